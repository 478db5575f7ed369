"""The randomized SVD against torch.svd_lowrank, one matrix and batches.

Every implementation but the full decomposition has rank + 10 columns and 2 power iterations, so it reads A six times:
the floor is as many bytes, moved by copies (of bfloat16 matrices of 129 to 512 rows the kernels read four times). The
gate: the singular values against those of a full decomposition in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from balora import functional

from . import harness
from .harness import DEVICE
from .operation import Case, Defaults, Function, Implementation, Operation, Shape, own

OVERSAMPLE, N_ITER = 10, 2
PASSES = 2 * (N_ITER + 1)


def lowrank(a: Tensor, rank: int) -> tuple[Tensor, ...]:
    return torch.svd_lowrank(a.float(), q=rank + OVERSAMPLE, niter=N_ITER)


def lowrank_loop(a: Tensor, rank: int) -> tuple[Tensor, ...]:
    return tuple(torch.stack(parts) for parts in zip(*(lowrank(matrix, rank) for matrix in a), strict=True))


def balora_with(impl: str) -> Callable[[Tensor, int], tuple[Tensor, ...]]:
    return lambda a, rank: functional.randomized_svd(a, rank, OVERSAMPLE, N_ITER, impl=impl)


def exact_values(a: Tensor, rank: int) -> Tensor:
    """From the smaller Gram matrix in float64: exact to 1e-8 of the largest."""
    a = a.double()
    gram = a @ a.mT if a.shape[-2] <= a.shape[-1] else a.mT @ a
    return torch.linalg.eigvalsh(gram).flip(-1)[..., :rank].clamp_min(0).sqrt()


class RandomizedSVD(Case):
    """Matrices with a spectrum that decays like 1/i: columns of random numbers, scaled."""

    floor_name = f"copies of {PASSES} passes"

    def __init__(self, shape: Shape, dtype: torch.dtype, terms: str) -> None:
        batch, m, n, self._rank = shape
        g = torch.Generator(DEVICE).manual_seed(0)
        scale = torch.arange(1, n + 1, device=DEVICE) ** -1.0
        self._a = torch.empty(batch, m, n, dtype=dtype, device=DEVICE)
        for matrix in self._a:
            matrix.copy_(torch.randn(m, n, generator=g, device=DEVICE) * scale / m**0.5)
        self._checked = self._a[:4]
        self.share = len(self._checked) / batch
        self.held = self._a.numel() * dtype.itemsize

    def floor(self) -> Callable[[], None]:
        return harness.copies(self._a, PASSES)

    def run(self, function: Function) -> Callable[[], object]:
        return lambda: function(self._a, self._rank)

    def small(self, function: Function) -> Callable[[], object]:
        return lambda: function(self._checked, self._rank)

    def errors(self, function: Function) -> dict[str, harness.Error]:
        exact = exact_values(self._checked, self._rank)
        torch.manual_seed(0)
        plain = harness.error(lowrank(self._checked, self._rank)[1][..., : self._rank], exact)
        found = harness.error(function(self._checked, self._rank)[1][..., : self._rank], exact)
        # Two sketches of equal quality differ by chance: one seed may be twice as good as the other.
        return {"σ": harness.Error(found, 4 * plain + 1e-6)}


OPERATION = Operation(
    name="randomized_svd",
    axes=("batch", "m", "n", "rank"),
    case=RandomizedSVD,
    implementations=(
        own("cuda", balora_with("cuda")),
        own("torch", balora_with("torch")),
        own("reference", balora_with("reference"), note="torch.linalg.svd"),
        Implementation("svd-lowrank", lowrank, note="torch.svd_lowrank of the batch"),
        Implementation("svd-lowrank-loop", lowrank_loop, note="of one matrix after the other"),
    ),
    cpu=Defaults([(1, 512, 8000, 10), (64, 256, 128, 16), (4, 1024, 1024, 16)], ["float32"]),
    gpu=Defaults([(1, 2048, 32000, 10), (64, 512, 2048, 16), (1024, 512, 2048, 16)], ["bfloat16", "float32"]),
)
