"""PiSSA set-up of the attention and MLP weights of a Llama, against peft's ``pissa`` and ``pissa_niter_16``.

All give A₀ and B₀ in the weights' type: balora as ``get_pissa_model`` does, in batches; peft one weight after the
other, by the decompositions that its ``LoraLayer.pissa_init`` calls (the residual W − BA that it computes too is left
out). The gate: how far ‖W − B₀A₀‖ is above the least of that rank, from all singular values, on a few weights: at most
1e-3, or what ``pissa_niter_16`` is. The weights are random: a flat spectrum with a heavy head, as language models have
it. The floor: bare products W·Ω and YᵀW with r columns, the least of a decomposition by sketches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from balora import principal

from . import harness
from .harness import DEVICE
from .operation import Case, Defaults, Function, Implementation, Operation, Shape, own

HEAD = 512  # directions above the flat part of the spectrum
BATCH_BYTES = 2**29
Pairs = list[tuple[Tensor, Tensor]]


def balora_in_batches(weights: list[Tensor], rank: int) -> Pairs:
    found: Pairs = []
    for batch in principal.batches(weights, [rank] * len(weights), BATCH_BYTES):
        found += principal.factors([weights[i] for i in batch], rank, [1.0] * len(batch))
    return found


def peft_niter_16(weights: list[Tensor], rank: int) -> Pairs:
    return [_pair(w, *torch.svd_lowrank(w.float(), q=rank, niter=16)) for w in weights]


def peft_exact(weights: list[Tensor], rank: int) -> Pairs:
    found = []
    for w in weights:
        u, s, vh = torch.linalg.svd(w.float(), full_matrices=False)
        found.append(_pair(w, u[:, :rank], s[:rank], vh[:rank].T))
    return found


def _pair(w: Tensor, u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    root = torch.diag(s.sqrt())
    return (u @ root).to(w.dtype), (root @ v.T).to(w.dtype)


def random_weight(m: int, n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """0.02·(G + Σ_i c_i·l_i r_iᵀ), all random: σ_i falls like 6/√i of the largest σ of G, until that leads."""
    scale = 6 * (m**-0.5 + n**-0.5) * torch.arange(1, HEAD + 1, device=DEVICE) ** -0.5
    left, right = (torch.randn(side, HEAD, generator=g, device=DEVICE) for side in (m, n))
    w = torch.randn(m, n, generator=g, device=DEVICE)
    return (0.02 * w.addmm_(left * scale, right.T)).to(dtype)


class PissaSetup(Case):
    floor_name = "2 bare products"

    def __init__(self, shape: Shape, dtype: torch.dtype, terms: str) -> None:
        layers, d, ffn, self._rank = shape
        g = torch.Generator(DEVICE).manual_seed(0)
        sides = [(d, d)] * 4 + [(ffn, d)] * 2 + [(d, ffn)]
        self._weights = [random_weight(m, n, dtype, g) for _ in range(layers) for m, n in sides]
        self._checked = self._weights[2:5]  # two of them of one shape
        numel = sum(w.numel() for w in self._weights)
        self.share = sum(w.numel() for w in self._checked) / numel
        self.held = numel * dtype.itemsize

    def floor(self) -> Callable[[], None]:
        omega = {w.shape[1]: w.new_ones(w.shape[1], self._rank) for w in self._weights}

        def run() -> None:
            for w in self._weights:
                y = w @ omega[w.shape[1]]
                y.T @ w

        return run

    def run(self, function: Function) -> Callable[[], object]:
        return lambda: function(self._weights, self._rank)

    def small(self, function: Function) -> Callable[[], object]:
        return lambda: function(self._checked, self._rank)

    @cached_property
    def _least(self) -> list[float]:
        """‖W − W_r‖ / ‖W‖ of the best matrices of that rank."""
        # σ² are the eigenvalues of the smaller Gram matrix; what is beyond the rank holds most of ‖W‖.
        wide = [w.double() if len(w) <= w.shape[1] else w.double().T for w in self._checked]
        squares = [torch.linalg.eigvalsh(w @ w.T).flip(0) for w in wide]
        return [(s[self._rank :].sum() / s.sum()).sqrt().item() for s in squares]

    @cached_property
    def _allowed(self) -> float:
        return max(1e-3, self._above_least(peft_niter_16))

    def _above_least(self, function: Function) -> float:
        torch.manual_seed(0)
        above = []
        for w, (b0, a0), least in zip(self._checked, self.small(function)(), self._least, strict=True):  # type: ignore[call-overload]
            wide = w.double()
            above.append(((wide - b0.double() @ a0.double()).norm() / wide.norm()).item() / least - 1)
        return max(above)

    def errors(self, function: Function) -> dict[str, harness.Error]:
        return {"excess": harness.Error(self._above_least(function), self._allowed)}


OPERATION = Operation(
    name="pissa_setup",
    axes=("layers", "d", "ffn", "rank"),
    case=PissaSetup,
    implementations=(
        own("batched", balora_in_batches),
        Implementation("peft-pissa-niter-16", peft_niter_16),
        Implementation("peft-pissa", peft_exact, note="torch.linalg.svd"),
    ),
    cpu=Defaults([(2, 1024, 2752, 128)], ["bfloat16"]),
    gpu=Defaults([(8, 4096, 11008, 128)], ["bfloat16"]),  # a quarter of LLaMA-2-7B
)
