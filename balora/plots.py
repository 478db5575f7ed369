"""Line plots, maps and bars as inline SVG: text stays text, what is not a curve takes the page's own color."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

POINTS = 1000  # of a curve, that are drawn
_WIDTH, _HEIGHT = 4.6, 2.7  # inches
_LEFT, _BOTTOM, _TALL = 0.14, 0.205, 0.67  # of the axes, as shares
_FONT = 9.5  # points
_INK = "#010203"  # stands for the page's text color


class Curve(NamedTuple):
    label: str  # written at the curve's end
    color: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    width: float = 1.4  # points
    band: tuple[Sequence[float], Sequence[float]] | None = None  # the lowest and the highest value at each x


def number(value: float, digits: int = 4) -> str:
    """So many significant digits, thousands set apart."""
    if not math.isfinite(value):
        return str(value)
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return text.replace("e-0", "e-").replace("-", "−")


def draw(
    curves: Sequence[Curve],
    unit: str,
    x_label: str = "step",
    x_range: tuple[float, float] | None = None,
    log: bool = False,
    from_zero: bool = False,
    ticks: Sequence[str] | None = None,
) -> str:
    """An ``<svg>`` element, without a title: give it one around it.

    Args:
        curves: at least one with a finite point; points that are not finite leave a gap. A curve of one point is a dot.
        unit: of the values, above the axis.
        x_range: what the horizontal axis shows at least.
        log: logarithmic values; those of 0 and below leave a gap.
        from_zero: the value axis begins at 0.
        ticks: names of the places 0, 1, … of the horizontal axis, instead of numbers.
    """
    longest = max(len(curve.label) for curve in curves)
    axes = _axes(right=0.98 - min(0.4, 0.02 + 0.0162 * longest))
    ends = []
    for curve in curves:
        x, y = _thinned(np.asarray(curve.x, float), np.asarray(curve.y, float))
        y[~np.isfinite(y) | ((y <= 0) if log else False)] = np.nan
        seen = np.flatnonzero(np.isfinite(y))
        few = len(seen) <= 25
        axes.plot(
            x,
            y,
            color=curve.color,
            linewidth=curve.width,
            clip_on=False,
            linestyle="--" if curve.dashed else "-",
            marker="o" if few and not curve.dashed else None,
            markersize=2.6,
        )
        if curve.band is not None:
            low, high = (np.asarray(side, float) for side in curve.band)
            axes.fill_between(curve.x, low, high, color=curve.color, alpha=0.16, linewidth=0)
        if len(seen):
            ends.append((float(y[seen[-1]]), float(x[seen[-1]]), curve))
    if log:
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if from_zero:
            lowest, highest = axes.dataLim.intervaly
            axes.set_ylim(min(0.0, 1.05 * lowest), 1.05 * highest if highest > 0 else 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    left, right = x_range or axes.get_xlim()
    axes.set_xlim(left, right if right > left else left + 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    if ticks is not None:
        axes.set_xticks(range(len(ticks)), ticks)
    _style(axes, unit, x_label)
    _label_ends(axes, ends)
    return _svg(axes, "".join([unit, *(curve.label for curve in curves)]))


def draw_map(x: Sequence[float], y: Sequence[float], colors: Sequence[str], name: str) -> str:
    """An ``<svg>`` element with a dot for each point, and no axes: only what lies near what has a meaning.

    Args:
        colors: of the points, one each; those of the rarest color are drawn last.
        name: other than that of any other map of the page.
    """
    axes = _axes(left=0.01, bottom=0.01, right=0.99, top=0.99)
    axes.set_axis_off()
    for color in sorted(set(colors), key=lambda c: (-colors.count(c), c)):
        mine = [i for i, c in enumerate(colors) if c == color]
        axes.plot([x[i] for i in mine], [y[i] for i in mine], "o", color=color, markersize=2.4, alpha=0.75, mew=0)
    return _svg(axes, f"map {name}")


def draw_bars(
    groups: Sequence[str], bars: Sequence[tuple[str, Sequence[float], Sequence[tuple[float, float]]]], unit: str
) -> str:
    """An ``<svg>`` element with bars side by side in each group.

    Args:
        bars: (color, height in each group, lowest and highest value in each group) of each bar.
    """
    axes = _axes(right=0.98)
    width = 0.8 / max(len(bars), 1)
    for i, (color, heights, ranges) in enumerate(bars):
        at = np.arange(len(groups)) + (i - (len(bars) - 1) / 2) * width
        axes.bar(at, heights, 0.88 * width, color=color)
        axes.vlines(at, [low for low, _ in ranges], [high for _, high in ranges], color=_INK, linewidth=0.8)
    axes.set_ylim(0, 1)
    axes.set_xticks(range(len(groups)), groups)
    _style(axes, unit, "")
    return _svg(axes, f"bars {unit} {' '.join(groups)}")


def _axes(left: float = _LEFT, bottom: float = _BOTTOM, right: float = 0.98, top: float = _BOTTOM + _TALL) -> Axes:
    figure = Figure(figsize=(_WIDTH, _HEIGHT))
    FigureCanvasSVG(figure)
    axes: Axes = figure.add_axes((left, bottom, right - left, top - bottom))
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return axes


def _svg(axes: Axes, salt: str) -> str:
    """``salt`` is that of ids, which other plots of a page must not have."""
    out = io.StringIO()
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasSVG)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "path.simplify": True}):
        canvas.print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(out.getvalue())


def _tick(value: float, _: int) -> str:
    return number(value, 6)


def _style(axes: Axes, unit: str, x_label: str) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_INK)
    axes.spines["bottom"].set_linewidth(0.6)
    axes.grid(axis="y", color=_INK, alpha=0.13, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", which="both", labelsize=_FONT, length=0, labelcolor=_INK)
    axes.tick_params(axis="x", length=3, color=_INK, width=0.6)
    axes.minorticks_off()
    axes.set_title(unit, loc="left", fontsize=_FONT, color=_INK, x=0, pad=7)
    axes.set_xlabel(x_label, loc="right", fontsize=_FONT, color=_INK, labelpad=2)


def _label_ends(axes: Axes, ends: list[tuple[float, float, Curve]]) -> None:
    """The name of each curve beside its last point, pushed apart where they would overlap."""
    if not ends:
        return
    height = 1.3 * _FONT / 72 / (_HEIGHT * _TALL)  # of a line of text, as a share of the axes
    scale = axes.transLimits
    places = sorted(
        (float(scale.transform(axes.transScale.transform((x, y)))[1]), curve.label, curve.color) for y, x, curve in ends
    )
    ats = pushed_apart([min(max(place, 0.0), 1.0) for place, _, _ in places], height, 1.02)
    for at, (_, label, color) in zip(ats, places, strict=True):
        axes.text(1.015, at, label, transform=axes.transAxes, color=color, fontsize=_FONT, va="center")


def pushed_apart(places: list[float], height: float, ceiling: float) -> list[float]:
    """Ascending places of labels, moved until they are ``height`` apart and none is above the ceiling."""
    at = list(places)
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + height)
    for i in reversed(range(len(at))):
        at[i] = min(at[i], ceiling)
        ceiling = at[i] - height
    return at


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most ``POINTS`` points: of each of equal parts its lowest and its highest, so that no spike is lost."""
    if len(x) <= POINTS:
        return x.copy(), y.copy()
    kept = []
    for part in np.array_split(np.arange(len(x)), POINTS // 2):
        values, finite = y[part], np.isfinite(y[part])
        lowest, highest = np.where(finite, values, np.inf).argmin(), np.where(finite, values, -np.inf).argmax()
        kept += sorted({int(part[lowest]), int(part[highest])})
    kept[-1] = len(x) - 1  # the end is what a curve is read for
    return x[kept], y[kept]


def _inline(svg: str) -> str:
    """The <svg> element of a document, for a page: the page's size, font and text color, no id that nothing needs."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true" focusable="false">', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)  # matplotlib up to 3.10 writes it so
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), svg)
    svg = svg.replace("xlink:href", "href").replace(_INK, "currentColor")
    return re.sub(r"\n\s*", "\n", svg).strip()
