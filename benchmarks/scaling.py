"""docs/scaling.md: its tables, between their marks in the text, and its pictures.

    python benchmarks/scaling_simulation.py              # first, where code or versions changed
    python benchmarks/scaling.py --out docs/scaling      # seconds: docs/scaling/*.png, the tables of docs/scaling.md

Counted figures come from ``scaling_counts``, simulated ones from results/scaling-simulated.csv, measured ones from
results/linear-objective-cpu.csv and, where that is there, results/training-cost-cpu.csv.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path
from typing import Any

import scaling_counts as counts
import scaling_pictures as pictures
from balora_bench import harness
from balora_bench.training_methods import SHAPES
from scaling_counts import LLAMA_3_70B, Shape, Step
from scaling_ledger import HALF_RATE

from balora import rows as streaming_rows
from balora import streaming

RESULTS = Path(__file__).parent / "results"
NAMES = {
    "llama-2-7b": "LLaMA-2-7B",
    "llama-3-8b": "LLaMA-3-8B",
    "gemma-2-2b": "Gemma-2-2B",
    "llama-3-70b": "LLaMA-3-70B",
}
METHODS = {
    "full": "full fine-tuning",
    "pissa": "PiSSA, LoRA",
    "published": "BA-LoRA, published",
    "balora": "BA-LoRA, balora",
}
# The models of results/training-cost-cpu.csv, by the name of their folder in small letters.
MEASURED = {
    "stories15m": Shape(6, 288, 6, 6, 48, 768, 32000, tied=True),
    "smollm2-135m-instruct": Shape(30, 576, 9, 3, 64, 1536, 49152, tied=True),
}
LINK = 0.8 * 450e9  # bytes a second that a GPU receives over NVLink (H100, data sheet), 80 % of it


def read(name: str) -> list[dict[str, str]]:
    path = RESULTS / name
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def simulated(rows: list[dict[str, str]], name: str, method: str, **changes: Any) -> dict[str, str] | None:
    """The row of that setting; the defaults are 4 x 512 tokens, r = 128, one rank, checkpointing."""
    shape = {**SHAPES, "llama-3-70b": LLAMA_3_70B}[name]
    path = {"balora_path": "triton" if method == "balora" else ""}
    wanted = {"checkpointing": "on", "batch": 4, "length": 512, "V": shape["vocab_size"], "r": 128, "ranks": 1, **path}
    wanted = {key: str(value) for key, value in {**wanted, **changes, "model": name, "method": method}.items()}
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


# ---------------------------------------------------------------- tables


def ratio_table(rows: list[dict[str, str]]) -> str:
    """Operations, nominal time and peak of BA-LoRA over those of PiSSA."""
    found = []
    for name in SHAPES:
        shape = Shape.of(SHAPES[name])
        for checkpointing in (True, False):
            step = Step(checkpointing=checkpointing)
            base = sum(counts.flops(shape, step, "pissa").values())
            how = "on" if checkpointing else "off"
            plain = simulated(rows, name, "pissa", checkpointing=how)
            for method in ("published", "balora"):
                row = {"shape": NAMES[name], "checkpointing": how, "method": METHODS[method]}
                row["flops"] = f"{sum(counts.flops(shape, step, method).values()) / base:.2f}"
                memory = [counts.memory(shape, step, m).peak for m in (method, "pissa")]
                row["peak"] = f"{memory[0] / 1e9:.2f} ({memory[0] / memory[1]:.2f} ×)"
                seen = simulated(rows, name, method, checkpointing=how)
                if seen and plain:
                    row["time"] = f"{float(seen['nominal_seconds']) / float(plain['nominal_seconds']):.2f}"
                    row["simulated"] = f"{int(seen['peak_bytes']) / 1e9:.2f}"
                    row["simulated"] += f" ({int(seen['peak_bytes']) / int(plain['peak_bytes']):.2f} ×)"
                found.append(row)
    columns = {"shape": "shape", "checkpointing": "checkpointing", "method": "method", "flops": "operations ÷ PiSSA's"}
    columns |= {"time": "nominal time ÷ PiSSA's", "peak": "peak counted, GB (÷ PiSSA's)"}
    return harness.table(found, columns | {"simulated": "peak simulated, GB (÷ PiSSA's)"})


def simulated_table(rows: list[dict[str, str]]) -> str:
    """Counted over simulated: the smallest and the largest ratio over all settings of a shape; peaks by method."""
    ratios: dict[tuple[str, str], dict[str, list[float]]] = {}
    settings: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["balora_path"] == "streaming":
            continue
        shape = Shape.of({**({**SHAPES, "llama-3-70b": LLAMA_3_70B}[row["model"]]), "vocab_size": int(row["V"])})
        step = Step(
            int(row["batch"]), int(row["length"]), int(row["r"]), row["checkpointing"] == "on", int(row["ranks"])
        )
        key = row["model"], "1 rank" if step.ranks == 1 else "FSDP2"
        settings[key] = settings.get(key, 0) + 1
        peak = counts.memory(shape, step, row["method"]).peak / int(row["peak_bytes"])
        flops = sum(counts.flops(shape, step, row["method"]).values()) / int(row["flops"])
        for column, ratio in ((row["method"], peak), ("flops", flops)):
            ratios.setdefault(key, {}).setdefault(column, []).append(ratio)
    found = [
        {"shape": f"{NAMES[key[0]]}, {key[1]}", "settings": settings[key]}
        | {column: _range(values) for column, values in by_column.items()}
        for key, by_column in ratios.items()
    ]
    peaks = {method: f"peak: {name}" for method, name in METHODS.items()}
    return harness.table(found, {"shape": "shape", "settings": "settings"} | peaks | {"flops": "operations"})


def _range(values: Any) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def loss_bytes(n: int, d: int, vocab: int, half: bool, method: str) -> int:
    """Bytes of the loss part on a CPU at its peak, beyond inputs and gradients.

    The naive objective holds eight float32 tensors [N, V] in the forward of the KL: the logits, the log-softmax of the
    cross-entropy, the teacher's logits, log-softmax and softmax at T, the three products of ``kl_div``; of bfloat16
    inputs also the logits in bfloat16. Streaming: a chunk's logits and differences (of bfloat16 inputs a bfloat16
    tensor and the copy that a product packs), five buffers of a block, K in float64, and three float32 tensors [c, d].
    """
    if method == "naive":
        return n * vocab * (34 if half else 32)
    row = 8 * vocab
    chunk = -(-n // -(-n // max(1, streaming._CHUNK_BYTES // row)))
    block = max(1, min(chunk, streaming._BLOCK_BYTES // (4 * vocab)))
    return chunk * row + (streaming_rows.BUFFERS + half) * 4 * block * vocab + 8 * d * d + 3 * 4 * chunk * d


def loss_seconds(rows: list[dict[str, str]], half: bool) -> tuple[float, dict[str, float]]:
    """Operations a second, and seconds a logit beside the products, of the smaller measured shape."""
    kind = "bfloat16" if half else "float32"
    own = {
        row["implementation"]: row
        for row in rows
        if row["dtype"] == kind and row["terms"] == "all" and row["N"] == "512"
    }
    n, d, vocab = (int(own["naive"][key]) for key in ("N", "d", "V"))
    floor = float(own["floor: 3 bare products"]["ms"]) / 1e3
    beside = {name: (float(own[name]["ms"]) / 1e3 - floor) / (n * vocab) for name in ("naive", "balora streaming")}
    return 6 * n * d * vocab / floor, beside


def measured_loss(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Each measured point of the whole objective: counted and measured, memory and time."""
    found = []
    for row in rows:
        name = row["implementation"]
        method = "balora streaming" if name.startswith("balora streaming") else name
        if row["terms"] != "all" or method not in ("naive", "balora streaming"):
            continue
        n, d, vocab, half = int(row["N"]), int(row["d"]), int(row["V"]), row["dtype"] == "bfloat16"
        rate, beside = loss_seconds(rows, half)
        point = dict(n=n, d=d, vocab=vocab, half=half, method=method, bytes=loss_bytes(n, d, vocab, half, method))
        point |= dict(measured_bytes=float(row["peak_MiB"]) * 2**20)
        point |= dict(seconds=6 * n * d * vocab / rate + beside[method] * n * vocab, products=6 * n * d * vocab / rate)
        found.append(point | dict(measured_seconds=float(row["ms"]) / 1e3 if row["ms"] else None))
    return found


def loss_table(points: list[dict[str, Any]]) -> str:
    found = []
    for p in points:
        kind = "bfloat16" if p["half"] else "float32"
        row = {"what": f"{p['method']}, N {p['n']}, d {p['d']}, V {p['vocab']}, {kind}"}
        row |= {"memory": f"{p['bytes'] / 2**20:.0f} / {p['measured_bytes'] / 2**20:.0f}"}
        row["memory_ratio"] = f"{p['bytes'] / p['measured_bytes']:.2f}"
        if p["measured_seconds"]:
            fitted = " (fitted)" if p["n"] == 512 else ""
            row["time"] = f"{p['seconds']:.2f} / {p['measured_seconds']:.2f}"
            row["time_ratio"] = f"{p['seconds'] / p['measured_seconds']:.2f}{fitted}"
        found.append(row)
    columns = {"what": "loss part on a CPU", "memory": "MiB, counted / measured", "memory_ratio": "ratio"}
    return harness.table(found, columns | {"time": "seconds, counted / measured", "time_ratio": "ratio"})


def measured_steps(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Each measured step with its operations, counted and measured, and all ratios to PiSSA's.

    Without attention in both: on a CPU torch's counter does not see it.

    Raises:
        ValueError: a model whose shape is in neither MEASURED nor SHAPES.
    """
    shapes = {**MEASURED, **{name: Shape.of(fields) for name, fields in SHAPES.items()}}
    found = []
    for row in rows:
        shape = next((shape for name, shape in shapes.items() if name in row["model"].lower()), None)
        if shape is None:
            raise ValueError(f"training-cost-cpu.csv: expected one of {', '.join(shapes)}, found {row['model']!r}")
        if not row["seconds"]:  # it could not run
            continue
        step = Step(int(row["batch"]), int(row["length"]), int(row["r"]), row["checkpointing"] == "True")
        counted, plain = (_flops_of_products(shape, step, method) for method in (row["method"], "pissa"))
        point = {"model": row["model"], "method": row["method"], "dtype": row["dtype"], "step": step}
        point |= {"flops": counted, "measured_flops": float(row["TFLOP"]) * 1e12, "x_flops": counted / plain}
        found.append(point | {key: float(row[key] or "nan") for key in ("x_TFLOP", "x_seconds", "x_peak")})
    return found


def _flops_of_products(shape: Shape, step: Step, method: str) -> int:
    forward, backward = counts.attention_flops(shape, step)
    forwards = 1 + step.checkpointing + (method in ("published", "balora"))
    return sum(counts.flops(shape, step, method).values()) - forwards * forward - backward


def step_table(points: list[dict[str, Any]]) -> str:
    """Whole steps on a CPU: operations counted over measured; operations, time and memory over PiSSA's."""
    if not points:
        return "*Not measured yet: `benchmarks/results/training-cost-cpu.csv` is not there.*"
    found: dict[tuple[str, str, Step], dict[str, Any]] = {}
    ratios: dict[tuple[str, str, Step], list[float]] = {}
    for p in points:
        key, step = (p["model"], p["dtype"], p["step"]), p["step"]
        what = f"{p['model']}, {p['dtype']}, {step.batch} × {step.length}, r {step.r}"
        row = found.setdefault(key, {"what": f"{what}, checkpointing {'on' if step.checkpointing else 'off'}"})
        ratios.setdefault(key, []).append(p["flops"] / p["measured_flops"])
        row["ratio"] = _range(ratios[key])
        row[p["method"]] = f"{p['x_flops']:.2f}, {p['x_TFLOP']:.2f}, {p['x_seconds']:.2f}, {p['x_peak']:.2f}"
    columns = {"what": "step on a CPU", "ratio": "operations, counted ÷ measured", "full": METHODS["full"]}
    columns |= {"lora": "LoRA"} | {m: METHODS[m] for m in ("published", "balora")}
    text = (
        "A method's cell is over PiSSA's: operations counted, operations, time and peak measured. Operations are "
        "without attention, which torch's counter does not see on a CPU; peaks are the whole process's."
    )
    return f"{harness.table(list(found.values()), columns)}\n\n{text}"


def stack_of_70b() -> dict[str, dict[str, int]]:
    shape, step = Shape.of(LLAMA_3_70B), Step(ranks=8)
    return {method: counts.memory(shape, step, method).parts for method in ("pissa", "published", "balora")}


def table_of_70b(rows: list[dict[str, str]]) -> str:
    shape, step = Shape.of(LLAMA_3_70B), Step(ranks=8)
    stacks = stack_of_70b()
    names = list(dict.fromkeys(part for parts in stacks.values() for part in parts))
    found = [
        {"part": part} | {m: f"{parts[part] / 1e9:.2f}" if parts.get(part) else "" for m, parts in stacks.items()}
        for part in names
    ]
    totals = {m: sum(parts.values()) for m, parts in stacks.items()}
    found.append({"part": "**peak, counted**"} | {m: f"**{total / 1e9:.1f}**" for m, total in totals.items()})
    seen = {m: simulated(rows, "llama-3-70b", m, ranks=8) for m in stacks}
    found.append(
        {"part": "peak, simulated"}
        | {m: f"{int(row['peak_bytes']) / 1e9:.1f}" if row else "" for m, row in seen.items()}
    )
    for capacity in (80, 141):
        fits = {m: "yes" if total < 0.9e9 * capacity else "no" for m, total in totals.items()}
        found.append({"part": f"fits {capacity} GB (a tenth left free)"} | fits)
    gathered = {m: counts.gathered(shape, step, m) for m in stacks}
    found.append({"part": "all-gathered in a step"} | {m: f"{size / 1e9:.0f}" for m, size in gathered.items()})
    found.append({"part": "reduced in a step"} | {m: f"{counts.scattered(shape, step) / 1e9:.1f}" for m in stacks})
    return harness.table(found, {"part": "GB a rank"} | {m: METHODS[m] for m in stacks})


def teacher_traffic() -> str:
    """When the gathers of the teacher's forward hide behind its products."""
    shape, step = Shape.of(LLAMA_3_70B), Step(ranks=8)
    received = counts.gathered_by_teacher(shape, step) * 7 / 8
    compute = counts.flops(shape, step, "balora")["teacher"] / HALF_RATE
    hidden = step.tokens * received / LINK / compute
    return (
        f"The teacher's forward of 70B gathers {received * 8 / 7 / 1e9:.0f} GB more, of which a rank receives "
        f"{received / 1e9:.0f}: {received / LINK:.2f} s at {LINK / 1e9:.0f} GB/s (NVLink), against {compute:.2f} s of "
        f"products for {step.tokens} tokens a rank. It hides from {hidden:.0f} tokens a rank on; at 50 GB/s (network) "
        f"from {hidden * LINK / 50e9:.0f}. Both sides grow with the model alike: other sizes have about the same bound."
    )


def fill(text: str, tables: dict[str, str]) -> str:
    """The text with each table between its marks, ``<!-- name -->`` and ``<!-- end -->``.

    Raises:
        ValueError: a mark is missing.
    """
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"docs/scaling.md: expected the mark <!-- {name} -->, found none")
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def tables() -> dict[str, str]:
    rows = read("scaling-simulated.csv")
    return {
        "ratios": ratio_table(rows),
        "simulated": simulated_table(rows),
        "loss": loss_table(measured_loss(read("linear-objective-cpu.csv"))),
        "steps": step_table(measured_steps(read("training-cost-cpu.csv"))),
        "70b": table_of_70b(rows),
        "teacher": teacher_traffic(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures; the text is OUT.md")
    out = parser.parse_args().out
    rows = read("scaling-simulated.csv")
    out.mkdir(parents=True, exist_ok=True)
    pictures.loss(measured_loss(read("linear-objective-cpu.csv")), loss_bytes, out / "loss.png")
    pictures.memory(lambda method, **at: simulated(rows, "llama-3-8b", method, **at), out / "memory.png")
    pictures.time(lambda method, **at: simulated(rows, "llama-3-8b", method, **at), out / "time.png")
    pictures.stack(stack_of_70b(), out / "70b.png")
    text = out.with_suffix(".md")
    text.write_text(fill(text.read_text(encoding="utf-8"), tables()), encoding="utf-8")


if __name__ == "__main__":
    main()
