"""The objective in chunks of rows, with hand-written gradients: plain PyTorch, any device, never [N, V] in memory.

A chunk of rows has its logits in one reused buffer. Small blocks of it, which stay in the cache, are turned into loss
terms and, in place, into the gradient by the logits; one product then turns the chunk into the gradient by the hidden
states. The arithmetic is float32 (float64 for float64 inputs); a half-precision head is widened a tile at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK_BYTES = 80 * 2**20  # the logits and difference logits of a chunk
_BLOCK_BYTES = 2 * 2**20  # a block of rows that is worked on at once; its temporaries should stay in the cache
_TILE_BYTES = 16 * 2**20  # a widened tile of the head


class TokenTerms(NamedTuple):
    """Sums over the rows, and the gradient of ``CE + λ₁·consistency + λ₂·diversity`` by the hidden states."""

    ce: Tensor  # []
    consistency: Tensor  # [], with its T²
    diversity: Tensor  # [], with its sign
    grad_hidden: Tensor | None  # [N, d], float32 or float64


def token_terms(
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    *,
    teacher_weight: Tensor | None = None,
    lambda_consistency: float,
    lambda_diversity: float,
    temperature: float,
    top_k: int,
    need_grad: bool,
) -> TokenTerms:
    """Cross-entropy, consistency and diversity of N valid tokens, and the gradient of their weighted sum.

    Nothing is divided by the number of tokens. A term whose λ is 0 is not computed, and is 0.

    hidden, teacher_hidden [N, d] (the teacher may be None if λ₁ is 0), weight [V, d], labels [N] in [0, V). A teacher
    with a head of its own has teacher_weight [V, d_T] and teacher_hidden [N, d_T].
    """
    n, d = hidden.shape
    vocab = weight.shape[0]
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    if lambda_consistency == 0:
        teacher_hidden = None

    row_bytes = vocab * dtype.itemsize
    chunk_rows = max(1, min(n, _CHUNK_BYTES // (row_bytes * (1 if teacher_hidden is None else 2))))
    block_rows = max(1, min(chunk_rows, _BLOCK_BYTES // row_bytes))
    z = hidden.new_empty(chunk_rows, vocab, dtype=dtype)
    delta = None if teacher_hidden is None else torch.empty_like(z)
    rows = hidden.new_zeros(3, n, dtype=dtype)  # CE, KL and −entropy of each row
    grad_hidden = hidden.new_zeros(n, d, dtype=dtype) if need_grad else None

    for start in range(0, n, chunk_rows):
        stop = min(start + chunk_rows, n)
        h = hidden[start:stop].to(dtype)  # [c, d]
        difference = None
        if teacher_hidden is not None and teacher_weight is None:
            # Z_P − Z = (H_P − H) Wᵀ: subtracted before the product, so that its error is relative to the difference.
            difference = teacher_hidden[start:stop].to(dtype) - h
        for columns, tile in _tiles(weight, dtype):
            torch.mm(h, tile.T, out=z[: stop - start, columns])
            if difference is not None and delta is not None:
                torch.mm(difference, tile.T, out=delta[: stop - start, columns])
        if teacher_hidden is not None and teacher_weight is not None and delta is not None:
            for columns, tile in _tiles(teacher_weight, dtype):
                torch.mm(teacher_hidden[start:stop].to(dtype), tile.T, out=delta[: stop - start, columns])
            delta[: stop - start] -= z[: stop - start]
        for first in range(start, stop, block_rows):
            last = min(first + block_rows, stop)
            here = slice(first - start, last - start)
            rows[:, first:last] = _block(
                z[here],
                None if delta is None else delta[here],
                labels[first:last],
                lambda_consistency,
                lambda_diversity,
                temperature,
                top_k,
                need_grad,
            )
        if grad_hidden is not None:
            for columns, tile in _tiles(weight, dtype):
                grad_hidden[start:stop].addmm_(z[: stop - start, columns], tile)

    ce, kl, negative_entropy = rows.sum(-1)
    return TokenTerms(ce, temperature**2 * kl, negative_entropy, grad_hidden)


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in ``dtype``, whole where it has that type already, else a tile of the vocabulary at a time."""
    vocab, d = weight.shape
    step = vocab if weight.dtype == dtype else max(1, _TILE_BYTES // (d * dtype.itemsize))
    for start in range(0, vocab, step):
        yield slice(start, min(start + step, vocab)), weight[start : start + step].to(dtype)


def _block(
    z: Tensor,
    delta: Tensor | None,
    labels: Tensor,
    lambda_consistency: float,
    lambda_diversity: float,
    temperature: float,
    top_k: int,
    need_grad: bool,
) -> Tensor:
    """CE, KL and −entropy of each row [3, b]; if asked for, z [b, V] is overwritten by the gradient of their sum."""
    terms = z.new_zeros(3, z.shape[0])
    labels = labels[:, None]  # [b, 1]
    shifted = z - z.amax(-1, keepdim=True)  # [b, V]
    probability = shifted.exp()
    total = probability.sum(-1, keepdim=True)  # [b, 1]
    terms[0] = (total.log() - shifted.gather(-1, labels)).squeeze(-1)

    top: Tensor | None = None
    if lambda_diversity != 0:
        top = _top_k_indices(z, top_k)  # [b, K]
        log_q = z.gather(-1, top).log_softmax(-1)
        q = log_q.exp()
        q_log_q = torch.where(q == 0, torch.zeros_like(q), q * log_q)  # a −inf logit contributes 0
        terms[2] = q_log_q.sum(-1)
        # d(−H)/dz_j = q_j (log q_j + H) inside the top K, 0 outside.
        top_grad = lambda_diversity * (q_log_q - q * terms[2, :, None])

    kl_grad: Tensor | None = None
    if delta is not None:
        if temperature == 1:
            p_student = probability / total
        else:
            p_student = (shifted / temperature).exp_()
            p_student /= p_student.sum(-1, keepdim=True)
        terms[1], kl_grad = _kl(p_student, shifted, delta, temperature)

    if need_grad:
        torch.div(probability, total, out=z)
        z.scatter_add_(-1, labels, z.new_full(labels.shape, -1.0))
        if kl_grad is not None:
            # T² · KL: one factor T is in the KL itself, see _kl.
            z.add_(kl_grad, alpha=lambda_consistency * temperature)
        if top is not None:
            z.scatter_add_(-1, top, top_grad)
    return terms


def _kl(p_student: Tensor, shifted: Tensor, delta: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(P ‖ S) of each row [b], and p_S − p_P [b, V], from δ = Z_P − Z. δ is overwritten.

    With Δ = lse_P − lse_S = log1p(Σ p_S·expm1(δ/T)) and u = δ/T − Δ: p_P − p_S = p_S·expm1(u), and
    KL = Σ p_S·(u·eᵘ − expm1(u)), a sum of terms of one sign. Neither subtracts two rounded probabilities, so both keep
    their relative accuracy however close the teacher is.
    """
    delta.div_(temperature)
    far = ~(delta.abs().amax(-1) <= 1)  # a row with a NaN counts as far
    if not far.any():
        lse_difference = (p_student * delta.expm1()).sum(-1, keepdim=True).log1p_()  # [b, 1]
        u = delta.sub_(lse_difference)
        growth = u.expm1()
        # u·eᵘ − expm1(u), with eᵘ = growth + 1
        kl = (p_student * (u * growth - (growth - u))).sum(-1)
        return kl, growth.mul_(p_student).neg_()
    kl = torch.empty_like(delta[:, 0])
    grad = torch.empty_like(delta)
    near = ~far
    if near.any():
        kl[near], grad[near] = _kl(p_student[near], shifted[near], delta[near], 1.0)
    kl[far], grad[far] = _kl_far(p_student[far], shifted[far] / temperature, delta[far])
    return kl, grad


def _kl_far(p_student: Tensor, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """``_kl`` where some |δ| > 1 (everything already divided by T): guarded against e^δ that overflows.

    An element with a large δ takes the difference of two probabilities, which is then no cancellation; one with a
    small δ keeps expm1. Δ is the log1p of the sum while that sum is small, else the difference of the log-sum-exps.
    """
    lse_student = x.exp().sum(-1, keepdim=True).log()  # x ≤ 0, its maximum is 0
    x_teacher = x + delta
    growth = torch.where(delta.abs() <= 1, p_student * delta.expm1(), (x_teacher - lse_student).exp() - p_student)
    total = growth.sum(-1, keepdim=True)
    top = x_teacher.amax(-1, keepdim=True)
    lse_teacher = (x_teacher - top).exp().sum(-1, keepdim=True).log() + top
    lse_difference = torch.where(total.abs() <= 0.5, total.log1p(), lse_teacher - lse_student)
    p_teacher = (x_teacher - lse_teacher).exp()
    u = delta - lse_difference
    growth = u.expm1()
    near = u.abs() <= 1
    terms = torch.where(near, p_student * (u * growth - (growth - u)), p_teacher * u - p_teacher + p_student)
    return terms.sum(-1), torch.where(near, -p_student * growth, p_student - p_teacher)


def _top_k_indices(z: Tensor, top_k: int) -> Tensor:
    """The K largest entries of each row, ties across the K-th place to the lower index. z [b, V] -> [b, min(K, V)]."""
    vocab = z.shape[-1]
    k = min(top_k, vocab)
    values, indices = z.topk(min(k + 1, vocab), dim=-1)
    if k < vocab:
        # topk breaks ties as it likes; only a tie between the K-th and the next matters to the set that it picks.
        tied = values[:, k - 1] == values[:, k]
        if tied.any():
            indices[tied, :k] = z[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return indices[:, :k]
