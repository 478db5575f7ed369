"""Results of several runs as tables: mean ± standard deviation over the seeds, and differences over the same seeds."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Measure(NamedTuple):
    title: str
    better: str  # "lower", "higher", or "" where neither is
    note: str


MEASURES = {
    "eval_loss": Measure(
        "eval loss",
        "lower",
        "on the evaluation data: cross-entropy in nats a token or row, of a regression the squared error",
    ),
    "accuracy": Measure("accuracy", "higher", "share of the evaluation rows that are classified right"),
    "macro_f1": Measure("macro-F1", "higher", "mean of the classes' F1"),
    "rare_class_recall": Measure(
        "rare-class recall", "higher", "recall of the class that is rarest in the training data"
    ),
    "matthews": Measure("Matthews", "higher", "Matthews correlation"),
    "pearson": Measure("Pearson", "higher", "correlation with the targets"),
    "spearman": Measure("Spearman", "higher", "correlation of the ranks with those of the targets"),
    "mse": Measure("MSE", "lower", "mean squared error"),
    "silhouette": Measure("silhouette", "higher", "of the features by true class, cosine distance"),
    "drift": Measure("drift", "lower", "KL(pre-trained ‖ fine-tuned) on the drift data, nats a token"),
    "perplexity": Measure("perplexity", "lower", "of the drift data, fine-tuned"),
    "perplexity_before": Measure("perplexity before", "", "of the drift data, pre-trained"),
    "distinct_1": Measure("distinct-1", "higher", "different tokens over all tokens of the greedy answers"),
    "distinct_2": Measure("distinct-2", "higher", "different pairs of tokens over all pairs"),
    "distinct_3": Measure("distinct-3", "higher", "different triples of tokens over all triples"),
    "answer_tokens": Measure("answer length", "", "mean tokens of a greedy answer"),
    "seconds_per_step": Measure("s a step", "lower", "of training, without evaluations and checkpoints"),
    "memory_device": Measure("GPU memory, GB", "lower", "peak of the training"),
    "memory_host": Measure("host memory, GB", "lower", "peak of the training's process, libraries included"),
}


@dataclass
class Result:
    """What one run gave."""

    group: str  # a method, or a point of a sweep
    seed: int
    measures: dict[str, float | None] | None  # None until it is finished; a measure that is not finite is None
    details: dict[str, Any] = field(default_factory=dict)  # log history, versions, features, ...
    failure: str = ""  # why it failed


class Cell(NamedTuple):
    """Mean and standard deviation (ddof = 1; NaN of a single number) of n numbers."""

    mean: float
    std: float
    n: int

    def __str__(self) -> str:
        if not self.n:
            return "–"
        # The mean to the second digit of its deviation: more would be noise.
        if self.n == 1 or not self.std:
            return _digits(self.mean, 4)
        places = max(0, 1 - math.floor(math.log10(self.std)))
        if places > 5:
            return f"{_minus(f'{self.mean:.1e} ± {self.std:.1e}')}"
        return f"{_minus(f'{self.mean:.{places}f}')} ± {self.std:.{places}f}"


def cell(values: Sequence[float | None]) -> Cell:
    """Of the values that are numbers."""
    numbers = [v for v in values if v is not None and math.isfinite(v)]
    mean = statistics.fmean(numbers) if numbers else math.nan
    return Cell(mean, statistics.stdev(numbers) if len(numbers) > 1 else math.nan, len(numbers))


def measures_of(results: Sequence[Result]) -> list[str]:
    """The measures that at least one run has, in the order of the table."""
    found = {name for r in results for name in r.measures or {}}
    return [name for name in MEASURES if name in found]


def summarize(results: Sequence[Result]) -> dict[str, dict[str, Cell]]:
    """group -> measure -> cell, over the seeds that are finished."""
    groups = dict.fromkeys(r.group for r in results)
    return {
        group: {
            name: cell([r.measures.get(name) for r in results if r.group == group and r.measures])
            for name in measures_of(results)
        }
        for group in groups
    }


def best(cells: Mapping[str, Cell], better: str) -> str | None:
    """The group whose mean is best, where its interval mean ± standard deviation is apart from every other; else None.

    Every group needs two seeds at least. That three seeds lie apart is no proof: it is the least to ask before one
    number is set off from the others.
    """
    if not better or len(cells) < 2 or any(c.n < 2 for c in cells.values()):
        return None
    sign = 1 if better == "higher" else -1
    first = max(cells, key=lambda g: sign * cells[g].mean)
    top = cells[first]
    apart = all(sign * top.mean - top.std > sign * c.mean + c.std for group, c in cells.items() if group != first)
    return first if apart else None


def paired(results: Sequence[Result], ours: str, other: str) -> dict[str, Cell]:
    """measure -> ours − other over the seeds that both have finished."""
    by_seed = {(r.group, r.seed): r.measures for r in results if r.measures}
    pairs = [(by_seed[ours, s], by_seed[other, s]) for g, s in by_seed if g == ours and (other, s) in by_seed]
    found = {}
    for name in measures_of(results):
        both = [(a.get(name), b.get(name)) for a, b in pairs]
        found[name] = cell([x - y for x, y in both if x is not None and y is not None])
    return found


def rows(results: Sequence[Result], titles: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of the table: a row for each group of ``titles``, its name, n and one cell for each measure."""
    names, table = measures_of(results), summarize(results)
    columns = ["", "seeds", *(MEASURES[name].title for name in names)]
    body = []
    for group, title in titles.items():
        mine = [r for r in results if r.group == group]
        count = f"{sum(bool(r.measures) for r in mine)}"
        count += f", {sum(bool(r.failure) for r in mine)} failed" if any(r.failure for r in mine) else ""
        body.append([title, count, *(str(table[group][name]) for name in names)])
    return columns, body


def bold(results: Sequence[Result], methods: Sequence[str]) -> set[tuple[str, str]]:
    """(group, measure) of the means that are apart from those of all other methods. The cost is left out."""
    table = summarize(results)
    found = set()
    for name in measures_of(results):
        if not name.startswith(("seconds", "memory")):
            group = best({g: table[g][name] for g in methods if g in table}, MEASURES[name].better)
            if group:
                found.add((group, name))
    return found


NOTE = (
    "Mean ± standard deviation over the seeds (n − 1). Bold: the best mean, where its interval (mean ± standard "
    "deviation) is apart from that of every other method; no test of significance."
)


def markdown_table(results: Sequence[Result], titles: Mapping[str, str]) -> str:
    columns, body = rows(results, titles)
    names, marked = measures_of(results), bold(results, [g for g in titles if not g.startswith("sweep_")])
    lines = [columns, ["---"] * len(columns)]
    for group, (title, count, *cells) in zip(titles, body, strict=True):
        shown = [f"**{c}**" if (group, n) in marked else c for n, c in zip(names, cells, strict=True)]
        lines.append([title, count, *shown])
    notes = "".join(f"- {MEASURES[n].title}: {MEASURES[n].note}\n" for n in names)
    escaped = [[text.replace("|", r"\|") for text in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped) + f"\n{NOTE}\n\n{notes}"


def csv_table(results: Sequence[Result]) -> str:
    """A line for each group and measure: group, measure, mean, standard deviation, n."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "measure", "mean", "std", "n"])
    for group, cells in summarize(results).items():
        for name, (mean, std, n) in cells.items():
            writer.writerow([group, name, mean if n else "", std if n > 1 else "", n])
    return out.getvalue()


def terminal_table(results: Sequence[Result], titles: Mapping[str, str]) -> str:
    """A row for each measure: there are more of them than a terminal is wide."""
    columns, body = rows(results, titles)
    lines = [list(line) for line in zip(columns, *body, strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _digits(value: float, digits: int) -> str:
    return _minus(f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}")


def _minus(text: str) -> str:
    return text.replace("-", "−")
