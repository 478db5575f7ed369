"""Log-log plots, side by side, as a PNG: each line's name at its end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from balora.plots import pushed_apart

# Okabe and Ito's, which color-blind readers tell apart; first those of balora.
COLORS = ("#0B3C6F", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#8C564B", "#7F7F00", "#5E3C99")
GRAY = "#666666"
_WIDTH, _HEIGHT, _FONT = 10.6, 4.0, 9.5  # inches, points


class Line(NamedTuple):
    label: str
    color: str
    x: list[float]
    y: list[float]
    style: str
    width: float = 1.2  # points


def draw(path: Path, title: str, subtitle: str, axis: str, panels: dict[str, list[Line]]) -> None:
    """Write a PNG.

    Args:
        axis: the name of the horizontal axis.
        panels: lines by the unit of their values.
    """
    figure = Figure(figsize=(_WIDTH * len(panels) / 2, _HEIGHT), dpi=160)
    FigureCanvasAgg(figure)
    figure.text(0.012, 0.95, title, fontsize=_FONT + 1.5, fontweight="bold", va="center")
    figure.text(0.012, 0.89, subtitle, fontsize=_FONT - 1, color=GRAY, va="center")
    for i, (unit, lines) in enumerate(panels.items()):
        share = 1 / len(panels)
        longest = max(len(line.label) for line in lines)
        names = 0.0093 * longest * 2 * share * _FONT / 9.5 + 0.01  # of the figure's width
        axes = figure.add_axes((i * share + 0.05, 0.13, share - 0.05 - names * 0.72, 0.65))
        _panel(axes, axis, unit, lines)
    figure.savefig(path)


def _panel(axes: Axes, axis: str, unit: str, lines: list[Line]) -> None:
    for line in lines:
        marker = "o" if line.style == "-" else None
        axes.plot(line.x, line.y, line.style, color=line.color, linewidth=line.width, marker=marker, markersize=3.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({x for line in lines for x in line.x})
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _size(round(value))))
    low, high = (round_(math.log10(v)) for round_, v in zip((math.floor, math.ceil), axes.get_ylim(), strict=True))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high - low <= 2 else (1.0,)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(which="major", color="#000000", alpha=0.1, linewidth=0.6)
    axes.tick_params(labelsize=_FONT, length=3, which="major")
    axes.set_title(unit, loc="left", fontsize=_FONT, pad=6)
    axes.set_xlabel(axis, loc="right", fontsize=_FONT, labelpad=1)
    _name_ends(axes, lines)


def _size(value: int) -> str:
    """64, 4k, 256k: thousands, or 1024s where the size is made of them."""
    unit = 1024 if value % 1024 == 0 else 1000
    return f"{value // unit}k" if value % unit == 0 else str(value)


def _name_ends(axes: Axes, lines: list[Line]) -> None:
    """The name of each line beside its last point, pushed apart where they would overlap."""
    height = 1.3 * _FONT / 72 / (_HEIGHT * axes.get_position().height)  # of a line of text, as a share of the axes
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(((*to_axes.transform((line.x[-1], line.y[-1])), line) for line in lines), key=lambda end: end[1])
    at = pushed_apart([end[1] for end in ends], height, 1.04)
    for y, (x, end, line) in zip(at, ends, strict=True):
        axes.annotate(
            line.label,
            xy=(x, end),
            xytext=(1.025, y),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=line.color,
            fontsize=_FONT,
            va="center",
            arrowprops=dict(arrowstyle="-", color=line.color, linewidth=0.5, alpha=0.6, shrinkA=0, shrinkB=2),
            annotation_clip=False,
        )
