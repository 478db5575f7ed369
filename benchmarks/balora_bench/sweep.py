"""Time and memory over a size that doubles: one line an implementation, as tables and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from . import harness
from .measure import MEASURED, NOT_HERE, Row, measure
from .operation import Implementation, Operation, Shape
from .tables import Report, grid, number

_MEANING = {"N": "tokens", "V": "vocabulary"}


def shapes(first: Shape, last: Shape) -> list[Shape]:
    """From the first to the last, which differ in one size, doubling it."""
    found = [first]
    while found[-1] != last:
        found.append(tuple(min(2 * a, c) if a != c else a for a, c in zip(found[-1], last, strict=True)))
    return found


def run(
    operation: Operation,
    axis: str,
    sizes: Sequence[Shape],
    dtype: str,
    terms: Sequence[str],
    implementations: Sequence[Implementation],
    rounds: int,
    slow: float,
    bandwidth: float,
    report: Report,
) -> list[Row]:
    """Of each implementation the first of the terms that it has; none goes on beyond the size where it ended."""
    index = operation.axes.index(axis)
    going = {i: next(t for t in terms if t in i.terms) for i in implementations if set(terms) & set(i.terms)}
    rows: list[Row] = []
    lines: dict[str, dict[int, Row]] = {}
    ends: list[str] = []
    for shape in sizes:
        size = shape[index]
        for group in [t for t in terms if t in going.values()]:
            members = [i for i, own_terms in going.items() if own_terms == group]
            try:
                found = measure(operation, shape, dtype, group, members, rounds, slow, bandwidth)
            except (RuntimeError, MemoryError) as broken:
                if not harness.out_of_memory(broken):
                    raise
                ends.append(f"{axis} {size}: the inputs themselves are out of memory")
                going.clear()
                break
            rows += found
            lines.setdefault("floor", {}).setdefault(size, found[0])
            for implementation, row in zip(members, found[1:], strict=True):
                name = row["implementation"] + (f" ({group})" if group != terms[0] else "")
                if row["status"] == MEASURED:
                    lines.setdefault(name, {})[size] = row
                    if "outside" in row["note"]:  # a peer, that keeps its points
                        ends.append(f"{name} at {axis} {size}: {row['note']}")
                else:
                    del going[implementation]
                    where = "" if row["status"] == NOT_HERE else f"from {axis} {size} on: "
                    ends.append(f"{name}: {where}{row['note']}")
        # After every size, for an interrupted sweep.
        _report(operation, axis, sizes, dtype, terms[0], lines, ends, rows, report, done=shape == sizes[-1])
    return rows


def _report(
    operation: Operation,
    axis: str,
    sizes: Sequence[Shape],
    dtype: str,
    terms: str,
    lines: dict[str, dict[int, Row]],
    ends: Sequence[str],
    rows: Sequence[Row],
    report: Report,
    done: bool,
) -> None:
    fixed = ", ".join(f"{a} {s}" for a, s in zip(operation.axes, sizes[0], strict=True) if a != axis)
    several = len(operation.terms) > 1
    title = f"{operation.name} over {axis}: {fixed}, {dtype}" + (f", terms {terms}" if several else "")
    measured = sorted({size for line in lines.values() for size in line})
    shown, written = [], []
    for key, unit in (("ms", "ms, forward and backward"), ("peak_MiB", "MiB beyond inputs and gradients")):
        heads = [name for name, line in lines.items() if any(key in row for row in line.values())]
        body = {}
        for size in measured:
            values = [lines[name].get(size, {}).get(key) for name in heads]
            body[f"{size:,}"] = ["" if value is None else number(value) for value in values]
        if heads:
            shown.append(f"  {unit}\n" + grid(axis, heads, body, terminal=True))
            written.append(f"{unit}\n\n" + grid(axis, heads, body))
    shown += [f"  {end}" for end in ends]
    written += ["\n".join(f"- {end}" for end in ends)] if ends else []
    if report.picture is not None and measured:
        _draw(operation, axis, dtype, lines, title, report.subtitle, report.picture)
        written.insert(0, f"![{title}]({report.picture.name})")
    report.add(title, "\n".join(shown), "\n\n".join(written), rows, done)


def _draw(
    operation: Operation,
    axis: str,
    dtype: str,
    lines: dict[str, dict[int, Row]],
    title: str,
    subtitle: str,
    picture: Path,
) -> None:
    """Memory with inputs and gradients included, so that these are its floor."""
    from . import plots  # matplotlib, which tables do without

    colors = {i.label: color for i, color in zip(operation.implementations, plots.COLORS, strict=False)}
    time = [plots.Line(f"floor: {next(iter(lines['floor'].values()))['implementation'][7:]}", plots.GRAY, [], [], "--")]
    memory = [
        plots.Line("inputs and gradients", plots.GRAY, [], [], "--"),
        plots.Line("one [N, V] tensor", plots.GRAY, [], [], ":"),
    ]
    for size, row in lines["floor"].items():
        cells = row["N"] * row["V"] * getattr(torch, dtype).itemsize / harness.MIB
        for guide, value in zip((*time, *memory), (row["ms"], row["held_MiB"], cells), strict=True):
            guide.x.append(size)
            guide.y.append(value)
    held = {size: row["held_MiB"] for size, row in lines["floor"].items()}
    for name, line in lines.items():
        if name == "floor":
            continue
        label = next(iter(line.values()))["implementation"]
        for panel, key in ((time, "ms"), (memory, "peak_MiB")):
            points = {size: row[key] for size, row in line.items() if key in row}
            y = [value + (held[size] if key == "peak_MiB" else 0) for size, value in points.items()]
            if points:
                width = 2.4 if label.startswith("balora") else 1.4
                panel.append(plots.Line(name, colors.get(label, plots.GRAY), list(points), y, "-", width))
    panels = {"milliseconds, forward and backward": time}
    if len(memory) > 2:
        panels["peak MiB, inputs and gradients included"] = memory
    plots.draw(picture, title, subtitle, f"{axis}, {_MEANING[axis]}", panels)
