"""Data for classifiers and regression: texts, or pairs of texts, with a label each, to token rows."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from . import sources
from .sources import check_unicode, short, text_of
from .tokenized import Examples, Tokenized

# Ours, then those of GLUE's tasks.
_TEXTS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)
_EXPECTED = "; ".join(" and ".join(names) for names in _TEXTS)
_SHOWN = 10  # classes that the summary lists


@dataclass(frozen=True)
class LabelledText:
    """One example: a text or a pair of texts, and the number of its class or, for regression, the target."""

    text: str
    text_pair: str | None
    label: int | float
    where: str = ""  # "FILE, line N", for errors


@dataclass(frozen=True)
class Labelled:
    """Texts with labels.

    ``names`` are the names of the classes, in the order of their numbers; None for regression. ``unused`` are the
    columns of the first row that nothing is taken from; ``columns`` those of the text, or of the pair.
    """

    rows: list[LabelledText]
    names: list[str] | None
    unused: list[str] = field(default_factory=list)
    columns: tuple[str, ...] = ("text",)

    def ordered(self, names: list[str]) -> Labelled:
        """The same rows with the classes numbered in the order of ``names``, which are the same classes."""
        number = [names.index(name) for name in self.names or []]
        return replace(self, rows=[replace(row, label=number[int(row.label)]) for row in self.rows], names=list(names))

    def counts(self) -> list[int]:
        """The number of rows of each class; none for regression."""
        counted = Counter(row.label for row in self.rows)
        return [counted[i] for i in range(len(self.names or []))]

    def summary(self) -> str:
        """One line: rows, classes and their shares, those that have no row (for regression the range of the labels),
        columns that are not used.
        """
        text = f"{len(self.rows):,} rows"
        unused = f"; columns not used: {', '.join(self.unused)}" if self.unused else ""
        if self.names is None:
            labels = [row.label for row in self.rows]
            mean = math.fsum(labels) / len(labels)
            return f"{text}, regression: labels from {min(labels):g} to {max(labels):g}, mean {mean:.4g}{unused}"
        counts = self.counts()
        found = sorted((i for i in range(len(counts)) if counts[i]), key=lambda i: -counts[i])  # ties: by number
        shares = [f"{self.names[i]} {100 * counts[i] / len(self.rows):.3g} %" for i in found]
        if len(shares) > _SHOWN:
            shares = [*shares[:3], "…", shares[-1]]
        text += f", {len(counts):,} classes: {', '.join(shares)}"
        missing = [name for name, count in zip(self.names, counts, strict=True) if not count]
        if missing:
            text += f"; no row of {', '.join(missing[:_SHOWN])}{' …' if len(missing) > _SHOWN else ''}"
        return text + unused


def read(
    source: str | Path, split: str | None = None, usual: str = "train", training: Labelled | None = None
) -> Labelled:
    """The rows of a data set (sources as for :func:`balora.data.read`) with the columns label, and text, text and
    text_pair, sentence, or one of GLUE's pairs (sentence1 and sentence2, premise and hypothesis, …).

    Labels are texts, booleans or whole numbers, which are classes, or numbers of which one is a float, which are the
    targets of a regression. Texts that are numbers throughout count as numbers, because CSV has nothing else. The
    classes of a ``datasets.ClassLabel`` keep their order; others are sorted, and whole numbers become 0, 1, 2, ….

    Args:
        training: the rows that the model was trained on, when others are read to evaluate it: their classes are used.

    Raises:
        FileNotFoundError, ImportError: as :func:`balora.data.read`.
        ValueError: a row is bad, the labels are not of one kind, there is only one class, or a label is not among those
            of ``training``. The message has the source, the row, the column, what was found and what was expected.
    """
    found = sources.find(source, split, usual)
    where, first = next(iter(found))
    columns = _columns(first, where)
    unused = [name for name in first if name not in (*columns, "label")]
    texts = list(_texts(found, columns))
    names = found.class_names.get("label")
    labels = [_label(value, names, f"{where}, column 'label'") for _, _, value, where in texts]
    wheres = [f"{where}, column 'label'" for *_, where in texts]
    values = _one_kind(labels, wheres)
    regression = training.names is None if training else any(isinstance(value, float) for value in values)
    if regression:
        targets = [_target(value, where) for value, where in zip(values, wheres, strict=True)]
        rows = [LabelledText(a, b, y, w) for (a, b, _, w), y in zip(texts, targets, strict=True)]
        return Labelled(rows, None, unused, columns)
    if training is not None:
        names = training.names or []
    elif names is None:
        names = [str(value) for value in sorted(set(values))]
        if len(names) < 2:
            raise ValueError(f"{found.name}, column 'label': expected at least two classes, found only {names[0]}")
    number = {name: i for i, name in enumerate(names)}
    rows = []
    for (text, pair, _, where), label, value in zip(texts, labels, values, strict=True):
        # In training "1.50" may have been a text, because others were: the text comes before the number.
        name = label if isinstance(label, str) and label in number else str(value)
        if name not in number:
            raise ValueError(
                f"{where}, column 'label': expected one of the classes trained on, {listed(names)}; found "
                f"{short(label)}"
            )
        rows.append(LabelledText(text, pair, number[name], where))
    return Labelled(rows, names, unused, columns)


def _texts(source: sources.Source, columns: tuple[str, ...]) -> Iterator[tuple[str, str | None, Any, str]]:
    """(text, its pair or None, label as found, where) of every row."""
    for where, record in source:
        for name in (*columns, "label"):
            if name not in record:
                raise ValueError(
                    f"{where}: expected the column {name!r}, as in the rows before; found {', '.join(record)}"
                )
        text, *pair = (text_of(record[name], f"{where}, column {name!r}") for name in columns)
        yield text, pair[0] if pair else None, record["label"], where


def _columns(record: dict[str, Any], where: str) -> tuple[str, ...]:
    there = [names for names in _TEXTS if all(name in record for name in names)]
    there = [names for names in there if not any(set(names) < set(others) for others in there)]
    if len(there) > 1:
        raise ValueError(
            f"{where}: expected one text or pair of texts, found {'; '.join(' and '.join(names) for names in there)}"
        )
    if not there or "label" not in record:
        raise ValueError(
            f"{where}: expected the column label, and the text in one of: {_EXPECTED}; found "
            f"{', '.join(record) or 'no column'}"
        )
    return there[0]


def _label(value: Any, names: list[str] | None, where: str) -> str | bool | int | float:
    """The label as a text, a boolean or a number; ``names``: those of a ClassLabel, whose values are numbers."""
    if names is not None:
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise ValueError(f"{where}: expected a class from 0 to {len(names) - 1}, found {short(value)}")
        return names[value]
    if not isinstance(value, (str, bool, int, float)) or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{where}: expected a text, a boolean or a number, found {short(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, found {value}")
    if isinstance(value, str):
        check_unicode(value, where)
    return float(value) if isinstance(value, float) else value  # and not as it was written


def _one_kind(labels: list[Any], wheres: list[str]) -> list[Any]:
    """The labels, if all are texts, all booleans or all numbers; texts of numbers as numbers.

    "007" is none: as a number it would be one class with "7".
    """
    kinds = {str: "a text", bool: "a boolean", int: "a number", float: "a number"}
    for label, where in zip(labels, wheres, strict=True):
        if kinds[type(label)] != kinds[type(labels[0])]:
            raise ValueError(f"{where}: expected {kinds[type(labels[0])]}, as in the rows before; found {short(label)}")
    if not isinstance(labels[0], str):
        return labels
    if all(re.fullmatch(r"0|-?[1-9]\d{0,17}", label) for label in labels):
        return [int(label) for label in labels]
    if all(re.fullmatch(r"-?(0|[1-9]\d{0,17})(\.\d+)?([eE][+-]?\d{1,2})?", label) for label in labels):
        return [float(label) for label in labels]
    return labels


def _target(value: Any, where: str) -> float:
    if isinstance(value, (str, bool)):
        raise ValueError(f"{where}: expected a number, as in training; found {short(value)}")
    return float(value)


def listed(names: list[str]) -> str:
    """The first ten, and how many there are."""
    return ", ".join(names[:_SHOWN]) + (f" … ({len(names)} in all)" if len(names) > _SHOWN else "")


def tokenize(data: Labelled, tokenizer: Any, max_length: int, source: str) -> Tokenized:
    """input_ids, token_type_ids (where the tokenizer has them) and the label, as ``labels``, of every row.

    Rows over ``max_length`` tokens are cut as the tokenizer does it, the longer text of a pair first, and counted.
    """
    types = "token_type_ids" in tokenizer.model_input_names
    result = Tokenized(Examples(["input_ids", *(["token_type_ids"] if types else [])], ["labels"]), max_length)

    def encode(rows: list[LabelledText], **options: Any) -> Any:
        pairs = [row.text_pair for row in rows] if rows[0].text_pair is not None else None
        return tokenizer([row.text for row in rows], pairs, verbose=False, **options)

    rows = iter(tqdm(data.rows, desc=f"tokenizing {source}", unit=" rows", disable=None, leave=False))
    while batch := list(islice(rows, 1000)):
        encoded = encode(batch)
        for i, row in enumerate(batch):
            found = {name: encoded[name][i] for name in result.examples.columns}
            over = len(found["input_ids"]) - max_length
            if over > 0:
                result.cut += 1
                result.lost += over
                cut = encode([row], truncation=True, max_length=max_length)
                found = {name: cut[name][0] for name in result.examples.columns}
            result.examples.append(labels=row.label, **found)
    return result
