"""Instruction data in JSONL files to token tensors, the prompt masked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .functional import IGNORE_INDEX

# Each pair is one prompt and the response to it; ``input`` may stand beside instruction (it is appended to it).
_PAIRS = (("instruction", "output"), ("query", "response"), ("question", "answer"), ("prompt", "completion"))
_EXPECTED = "; ".join(f"{a} and {b}" for a, b in _PAIRS) + "; or messages"

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Row:
    """One example: a conversation, or a prompt and its completion that are joined as they stand."""

    messages: Messages | None = None
    prompt: str = ""
    completion: str = ""
    where: str = ""  # "FILE, line N", for errors


@dataclass
class Tokenized:
    """Token ids and labels (−100 where the token is not trained on), and what became of the rows."""

    examples: list[dict[str, list[int]]]
    cut: int = 0  # rows cut to the maximal length
    skipped: int = 0  # rows left out because no token of them would be trained on

    def summary(self) -> str:
        """One line: rows, tokens, the share of them that is trained on, lengths, what was cut and skipped."""
        lengths = [len(e["input_ids"]) for e in self.examples]
        valid = sum(label != IGNORE_INDEX for e in self.examples for label in e["labels"][1:])
        text = (
            f"{len(lengths):,} rows, {sum(lengths):,} tokens, {100 * valid / sum(lengths):.0f} % of them trained on; "
            f"mean length {sum(lengths) / len(lengths):.0f}, longest {max(lengths)}"
        )
        if self.cut:
            text += f"; {self.cut:,} rows cut to {max(lengths)} tokens"
        if self.skipped:
            text += f"; {self.skipped:,} rows skipped: no token of them would be trained on"
        return text


def read_jsonl(path: str | Path) -> list[Row]:
    """The rows of a JSONL file with one of these column sets: instruction (and input) / output, query / response,
    question / answer, prompt / completion, or messages (a list of ``{"role": …, "content": …}``).

    The first row decides the set. Empty lines are passed over.

    Raises:
        ValueError: the file is empty, or a row is bad; the message has the file, the line, the column, what was found
            and what was expected.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: expected a JSONL file, found nothing at {path}")
    rows: list[Row] = []
    columns: tuple[str, ...] | None = None
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: expected UTF-8 text, found the byte {raw[error.start]:#x}") from None
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: expected a JSON object, found {_short(line)} ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected a JSON object, found {_short(row)}")
            if columns is None:
                columns = _columns(row, where)
            rows.append(_row(row, columns, where))
    if not rows:
        raise ValueError(f"{path}: expected at least one row, found an empty file")
    return rows


def _columns(row: dict[str, Any], where: str) -> tuple[str, ...]:
    for pair in (("messages",), *_PAIRS):
        if all(name in row for name in pair):
            return pair
    raise ValueError(f"{where}: expected the columns {_EXPECTED}; found {', '.join(row) or 'no column'}")


def _row(row: dict[str, Any], columns: tuple[str, ...], where: str) -> Row:
    for name in columns:
        if name not in row:
            raise ValueError(f"{where}: expected the column {name!r}, as in the rows before; found {', '.join(row)}")
    if columns == ("messages",):
        return Row(messages=_messages(row["messages"], f"{where}, column 'messages'"), where=where)
    prompt, response = (_text(row[name], f"{where}, column {name!r}") for name in columns)
    if columns == ("prompt", "completion"):
        return Row(prompt=prompt, completion=response, where=where)
    if columns[0] == "instruction" and row.get("input") not in (None, ""):
        prompt += "\n\n" + _text(row["input"], f"{where}, column 'input'")
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return Row(messages=messages, where=where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: expected a text that is not empty, found {_short(value)}")
    _check_unicode(value, where)
    return value


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: expected Unicode text, found half a surrogate pair, {text[error.start]!r}"
        ) from None


def _messages(value: Any, where: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: expected a list of messages that is not empty, found {_short(value)}")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{where}: expected texts 'role' and 'content' in message {i}, found {_short(message)}")
        _check_unicode(message["role"] + message["content"], f"{where}, message {i}")
    if not any(m["role"] == "assistant" for m in value):
        raise ValueError(
            f"{where}: expected a message of the role 'assistant', found {sorted({m['role'] for m in value})}"
        )
    if value[0]["role"] == "assistant":
        raise ValueError(f"{where}: expected something before the first message of the assistant, found nothing")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def render(row: Row, tokenizer: Any) -> tuple[str, list[tuple[int, int]], bool]:
    """The text of a row, the spans of characters that are trained on, and whether a chat template wrote it.

    Conversations take the tokenizer's chat template; every assistant turn is trained on. Without a template a single
    question and answer become ``### Instruction: … ### Response: …``. prompt / completion are joined as they stand.
    """
    if row.messages is None:
        return row.prompt + row.completion, [(len(row.prompt), len(row.prompt) + len(row.completion))], False
    if tokenizer.chat_template is None:
        if [m["role"] for m in row.messages] != ["user", "assistant"]:
            raise ValueError(
                "expected one user and one assistant message, because the tokenizer has no chat template; found "
                + ", ".join(m["role"] for m in row.messages)
            )
        prompt = instruction_prompt(row.messages[0]["content"], tokenizer)
        return (
            prompt + row.messages[1]["content"],
            [(len(prompt), len(prompt) + len(row.messages[1]["content"]))],
            False,
        )
    text = tokenizer.apply_chat_template(row.messages, tokenize=False)
    spans = []
    for i, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(row.messages[:i], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(row.messages[: i + 1], tokenize=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                "the tokenizer's chat template rewrites earlier turns, so the answers cannot be told apart"
            )
        spans.append((len(before), len(after)))
    return text, spans, True


def instruction_prompt(instruction: str, tokenizer: Any) -> str:
    """What stands before the answer to a single instruction, in training and when the model is asked."""
    if tokenizer.chat_template is None:
        return f"### Instruction:\n{instruction}\n\n### Response:\n"
    message = [{"role": "user", "content": instruction}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def tokenize(rows: list[Row], tokenizer: Any, max_length: int, source: str) -> Tokenized:
    """Token ids and labels of every row; the prompt has the label −100, and an end-of-text token follows each answer.

    ``source`` names the data in errors. Rows over ``max_length`` tokens are cut, rows without a trained token skipped;
    both are counted.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("tokenizer: expected a fast tokenizer (one that gives character offsets), found a slow one")
    result = Tokenized([])
    for row in rows:
        try:
            text, spans, templated = render(row, tokenizer)
        except Exception as error:  # whatever a chat template raises
            raise ValueError(f"{row.where or source}: {error}") from None
        encoding = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
        ids = list(encoding["input_ids"])
        labels = [
            token if any(_trained(start, stop, *span) for span in spans) else IGNORE_INDEX
            for token, (start, stop) in zip(ids, encoding["offset_mapping"], strict=True)
        ]
        if not templated and tokenizer.eos_token_id is not None:
            if ids[-1:] != [tokenizer.eos_token_id]:
                ids.append(tokenizer.eos_token_id)
                labels.append(IGNORE_INDEX)
            labels[-1] = tokenizer.eos_token_id
        if len(ids) > max_length:
            result.cut += 1
            ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORE_INDEX for label in labels[1:]):  # the first token is never predicted
            result.skipped += 1
            continue
        result.examples.append({"input_ids": ids, "labels": labels})
    if not result.examples:
        raise ValueError(
            f"{source}: no row has a token to train on within max_length={max_length}; expected room for the prompt "
            "and the answer"
        )
    return result


def _trained(start: int, stop: int, first: int, last: int) -> bool:
    """Whether the token of the characters start:stop overlaps the span first:last. A token of blanks may have no width
    (tokenizers that trim offsets); special tokens have none either, at 0.
    """
    return start < last and stop > first if stop > start else first < start < last


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
