"""The pictures of ``profiles``: stacked bars of parts, a roofline, a row for every kernel, alternatives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from kernel_counts import Count, Device

# Okabe and Ito's colors (2008), then the same hatched: told apart with any color vision.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
GRAY = "#999999"
UNITS = {
    "issue": ("#0072B2", "o", "instructions of a thread"),
    "float64": ("#D55E00", "s", "float64"),
    "float32": ("#CC79A7", "D", "float32"),
    "bf16": ("#009E73", "^", "bfloat16 on tensor cores"),
    "tf32": ("#E69F00", "v", "tf32 on tensor cores"),
}
LAUNCH = 3  # microseconds that a launch takes by itself: the order of magnitude, not measured here
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "balora"}


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def parts(found: list[dict[str, Any]], path: Path) -> None:
    """One stacked bar a case, in milliseconds under the profiler, parts below 3 % together; the floor as a line."""
    with plt.rc_context(STYLE):
        height = 1.15 * len(found) + 0.9
        figure, axes = plt.subplots(len(found), 1, figsize=(9, height), squeeze=False, layout="constrained")
        names = sorted({name for row in found for name in row["parts"]}, key=lambda n: -_most(found, n))
        looks = {
            name: {"color": COLORS[i % len(COLORS)], "hatch": "" if i < len(COLORS) else "////"}
            for i, name in enumerate(names)
        }
        for axis, row in zip(axes[:, 0], found, strict=True):
            _bar(axis, row, looks, names)
        axes[-1, 0].set_xlabel("milliseconds under the profiler")
        save(figure, path)


def milliseconds(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _most(found: list[dict[str, Any]], name: str) -> float:
    return max(row["parts"].get(name, 0) / row["profiled"] for row in found)


def _bar(axis: Any, row: dict[str, Any], looks: dict[str, dict[str, str]], names: list[str]) -> None:
    total, start = row["profiled"], 0.0
    end = max(total, row["floor"]) * 1.02
    shown = {name: row["parts"].get(name, 0.0) for name in names}
    shown = {name: ms for name, ms in shown.items() if ms >= 0.03 * total}
    rest = total - sum(shown.values())
    bar = {"height": 0.5, "edgecolor": "white", "linewidth": 0.8}
    for name, ms in shown.items():
        axis.barh(0, ms, left=start, label=f"{name} {100 * ms / total:.0f} %", **bar, **looks[name])
        start += ms
    if rest > 0.005 * total:
        axis.barh(0, rest, left=start, label=f"rest {100 * rest / total:.0f} %", color=GRAY, **bar)
    axis.legend(
        loc="lower left", bbox_to_anchor=(0, 0.98), ncols=len(shown) + 1, frameon=False, fontsize=8,
        borderpad=0, borderaxespad=0.3, handlelength=1, handletextpad=0.5, columnspacing=1.4,
    )  # fmt: skip
    axis.plot([row["floor"]] * 2, [-0.33, 0.28], color="black", linewidth=2)
    near_end = row["floor"] > 0.6 * end
    text = f"floor {milliseconds(row['floor'])} ms: {row['floor_label']}"
    axis.annotate(
        text, (row["floor"], -0.33), (-3 if near_end else 3, -2),
        textcoords="offset points", ha="right" if near_end else "left", va="top", fontsize=8,
    )  # fmt: skip
    unprofiled = f"{milliseconds(row['call'])} ms, {row['call'] / row['floor']:.2f} × the floor"
    axis.set_title(f"{row['operation']}, {row['case']}: {unprofiled}", loc="left", fontsize=9, pad=21)
    axis.set(yticks=[], ylim=(-0.62, 0.3), xlim=(0, end))
    axis.spines["left"].set_visible(False)


def roofline(found: list[Count], devices: tuple[Device, ...], path: Path, timed: bool = False) -> None:
    """All kernels at what they can reach on an H100: under its bandwidth and the peak of the unit that they use."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 5.6), layout="constrained")
        h100 = next(d for d in devices if d.name == "H100")
        low, high = 0.03, 3e4
        for device, style in zip(devices, (":", "-", "--"), strict=True):
            ends = [low * device.bandwidth, high * device.bandwidth]
            text = f"{device.name}: {device.bandwidth / 1e12:.3g} TB/s"
            axis.plot([low, high], ends, style, color=GRAY, linewidth=1, label=text)
        used = dict.fromkeys(c.unit for c in found)
        for unit in used:
            color, _, text = UNITS[unit]
            peak = getattr(h100, unit)
            axis.plot([peak / h100.bandwidth, high], [peak, peak], color=color, linewidth=1.3,
                      linestyle="--" if unit == "float64" else "-")  # fmt: skip
            above = unit != "float64"
            axis.annotate(
                f"{text}, {peak / 1e12:.3g} T/s", (high, peak), (0, 3 if above else -4), textcoords="offset points",
                ha="right", va="bottom" if above else "top", color=color, fontsize=8,
            )  # fmt: skip
        for c in found:
            _point(axis, c, h100)
        axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(1e10, 3e15))
        axis.legend(loc="lower right", frameon=False)
        axis.set_xlabel("operations a byte, counted")
        axis.set_ylabel("operations a second, at most, on an H100")
        title = "counted, not timed" if timed else "no kernel has been timed on a device yet"
        axis.set_title(f"Expectation: {title}", loc="left", fontsize=10)
        save(figure, path)


def _point(axis: Any, c: Count, device: Device) -> None:
    x, y = c.operations / c.bytes, c.operations / max(c.seconds(device))
    color, marker, _ = UNITS[c.unit]
    axis.plot(x, y, marker, color=color, markersize=6, markeredgecolor="black", markeredgewidth=0.5)
    offset, side = NUDGED.get(c.kernel, ((6, -3), "left"))
    axis.annotate(c.kernel, (x, y), offset, textcoords="offset points", fontsize=8, ha=side)


# Where a name would lie on another one.
NUDGED: dict[str, tuple[tuple[int, int], str]] = {
    "times": ((-6, 2), "right"),
    "transposed_times": ((6, -8), "left"),
    "update": ((-8, 0), "right"),
    "add_top": ((7, -4), "left"),
    "gradient": ((6, -9), "left"),
    "merge": ((0, -14), "center"),
    "cap": ((-8, -3), "right"),
    "cap, in place": ((-7, -3), "right"),
    "capped_gradient": ((-7, 1), "right"),
    "apply_kernel": ((0, -14), "center"),
    "gather_kernel": ((0, -14), "center"),
    "gram_kernel": ((0, -14), "center"),
    "factor_kernel": ((4, -14), "left"),
    "jacobi_kernel": ((0, -14), "center"),
    "cholesky_inverse": ((0, 7), "center"),
}


def kernels(found: list[Count], table: list[dict[str, str]], devices: tuple[Device, ...], path: Path) -> None:
    """A row for each kernel: the least time by bytes and by operations on each device, and what the compiler says."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(10, 0.42 * len(found) + 1.2), layout="constrained")
        axis.axvspan(1e-3, LAUNCH, color="#F2F2F2", linewidth=0, zorder=-2)
        axis.text(1.2e-3, len(found) - 0.5, "shorter than a launch takes", fontsize=8, color="#777777", va="bottom")
        for i, (c, row) in enumerate(zip(found, table, strict=True)):
            for j, device in enumerate(devices):
                memory, unit = (1e6 * s for s in c.seconds(device))
                y = i + 0.25 * (j - 1)
                first = i == 0
                axis.plot(memory, y, "o", color="#0072B2", markersize=4, fillstyle=("none", "full", "left")[j],
                          label=f"by bytes, {device.name}" if first else None)  # fmt: skip
                axis.plot(unit, y, "s", color="#D55E00", markersize=4, fillstyle=("none", "full", "left")[j],
                          label=f"by operations, {device.name}" if first else None)  # fmt: skip
                axis.plot([memory, unit], [y, y], color="#CCCCCC", linewidth=1, zorder=0)
            spilled = "" if row["spilled"] == "0" else f", {row['spilled']} bytes spilled"
            size = f"{c.bytes / 1e6:.3g} MB" if c.bytes >= 1e6 else f"{c.bytes / 1e3:.3g} KB"
            text = f"{size}, {c.blocks:,} block{'s' * (c.blocks > 1)} · "
            text += f"{row['registers']} registers, occupancy {row['occupancy']}"
            axis.text(1.01, i, text + spilled, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
        axis.set_yticks(range(len(found)), [c.kernel for c in found])
        axis.set(
            xscale="log", xlabel="least microseconds: the right one of a pair binds", ylim=(len(found) - 0.4, -0.6)
        )
        axis.set_xlim(1e-3, None)
        axis.grid(axis="x", color="#EEEEEE")
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8)
        save(figure, path)


def alternatives(found: list[dict[str, Any]], path: Path) -> None:
    """Times against the way that is taken, one bar a way; the taken one in blue."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 0.27 * len(found) + 1.2), layout="constrained")
        y, places, group = 0.0, [], None
        for row in found:
            taken = row["group"] != group
            if taken:
                y += 0.9
                axis.text(0.31, y - 0.75, row["group"], fontweight="bold", fontsize=9, va="center",
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
                group = row["group"]
            ratio = float(row["ratio"])
            axis.barh(y, ratio - 0.3, left=0.3, height=0.7, color="#0072B2" if taken else "#E69F00")
            axis.text(ratio * 1.03, y, f"{row['ratio']} ×, {row['ms']} ms", va="center", fontsize=8,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
            places.append((y, row["way"]))
            y += 1
        axis.set_yticks(*zip(*places, strict=True))
        axis.axvline(1, color=GRAY, linewidth=1, zorder=-1)
        axis.set(xscale="log", xlabel="time, in that of balora's way", ylim=(y, -0.6))
        axis.set_xlim(0.3, 2 * max(float(row["ratio"]) for row in found))
        ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50) if tick < axis.get_xlim()[1]]
        axis.set_xticks(ticks, [f"{tick:g} ×" for tick in ticks])
        axis.minorticks_off()
        save(figure, path)
