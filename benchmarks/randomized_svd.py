"""The randomized SVD against torch.svd_lowrank, one matrix and batches, and what the SVD term adds to the objective.

    python benchmarks/randomized_svd.py --out benchmarks/results/randomized-svd-gpu
    python benchmarks/randomized_svd.py --shapes 64,256,128,16 --dtypes float32 --only "balora torch"

Every implementation has rank + 10 columns and 2 power iterations, so it reads A six times: the floor is the time of six
readings at the bandwidth of a copy (of bfloat16 matrices of 129 to 512 rows the kernels read four times). Singular
values are held against those of a full decomposition in float64. On a CUDA device the kernels of one call are listed
with their times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import harness
import torch
from torch import Tensor

import balora
from balora import dispatch
from balora import functional as F

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
OVERSAMPLE, N_ITER = 10, 2
PASSES = 2 * (N_ITER + 1)


def lowrank(a: Tensor, rank: int) -> Tensor:
    return torch.svd_lowrank(a.float(), q=rank + OVERSAMPLE, niter=N_ITER)[1][..., :rank]


def lowrank_loop(a: Tensor, rank: int) -> Tensor:
    return torch.stack([lowrank(matrix, rank) for matrix in a])


def balora_with(impl: str) -> Callable[[Tensor, int], Tensor]:
    return lambda a, rank: F.randomized_svd(a, rank, OVERSAMPLE, N_ITER, impl=impl)[1]


# With where it makes sense: the smallest batch.
IMPLEMENTATIONS: dict[str, tuple[Callable[[Tensor, int], Tensor], int]] = {
    "balora cuda": (balora_with("cuda"), 1),
    "balora torch": (balora_with("torch"), 1),
    "torch.svd_lowrank, batched": (lowrank, 1),
    "torch.svd_lowrank, a loop": (lowrank_loop, 2),
}


def matrices(batch: int, m: int, n: int, dtype: torch.dtype) -> Tensor:
    """Random, with a spectrum that decays like 1/i: columns of random numbers, scaled."""
    g = torch.Generator(DEVICE).manual_seed(0)
    scale = torch.arange(1, n + 1, device=DEVICE) ** -1.0
    out = torch.empty(batch, m, n, dtype=dtype, device=DEVICE)
    for matrix in out:
        matrix.copy_(torch.randn(m, n, generator=g, device=DEVICE) * scale / m**0.5)
    return out


def exact_values(a: Tensor, rank: int) -> Tensor:
    """From the smaller Gram matrix in float64: exact to 1e-8 of the largest."""
    a = a.double()
    gram = a @ a.mT if a.shape[-2] <= a.shape[-1] else a.mT @ a
    return torch.linalg.eigvalsh(gram).flip(-1)[..., :rank].clamp_min(0).sqrt()


def measure(shape: tuple[int, ...], dtype: torch.dtype, names: list[str], rounds: int, bandwidth: float) -> list[dict]:
    batch, m, n, rank = shape
    a = matrices(batch, m, n, dtype)
    checked = a[: max(1, min(batch, 4))]
    exact = exact_values(checked, rank)
    torch.manual_seed(0)
    # Two sketches of equal quality differ by chance: one seed may be twice as good as the other.
    allowed = 4 * harness.error(lowrank(checked, rank), exact) + 1e-6
    common = {"operation": "randomized_svd", "batch": batch, "m": m, "n": n, "rank": rank, "dtype": str(dtype)[6:]}
    floor = 1e3 * PASSES * a.numel() * a.element_size() / bandwidth
    rows, runs = [{**common, "implementation": f"floor: {PASSES} readings of A", "ms": f"{floor:.3g}"}], {}
    for name in names:
        function, smallest = IMPLEMENTATIONS[name]
        if batch < smallest:
            continue
        row = {**common, "implementation": name}
        rows.append(row)
        if name == "balora cuda" and (reasons := dispatch.why_not("cuda", a.device)):
            row["note"] = "; ".join(reasons)
            continue
        harness.progress(f"{name}: correctness")
        found = harness.error(function(checked, rank), exact)
        row["error"] = f"{found:.1e}"
        if name.startswith("balora") and not found <= allowed:
            raise SystemExit(f"{name} {common}: error {found:.2e} of a singular value, allowed {allowed:.2e}")
        runs[name] = lambda function=function: function(a, rank)
    seconds = harness.interleaved(runs, rounds, warm_up=2 if ON_GPU else 1)
    medians = {name: harness.median_and_spread(found) for name, found in seconds.items()}
    base = medians.get("balora cuda", medians.get("balora torch"))
    for row in rows[1:]:
        if row["implementation"] in medians:
            ms, spread = medians[row["implementation"]]
            row |= {"ms": f"{ms:.3g}", "spread": f"{spread:.2g}", "floors": f"{ms / floor:.2f}"}
            if base:
                row["ratio"] = f"{ms / base[0]:.2f}"
    return rows


def kernels(shape: tuple[int, ...], dtype: torch.dtype) -> list[dict]:
    """The kernels of one call, with their times."""
    batch, m, n, rank = shape
    a = matrices(batch, m, n, dtype)
    run = balora_with("cuda")
    run(a, rank)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(a, rank)
        torch.cuda.synchronize()
    found = [e for e in profile.key_averages() if e.device_time_total > 0]
    found.sort(key=lambda e: -e.device_time_total)
    return [{"kernel": e.key[:60], "launches": e.count, "us": f"{e.device_time_total:.1f}"} for e in found]


def svd_term(rounds: int) -> dict:
    """The part of linear_objective that its SVD term takes, by leaving it out."""
    n, d, vocab = (8192, 4096, 131072) if ON_GPU else (512, 1024, 32000)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(n, d, generator=g, device=DEVICE).to(dtype)
    teacher = (hidden + 0.1 * torch.randn(n, d, generator=g, device=DEVICE)).to(dtype)
    weight = (torch.randn(vocab, d, generator=g, device=DEVICE) / d**0.5).to(dtype)
    labels = torch.randint(vocab, (n,), generator=g, device=DEVICE)
    head = balora.LinearHead(weight)

    def run(weight_of_svd: float) -> Callable[[], None]:
        config = balora.BALoraConfig(lambda_svd=weight_of_svd)
        leaf = hidden.clone().requires_grad_()

        def once() -> None:
            leaf.grad = None
            F.linear_objective(leaf, teacher, head, labels, config).loss.backward()

        return once

    seconds = harness.interleaved({"with": run(0.005), "without": run(0.0)}, rounds, warm_up=2)
    whole, rest = (harness.median_and_spread(seconds[name])[0] for name in ("with", "without"))
    shape = {"N": n, "d": d, "V": vocab, "dtype": str(dtype)[6:]}
    return {**shape, "ms": f"{whole:.4g}", "without": f"{rest:.4g}", "share": f"{100 * (whole - rest) / whole:.1f} %"}


COLUMNS = {
    "implementation": "implementation",
    "ms": "ms",
    "spread": "±",
    "floors": "× floor",
    "ratio": "× balora",
    "error": "error of a singular value",
    "note": "",
}


def _shape(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if len(numbers) != 4 or not all(n.isdigit() and int(n) > 0 for n in numbers):
        raise argparse.ArgumentTypeError(f"expected batch,m,n,rank, as 1,2048,32000,10; found {text!r}")
    return tuple(map(int, numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [(1, 512, 8000, 10), (64, 256, 128, 16), (4, 1024, 1024, 16)]
    if ON_GPU:
        shapes = [(1, 2048, 32000, 10), (64, 512, 2048, 16), (1024, 512, 2048, 16)]
    parser.add_argument("--shapes", nargs="+", type=_shape, default=shapes, metavar="batch,m,n,rank")
    default = ["bfloat16", "float32"] if ON_GPU else ["float32"]
    parser.add_argument("--dtypes", nargs="+", default=default, choices=["bfloat16", "float16", "float32"])
    names = list(IMPLEMENTATIONS)
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=10 if ON_GPU else 7)
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.csv")
    arguments = parser.parse_args()
    bandwidth = harness.copy_bandwidth()
    machine = {**harness.machine(), "copy": f"{bandwidth / 1e9:.0f} GB/s"}
    text = ["# The randomized SVD", "", ", ".join(f"{k} {v}" for k, v in machine.items())]
    print("\n".join(text))
    everything: list[dict] = []

    def add(part: str, rows: list[dict]) -> None:
        text.append(part)
        print(part, flush=True)
        everything.extend({**row, **machine} for row in rows)
        if arguments.out:
            arguments.out.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
            harness.write_csv(arguments.out.with_suffix(".csv"), everything)

    for shape in arguments.shapes:
        for dtype in (getattr(torch, name) for name in arguments.dtypes):
            rows = measure(shape, dtype, arguments.only, arguments.rounds, bandwidth)
            title = f"\n## {shape[0]} of {shape[1]} × {shape[2]}, rank {shape[3]}, {str(dtype)[6:]}\n\n"
            add(title + harness.table(rows, COLUMNS), rows)
            if ON_GPU and not dispatch.why_not("cuda") and "balora cuda" in arguments.only:
                listed = kernels(shape, dtype)
                columns = {"kernel": "kernel", "launches": "launches", "us": "µs in all"}
                add("\n" + harness.table(listed, columns), [])
    found = svd_term(arguments.rounds)
    columns = {"N": "N", "d": "d", "V": "V", "dtype": "type", "ms": "ms", "without": "without the term"}
    title = "\n## The SVD term within linear_objective\n\n"
    add(title + harness.table([found], {**columns, "share": "its share"}), [{"operation": "svd_term", **found}])


if __name__ == "__main__":
    sys.exit(main())
