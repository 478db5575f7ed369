"""consistency_loss and diversity_loss on logits, forward and backward, against the bandwidth of a copy.

    python benchmarks/logit_losses.py                                   # what runs on this machine, to the terminal
    python benchmarks/logit_losses.py --shapes 2048,32000 --out benchmarks/results/logit-losses

The floor is the bytes that no method can avoid, at the bandwidth of a copy measured in the same run: each logit read
once forward and once backward, the gradient written once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
import torch
from torch import Tensor

from balora import functional as F
from balora import reference

ON_GPU = torch.cuda.is_available()
K, T = 20, 2.0


def _plain(loss):
    """The equation, everything materialized; half precision is widened, as the published code does."""
    return lambda z, t: loss(z.to(torch.promote_types(z.dtype, torch.float32)), t) / len(z)


# loss -> name -> function of student's and teacher's logits
IMPLEMENTATIONS = {
    "consistency": {
        "balora triton": lambda z, t: F.consistency_loss(z, t, T, impl="triton"),
        "balora streaming": lambda z, t: F.consistency_loss(z, t, T, impl="streaming"),
        "torch": _plain(lambda z, t: reference.consistency(z, t.to(z.dtype), T)),
    },
    "diversity": {
        "balora triton": lambda z, t: F.diversity_loss(z, K, impl="triton"),
        "balora streaming": lambda z, t: F.diversity_loss(z, K, impl="streaming"),
        "torch": _plain(lambda z, t: reference.diversity(z, K)),
    },
}
# Bytes of a logit's type: read forward, read backward, written. The entropy's backward reads K entries of a row alone.
PASSES = {"consistency": (2, 2, 1), "diversity": (1, 0, 1)}


def logits(n: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    device = "cuda" if ON_GPU else "cpu"
    g = torch.Generator(device).manual_seed(0)
    z = 3 * torch.randn(n, vocab, generator=g, device=device)
    teacher = z + 0.3 * torch.randn(n, vocab, generator=g, device=device)
    return z.to(dtype).requires_grad_(), teacher.to(dtype)


def forward_backward(function, z: Tensor, teacher: Tensor) -> harness.Run:
    def run() -> tuple[Tensor, dict[str, Tensor]]:
        loss = function(z, teacher)
        (grad,) = torch.autograd.grad(loss, z)
        return loss.detach(), {"logits": grad}

    return run


def measure(loss: str, n: int, vocab: int, dtype: torch.dtype, rounds: int, bandwidth: float) -> list[dict]:
    z, teacher = logits(n, vocab, dtype)
    few = min(n, 64)
    small = z.detach()[:few].clone().requires_grad_(), teacher[:few]
    wide = tuple(x.detach().double().requires_grad_() for x in small)
    plain = forward_backward(IMPLEMENTATIONS[loss]["torch"], *small)
    exact = forward_backward(IMPLEMENTATIONS[loss]["torch"], *wide)
    rows, runs = [], {}
    for name, function in IMPLEMENTATIONS[loss].items():
        row = {"loss": loss, "N": n, "V": vocab, "dtype": str(dtype)[6:], "implementation": name}
        rows.append(row)
        if name == "balora triton" and not ON_GPU:
            row["note"] = "needs a CUDA device"
            continue
        harness.progress(f"{name}: correctness")
        within, errors = harness.gate(forward_backward(function, *small), plain, exact, dtype)
        row |= {f"error_{key}": f"{value:.1e}" for key, value in errors.items()}
        if not within and name.startswith("balora"):
            raise SystemExit(f"{name}, {loss}, {dtype}: outside the error budget: {errors}")
        runs[name] = forward_backward(function, z, teacher)
        if ON_GPU:
            peak = harness.peak_memory(runs[name]) - z.numel() * z.element_size()
            row["peak_MiB"] = f"{peak / harness.MIB:.0f}"
    seconds = harness.interleaved(runs, rounds, warm_up=3 if ON_GPU else 1)
    needed = sum(PASSES[loss]) * z.numel() * z.element_size()
    for row in rows:
        if row["implementation"] in seconds:
            ms, spread = harness.median_and_spread(seconds[row["implementation"]])
            share = needed / bandwidth * 1e3 / ms
            row |= {"ms": f"{ms:.2f}", "spread": f"{spread:.2f}", "floor": f"{1e3 * needed / bandwidth:.2f}"}
            row |= {"share": f"{100 * share:.0f} %"}
    return rows


def _shape(text: str) -> tuple[int, int]:
    numbers = text.split(",")
    if len(numbers) != 2 or not all(n.isdigit() and int(n) > 0 for n in numbers):
        raise argparse.ArgumentTypeError(f"expected N,V, as 2048,32000; found {text!r}")
    return int(numbers[0]), int(numbers[1])


COLUMNS = {
    "loss": "loss",
    "implementation": "implementation",
    "ms": "ms",
    "spread": "±",
    "floor": "ms for the bytes needed",
    "share": "of a copy's bandwidth",
    "peak_MiB": "MiB beyond inputs and gradients",
    "error_loss": "error of the loss",
    "error_logits": "of the gradient",
    "note": "",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [(8192, 32000), (8192, 131072), (16, 131072)] if ON_GPU else [(256, 32000)]
    parser.add_argument("--shapes", nargs="+", type=_shape, default=shapes, metavar="N,V")
    names = ["bfloat16", "float32"]
    parser.add_argument("--dtypes", nargs="+", default=names[:1] if ON_GPU else names, choices=[*names, "float16"])
    parser.add_argument("--rounds", type=int, default=20 if ON_GPU else 7)
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.csv")
    arguments = parser.parse_args()
    machine = harness.machine()
    bandwidth = harness.copy_bandwidth()
    machine["copy"] = f"{bandwidth / 1e9:.0f} GB/s"
    text = ["# Losses on logits, forward and backward", "", ", ".join(f"{k} {v}" for k, v in machine.items())]
    print("\n".join(text))
    everything = []
    for n, vocab in arguments.shapes:
        for dtype in arguments.dtypes:
            rows = [
                row
                for loss in IMPLEMENTATIONS
                for row in measure(loss, n, vocab, getattr(torch, dtype), arguments.rounds, bandwidth)
            ]
            harness.progress("")
            text.append(f"\n## N {n}, V {vocab}, {dtype}\n\n" + harness.table(rows, COLUMNS))
            print(text[-1], flush=True)
            everything += [{**row, **machine} for row in rows]
    if arguments.out:
        arguments.out.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
        harness.write_csv(arguments.out.with_suffix(".csv"), everything)


if __name__ == "__main__":
    main()
