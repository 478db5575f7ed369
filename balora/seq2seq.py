"""Data for encoder-decoders: what the encoder reads, and what the decoder is to write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from . import classification, data, sources
from .tokenized import Examples, Tokenized


class Pair(NamedTuple):
    """One example: a source text and its target."""

    source: str
    target: str
    where: str = ""  # "FILE, line N", for errors


@dataclass(frozen=True)
class Pairs:
    """Sources with targets. ``labelled`` is what they were made of where the targets are classes or numbers."""

    pairs: Iterable[Pair]
    labelled: classification.Labelled | None = None


def read(source: str | Path, split: str | None = None, usual: str = "train", training: Pairs | None = None) -> Pairs:
    """The pairs of instruction data (:func:`balora.data.read`: the question and its answer) or, where there is a column
    label, of texts with labels (:func:`balora.classification.read`), cast as text.

    There the source is each text behind its column's name, ``sentence1: … sentence2: …``, and the target the name of
    the class; of a regression, the number with one decimal. T5 puts the name of the task in front, too, and rounds the
    numbers of STS-B to 0.2.

    Args:
        training: what the model was trained on, when others are read to evaluate it: their classes are used.

    Raises:
        FileNotFoundError, ImportError, ValueError: as of the two readers. Later rows of instruction data are checked as
            they are gone through.
    """
    _, first = next(iter(sources.find(source, split, usual)))
    if "label" not in first:
        return Pairs(_Answers(data.read(source, split, usual)))
    rows = classification.read(source, split, usual, training.labelled if training else None)
    return Pairs([_cast(row, rows) for row in rows.rows], rows)


class _Answers:
    """The pairs of instruction rows, read anew each time."""

    def __init__(self, rows: data.Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Pair]:
        for row in self.rows:
            if row.messages is None:
                yield Pair(row.prompt, row.completion, row.where)
                continue
            roles = [m["role"] for m in row.messages]
            if roles != ["user", "assistant"] or any(m.get("tool_calls") for m in row.messages):
                raise ValueError(
                    f"{row.where}: expected one user and one assistant message without tool calls, because the model "
                    f"is an encoder-decoder; found {', '.join(roles)}"
                )
            question, answer = row.messages
            yield Pair(question["content"], answer["content"], row.where)


def _cast(row: classification.LabelledText, of: classification.Labelled) -> Pair:
    texts = (row.text,) if row.text_pair is None else (row.text, row.text_pair)
    source = " ".join(f"{name}: {text}" for name, text in zip(of.columns, texts, strict=True))
    target = f"{row.label:.1f}" if of.names is None else of.names[int(row.label)]
    return Pair(source, target, row.where)


def tokenize(pairs: Iterable[Pair], tokenizer: Any, max_length: int, source: str) -> Tokenized:
    """input_ids of every source, and of its target as ``labels``, which end with the end-of-text token.

    Each of the two is cut to ``max_length`` tokens, the special ones kept; rows that are cut are counted.
    """
    result = Tokenized(Examples(["input_ids"], ["labels"]), max_length)
    end = tokenizer.eos_token_id
    rows = iter(tqdm(pairs, desc=f"tokenizing {source}", unit=" rows", disable=None, leave=False))
    while batch := list(islice(rows, 1000)):
        read = tokenizer([pair.source for pair in batch], verbose=False)["input_ids"]
        written = tokenizer(text_target=[pair.target for pair in batch], verbose=False)["input_ids"]
        for pair, ids, labels in zip(batch, read, written, strict=True):
            over = max(0, len(ids) - max_length)
            if over:
                ids = tokenizer(pair.source, truncation=True, max_length=max_length)["input_ids"]
            if end is not None and labels[-1:] != [end]:
                labels = [*labels, end]
            if len(labels) > max_length:
                over += len(labels) - max_length
                labels = [*labels[: max_length - 1], labels[-1]]
            result.cut += over > 0
            result.lost += over
            result.examples.append(input_ids=ids, labels=labels)
    return result
