"""linear_objective, forward and backward, against what people use: time, the floor beside it, peak memory.

    python benchmarks/linear_objective.py                       # the CPU table, to the terminal
    python benchmarks/linear_objective.py --out benchmarks/results/linear-objective-cpu
    python benchmarks/linear_objective.py --shapes 512,1024,32000 --dtypes float32 --rounds 9

The floor is what any method pays: bare products of N·V·d in the inputs' own type, three with a teacher (its logits, the
student's, the gradient by the hidden states), two for the cross-entropy alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

import balora

ALL = balora.BALoraConfig()
CONFIGS = {
    "all": ALL,
    "ce + kl": replace(ALL, lambda_diversity=0.0, lambda_svd=0.0, temperature=1.0),
    "ce": replace(ALL, lambda_consistency=0.0, lambda_diversity=0.0, lambda_svd=0.0),
}
GATE_ROWS = 320


class Problem:
    """Random inputs: logits of size 3, the teacher a tenth of the hidden states away."""

    def __init__(self, n: int, d: int, vocab: int, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        hidden = torch.randn(n, d, generator=g)
        self.hidden = hidden.to(device, dtype).requires_grad_()
        self.teacher = (hidden + 0.1 * torch.randn(n, d, generator=g)).to(device, dtype)
        self.weight = (3 * torch.randn(vocab, d, generator=g) / d**0.5).to(device, dtype)
        self.labels = torch.randint(vocab, (n,), generator=g).to(device)
        self.head = balora.LinearHead(self.weight)

    def first(self, n: int, dtype: torch.dtype | None = None) -> Problem:
        """The same problem with fewer rows, in another type."""
        part = object.__new__(Problem)
        part.hidden = self.hidden.detach()[:n].to(dtype or self.hidden.dtype).clone().requires_grad_()
        part.teacher, part.weight = (t.to(dtype or t.dtype) for t in (self.teacher[:n], self.weight))
        part.labels = self.labels[:n]
        part.head = self.head if dtype is None else balora.LinearHead(part.weight)
        return part


def objective(impl: str):
    def run(p: Problem, config: balora.BALoraConfig) -> Tensor:
        return balora.functional.linear_objective(p.hidden, p.teacher, p.head, p.labels, config, impl=impl).loss

    return run


def naive(p: Problem, config: balora.BALoraConfig) -> Tensor:
    """The objective as the published code computes it: logits of both models in full, softmaxes over them, autograd,
    ``torch.svd_lowrank`` with q = 15 and two iterations."""
    z = p.hidden @ p.weight.T
    wide = z.float()
    loss = F.cross_entropy(wide, p.labels)
    if config.lambda_consistency:
        t = config.temperature
        with torch.no_grad():
            z_teacher = (p.teacher @ p.weight.T).float()
        kl = F.kl_div((wide / t).log_softmax(-1), (z_teacher / t).softmax(-1), reduction="batchmean")
        loss = loss + config.lambda_consistency * t**2 * kl
    if config.lambda_diversity:
        q = wide.topk(config.entropy_top_k, dim=-1).values.softmax(-1)
        loss = loss + config.lambda_diversity * (q * (q + 1e-12).log()).sum(-1).mean()
    if config.lambda_svd:
        sigma = torch.svd_lowrank(wide, q=15, niter=2)[1]
        loss = loss - config.lambda_svd * sigma[: int(config.svd_rank)].sum() / torch.linalg.matrix_norm(wide)
    return loss


def compiled(p: Problem, config: balora.BALoraConfig) -> Tensor:
    return _compiled(p, config)


_compiled = torch.compile(naive)


def torch_linear_cross_entropy(p: Problem, config: balora.BALoraConfig) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(p.hidden, p.weight, p.labels, options=options)


def liger_chunked(p: Problem, config: balora.BALoraConfig) -> Tensor:
    """Liger's chunked distillation loss with beta 0 (KL, teacher first, T = 1; it weights CE and KL by halves of 2)."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1.0, weight_soft_loss=config.lambda_consistency, beta=0.0, compiled=False, chunk_size=256
    )
    found = loss(p.hidden, p.weight, p.teacher, p.weight, p.labels)
    return found[0] if isinstance(found, tuple) else found


def _has_linear_cross_entropy() -> str | None:
    return None if hasattr(torch.nn, "LinearCrossEntropyOptions") else "this torch has no chunked linear_cross_entropy"


def _has_liger() -> str | None:
    try:
        import liger_kernel.chunked_loss  # noqa: F401
    except ImportError as missing:
        return f"not importable: {missing}"
    return None


# name -> (function, terms it has, why it cannot run here)
IMPLEMENTATIONS = {
    "balora streaming": (objective("streaming"), ("all", "ce + kl", "ce"), lambda: None),
    "naive": (naive, ("all", "ce + kl", "ce"), lambda: None),
    "naive, torch.compile": (compiled, ("all",), lambda: None),
    "torch linear_cross_entropy": (torch_linear_cross_entropy, ("ce",), _has_linear_cross_entropy),
    "liger chunked JSD, beta 0": (liger_chunked, ("ce + kl",), _has_liger),
}


def forward_backward(function, p: Problem, config: balora.BALoraConfig) -> harness.Run:
    def run() -> tuple[Tensor, dict[str, Tensor]]:
        loss = function(p, config)
        # not backward(): a leaf's .grad is a copy, which the hidden states of a model, no leaf, do not have
        (grad,) = torch.autograd.grad(loss, p.hidden)
        return loss.detach(), {"hidden": grad}

    return run


def floor(p: Problem, products: int):
    n, vocab = len(p.hidden), len(p.weight)
    hidden = p.hidden.detach()
    logits = hidden.new_empty(n, vocab)
    out = torch.empty_like(hidden)

    def run() -> None:
        for _ in range(products - 1):
            torch.mm(hidden, p.weight.T, out=logits)
        torch.mm(logits, p.weight, out=out)

    return run


def measure(n: int, d: int, vocab: int, dtype: torch.dtype, terms: str, names: list[str], rounds: int) -> list[dict]:
    config = CONFIGS[terms]
    p = Problem(n, d, vocab, dtype)
    small = p.first(min(n, GATE_ROWS))
    plain = forward_backward(objective("reference"), small, config)
    exact = forward_backward(objective("reference"), small.first(n, torch.float64), config)
    products = 3 if config.lambda_consistency else 2
    common = {"operation": "linear_objective", "terms": terms, "N": n, "d": d, "V": vocab, "dtype": str(dtype)[6:]}
    rows, runs = [], {}
    for name in names:
        function, has, why_not = IMPLEMENTATIONS[name]
        if terms not in has:
            continue
        row = {**common, "implementation": name}
        rows.append(row)
        if reason := why_not():
            row["note"] = reason
            continue
        harness.progress(f"{name}: correctness")
        within, errors = harness.gate(forward_backward(function, small, config), plain, exact, dtype)
        row |= {f"error_{key}": f"{value:.1e}" for key, value in errors.items()}
        row["within_budget"] = "yes" if within else "no"
        if not within and name.startswith("balora"):
            raise SystemExit(f"{name} {common}: outside the error budget: {errors}")
        runs[name] = forward_backward(function, p, config)
    seconds = harness.interleaved({"floor": floor(p, products), **runs}, rounds)
    base, spread = harness.median_and_spread(seconds["floor"])
    rows.insert(0, {**common, "implementation": f"floor: {products} bare products", "ms": _number(base)})
    rows[0] |= {"spread": _number(spread), "ratio": "1.00"}
    for row in rows[1:]:
        name = row["implementation"]
        if name not in runs:
            continue
        ms, spread = harness.median_and_spread(seconds[name])
        row |= {"ms": _number(ms), "spread": _number(spread), "ratio": f"{ms / base:.2f}"}
        harness.progress(f"{name}: memory")
        found = harness.in_fresh_process(__file__, name, terms, f"{n},{d},{vocab}", str(dtype)[6:])
        row["peak_MiB"] = found.get("error") or f"{found['peak'] / harness.MIB:.0f}"
    harness.progress("")
    return rows


def _number(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 10 else f"{ms:.2f}"


def _shape(text: str) -> tuple[int, int, int]:
    numbers = text.split(",")
    if len(numbers) != 3 or not all(n.isdigit() and int(n) > 0 for n in numbers):
        raise argparse.ArgumentTypeError(f"expected N,d,V, as 512,1024,32000; found {text!r}")
    n, d, vocab = map(int, numbers)
    return n, d, vocab


def child(name: str, terms: str, shape: str, dtype: str) -> None:
    """Peak memory beyond inputs and gradients. A small call first loads code and caches what a frozen head keeps."""
    torch.set_num_threads(2)
    p = Problem(*map(int, shape.split(",")), getattr(torch, dtype))
    function, config = IMPLEMENTATIONS[name][0], CONFIGS[terms]
    forward_backward(function, p.first(8), config)()
    run = forward_backward(function, p, config)
    gradients = p.hidden.numel() * p.hidden.element_size()
    print(json.dumps({"peak": harness.peak_memory(run) - gradients}))


COLUMNS = {
    "terms": "terms",
    "implementation": "implementation",
    "ms": "ms",
    "spread": "±",
    "ratio": "× floor",
    "peak_MiB": "MiB beyond inputs and gradients",
    "error_loss": "error of the loss",
    "error_hidden": "of the gradient",
    "within_budget": "within the budget",
    "note": "",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [(512, 1024, 32000), (2048, 576, 49152)]
    parser.add_argument("--shapes", nargs="+", type=_shape, default=shapes, metavar="N,d,V")
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtypes", nargs="+", default=dtypes, choices=[*dtypes, "float16", "float64"])
    parser.add_argument("--terms", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument(
        "--only", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS), metavar="NAME"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", nargs="*", type=int, default=[8192], help="memory of balora at these N too")
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.csv")
    arguments = parser.parse_args()
    machine = harness.machine()
    everything = []
    text = ["# linear_objective, forward and backward", "", ", ".join(f"{k} {v}" for k, v in machine.items())]
    print("\n".join(text))
    for n, d, vocab in arguments.shapes:
        for dtype in arguments.dtypes:
            rows = []
            for terms in arguments.terms:
                rows += measure(n, d, vocab, getattr(torch, dtype), terms, arguments.only, arguments.rounds)
            for more in arguments.rows:
                found = harness.in_fresh_process(__file__, "balora streaming", "all", f"{more},{d},{vocab}", dtype)
                peak = found.get("error") or f"{found['peak'] / harness.MIB:.0f}"
                common = {
                    "operation": "linear_objective",
                    "terms": "all",
                    "N": more,
                    "d": d,
                    "V": vocab,
                    "dtype": dtype,
                }
                rows.append({**common, "implementation": f"balora streaming at N {more}", "peak_MiB": peak})
            text.append(f"\n## N {n}, d {d}, V {vocab}, {dtype}\n\n" + harness.table(rows, COLUMNS))
            print(text[-1], flush=True)
            everything += [{**row, **machine} for row in rows]
            if arguments.out:
                arguments.out.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
                harness.write_csv(arguments.out.with_suffix(".csv"), everything)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
