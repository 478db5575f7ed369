"""Singular values of the logits from [d, d] matrices: the vocabulary never appears.

With Z = H Wᵀ, G = WᵀW = C Cᵀ and S = HᵀH, the squared singular values of Z are the eigenvalues of Cᵀ S C, and with its
eigenvectors x_i and g_i = C x_i the gradient of −Σ_{i≤k} σ_i / ‖Z‖_F by H is H·K, K a [d, d] matrix. Two products of
N·d² replace a singular value decomposition of [N, V].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Up to this hidden size a full symmetric eigendecomposition costs less than it is worth to avoid.
_EIGH_MAX_D = 512
# Block Krylov: the span of all steps together, not the last step alone. On the flat spectrum of random matrices, the
# worst case (N 2048, d 1024, V 32,000), the largest error of a σ is 1.6e-5; subspace iteration leaves 1.4e-2.
_STEPS = 12
_OVERSAMPLE = 10
_SEED = 0
_ROWS = 4096  # rows that are widened to the accumulation type at a time


class HeadGram(NamedTuple):
    """G = WᵀW and a factor C with C Cᵀ = G, both [d, d] in the accumulation type."""

    gram: Tensor  # [d, d]
    factor: Tensor  # [d, d]


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 on the CPU and for float64 inputs, else float32.

    A Gram matrix squares the condition of the logits: in float32 a σ_i a hundred times below σ_1 keeps three digits,
    and one a thousand times below it is lost. float64 costs a CPU twice the time of a product that is d/V of the
    whole; most GPUs would pay 64 times.
    """
    return torch.float64 if tensor.device.type == "cpu" or tensor.dtype == torch.float64 else torch.float32


def gram(rows: Tensor) -> Tensor:
    """rowsᵀ rows, accumulated in ``accumulation_dtype``. rows [n, d] -> [d, d]."""
    dtype = accumulation_dtype(rows)
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=dtype, device=rows.device)
    for block in rows.split(_ROWS):
        wide = block.to(dtype)
        total.addmm_(wide.T, wide)
    return total


def head_gram(weight: Tensor) -> HeadGram:
    """The Gram matrix of a head and its factor. Once for a frozen head: V·d² operations. weight [V, d]."""
    g = gram(weight.detach())
    factor, info = torch.linalg.cholesky_ex(g)
    if not torch.isfinite(g).all():
        factor = torch.full_like(g, torch.nan)
    elif info.item() != 0:  # singular: fewer rows than columns, or dependent ones
        values, vectors = torch.linalg.eigh(g)
        factor = vectors * values.clamp_min(0).sqrt()
    return HeadGram(g, factor)


def svd_ratio(hidden: Tensor, head: HeadGram, rank: int, vocab: int, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """−Σ_{i≤k} σ_i(H Wᵀ) / ‖H Wᵀ‖_F and, if asked for, its gradient by H (2025 paper, eq. 11).

    Exact for d ≤ 512. Above, 12 steps of block Krylov iteration from a seeded start, k + 10 columns wide: the same bits
    on every run. Of a zero matrix the value is 0, and so is its gradient; a σ_i of 0 adds nothing to the gradient.

    hidden [N, d] with N ≥ 1 -> value [], gradient [N, d], both in ``accumulation_dtype``.
    """
    s = gram(hidden)  # [d, d]
    g, c = head
    s, g, c = s.to(c.dtype), g.to(c.dtype), c.to(c.dtype)
    rank = min(rank, hidden.shape[0], vocab, hidden.shape[1])
    values, vectors = _leading_eigenpairs(s, c, rank)  # [k], [d, k]
    # Below the rounding of the Gram matrices an eigenvalue is noise, and its direction arbitrary: it counts as 0.
    noise = values[:1] * torch.finfo(s.dtype).eps * 8
    values = torch.where(values <= noise, torch.zeros_like(values), values)  # keeps NaN
    sigma = values.sqrt()
    norm = (s * g).sum().clamp_min(0).sqrt()  # ‖Z‖_F
    zero = norm == 0
    norm = norm.masked_fill(zero, 1.0)
    value = -(sigma.sum() / norm)
    if not need_grad:
        return value, None
    directions = c @ vectors  # [d, k]: the g_i
    inverse = torch.where(sigma == 0, torch.zeros_like(sigma), 1.0 / sigma)
    k = (sigma.sum() / norm**3) * g - (directions * (inverse / norm)) @ directions.T  # [d, d]
    k = k.masked_fill(zero, 0.0)
    return value, torch.cat([block.to(k.dtype) @ k for block in hidden.split(_ROWS)])


def _leading_eigenpairs(s: Tensor, c: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues of Cᵀ S C, descending, and their vectors. s, c [d, d] -> [k], [d, k]."""
    d = len(s)
    width = k + _OVERSAMPLE
    if d <= _EIGH_MAX_D or _STEPS * width >= d:
        values, vectors = _eigh(c.T @ s @ c)
        return values[-k:].flip(0), vectors[:, -k:].flip(1)
    start = torch.Generator().manual_seed(_SEED)
    x = torch.randn(d, width, generator=start, dtype=torch.float64).to(s)  # [d, k + 10]
    blocks = []
    for _ in range(_STEPS):
        x = torch.linalg.qr(c.T @ (s @ (c @ x))).Q
        blocks.append(x)
    basis = torch.linalg.qr(torch.cat(blocks, dim=1)).Q  # [d, 12 (k + 10)]
    y = c @ basis
    values, small = _eigh(y.T @ (s @ y))
    return values[-k:].flip(0), basis @ small[:, -k:].flip(1)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric eigendecomposition, ascending; NaN in, NaN out (LAPACK raises; a diverged run must show)."""
    if torch.isfinite(matrix).all():
        return torch.linalg.eigh(matrix)
    return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)
