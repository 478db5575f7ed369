"""linear_objective, forward and backward, against what people use: time, the floor beside it, peak memory.

    python benchmarks/linear_objective.py                       # the CPU's or the GPU's table, to the terminal
    python benchmarks/linear_objective.py --out benchmarks/results/linear-objective-cpu
    python benchmarks/linear_objective.py --shapes 512,1024,32000 --dtypes float32 --rounds 9

The floor is what any method pays: bare products of N·V·d in the inputs' own type, three with a teacher (its logits, the
student's, the gradient by the hidden states), two for the cross-entropy alone. Beside balora's Triton path stands how
many bytes it moves, counted from the shapes, and how long they take at the bandwidth of a copy.
"""

from __future__ import annotations

import argparse
import importlib
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
    "kl": replace(ALL, lambda_consistency=1.0, lambda_diversity=0.0, lambda_svd=0.0, temperature=1.0),  # without CE
}
ON_GPU = torch.cuda.is_available()
GATE_ROWS = 64 if ON_GPU else 320


class Problem:
    """Random inputs: logits of size 3, the teacher a tenth of the hidden states away."""

    def __init__(self, n: int, d: int, vocab: int, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(0)
        device = "cuda" if ON_GPU else "cpu"
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


def naive_kl(p: Problem, config: balora.BALoraConfig) -> Tensor:
    z = (p.hidden @ p.weight.T).to(torch.promote_types(p.hidden.dtype, torch.float32))
    with torch.no_grad():
        z_teacher = (p.teacher @ p.weight.T).to(z.dtype)
    return F.kl_div(z.log_softmax(-1), z_teacher.softmax(-1), reduction="batchmean")


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


def liger_fused(p: Problem, config: balora.BALoraConfig) -> Tensor:
    """Liger's fused linear JSD with beta 0: KL, teacher first, without CE."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.0)(p.hidden, p.weight, p.teacher, p.weight)


def liger_kl(p: Problem, config: balora.BALoraConfig) -> Tensor:
    """Takes the teacher's probabilities, all of them at once."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    with torch.no_grad():
        target = (p.teacher @ p.weight.T).softmax(-1)
    return LigerFusedLinearKLDivLoss()(p.hidden, p.weight, target)


def liger_ce(p: Problem, config: balora.BALoraConfig) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(p.weight, p.hidden, p.labels)


def cut_cross_entropy(p: Problem, config: balora.BALoraConfig) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(p.hidden, p.weight, p.labels)


def _needs(module: str) -> str | None:
    if not ON_GPU:
        return "needs a CUDA device"
    try:
        importlib.import_module(module)
    except ImportError as missing:
        return f"not importable: {missing}"
    return None


def _has_triton() -> str | None:
    return None if ON_GPU else "needs a CUDA device"


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
    "balora triton": (objective("triton"), ("all", "ce + kl", "ce"), _has_triton),
    "balora streaming": (objective("streaming"), ("all", "ce + kl", "ce"), lambda: None),
    "naive": (naive, ("all", "ce + kl", "ce"), lambda: None),
    "naive, torch.compile": (compiled, ("all",), lambda: None),
    "torch linear_cross_entropy": (torch_linear_cross_entropy, ("ce",), _has_linear_cross_entropy),
    "liger chunked JSD, beta 0": (liger_chunked, ("ce + kl",), _has_liger),
    "liger FLCE": (liger_ce, ("ce",), lambda: _needs("liger_kernel.transformers")),
    "cut cross-entropy": (cut_cross_entropy, ("ce",), lambda: _needs("cut_cross_entropy")),
    "naive, KL": (naive_kl, ("kl",), lambda: None),
    "liger fused JSD, beta 0": (liger_fused, ("kl",), lambda: _needs("liger_kernel.transformers")),
    "liger fused KL": (liger_kl, ("kl",), lambda: _needs("liger_kernel.transformers.fused_linear_kl_div")),
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


def bytes_moved(n: int, d: int, vocab: int, dtype: torch.dtype, config: balora.BALoraConfig) -> int:
    """Bytes that the Triton path reads and writes in device memory, counted from the shapes.

    Of each logit: the student's in float32, written once and read twice; the difference and the gradient in the inputs'
    type, the one written and read twice, the other written and read. Of each chunk the head, once for each product.
    """
    from balora_kernels import tiles

    size = dtype.itemsize
    kl = config.lambda_consistency != 0
    logit = 3 * 4 + 3 * size * kl + 2 * size
    rows = tiles.chunk_rows(n, vocab * (4 + size * max(1, kl)), balora.fused.CHUNK_BYTES)
    products = 3 if kl else 2
    return n * vocab * logit + -(-n // rows) * products * vocab * d * size + 4 * n * d * size


def measure(
    n: int, d: int, vocab: int, dtype: torch.dtype, terms: str, names: list[str], rounds: int, bandwidth: float
) -> list[dict]:
    config = CONFIGS[terms]
    p = Problem(n, d, vocab, dtype)
    small = p.first(min(n, GATE_ROWS))
    oracle = naive_kl if terms == "kl" else objective("reference")
    plain = forward_backward(oracle, small, config)
    exact = forward_backward(oracle, small.first(n, torch.float64), config)
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
        try:
            within, errors = harness.gate(forward_backward(function, small, config), plain, exact, dtype)
            if ON_GPU:
                row["peak_MiB"] = f"{(_peak(function, p, config)) / harness.MIB:.0f}"
        except (RuntimeError, TypeError, NotImplementedError) as broken:  # a peer's: out of memory, another interface
            if name.startswith("balora"):
                raise
            row["note"] = f"{type(broken).__name__}: {str(broken).splitlines()[0][:100]}"
            continue
        row |= {f"error_{key}": f"{value:.1e}" for key, value in errors.items()}
        row["within_budget"] = "yes" if within else "no"
        if not within and name.startswith("balora"):
            raise SystemExit(f"{name} {common}: outside the error budget: {errors}")
        runs[name] = forward_backward(function, p, config)
    seconds = harness.interleaved({"floor": floor(p, products), **runs}, rounds, warm_up=3 if ON_GPU else 1)
    base, spread = harness.median_and_spread(seconds["floor"])
    rows.insert(0, {**common, "implementation": f"floor: {products} bare products", "ms": _number(base)})
    rows[0] |= {"spread": _number(spread), "ratio": "1.00"}
    for row in rows[1:]:
        name = row["implementation"]
        if name not in runs:
            continue
        ms, spread = harness.median_and_spread(seconds[name])
        row |= {"ms": _number(ms), "spread": _number(spread), "ratio": f"{ms / base:.2f}"}
        if name == "balora triton":
            moved = bytes_moved(n, d, vocab, dtype, config)
            row |= {"GB_moved": f"{moved / 1e9:.1f}", "ms_moved": _number(1e3 * moved / bandwidth)}
        if ON_GPU:
            continue
        harness.progress(f"{name}: memory")
        found = harness.in_fresh_process(__file__, name, terms, f"{n},{d},{vocab}", str(dtype)[6:])
        row["peak_MiB"] = found.get("error") or f"{found['peak'] / harness.MIB:.0f}"
    harness.progress("")
    return rows


def _peak(function, p: Problem, config: balora.BALoraConfig) -> int:
    """Device memory beyond inputs and gradients. A small call first loads code and caches what a frozen head keeps."""
    forward_backward(function, p.first(8), config)()
    gradients = p.hidden.numel() * p.hidden.element_size()
    return harness.peak_memory(forward_backward(function, p, config)) - gradients


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
    "GB_moved": "GB moved",
    "ms_moved": "ms at a copy's bandwidth",
    "error_loss": "error of the loss",
    "error_hidden": "of the gradient",
    "within_budget": "within the budget",
    "note": "",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [(512, 1024, 32000), (2048, 576, 49152)]
    if ON_GPU:
        shapes = [(8192, 4096, 131072), (8192, 2304, 256000), (8192, 4096, 32000), (2048, 4096, 32000)]
    parser.add_argument("--shapes", nargs="+", type=_shape, default=shapes, metavar="N,d,V")
    dtypes = ["float32", "bfloat16"]
    default = ["bfloat16"] if ON_GPU else dtypes
    parser.add_argument("--dtypes", nargs="+", default=default, choices=[*dtypes, "float16", "float64"])
    parser.add_argument("--terms", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument(
        "--only", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS), metavar="NAME"
    )
    parser.add_argument("--rounds", type=int, default=10 if ON_GPU else 7)
    parser.add_argument(
        "--rows", nargs="*", type=int, default=[] if ON_GPU else [8192], help="memory of balora at these N too"
    )
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.csv")
    arguments = parser.parse_args()
    machine = harness.machine()
    bandwidth = harness.copy_bandwidth()
    machine["copy"] = f"{bandwidth / 1e9:.0f} GB/s"
    everything = []
    text = ["# linear_objective, forward and backward", "", ", ".join(f"{k} {v}" for k, v in machine.items())]
    print("\n".join(text))
    for n, d, vocab in arguments.shapes:
        for dtype in arguments.dtypes:
            rows = []
            for terms in arguments.terms:
                rows += measure(n, d, vocab, getattr(torch, dtype), terms, arguments.only, arguments.rounds, bandwidth)
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
