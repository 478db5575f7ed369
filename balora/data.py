"""Instruction data to token rows, the prompt masked. The labels of classification are in ``classification.py``."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm
from transformers.utils.chat_template_utils import render_jinja_template

from . import sources
from .checks import IGNORE_INDEX
from .sources import check_unicode, short, text_of
from .tokenized import Examples, Tokenized

_CHATS = ("messages", "conversations")
_PROMPTS = ("instruction", "query", "question", "problem", "prompt")
_RESPONSES = ("output", "response", "answer", "solution", "completion")
_INPUTS = ("input", "context")  # may stand beside a question, and are appended to it
_EXPECTED = f"a column of {', '.join(_PROMPTS)} and one of {', '.join(_RESPONSES)}; or messages or conversations"
# ShareGPT's names of the roles.
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Messages = list[dict[str, Any]]  # role and content, which are texts, and further keys for the chat template


@dataclass(frozen=True)
class Row:
    """One example: a conversation, or a prompt and its completion that are joined as they stand."""

    messages: Messages | None = None
    prompt: str = ""
    completion: str = ""
    where: str = ""  # "FILE, line N", for errors
    given: int = 0  # so many messages are the prompt: answers among them are not trained on


class Rows:
    """The rows of a source, read and checked anew each time they are gone through. The first one decides the columns.

    ``unused`` are the columns of the first row that nothing is taken from, once it has been read.

    Raises:
        ValueError: while it is gone through: a row is bad. The message has the source, the line or the row (counted
            from 1), the column, what was found and what was expected.
    """

    def __init__(self, source: sources.Source) -> None:
        self.source = source
        self.name = source.name
        self.unused: list[str] = []

    def __iter__(self) -> Iterator[Row]:
        columns: tuple[str, ...] | None = None
        for where, record in self.source:
            if columns is None:
                columns = _columns(record, where)
                self.unused = [name for name in record if name not in (*columns, *_appended(columns))]
            yield _row(record, columns, where)

    def __length_hint__(self) -> int:
        return self.source.total or 0


def read(source: str | Path, split: str | None = None, usual: str = "train") -> Rows:
    """The rows of a JSONL, JSON, CSV, TSV or Parquet file, of a folder of such files or of ``datasets.save_to_disk``,
    or of a data set of Hugging Face's hub (``owner/name`` or ``owner/name:config``).

    Their columns are one of instruction, query, question, problem, prompt, and one of output, response, answer,
    solution, completion; or messages or conversations, each a list of ``{"role": …, "content": …}`` or, as in ShareGPT,
    of ``{"from": …, "value": …}``. A conversation is taken before anything that stands beside it. prompt and completion
    are joined as they stand, or are both lists of messages; every other pair is a question and its answer, and an input
    or context beside it is appended to the question. Nothing is appended to prompt and completion. Of several columns
    that could be the prompt, or the response, none is chosen. A number stands for its digits. :attr:`Rows.unused` names
    what is not taken.

    Further keys of a message (tool_calls, reasoning_content, name, …) are handed to the chat template as they are, but
    for nulls and empty lists. A message of the assistant has a text or tool calls; one with calls alone has the content
    ``""``, because templates write null as the word None.

    Args:
        split: the part of a folder or hub data set, ``"train[:1000]"`` included. None: the one named ``usual``, or the
            only one.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: the split, the files or the first row do not fit. Later rows are checked as they are read.
        ImportError: the package datasets is needed and missing.
    """
    rows = Rows(sources.find(source, split, usual))
    next(iter(rows))
    return rows


def read_jsonl(path: str | Path) -> list[Row]:
    """The rows of a JSONL file, all checked; the columns are those of :func:`read`. Empty lines are passed over.

    Raises:
        ValueError: the file is empty, or a row is bad; the message has the file, the line, the column, what was found
            and what was expected.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: expected a JSONL file, found nothing at {path}")
    return list(Rows(sources.Source(str(path), lambda: sources.jsonl(path))))


def _columns(record: dict[str, Any], where: str) -> tuple[str, ...]:
    for kind in (_CHATS, _PROMPTS, _RESPONSES):
        found = [name for name in kind if name in record]
        if len(found) > 1:
            raise ValueError(f"{where}: expected one column of {', '.join(kind)}; found {', '.join(found)}")
        if kind is _CHATS and found:
            return (found[0],)
    prompt, response = (next((n for n in kind if n in record), None) for kind in (_PROMPTS, _RESPONSES))
    if prompt is None or response is None:
        raise ValueError(f"{where}: expected {_EXPECTED}; found {', '.join(record) or 'no column'}")
    return prompt, response


def _appended(columns: tuple[str, ...]) -> tuple[str, ...]:
    """The columns that are appended to the prompt where a row has them."""
    return () if len(columns) == 1 or columns == ("prompt", "completion") else _INPUTS


def _row(record: dict[str, Any], columns: tuple[str, ...], where: str) -> Row:
    for name in columns:
        if name not in record:
            raise ValueError(f"{where}: expected the column {name!r}, as in the rows before; found {', '.join(record)}")
    if len(columns) == 1:
        column = f"{where}, column {columns[0]!r}"
        messages = _messages(record[columns[0]], column)
        _check_answer(messages, column)
        _check_question(messages, column)
        return Row(messages=messages, where=where)
    if columns == ("prompt", "completion") and any(isinstance(record[name], list) for name in columns):
        given, answer = (_messages(record[name], f"{where}, column {name!r}") for name in columns)
        _check_question(given, f"{where}, column 'prompt'")
        _check_answer(answer, f"{where}, column 'completion'")
        return Row(messages=given + answer, where=where, given=len(given))
    prompt, response = (text_of(record[name], f"{where}, column {name!r}") for name in columns)
    if columns == ("prompt", "completion"):
        return Row(prompt=prompt, completion=response, where=where)
    for name in _appended(columns):
        if record.get(name) not in (None, ""):
            prompt += "\n\n" + text_of(record[name], f"{where}, column {name!r}")
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return Row(messages=messages, where=where)


def _messages(value: Any, where: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: expected a list of messages that is not empty, found {short(value)}")
    messages = []
    for i, message in enumerate(value):
        keys = ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
        role, content = (message.get(k) for k in keys) if isinstance(message, dict) else (None, None)
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        if content is None and calls:
            content = ""
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(
                f"{where}: expected texts {keys[0]!r} and {keys[1]!r} in message {i}, found {short(message)}"
            )
        if keys[0] == "from":
            if role not in _ROLES:
                raise ValueError(f"{where}: expected one of {', '.join(_ROLES)} in message {i}, found {short(role)}")
            role = _ROLES[role]
        if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise ValueError(f"{where}: expected a list of objects as tool_calls in message {i}, found {short(calls)}")
        if role == "assistant" and not content.strip() and not calls:
            raise ValueError(f"{where}: expected a text or tool calls in message {i}, found {short(message)}")
        check_unicode(role + content, f"{where}, message {i}")
        further = {k: v for k, v in message.items() if k not in keys and v is not None and v != []}
        messages.append(further | {"role": role, "content": content})
    return messages


def _check_answer(messages: Messages, where: str) -> None:
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError(
            f"{where}: expected a message of the role 'assistant', found {sorted({m['role'] for m in messages})}"
        )


def _check_question(messages: Messages, where: str) -> None:
    if messages[0]["role"] == "assistant":
        raise ValueError(f"{where}: expected something before the first message of the assistant, found nothing")


class Rendered(NamedTuple):
    """The text of a row, and which of its characters are trained on."""

    text: str
    spans: list[tuple[int, int]]
    templated: bool  # a chat template wrote it
    last_only: bool = False  # of several answers only the last is trained on
    unwritten: tuple[str, ...] = ()  # keys of the messages that leave no trace in the text


def render(row: Row, tokenizer: Any) -> Rendered:
    """A row as the text that the model sees.

    Conversations take the tokenizer's chat template, up to the last answer. What its ``{% generation %}`` blocks hold
    is trained on; in a template without them every assistant turn is, with what ends it, or only the last one where the
    template writes earlier turns in another way than when they were asked for (without their reasoning). Without a
    template a single question and answer become ``### Instruction: … ### Response: …``. prompt / completion are joined
    as they stand.

    Raises:
        ValueError: the template leaves out a system message or tool calls, or does not begin an answer as it asks for
            one; or there is no template, and the conversation is not one question and its answer, or has tool calls.
            Templates raise errors of their own.
    """
    if row.messages is None:
        text = row.prompt + row.completion
        return Rendered(text, [(len(row.prompt), len(text))], False)
    if tokenizer.chat_template is not None:
        return _render_chat(row.messages, row.given, tokenizer)
    if [m["role"] for m in row.messages] != ["user", "assistant"]:
        raise ValueError(
            "expected one user and one assistant message, because the tokenizer has no chat template; found "
            + ", ".join(m["role"] for m in row.messages)
        )
    if any(m.get("tool_calls") for m in row.messages):
        raise ValueError("expected no tool_calls, because the tokenizer has no chat template; found some")
    prompt = instruction_prompt(row.messages[0]["content"], tokenizer)
    text = prompt + row.messages[1]["content"]
    return Rendered(text, [(len(prompt), len(text))], False, unwritten=_further_keys(row.messages))


def _render_chat(messages: Messages, given: int, tokenizer: Any) -> Rendered:
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= given]
    messages = messages[: answers[-1] + 1]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    for message in messages:
        if message["role"] == "system" and message["content"].strip() not in text:
            raise ValueError(
                "expected a chat template that writes system messages; the tokenizer's leaves out "
                + short(message["content"])
            )
    unwritten = _unwritten(messages, text, tokenizer)
    template = tokenizer.get_chat_template()
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        [text], [spans] = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
        )
        if given:
            prompt = tokenizer.apply_chat_template(messages[:given], tokenize=False)
            spans = [span for span in spans if span[0] >= len(prompt)]
        return Rendered(text, spans, True, unwritten=unwritten)
    spans = []
    for i in answers:
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        after = text if i == answers[-1] else tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if text.startswith(after) and after.startswith(before):
            spans.append((len(before), len(after)))
        elif i == answers[-1]:
            raise ValueError(
                "expected a chat template that begins an answer as it asks for one; the tokenizer's does not, so the "
                f"answers cannot be told apart: {short(before[-40:])} is not in {short(text[len(before) - 40 :])}"
            )
    last_only = len(spans) < len(answers)
    return Rendered(text, spans[-1:] if last_only else spans, True, last_only, unwritten)


def _further_keys(messages: Messages) -> tuple[str, ...]:
    return tuple(dict.fromkeys(k for m in messages for k, v in m.items() if k not in ("role", "content") and v != ""))


def _unwritten(messages: Messages, text: str, tokenizer: Any) -> tuple[str, ...]:
    """The further keys without which the template writes the same text. ValueError if tool calls are among them."""
    found = []
    for key in _further_keys(messages):
        without = [{k: v for k, v in message.items() if k != key} for message in messages]
        try:
            same = tokenizer.apply_chat_template(without, tokenize=False) == text
        except Exception:  # whatever a chat template raises: it asks for the key
            same = False
        if same:
            found.append(key)
    if "tool_calls" in found:
        raise ValueError("expected a chat template that writes tool_calls; the tokenizer's leaves them out")
    return tuple(found)


def instruction_prompt(instruction: str, tokenizer: Any) -> str:
    """What stands before the answer to a single instruction, in training and when the model is asked."""
    if tokenizer.chat_template is None:
        return f"### Instruction:\n{instruction}\n\n### Response:\n"
    message = [{"role": "user", "content": instruction}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def tokenize(rows: Iterable[Row], tokenizer: Any, max_length: int, source: str) -> Tokenized:
    """Token ids and labels of every row; the prompt has the label −100.

    An end-of-text token, where the tokenizer has one, follows the answer of a row without a chat template. A template
    ends answers in its own way; ``Tokenized.warnings`` tells when no answer ends with a special token.

    ``source`` names the data in errors. Rows over ``max_length`` tokens are cut, rows without a trained token skipped;
    both are counted. Rows are taken in batches, so that a reader's are never all in memory.

    Raises:
        ValueError: the tokenizer is a slow one, a row cannot be rendered (the message says where it stands), or no row
            has a token to train on.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("tokenizer: expected a fast tokenizer (one that gives character offsets), found a slow one")
    result = Tokenized(Examples(["input_ids", "labels"]), max_length)
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    total = operator.length_hint(rows) or None
    bar = tqdm(rows, total=total, desc=f"tokenizing {source}", unit=" rows", disable=None, leave=False)
    for number, ids, trained, where, made in _encoded(bar, tokenizer, source):
        labels = np.where(trained, ids, IGNORE_INDEX)
        kept = labels[:max_length]
        if not (kept[1:] != IGNORE_INDEX).any():  # the first token is never predicted
            result.skip(where.rpartition(", ")[2] or f"row {number}", cut=bool(trained[1:].any()))
            continue
        result.cut += len(ids) > max_length
        result.lost += max(0, len(ids) - max_length)
        result.last_only += made.last_only
        result.unwritten.update(made.unwritten)
        result.ends = result.ends or _ends(kept[kept != IGNORE_INDEX], special, tokenizer)
        result.examples.append(input_ids=ids[:max_length].tolist(), labels=kept.tolist())
    if not result.examples:
        raise ValueError(
            f"{source}: no row has a token to train on within max_length={max_length}; expected room for the prompt "
            "and the answer"
        )
    result.unused = rows.unused if isinstance(rows, Rows) else []
    return result


def _ends(trained: np.ndarray, special: set[int], tokenizer: Any) -> bool:
    """Whether the last of these tokens is a special one. Many templates write a line feed after it."""
    for token in trained[::-1].tolist():
        if token in special or tokenizer.decode([token]).strip():
            return token in special
    return False


def _encoded(rows: Iterable[Row], tokenizer: Any, source: str) -> Iterator[tuple[int, Any, Any, str, Rendered]]:
    """(number, token ids, which of them are trained on, where, as rendered) of every row, encoded in batches."""
    eos = tokenizer.eos_token_id
    rows, number = iter(rows), 0
    while batch := list(islice(rows, 1000)):
        rendered = [_rendered(row, tokenizer, source) for row in batch]
        encodings = chain.from_iterable(
            tokenizer(
                [r.text for r in group],
                add_special_tokens=not templated,
                return_attention_mask=False,  # the encodings have what is needed, the offsets included
                return_token_type_ids=False,
                verbose=False,  # it would warn of texts longer than the model takes; they are cut
            ).encodings
            for templated, group in groupby(rendered, key=lambda r: r.templated)
        )
        for row, made, encoding in zip(batch, rendered, encodings, strict=True):
            number += 1
            ids = np.array(encoding.ids)
            trained = _trained(np.array(encoding.offsets).reshape(-1, 2), made.spans)
            if not made.templated and eos is not None:
                if not len(ids) or ids[-1] != eos:
                    ids, trained = np.append(ids, eos), np.append(trained, False)
                trained[-1] = True
            yield number, ids, trained, row.where, made


def _rendered(row: Row, tokenizer: Any, source: str) -> Rendered:
    try:
        made = render(row, tokenizer)
    except Exception as error:  # whatever a chat template raises
        raise ValueError(f"{row.where or source}: {error}") from None
    check_unicode(made.text, row.where or source)  # of the further keys: the rest has been checked
    return made


def _trained(offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """Which tokens of these offsets [tokens, 2] overlap a span. A token of blanks may have no width (tokenizers that
    trim offsets); special tokens have none either, at 0.
    """
    start, stop = offsets.T
    trained = np.zeros(len(offsets), dtype=bool)
    for first, last in spans:
        trained |= (start < last) & np.where(stop > start, stop > first, start > first)
    return trained
