"""PiSSA set-up of the weights of a whole model against peft's ``pissa_niter_16``: time, error, peak memory.

    python benchmarks/pissa_setup.py            # CPU: 2 layers of a LLaMA-2-7B a quarter as wide; GPU: all of it
    python benchmarks/pissa_setup.py --out benchmarks/results/pissa-setup-cpu
    python benchmarks/pissa_setup.py --shapes 16x2048x2048 --rank 32 --dtype float32

Both give A₀ and B₀ in the weights' type: balora as ``get_pissa_model`` does, in batches; peft one weight after the
other (``torch.svd_lowrank(W.float(), q=r, niter=16)``, as its ``LoraLayer.pissa_init`` calls it; the residual W − BA
that it computes too is left out). Both are first held against the least error of rank r, from all singular values, on
the first weights of each shape. The weights are random: a flat spectrum with a heavy head, as language models have it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import harness
import torch
from torch import Tensor

from balora import principal

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
HEAD = 512  # directions above the flat part of the spectrum
Shape = tuple[int, int, int]  # count, m, n


def random_weights(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """0.02·(G + Σ_i c_i·l_i r_iᵀ), all random: σ_i falls like 6/√i of the largest σ of G, until that leads."""
    count, m, n = shape
    g = torch.Generator(DEVICE).manual_seed(0)
    scale = 6 * (m**-0.5 + n**-0.5) * torch.arange(1, HEAD + 1, device=DEVICE) ** -0.5
    found = []
    for _ in range(count):
        left, right = (torch.randn(side, HEAD, generator=g, device=DEVICE) for side in (m, n))
        w = torch.randn(m, n, generator=g, device=DEVICE)
        found.append((0.02 * w.addmm_(left * scale, right.T)).to(dtype))
    return found


def balora(weights: list[Tensor], rank: int, batch_bytes: int) -> list[tuple[Tensor, Tensor]]:
    found = []
    for batch in principal.batches(weights, [rank] * len(weights), batch_bytes):
        found += principal.factors([weights[i] for i in batch], rank, [1.0] * len(batch))
    return found


def peft(weights: list[Tensor], rank: int, batch_bytes: int) -> list[tuple[Tensor, Tensor]]:
    found = []
    for w in weights:
        u, s, v = torch.svd_lowrank(w.float(), q=rank, niter=16)
        root = torch.diag(s.sqrt())
        found.append(((u @ root).to(w.dtype), (root @ v.T).to(w.dtype)))
    return found


IMPLEMENTATIONS = {"balora": balora, "peft pissa_niter_16": peft}


def distance(w: Tensor, b0: Tensor, a0: Tensor) -> float:
    """‖W − B₀A₀‖_F / ‖W‖_F"""
    w = w.double()
    return ((w - b0.double() @ a0.double()).norm() / w.norm()).item()


def least(w: Tensor, rank: int) -> float:
    """The distance of the best matrix of that rank."""
    s = torch.linalg.svdvals(w.double())
    return (s[rank:].norm() / s.norm()).item()


def measure(shape: Shape, arguments: argparse.Namespace) -> list[dict]:
    count, m, n = shape
    dtype, rank = getattr(torch, arguments.dtype), arguments.rank
    weights = random_weights(shape, dtype)
    checked = weights[: arguments.check]
    harness.progress(f"{m} x {n}: the least error")
    best = [least(w, rank) for w in checked]
    rows, runs, errors = [], {}, {}
    for name, function in IMPLEMENTATIONS.items():
        harness.progress(f"{m} x {n}, {name}: error")
        torch.manual_seed(0)
        found = [distance(w, *pair) for w, pair in zip(checked, function(checked, rank, 2**29), strict=True)]
        errors[name] = max(e / b - 1 for e, b in zip(found, best, strict=True))
        row = {"weights": f"{count} of {m} x {n}", "dtype": arguments.dtype, "rank": rank, "implementation": name}
        rows.append(row | {"error": f"{sum(found) / len(found):.5f}", "above_least": f"{errors[name]:.1e}"})
        runs[name] = lambda function=function: function(weights, rank, arguments.batch_bytes)
    if errors["balora"] > max(1e-3, errors["peft pissa_niter_16"]):
        raise SystemExit(f"balora, {m} x {n}: the error is {errors['balora']:.1e} above the least")
    memory = {name: harness.peak_memory(run) for name, run in runs.items()} if ON_GPU else {}
    seconds = harness.interleaved(runs, arguments.rounds, warm_up=0)
    peer = harness.median_and_spread(seconds["peft pissa_niter_16"])[0]
    for row in rows:
        name = row["implementation"]
        ms, spread = harness.median_and_spread(seconds[name])
        row |= {"ms": f"{ms:.0f}", "spread": f"{spread:.0f}", "ratio": f"{ms / peer:.2f}"}
        if ON_GPU:
            row["peak_MiB"] = f"{memory[name] / harness.MIB:.0f}"
            continue
        harness.progress(f"{m} x {n}, {name}: memory")
        child = [name, f"{count}x{m}x{n}", arguments.dtype, str(rank), str(arguments.batch_bytes)]
        found = harness.in_fresh_process(__file__, *child)
        row["peak_MiB"] = found.get("error") or f"{found['peak'] / harness.MIB:.0f}"
    harness.progress("")
    return rows


def total(rows: list[dict]) -> list[dict]:
    """Of each implementation the sum of the times, the largest error above the least, the largest memory."""
    found = []
    for name in IMPLEMENTATIONS:
        own = [row for row in rows if row["implementation"] == name]
        ms = sum(int(row["ms"]) for row in own)
        found.append({**own[0], "weights": "all", "error": "", "spread": "", "ms": f"{ms}"})
        found[-1]["above_least"] = max((row["above_least"] for row in own), key=float)
        found[-1]["peak_MiB"] = max((row["peak_MiB"] for row in own), key=lambda m: int(m) if m.isdigit() else -1)
    for row in found:
        row["ratio"] = f"{int(row['ms']) / int(found[-1]['ms']):.2f}"
    return found


def child(name: str, shape: str, dtype: str, rank: str, batch_bytes: str) -> None:
    """Peak memory beyond the weights; a small call first loads the libraries."""
    torch.set_num_threads(2)
    weights = random_weights(_shape(shape), getattr(torch, dtype))
    function = IMPLEMENTATIONS[name]
    function([weights[0][:64, :64].clone()], min(8, int(rank)), 1)
    print(json.dumps({"peak": harness.peak_memory(lambda: function(weights, int(rank), int(batch_bytes)))}))


def _shape(text: str) -> Shape:
    numbers = text.split("x")
    if len(numbers) != 3 or not all(n.isdigit() and int(n) > 0 for n in numbers):
        raise argparse.ArgumentTypeError(f"expected COUNTxMxN, as 16x1024x1024; found {text!r}")
    count, m, n = map(int, numbers)
    return count, m, n


COLUMNS = {
    "weights": "weights",
    "implementation": "implementation",
    "ms": "ms",
    "spread": "±",
    "ratio": "× peft",
    "error": "‖W − B₀A₀‖ / ‖W‖",
    "above_least": "at most above the least",
    "peak_MiB": "MiB beyond the weights",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [(8, 1024, 1024), (4, 2752, 1024), (2, 1024, 2752)]
    if ON_GPU:
        shapes = [(128, 4096, 4096), (64, 11008, 4096), (32, 4096, 11008)]
    parser.add_argument("--shapes", nargs="+", type=_shape, default=shapes, metavar="COUNTxMxN")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32", "float64"])
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--batch_bytes", type=int, default=2**29)
    parser.add_argument("--check", type=int, default=2, metavar="WEIGHTS", help="of each shape, for the errors")
    parser.add_argument("--rounds", type=int, default=2 if ON_GPU else 7)
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.csv")
    arguments = parser.parse_args()
    machine = harness.machine()
    title = f"# PiSSA set-up, {arguments.dtype}, rank {arguments.rank}, batches of {arguments.batch_bytes >> 20} MiB"
    rows = []
    for shape in arguments.shapes:
        rows += measure(shape, arguments)
    rows += total(rows)
    text = f"{title}\n\n{', '.join(f'{k} {v}' for k, v in machine.items())}\n\n{harness.table(rows, COLUMNS)}\n"
    print(text)
    if arguments.out:
        arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
        harness.write_csv(arguments.out.with_suffix(".csv"), [{**row, **machine} for row in rows])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
