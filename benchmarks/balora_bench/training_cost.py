"""What a training step costs: Full FT, LoRA, PiSSA, BA-LoRA as published, BA-LoRA with balora, under HF's Trainer.

    balora bench training_cost STORIES15M_FOLDER --length 250 --data gsm8k.jsonl --r 32
    balora bench training_cost llama-2-7b llama-3-8b gemma-2-2b --out benchmarks/results/gpu/training-cost

A model is a folder, or the name of a public shape; without weights they are drawn at random. Every method runs in a
process of its own, on one device: the peak is that process's up to the last timed step, without its set-up. On a CPU
the processes take turns, a step each, so that a slow moment of the machine meets all of them; all are resident at once
then: name fewer --methods where memory is short. On a GPU they run one after the other, PiSSA and balora first, and the
files are written after each. All see the same batches, full rows of which every token is trained on. λ is constant, so
that every step computes every term. A method with a loss that is not finite has no figures.

The published method is written anew from the paper's text: peft's PiSSA, a second model as the teacher, the logits of
both in full, float32 softmaxes over them, ``torch.svd_lowrank``. balora shows no figure unless each of its terms
follows the published method's in every step, and the reference's at the end (``training_gate``). What it took all the
same stays in the CSV, in columns whose names begin with ``refused_``.

The floor is a step's products alone, their operations counted in a real step, at the rate of one large bare product.
Of a few steps more the parts are taken: the forwards of teacher and student up to the head (of the published method's
teacher with its head), the loss (the head and all behind it, forward and backward), the backward below the head, and
the rest (clipping, optimizer). To fetch a batch is no part of a step. On a GPU one of these steps is profiled instead:
the seconds that the device is at work in it, its kernels and copies.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from balora.data import read, tokenize

from . import harness
from .training_gate import gated
from .training_methods import METHODS, PART_STEPS, PARTS, SHAPES, config_of, steps_of

HOST_BOUND = 0.9  # the device is at work for less of a step: the host's launches bind, and a faster loss may not show
_FIRST = ("pissa", "balora", "published")  # on a GPU, where what ends a run early leaves these

Rows = list[dict[str, Any]]


def measure(
    spec: dict[str, Any],
    methods: list[str],
    data: Path | None,
    rate: float,
    so_far: Callable[[Rows], None] | None = None,
) -> Rows:
    """A row for each method: seconds a step, peak, parts and losses, or why there are none.

    so_far gets the rows of the methods that have run, whenever there is one more.
    """
    with tempfile.TemporaryDirectory() as scratch:
        rows_file = Path(scratch) / "rows.json"
        rows_file.write_text(json.dumps(token_rows(spec, data)))
        spec = spec | {"scratch": scratch, "rows": str(rows_file)}
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
        failed: dict[str, str] = {}
        one_by_one = [[name] for name in sorted(methods, key=lambda m: _FIRST.index(m) if m in _FIRST else len(_FIRST))]
        ended: list[str] = []
        for group in [methods] if harness.DEVICE == "cpu" else one_by_one:
            running: dict[str, Child] = {}
            try:
                for name in group:
                    running[name] = Child(spec | {"method": name})
                for step in range(steps_of(spec)):
                    for name, process in running.items():
                        harness.progress(f"{spec['model']}: step {step + 1} of {steps_of(spec)}, {METHODS[name]}")
                        if name not in failed and (answer := process.step()) is not None:
                            answers[name].append(answer)
                        elif name not in failed:
                            failed[name] = process.why()
            finally:
                for process in running.values():
                    process.end()
            ended += group
            rows = gated([summary(spec, m, answers[m], failed.get(m), rate) for m in methods if m in ended])
            if so_far is not None:
                so_far(rows)
    harness.progress("")
    return rows


class Child:
    """A method's process, which makes a step when it is told to."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "balora_bench.training_methods", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=child_environment(),
        )

    def step(self) -> dict[str, Any] | None:
        """None where the process has ended."""
        assert self.process.stdin is not None
        try:
            if self._read("ready") is None:  # set up, or back from the last step
                return None
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            return self._read("seconds")
        except OSError:  # it was killed while it waited
            return None

    def _read(self, key: str) -> dict[str, Any] | None:
        """The next message, which has that key; None behind the last one."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            return None
        message = json.loads(line)
        if key not in message:
            raise RuntimeError(f"training_methods: expected a message with {key!r}, found {line[:160]!r}")
        return message

    def why(self) -> str:
        """What ended it, or its last words; it has ended, or is told to."""
        if self._stop() and self.process.returncode == -signal.SIGKILL:
            return "killed by SIGKILL, as where memory ends"
        self.errors.seek(0)
        text = self.errors.read().strip()
        print(text, file=sys.stderr, flush=True)  # the table has one line alone
        lines = text.splitlines()
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]  # CUDA's go on below it
        return (errors or lines)[-1][:160] if lines else f"ended with status {self.process.returncode}"

    def end(self) -> None:
        self._stop()
        self.errors.close()

    def _stop(self) -> bool:
        """Whether it ended without being killed here."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        by_itself = True
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            by_itself = False
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        return by_itself


def child_environment() -> dict[str, str]:
    """One process on one device, whatever launched this one: the Trainer would spread the model over all it sees."""
    launcher = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    found = {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith("ACCELERATE_")}
    found["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return found | {"PYTHONPATH": harness.python_path(), "HF_HUB_OFFLINE": "1"}


def summary(
    spec: dict[str, Any], name: str, steps: list[dict[str, Any]], failed: str | None, rate: float
) -> dict[str, Any]:
    given = ("data", "dtype", "batch", "length", "r", "checkpointing")
    row: dict[str, Any] = {"model": Path(spec["model"]).name, "method": name, "note": failed or ""}
    row |= {key: spec[key] for key in given}
    if failed:
        return row
    for i, step in enumerate(steps):
        if not math.isfinite(step["loss"]):
            return row | {"note": f"its loss is {step['loss']} in step {i + 1}"}
    timed = [step["seconds"] for step in steps[spec["warm_up"] : -PART_STEPS - 1]]
    ms, spread = harness.median_and_spread(timed)
    row |= {"seconds": ms / 1e3, "spread": spread / 1e3, "peak_GB": steps[-PART_STEPS - 2]["peak"] / 1e9}
    operations = steps[-1]["operations"]
    row |= {"TFLOP": operations and operations / 1e12, "floor": operations and operations / rate}
    if operations is None:
        row["note"] = "its operations could not be counted"
    last = steps[-PART_STEPS - 1 : -1]
    row |= {part: statistics.median(step["parts"][part] for step in last if "parts" in step) for part in PARTS}
    if seconds := last[-1].get("device_seconds"):
        row["device_seconds"] = seconds
    if name in ("published", "balora"):
        row["terms"] = [step["terms"] for step in steps]
        row["losses"] = [step["loss"] for step in steps]
        row["reference"], row["exact"] = steps[-1].get("reference"), steps[-1].get("exact")
        row["unchecked"] = steps[-1].get("unchecked", "")
    return row


def token_rows(spec: dict[str, Any], data: Path | None) -> list[list[int]]:
    """Rows of exactly ``length`` tokens for all steps: the texts of a file one behind the other, or drawn."""
    count, length = spec["batch"] * steps_of(spec), spec["length"]
    if data is None:
        vocab = config_of(spec["model"]).vocab_size
        return torch.randint(vocab, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], local_files_only=True)
    examples = tokenize(read(str(data)), tokenizer, max_length=length, source=str(data)).examples
    tokens = [token for example in examples for token in example["input_ids"]]
    tokens = tokens * (count * length // len(tokens) + 1)
    return [tokens[i * length : (i + 1) * length] for i in range(count)]


# ---------------------------------------------------------------- what is shown


COLUMNS = {
    "name": "method",
    "peak": "peak, GB",
    "x_peak": "× PiSSA",
    "step": "s a step",
    "spread": "±",
    "x_seconds": "× PiSSA",
    "device": "device, s",
    "floor": "floor, s",
    "x_TFLOP": "× PiSSA",
    **{part: part for part in PARTS},
    "note": "",
}


def shown(row: dict[str, Any]) -> dict[str, str]:
    cells = {"name": METHODS[row["method"]], "note": row["note"]}
    if "seconds" in row:
        cells |= {"peak": f"{row['peak_GB']:.2f}", "step": f"{row['seconds']:.3f}", "spread": f"{row['spread']:.3f}"}
        cells |= {"floor": f"{row['floor']:.3f}" if row["floor"] else ""}
        cells |= {"device": f"{row['device_seconds']:.3f}"} if "device_seconds" in row else {}
        cells |= {key: f"{row[key]:.2f}" for key in ("x_peak", "x_seconds", "x_TFLOP") if key in row}
        cells |= {part: f"{row[part]:.3f}" for part in PARTS if row[part] or part != "teacher"}
    return cells


def heading(row: dict[str, Any]) -> str:
    how = "with gradient checkpointing" if row["checkpointing"] else "without gradient checkpointing"
    tokens = f"{row['batch']} × {row['length']} tokens" + (f" of {row['data']}" if row["data"] else " drawn at random")
    return f"{row['model']}, {tokens}, {row['dtype']}, r = {row['r']}, {how}"


def section(rows: Rows) -> list[str]:
    """Of a model with and without checkpointing, in Markdown."""
    cells = [shown(row) for row in rows]
    columns = {k: v for k, v in COLUMNS.items() if k != "device" or any(k in row for row in cells)}
    found = [f"\n## {heading(rows[0])}\n\n" + harness.table(cells, columns)]
    if bound := host_bound(rows):
        found.append(f"\n{bound}")
    return found + [f"\n{distances(row)}" for row in rows if "apart" in row]


def host_bound(rows: Rows) -> str:
    shares = {METHODS[row["method"]]: row["device_seconds"] / row["seconds"] for row in rows if "device_seconds" in row}
    found = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share < HOST_BOUND)
    return found and (
        f"Bound by the host, so that these seconds are not the device's (its share of a step): {found}. More tokens a "
        "step (--batch) give it more work."
    )


def picture(out: Path, row: dict[str, Any]) -> Path:
    words = [row["model"].lower(), *(["checkpointing"] if row["checkpointing"] else [])]
    return out.with_name("-".join([out.name, *(word for word in words if word not in out.name)]) + ".png")


def write(out: Path, text: list[str], rows: Rows, machine: dict[str, str]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
    harness.write_csv(out.with_suffix(".csv"), [of_csv(row) | machine for row in rows])


def of_csv(row: dict[str, Any]) -> dict[str, Any]:
    """What the losses and terms were, in JSON; of a row that is refused nothing under the name of a figure."""
    lists = ("terms", "losses", "reference", "exact")
    cells = {key: value for key, value in row.items() if key not in (*lists, "apart", "at_the_end", "unchecked")}
    which = "refused_" if "refused_seconds" in row else ""
    return cells | {f"{which}{key}": json.dumps(row[key]) for key in lists if row.get(key)}


def distances(row: dict[str, Any]) -> str:
    found, at_the_end = (
        ", ".join(f"{name} {value:.2%}" for name, value in row[key].items()) for key in ("apart", "at_the_end")
    )
    return (
        f"Terms of balora, largest distance from those it is held against: {found}. From balora.reference's on the "
        f"weights of the end: {at_the_end}. The SVD term of a step's tokens there, from the exact one: "
        f"{row['svd_of_all']:.2%}. The KL came to {row['kl']:.1e} nats."
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds a step by part, and the peak, a bar for each method."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "seconds" in row][::-1]
    if not rows:
        return
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 0.45 * len(rows) + 1.5), width_ratios=(2, 1), sharey=True, layout="constrained"
    )
    names = [METHODS[row["method"]] for row in rows]
    colors = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#999999")  # Okabe and Ito
    start = [0.0] * len(rows)
    for part, color in zip(PARTS, colors, strict=True):
        # The parts come from other steps than the median: scaled to it.
        widths = [row["seconds"] * row[part] / sum(row[p] for p in PARTS) for row in rows]
        left.barh(names, widths, left=start, color=color, label=part)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    right.barh(names, [row["peak_GB"] for row in rows], color="#999999")
    for axis, key, unit, ratio in ((left, "seconds", "s", "x_seconds"), (right, "peak_GB", "GB", "x_peak")):
        for i, row in enumerate(rows):
            times = f" ({row[ratio]:.2f} ×)" if ratio in row else ""
            axis.text(row[key], i, f" {row[key]:.2f} {unit}{times}", va="center", fontsize=9)
        axis.set_xlim(0, 1.35 * max(row[key] for row in rows))
        axis.spines[["top", "right"]].set_visible(False)
    left.set_xlabel("seconds a step")
    right.set_xlabel("peak memory, GB")
    floors = [row["floor"] or math.nan for row in rows]
    left.plot(floors, names, "k|", markersize=14, label="floor: its products alone")
    figure.legend(loc="outside lower left", ncols=len(PARTS) + 1, frameon=False, fontsize=9)
    figure.suptitle(heading(rows[0]), x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 1 where balora has no figures."""
    parser = argparse.ArgumentParser(
        prog="balora bench training_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"a folder, or one of {', '.join(SHAPES)}")
    parser.add_argument("--data", type=Path, help="of the kind that balora train takes; unset: random tokens")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--r", type=int, default=128, help="rank of the adapters (default 128)")
    parser.add_argument(
        "--dtype",
        default="float32" if harness.DEVICE == "cpu" else "bfloat16",
        choices=("float32", "bfloat16"),
        help="of the base weights",
    )
    parser.add_argument("--steps", type=int, default=20, help="that are timed (default 20)")
    parser.add_argument("--warm_up", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument(
        "--out", type=Path, help="writes OUT.md and OUT.csv, and OUT-MODEL[-checkpointing].png (words that OUT has not)"
    )
    arguments = parser.parse_args(argv)
    for model in arguments.models:
        if model not in SHAPES and not Path(model, "config.json").is_file():
            parser.error(f"MODEL: expected a folder with a config.json or one of {', '.join(SHAPES)}, found {model!r}")
    for name, least in (("batch", 1), ("length", 2), ("r", 1), ("steps", 1), ("warm_up", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name}: expected at least {least}, found {getattr(arguments, name)}")
    if arguments.data and not arguments.data.is_file():
        parser.error(f"--data: expected a file, found {str(arguments.data)!r}")
    if arguments.out and find_spec("matplotlib") is None:
        parser.error("--out: the pictures need matplotlib, which is not installed: pip install matplotlib")
    rate = harness.product_rate(getattr(torch, arguments.dtype))
    torch.cuda.empty_cache()  # the processes that follow share the device with this one
    machine = harness.machine() | {"products": f"{rate / 1e12:.2f} TFLOP/s"}
    text = ["# What a training step costs", "", harness.in_words(machine)]
    print("\n".join(text))
    everything: list[dict[str, Any]] = []
    for model in arguments.models:
        for checkpointing in arguments.checkpointing:
            options = ("batch", "length", "r", "dtype", "steps", "warm_up")
            spec = {"model": model, "checkpointing": checkpointing == "on"}
            spec["data"] = "/".join(arguments.data.parts[-2:]) if arguments.data else ""
            spec |= {name: getattr(arguments, name) for name in options}

            def so_far(rows: Rows, before: tuple = (*text,), others: tuple = (*everything,)) -> None:
                if arguments.out:
                    write(arguments.out, [*before, *section(rows)], [*others, *rows], machine)
                    try:
                        draw(rows, picture(arguments.out, rows[0]))
                    except Exception as error:  # the methods that have not run are worth more than a picture
                        print(f"no picture: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

            rows = measure(spec, arguments.methods, arguments.data, rate, so_far)
            text += section(rows)
            everything += rows
            print("\n".join(section(rows)), flush=True)
    return any(row["method"] == "balora" and "seconds" not in row for row in everything)
