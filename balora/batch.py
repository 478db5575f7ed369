"""Terms of the whole batch, from tiles of the logits: SVD, covariance, normalized squares.

With M = Z Zᵀ [N, N], or Zᵀ Z [V, V] where that is smaller, the gradient of a singular value, or of the sum of squared
covariances, is a small matrix times Z. So one pass over tiles (of columns, or of rows) collects M, and a second one
writes the gradient; nothing of size [N, V] is held. Accumulated, and multiplied, in ``spectral.accumulation_dtype``: a
product with 1/σ_i rounded to float32 would lose what it cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import spectral

_TILE_BYTES = 16 * 2**20
_SMALL = 2**26  # operations; below it all decompositions are direct ones


class BatchTerms(NamedTuple):
    """Each [], with its sign; 0 where it was not asked for."""

    consistency: Tensor  # ‖Z_P/‖Z_P‖ − Z/‖Z‖‖²
    covariance: Tensor  # (1/V) Σ_{i≠j} Cov²_ij
    svd: Tensor  # −(Σ_{i≤k} σ_i/‖Z‖ + α·Var)


Tile = Callable[[slice, slice], tuple[Tensor, Tensor | None]]


class Batch:
    """The terms of Z [N, V], and the gradient of λ₁·consistency + λ₂·covariance + λ₃·svd. A λ of 0 leaves a term out.

    ``solve`` once, then ask for the ``gradient`` of every tile.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        like: Tensor,
        *,
        lambda_consistency: float = 0.0,
        lambda_covariance: float = 0.0,
        lambda_svd: float = 0.0,
        rank: int = 1,
        norm: str = "fro",
        variance: float = 0.0,
    ) -> None:
        self.n, self.vocab = shape
        self.by_columns = self.vocab > self.n  # tiles of columns, M = Z Zᵀ; else tiles of rows, M = Zᵀ Z
        self.like, self.itemsize = like, like.itemsize
        # Float64 costs a GPU nothing where the products are as small as those of a classifier's logits.
        small = self.n * self.vocab * min(shape) <= _SMALL and like.device.type in ("cpu", "cuda")
        self.dtype = torch.float64 if small else spectral.accumulation_dtype(like)
        self.lambdas = lambda_consistency, lambda_covariance, lambda_svd
        self.rank, self.norm, self.variance = rank, norm, variance
        new = like.new_zeros
        side = min(shape)
        self.gram: Tensor | None = None
        self.centred = new(side, side, dtype=self.dtype) if lambda_covariance else None  # of Z − Z̄
        self.squares = new((), dtype=self.dtype)  # Σ_j (Σ_m (Z − Z̄)²_mj)²
        self.shift: Tensor | None = None  # [V], near the mean of the columns; of tiles of rows
        self.excess = new(self.vocab if not self.by_columns else 0, dtype=self.dtype)  # Σ (Z − shift)
        self.products = new(3, dtype=self.dtype)  # ‖Z‖²_F, ‖Z_P‖²_F, ⟨Z_P, Z⟩

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """The rows and the columns of each tile."""
        short, long = sorted((self.n, self.vocab))
        step = max(1, _TILE_BYTES // (max(short, 1) * self.itemsize))
        for start in range(0, long, step):
            part = slice(start, min(start + step, long))
            yield (slice(0, self.n), part) if self.by_columns else (part, slice(0, self.vocab))

    def _collect(self, z: Tensor, z_teacher: Tensor | None = None) -> None:
        """A tile of the first pass. z, z_teacher [n, v]."""
        wide = z.to(self.dtype)
        if self.gram is not None:
            self.gram += wide @ wide.T if self.by_columns else wide.T @ wide
        if self.centred is not None and self.by_columns:
            centred = wide - wide.mean(0)
            self.centred += centred @ centred.T
            self.squares += centred.square().sum(0).square().sum()
        elif self.centred is not None:
            if self.shift is None:
                self.shift = wide.mean(0)
            shifted = wide - self.shift
            self.centred += shifted.T @ shifted
            self.excess += shifted.sum(0)
        if z_teacher is not None:
            teacher = z_teacher.to(self.dtype)
            self.products += torch.stack([(wide * wide).sum(), (teacher * teacher).sum(), (teacher * wide).sum()])

    def solve(self, tile: Tile, cheap: bool = False) -> BatchTerms:
        """The values; what ``gradient`` needs is kept.

        tile(rows, columns) gives the logits there, and the teacher's or None. ``cheap`` says that this costs no more
        than a copy: then a large SVD takes many passes over them instead of the product Z Zᵀ.
        """
        side = min(self.n, self.vocab)
        passes = cheap and self.norm == "fro" and spectral.iterates(side, self.rank)
        if self.lambdas[2] and not passes:
            self.gram = self.squares.new_zeros(side, side)
        if self.gram is not None or self.lambdas[0] or self.lambdas[1]:
            for at in self.tiles():
                self._collect(*tile(*at))
        consistency = covariance = svd = torch.zeros_like(self.squares)
        if self.lambdas[0]:
            norms = self.products[:2].sqrt()
            norms = torch.where(norms == 0, torch.ones_like(norms), norms)
            self.norm_student, self.norm_teacher = norms
            units = self.products[:2] / norms**2  # 1, or 0 of a zero matrix
            self.cosine = self.products[2] / norms.prod()
            consistency = (units.sum() - 2 * self.cosine).clamp_min(0)
        if self.centred is not None:
            # Of one row everything is 0: any number but 0 divides it.
            self.per_pair = 1 / (self.vocab * max(self.n - 1, 1) ** 2)
            if self.by_columns:
                total = (self.centred.square().sum() - self.squares).clamp_min(0)
            else:
                m = self.centred - torch.outer(self.excess, self.excess) / max(self.n, 1)
                self.centred = m - m.diag().diag()  # what is left are the pairs i ≠ j
                total = self.centred.square().sum()
            covariance = total * self.per_pair
        if self.gram is not None:
            self.svd = spectral.svd_term(self.gram, None, self.rank, side, norm=self.norm, variance=self.variance)
            svd = self.svd.value
        elif self.lambdas[2]:

            def sides() -> Iterator[Tensor]:
                for at in self.tiles():
                    z = tile(*at)[0]
                    yield z if self.by_columns else z.T

            self.svd = spectral.svd_term_of_tiles(sides, side, self.like, self.rank, self.variance)
            svd = self.svd.value
        return BatchTerms(consistency, covariance, svd)

    def gradient(self, z: Tensor, z_teacher: Tensor | None = None) -> Tensor:
        """The gradient by a tile. z, z_teacher [n, v] -> [n, v] in the type of z."""
        lambda_consistency, lambda_covariance, lambda_svd = self.lambdas
        wide = z.to(self.dtype)
        total = torch.zeros_like(wide)
        if lambda_svd:
            u, weights = self.svd.directions, (lambda_svd * self.svd.weights)[:, None]
            if self.by_columns:
                total.addmm_(u, weights * (u.T @ wide))
            else:
                total.addmm_(wide @ u, weights * u.T)
            total.add_(lambda_svd * self.svd.multiple * wide)
        if self.centred is not None:
            if self.by_columns:
                centred = wide - wide.mean(0)
                pairs = self.centred @ centred - centred * centred.square().sum(0)
            else:
                assert self.shift is not None
                pairs = (wide - self.shift - self.excess / self.n) @ self.centred
            total += (4 * lambda_covariance * self.per_pair) * pairs
        if lambda_consistency and z_teacher is not None:
            weight = 2 * lambda_consistency / self.norm_student
            total += (weight * self.cosine / self.norm_student) * wide
            total -= (weight / self.norm_teacher) * z_teacher.to(self.dtype)
        return total.to(z.dtype)
