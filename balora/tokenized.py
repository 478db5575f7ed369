"""Token rows in flat arrays, and what became of the rows that they were made of."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from .checks import IGNORE_INDEX

_NAMED = 5  # skipped rows that the summary names


class Examples(Sequence[dict[str, Any]]):
    """Rows of different lengths, each a dict of lists as collators take them, in 4 bytes a token.

    Lists of Python's ints would take ten times the memory, and processes that load data would copy them page by page.

    Args:
        columns: names of the columns with a value a token: input_ids first.
        values: names of the columns with one value a row.
    """

    def __init__(self, columns: Sequence[str], values: Sequence[str] = ()) -> None:
        self.columns = {name: array("i") for name in columns}
        self.values: dict[str, list[Any]] = {name: [] for name in values}
        self.ends = array("q", [0])

    def append(self, **row: Any) -> None:
        for name, tokens in self.columns.items():
            tokens.extend(row[name])
        for name, values in self.values.items():
            values.append(row[name])
        self.ends.append(self.ends[-1] + len(row["input_ids"]))

    def lengths(self) -> np.ndarray:
        return np.diff(np.array(self.ends))

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, i: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]
        row = {name: tokens[self.ends[i] : self.ends[i + 1]].tolist() for name, tokens in self.columns.items()}
        return row | {name: values[i] for name, values in self.values.items()}


@dataclass
class Tokenized:
    """Token ids and labels (−100 where the token is not trained on), and what became of the rows."""

    examples: Examples
    max_length: int
    cut: int = 0  # rows cut to max_length
    lost: int = 0  # tokens cut away
    last_only: int = 0  # conversations of which only the last answer is trained on
    skipped: int = 0  # rows left out because no token of them would be trained on
    answers_cut: int = 0  # those of the skipped whose answers all begin after max_length
    skipped_rows: list[str] = field(default_factory=list)  # where the first few of them stand
    unused: list[str] = field(default_factory=list)  # columns of the first row that nothing was taken from
    unwritten: Counter[str] = field(default_factory=Counter)  # rows a key of messages that left no trace in the text
    ends: bool = False  # the last trained token of a row, but for blanks, is a special one

    def skip(self, where: str, cut: bool) -> None:
        """Count a row that is left out; ``cut``: because its answers lie beyond max_length."""
        self.skipped += 1
        self.answers_cut += cut
        if len(self.skipped_rows) < _NAMED:
            self.skipped_rows.append(where)

    def trained_share(self) -> float:
        """The share of the tokens that are trained on: of those with a label, but for a row's first, which nothing
        predicts.
        """
        valid = np.array(self.examples.columns["labels"]) != IGNORE_INDEX
        valid[np.array(self.examples.ends[:-1])] = False
        return float(valid.mean())

    def summary(self) -> str:
        """One line: rows, tokens, the share of them that is trained on, lengths, what was cut, skipped and not used."""
        lengths = self.examples.lengths()
        text = f"{_rows(len(lengths))}, {lengths.sum():,} tokens"
        if "labels" in self.examples.columns:
            text += f", {_percent(self.trained_share())} of them trained on"
        longest_of_95 = np.percentile(lengths, 95, method="inverted_cdf")
        text += (
            f"; lengths: mean {lengths.mean():.0f}, median {np.median(lengths):.0f}, 95 % up to {longest_of_95}, "
            f"longest {lengths.max()}"
        )
        if self.cut:
            text += f"; {_rows(self.cut)} cut to {self.max_length} tokens ({self.lost:,} tokens lost)"
        if self.last_only:
            text += (
                f"; {_rows(self.last_only)} trained on the last answer only: the chat template rewrites earlier ones"
            )
        if self.skipped:
            text += f"; {_rows(self.skipped)} skipped: no token of them would be trained on ("
            if self.answers_cut:
                text += f"of {self.answers_cut:,} the answer begins after {self.max_length} tokens; "
            text += f"{', '.join(self.skipped_rows)}{', …' if self.skipped > len(self.skipped_rows) else ''})"
        if self.unwritten:
            keys = ", ".join(f"{key} ({_rows(n)})" for key, n in self.unwritten.items())
            text += f"; keys of messages that change nothing: {keys}"
        if self.unused:
            text += f"; columns not used: {', '.join(self.unused)}"
        return text

    def warnings(self) -> list[str]:
        """What deserves a second look: hardly any token is trained on, no answer ends, or many rows were skipped."""
        found = []
        if "labels" in self.examples.columns and (share := self.trained_share()) < 0.05:
            found.append(
                f"only {_percent(share)} of the tokens are trained on; the rest of each step is spent on prompts"
            )
        if "labels" in self.examples.columns and not self.ends:
            why = (
                f"max_length={self.max_length} cuts every row"
                if self.cut == len(self.examples)
                else "expected a chat template that writes one, or a tokenizer with an end-of-text token"
            )
            found.append(f"no answer ends with a special token, so the model does not learn to stop: {why}")
        rows = len(self.examples) + self.skipped
        if self.skipped > rows / 10:
            cut = self.answers_cut
            why = f": of {cut:,} max_length={self.max_length} cuts the answers away" if cut else ""
            found.append(f"{self.skipped:,} of {_rows(rows)} were skipped{why}")
        return found


def _rows(n: int) -> str:
    return f"{n:,} row" if n == 1 else f"{n:,} rows"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
