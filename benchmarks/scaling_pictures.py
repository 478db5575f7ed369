"""The pictures of docs/scaling.md: counted lines, and points that were simulated or measured on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import scaling_counts as counts
from balora_bench.training_methods import SHAPES
from scaling_counts import Shape, Step

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

COLORS = {"pissa": "#0072B2", "published": "#D55E00", "balora": "#009E73"}  # Okabe and Ito
LABELS = {"pissa": "PiSSA", "published": "BA-LoRA, published", "balora": "BA-LoRA, balora"}
SHAPE = Shape.of(SHAPES["llama-3-8b"])
Find = Callable[..., Any]


def _axes(axis: Axes, x_label: str, y_label: str, x_ticks: Sequence[float]) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.xaxis.set_major_locator(FixedLocator(list(x_ticks)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x < 1e9 else f"{x:.0e}"))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


_PANELS: dict[str, tuple[str, str, list[int], Callable[[int], tuple[Shape, Step]]]] = {
    "N": ("N, tokens a rank (512 a row)", "batch", [1, 2, 4, 8, 16], lambda x: (SHAPE, Step(batch=x))),
    "V": ("V, vocabulary", "V", [32000, 64000, 128256, 256000], lambda x: (SHAPE._replace(vocab=x), Step())),
    "r": ("r, rank of the adapters", "r", [16, 32, 64, 128, 256, 512], lambda x: (SHAPE, Step(r=x))),
    "ranks": ("processes (FSDP2 above 1)", "ranks", [1, 2, 4, 8, 16, 32, 64], lambda x: (SHAPE, Step(ranks=x))),
}


def _panels(panels: Sequence[str], y_label: str, counted: Callable, seen: Callable, title: str, path: Path) -> None:
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.6), sharey=True, layout="constrained")
    for axis, name in zip(axes, panels, strict=True):
        x_label, key, values, at = _PANELS[name]
        scale = 512 if name == "N" else 1
        for method, color in COLORS.items():
            xs = [x * scale for x in values]
            axis.plot(xs, [counted(method, *at(x)) for x in values], color=color, linewidth=1.6, label=LABELS[method])
            points = [(x * scale, y) for x in values if (y := seen(method, **{key: x})) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), "o", color=color, markersize=5.5, markeredgecolor="white")
        _axes(axis, x_label, y_label if axis is axes[0] else "", [x * scale for x in values])
        axis.tick_params(axis="x", labelrotation=35, labelsize=8)
    _label_ends(axes[-1])
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _label_ends(axis: Axes) -> None:
    """The name of each line right of its end, moved up where two would touch."""
    low, high = axis.get_ylim()
    least = (high / low) ** 0.065
    ends = sorted((line.get_ydata()[-1], line) for line in axis.get_lines() if not line.get_label().startswith("_"))
    at = 0.0
    for y, line in ends:
        at = max(y, at * least)
        place = {"xycoords": axis.get_yaxis_transform(), "va": "center", "fontsize": 9, "annotation_clip": False}
        axis.annotate(line.get_label(), (1.03, at), color=line.get_color(), **place)


def memory(find: Find, path: Path) -> None:
    def counted(method: str, shape: Shape, step: Step) -> float:
        return counts.memory(shape, step, method).peak / 1e9

    def seen(method: str, **at: Any) -> float | None:
        row = find(method, **at)
        return int(row["peak_bytes"]) / 1e9 if row else None

    title = "LLaMA-3-8B, 4 × 512 tokens, r = 128, bf16, checkpointing: lines counted, points simulated"
    _panels(["N", "V", "r", "ranks"], "peak of a rank, GB", counted, seen, title, path)


def time(find: Find, path: Path) -> None:
    """Operations of a step; the points are those of the simulated code."""

    def counted(method: str, shape: Shape, step: Step) -> float:
        return sum(counts.flops(shape, step, method).values()) / 1e12

    def seen(method: str, **at: Any) -> float | None:
        row = find(method, **at)
        return int(row["flops"]) / 1e12 if row else None

    title = "LLaMA-3-8B, 4 × 512 tokens, r = 128, checkpointing: lines counted, points simulated"
    _panels(["N", "V", "r"], "operations of a step, TFLOP", counted, seen, title, path)


def loss(points: list[dict[str, Any]], loss_bytes: Callable[..., int], path: Path) -> None:
    """The loss part on a CPU in float32: memory over N at two shapes, time over N·V·d."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 3.6), layout="constrained")
    colors = {"naive": COLORS["published"], "balora streaming": COLORS["balora"]}
    names = {"naive": "published (naive)", "balora streaming": "balora (streaming)"}
    ns = [128, 512, 2048, 8192]
    points = [p for p in points if not p["half"]]
    for axis, (d, vocab) in ((left, (1024, 32000)), (middle, (576, 49152))):
        for method, color in colors.items():
            sizes = [loss_bytes(n, d, vocab, False, method) / 2**20 for n in ns]
            axis.plot(ns, sizes, color=color, linewidth=1.6)
            above = method == "naive"
            y = 4e3 if above else sizes[0] / 1.3
            axis.text(ns[0], y, names[method], color=color, fontsize=9, va="bottom" if above else "top")
            own = [p for p in points if p["method"] == method and p["vocab"] == vocab]
            axis.plot([p["n"] for p in own], [p["measured_bytes"] / 2**20 for p in own], "o", color=color, markersize=6)
        _axes(axis, f"N, tokens (d {d}, V {vocab:,})", "MiB beyond inputs and gradients" if axis is left else "", ns)
        axis.set_ylim(20, 3e4)
    beside: dict[str, Any] = {"xycoords": right.get_yaxis_transform(), "va": "center", "fontsize": 9}
    beside["annotation_clip"] = False
    timed = [p for p in points if p["measured_seconds"]]
    for method, color in colors.items():
        own = sorted((p for p in timed if p["method"] == method), key=lambda p: p["n"] * p["vocab"])
        xs = [p["n"] * p["vocab"] for p in own]
        right.plot(xs, [p["seconds"] for p in own], color=color, linewidth=1.6)
        right.plot(xs, [p["measured_seconds"] for p in own], "o", color=color, markersize=6)
        right.annotate(names[method], (1.02, own[-1]["seconds"]), **beside, color=color)
    own = sorted((p for p in timed if p["method"] == "naive"), key=lambda p: p["n"] * p["vocab"])
    xs = [p["n"] * p["vocab"] for p in own]
    right.plot(xs, [p["products"] for p in own], color="#666666", linewidth=1.2, linestyle="--")
    right.annotate("three products", (1.02, own[-1]["products"]), **beside, color="#666666")
    _axes(right, "N·V, logits", "seconds, forward and backward", xs)
    right.set_xlim(xs[0] * 0.8, xs[-1] * 1.3)
    figure.suptitle("The loss part on two CPU cores, float32: lines counted, points measured", fontsize=10)
    _save(figure, path)


_STACK = {  # from the bottom: part, its name, its color (Okabe and Ito, and tints of them)
    "weights": "#0072B2",
    "second model": "#D55E00",
    "A0, B0": "#009E73",
    "adapters": "#56B4E9",
    "AdamW states": "#A6D8F5",
    "Gram matrix and factor": "#66C2A4",
    "gathered embedding": "#B3B3B3",
    "gathered head": "#8C8C8C",
    "gathered layers": "#666666",
    "activations": "#F0E442",
    "activations and gradients": "#F0E442",
    "hidden states": "#E69F00",
    "[N, V] tensors": "#CC79A7",
    "loss chunk": "#CC79A7",
    "K": "#E7BFD6",
}


def stack(stacks: dict[str, dict[str, int]], path: Path) -> None:
    """Bytes of a rank by part, a bar for each method."""
    figure, axis = plt.subplots(figsize=(8.5, 6.6), layout="constrained")
    for i, parts in enumerate(stacks.values()):
        bottom = 0.0
        for part, color in _STACK.items():
            size = parts.get(part, 0) / 1e9
            axis.bar(i, size, 0.55, bottom, color=color, edgecolor="white", linewidth=0.6)
            if size > 1.5:
                ink = "white" if color in ("#0072B2", "#666666") else "black"
                axis.text(
                    i, bottom + size / 2, f"{part}  {size:.1f}", ha="center", va="center", fontsize=7.5, color=ink
                )
            bottom += size
        axis.text(i, bottom + 0.8, f"{bottom:.1f} GB", ha="center", fontsize=11, weight="bold")
    axis.set_xticks(range(len(stacks)), [LABELS[m] for m in stacks])
    axis.set_ylim(0, 64)
    axis.set_ylabel("GB a rank, at the peak of a step (counted)")
    axis.set_title("LLaMA-3-70B on 8 GPUs: FSDP2, checkpointing, 4 × 512 tokens a rank, bf16, r = 128", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
