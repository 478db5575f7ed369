"""Rows of measurements as text: for a terminal, for Markdown, for CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import harness
from .measure import MEASURED, Row, short

LEGEND = (
    "ms: the median of {rounds} rounds, in each of which all run in turns, a short run on a GPU so often that it takes "
    "5 ms, with its inputs in the L2 cache if they fit; ±: half the distance of the quartiles; × floor: beside the "
    "floor, measured in the same rounds; MiB: peak memory beyond inputs and gradients; errors: the largest deviation "
    "from float64, as a share of the largest value. What is outside the error budget has no figures; a peer within "
    "twice the budget has, with a remark."
)
_HEADINGS = {
    "terms": "terms",
    "implementation": "implementation",
    "ms": "ms",
    "spread": "±",
    "ratio": "× floor",
    "peak_MiB": "MiB",
    "error_loss": "error, loss",
    "error_gradient": "gradient",
    "error_σ": "error, σ",
    "error_excess": "above the least",
    "GB_moved": "GB moved",
    "ms_moved": "ms to copy them",
    "note": "",
}


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(row: Row, key: str) -> str:
    value = row.get(key, "")
    if not isinstance(value, float):
        return str(value)
    return short(value) if key.startswith("error") else f"{value:.2f}" if key == "ratio" else number(value)


def _columns(rows: Sequence[Row]) -> dict[str, str]:
    there = {key for row in rows for key, value in row.items() if value != ""}
    return {key: heading for key, heading in _HEADINGS.items() if key in there}


def markdown(rows: Sequence[Row]) -> str:
    columns = _columns(rows)
    return harness.table([{key: _cell(row, key) for key in columns} for row in rows], columns)


def terminal(rows: Sequence[Row], width: int = 120) -> str:
    """In columns; a row without figures has its reason in their place."""
    columns = _columns(rows)
    body = [{key: _cell(row, key) for key in columns} for row in rows]
    names = [key for key in columns if key in ("terms", "implementation")]
    figures = [key for key in columns if key not in (*names, "note")]
    wide = {key: max(len(text) for text in (columns[key], *(cells[key] for cells in body))) for key in columns}
    lines = [[columns[k].ljust(wide[k]) for k in names] + [columns[k].rjust(wide[k]) for k in figures]]
    for row, cells in zip(rows, body, strict=True):
        line = [cells[key].ljust(wide[key]) for key in names]
        if row["status"] == MEASURED:
            line += [cells[key].rjust(wide[key]) for key in figures]
        lines.append([*line, cells.get("note", "")])
    texts = ("  " + "  ".join(line).rstrip() for line in lines)
    return "\n".join(text if len(text) <= width else text[: width - 1] + "…" for text in texts)


def grid(corner: str, heads: Sequence[str], rows: dict[str, list[str]], terminal: bool = False) -> str:
    """One line a size, one column an implementation: Markdown, or for a terminal."""
    columns = {"": corner, **{name: name for name in heads}}
    body = [{"": size, **dict(zip(heads, cells, strict=True))} for size, cells in rows.items()]
    if not terminal:
        return harness.table(body, columns)
    wide = {key: max(len(text) for text in (columns[key], *(cells[key] for cells in body))) for key in columns}
    return "\n".join("  " + "  ".join(cells[key].rjust(wide[key]) for key in columns) for cells in (columns, *body))


class Report:
    """What a command has measured, in a folder too: ``NAME.md`` and ``NAME.csv``, written again after every part."""

    def __init__(self, out: Path | None, name: str, machine: dict[str, str], argv: Sequence[str], rounds: int) -> None:
        self._path = out and out / name
        self._machine = machine
        self._text = [
            f"# {name}",
            f"{harness.in_words(machine)}; `balora bench {' '.join(argv)}`",
            LEGEND.format(rounds=rounds),
        ]
        self._rows: list[Row] = []

    @property
    def subtitle(self) -> str:
        return f"{self._machine['device'].partition(' (')[0]}, torch {self._machine['torch']}, {self._machine['date']}"

    @property
    def picture(self) -> Path | None:
        return self._path and self._path.with_suffix(".png")

    def add(self, title: str, shown: str, written: str, rows: Sequence[Row], done: bool = True) -> None:
        """A part; one that is not done is written, not shown, and the next takes its place."""
        text = [*self._text, f"## {title}\n\n{written}"]
        rounded = [{k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        rounded = [*self._rows, *rounded]
        if done:
            print(f"\n{title}\n{shown}", flush=True)
            self._text, self._rows = text, rounded
        if self._path is not None:
            self._path.with_suffix(".md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
            harness.write_csv(self._path.with_suffix(".csv"), [{**row, **self._machine} for row in rounded])
