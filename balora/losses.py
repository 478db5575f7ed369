"""Losses on logits that are there already: forward and backward in blocks, no softmax stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import batch, dispatch, fused, operators, reference, streaming
from .checks import as_scalar, check_normalizer, check_positive, check_rank, check_whole, describe
from .config import rank_of
from .precision import float32_products

_SKETCH, _POWER = 64, 4  # the widest sketch that the kernels have, and its power iterations


def consistency_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 2.0,
    valid: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    impl: str = "auto",
) -> Tensor:
    """T² · mean_n KL( softmax(Z_P,n / T) ‖ softmax(Z_n / T) ), teacher first (2025 paper, eq. 4 and 9).

    No softmax is stored: forward and backward each read the logits once, in float32 arithmetic. The gradient,
    T (softmax(Z/T) − softmax(Z_P/T)) / n, goes to the student alone, in its type.

    Args:
        student_logits: Z [N, V] or [B, S, V], floating point, of any strides.
        teacher_logits: Z_P, of the same shape and device.
        temperature: T, above 0. 1 is the 2024 paper's (eq. 10).
        valid: a boolean mask of the leading shape; rows that are False are left out. None: all rows.
        normalizer: what the sum over rows is divided by, instead of their number.
        impl: "auto", "streaming", "triton" (CUDA devices, not for float64; no copy of logits of other strides, no
            wait for the device) or "reference". "auto" takes "triton" where that runs.

    Returns:
        [] in float32 (float64 for float64 logits). Without a valid row a 0 that is still connected.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    check_logits("student_logits", student_logits, valid)
    check_same_logits("teacher_logits", teacher_logits, "student_logits", student_logits)
    check_positive("temperature", temperature)
    impl = _choose("consistency_loss", impl, student_logits)
    student, kept, norm = _rows(student_logits, valid, normalizer, impl)
    teacher, _, _ = _rows(teacher_logits.detach(), None, 1.0, impl)
    with torch.autocast(student.device.type, enabled=False):
        if impl == "reference":
            return reference.consistency(_wide(student, kept), _wide(teacher, kept), temperature) / norm
        return _Consistency.apply(
            student, teacher, temperature, kept, norm, operators if impl == "triton" else streaming
        )


class _Consistency(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, z_teacher, temperature, kept, norm, backend):
        total, saved = backend.consistency(z, z_teacher, temperature, kept)
        ctx.save_for_backward(z, z_teacher, kept, norm, saved)
        ctx.temperature, ctx.backend = temperature, backend
        return (total / norm).to(torch.promote_types(z.dtype, torch.float32))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        z, z_teacher, kept, norm, saved = ctx.saved_tensors
        scale = (grad_loss / norm).to(torch.promote_types(z.dtype, torch.float32))
        out = torch.empty_like(z)
        ctx.backend.consistency_gradient(z, z_teacher, ctx.temperature, kept, saved, out, scale)
        return out, *[None] * 5


def diversity_loss(
    logits: Tensor,
    top_k: int = 20,
    valid: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    impl: str = "auto",
) -> Tensor:
    """− mean_n H( softmax of Z_n restricted to its own K largest entries ), in nats (2025 paper, eq. 10).

    No temperature, not divided by log K; ties across the K-th place go to the lower index. Only K entries of a row
    have a gradient, q_j (log q_j + H) / n: they are kept from the forward, nothing of size [N, V] but the gradient is
    written.

    Args:
        logits: Z [N, V] or [B, S, V], floating point, of any strides.
        top_k: K, at least 1; above V it means V.
        valid, normalizer, impl: as in ``consistency_loss``.

    Returns:
        [] in float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    check_logits("logits", logits, valid)
    check_whole("top_k", top_k)
    impl = _choose("diversity_loss", impl, logits, min(top_k, logits.shape[-1]))
    z, kept, norm = _rows(logits, valid, normalizer, impl)
    with torch.autocast(z.device.type, enabled=False):
        if impl == "reference":
            return reference.diversity(_wide(z, kept), top_k) / norm
        return _Diversity.apply(z, top_k, kept, norm, operators if impl == "triton" else streaming)


class _Diversity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, top_k, kept, norm, backend):
        total, gradient, where = backend.diversity(z, top_k, kept)
        ctx.save_for_backward(gradient, where, kept if len(where) != z.numel() // z.shape[-1] else None, norm)
        ctx.like = z.shape, z.dtype
        return (total / norm).to(gradient.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        gradient, where, kept, norm = ctx.saved_tensors  # kept: where gradient has rows for the valid ones alone
        shape, dtype = ctx.like
        out = torch.zeros(shape, dtype=dtype, device=gradient.device)
        scaled = (gradient * (grad_loss / norm).to(gradient.dtype)).to(dtype)
        rows = out.view(-1, shape[-1])
        if kept is None:
            rows.scatter_(1, where, scaled)
        else:
            rows[kept[:, None], where] = scaled
        return out, *[None] * 4


def svd_loss(
    logits: Tensor, rank: float = 10, norm: str = "fro", valid: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """− Σ_{i≤k} σ_i(Z) / ‖Z‖, not centred; the rows are those of the batch (2025 paper, eq. 7 and 11).

    The gradient is −Σ_{i≤k} u_i v_iᵀ / ‖Z‖ plus a multiple of Z, of which a σ_i of 0 has no part.

    "streaming": exact up to the rounding of the smaller Gram matrix of Z where min(N, V) ≤ 512 or the norm is nuclear.
    Else by block Krylov iteration, twelve passes over tiles of Z: on a flat random spectrum, the worst case, 2e-4 off
    (2048 × 4096), and the gradient by 0.5 to 6 % (600 × 900, 1024 × 2048), since there is hardly a leading direction;
    where the spectrum falls, to the rounding of float32. "cuda": a sketch of 64 columns and four power
    iterations, ten readings of Z and nothing of its size but the gradient. It is for spectra that fall, as those of
    language models do: on real logits (stories15M, N 913) the value is 3e-8 off, the gradient 1e-5. On a flat one, of
    512 × 8000 random logits, the value is 2.5e-2 off and the gradient has other directions: none is a leading one
    (both with this sketch in float32 on a CPU).

    Args:
        logits: Z [N, V] or [B, S, V], floating point, of any strides.
        rank: k, a whole number of at least 1, or (a float) a fraction of all min(N, V) singular values. Above their
            number it means all.
        norm: "fro" (Frobenius) or "nuclear" (the sum of all singular values).
        valid: as in ``consistency_loss``. For "cuda" the rows that count are copied, where not all do.
        impl: "auto", "streaming", "cuda" (CUDA devices, the compiled extension; norm "fro", k ≤ 54, not for float64;
            without a mask no wait for the device) or "reference". "auto" takes "streaming", which holds for any logits.

    Returns:
        [] in float32 (float64 for float64 logits). Of a zero matrix, or without a valid row, a connected 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    check_logits("logits", logits, valid)
    check_rank("rank", rank)
    if norm not in ("fro", "nuclear"):
        raise ValueError(f"norm: expected 'fro' or 'nuclear', found {norm!r}")
    z, kept, _ = _rows(logits, valid, None, impl)
    n = len(z) if kept is None else len(kept)
    k = rank_of(rank, min(n, z.shape[1]))
    limit = None
    if norm != "fro" or z.dtype == torch.float64:
        limit = f"its norm is 'fro' and its arithmetic float32, asked for are {norm!r} and {z.dtype}"
    elif k > _SKETCH - 10:
        limit = f"{k} singular values are asked for, its sketch is good for {_SKETCH - 10}"
    impl = dispatch.choose("svd_loss", impl, z.device, {"cuda": limit})
    with torch.autocast(z.device.type, enabled=False):
        if impl == "reference":
            wide = _wide(z, kept)
            return reference.svd(wide, k, norm) if n else (0.0 * wide).sum()
        if impl == "cuda":
            return _SketchedSVD.apply(z, kept, k)
        return batch_term(z, kept, lambda_svd=1.0, rank=k, norm=norm)


class _SketchedSVD(torch.autograd.Function):
    """−Σσ/‖Z‖_F by the operators of the extension: of a sketch, and of a rank-k update for the gradient."""

    @staticmethod
    def forward(ctx, z, kept, k):
        ctx.save_for_backward(z)
        if 0 in (z.shape if kept is None else kept.shape):
            return z.new_zeros((), dtype=torch.float32)
        rows = z if kept is None else z[kept]
        u, s, vh, squares = torch.ops.balora.randomized_svd(rows, k, _SKETCH - k, _POWER, 0)
        squares = squares.masked_fill(squares == 0, 1.0)
        value = -(s.double() / squares.sqrt()).sum()  # in float64: a square may leave the range of float32
        noise = s <= s[:1] * torch.finfo(s.dtype).eps  # of a rank below k: no direction, no gradient
        weights = (-1 / squares.sqrt()).expand_as(s).masked_fill(noise, 0.0)
        ctx.save_for_backward(z, kept, rows, u, weights, vh, -value / squares)
        return value.to(s.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        z, *rest = ctx.saved_tensors
        if not rest:
            return torch.zeros_like(z), None, None
        kept, rows, u, weights, vh, multiple = rest
        weights, multiple = ((grad_loss.double() * t).to(u.dtype) for t in (weights, multiple))
        grad = torch.ops.balora.low_rank_update(rows, u, weights, vh, multiple)
        if kept is not None:
            grad = torch.zeros_like(z).index_copy_(0, kept, grad)
        return grad, None, None


def covariance_loss(logits: Tensor) -> Tensor:
    """(1/C) Σ_{i≠j} Cov(Z)²_ij, Cov = (Z − Z̄)ᵀ(Z − Z̄)/(M − 1) (2024 paper, eq. 6 and 7; 2025, eq. 5 and 6).

    From the smaller of the [C, C] and [M, M] matrices. The implementation is what BALORA_IMPL names, or "streaming".

    Args:
        logits: Z [M, C], the class logits of a batch, floating point.

    Returns:
        [] in float32 (float64 for float64 logits). Of fewer than two rows a 0 that is still connected.

    Raises:
        ValueError, TypeError: the logits do not fit.
    """
    impl = dispatch.choose("covariance_loss")
    check_logits("logits", logits, None)
    z, _, _ = _rows(logits, None, None, impl)
    with torch.autocast(z.device.type, enabled=False):
        if impl == "reference":
            return reference.covariance(_wide(z, None))
        return batch_term(z, None, lambda_covariance=1.0)


def batch_term(z: Tensor, kept: Tensor | None, z_teacher: Tensor | None = None, **terms: Any) -> Tensor:
    """The sum of the terms of the whole batch, as ``batch.Batch`` names and weights them, of the kept rows (None: all).

    z, z_teacher [N, V] -> [] in float32 (float64).
    """
    count = len(z) if kept is None else len(kept)
    if "rank" in terms:
        terms["rank"] = rank_of(terms["rank"], min(count, z.shape[1]))
    return _Batch.apply(z, kept, z_teacher, terms)


class _Batch(torch.autograd.Function):
    """Terms of the whole batch, from logits."""

    @staticmethod
    def forward(ctx, z, kept, z_teacher, terms):
        wide = torch.promote_types(z.dtype, torch.float32)
        n = len(z) if kept is None else len(kept)
        ctx.solver = None
        ctx.save_for_backward(z, kept, z_teacher)
        if n == 0:
            return z.new_zeros((), dtype=wide)
        solver = batch.Batch((n, z.shape[1]), z.new_empty(0, dtype=wide), **terms)
        with float32_products():
            found = solver.solve(lambda *at: _tile(z, kept, z_teacher, *at), cheap=True)
        ctx.solver = solver
        return (found.consistency + found.covariance + found.svd).to(wide)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        z, kept, z_teacher = ctx.saved_tensors
        out = torch.zeros_like(z)
        if ctx.solver is not None:
            with torch.autocast(z.device.type, enabled=False), float32_products():
                for row, column in ctx.solver.tiles():
                    gradient = ctx.solver.gradient(*_tile(z, kept, z_teacher, row, column)) * grad_loss
                    out[row if kept is None else kept[row], column] = gradient.to(out.dtype)
        return out, None, None, None


def _tile(
    z: Tensor, kept: Tensor | None, z_teacher: Tensor | None, row: slice, column: slice
) -> tuple[Tensor, Tensor | None]:
    """A tile of the kept rows of both logits, in float32 (float64)."""
    at = row if kept is None else kept[row]
    wide = torch.promote_types(z.dtype, torch.float32)
    return z[at, column].to(wide), None if z_teacher is None else z_teacher[at, column].to(wide)


def _choose(operation: str, impl: str, logits: Tensor, top_k: int = 1) -> str:
    limit = None
    if logits.dtype == torch.float64:
        limit = "its arithmetic is float32, the logits are float64"
    elif top_k > fused.TOP_K_MAX:
        limit = f"of top_k and V the smaller is {top_k}, it has {fused.TOP_K_MAX} at most"
    return dispatch.choose(operation, impl, logits.device, {"triton": limit})


def check_logits(name: str, logits: Any, valid: Any) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor [N, V], found {describe(logits)}")
    if logits.dim() < 2 or logits.shape[-1] == 0:
        raise ValueError(
            f"{name}: expected the shape [N, V] or [B, S, V] with V of at least 1, found {describe(logits)}"
        )
    if valid is not None:
        if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
            raise TypeError(f"valid: expected a boolean tensor, found {describe(valid)}")
        if valid.shape != logits.shape[:-1] and valid.shape != (logits.shape[:-1].numel(),):
            raise ValueError(
                f"valid: expected the leading shape of {name}, {list(logits.shape[:-1])}, found {describe(valid)}"
            )
        if valid.device != logits.device:
            raise ValueError(f"valid: expected the device of {name}, {logits.device}, found {valid.device}")


def _rows(
    logits: Tensor, valid: Tensor | None, normalizer: Tensor | float | None, impl: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Logits as rows, which of them count (None for all), and what their sum is divided by.

    [N, V] and the indices of the valid rows; for "triton" the logits as they lie, and the mask [N]: nothing is copied,
    and nothing waits for the device.
    """
    check_normalizer(normalizer)
    kept = None if valid is None else valid.reshape(-1)
    count: Tensor | int = logits.shape[:-1].numel()
    if impl == "triton":
        rows = logits if logits.dim() <= 3 else logits.reshape(-1, logits.shape[-1])
        if kept is not None:
            count = kept.sum().clamp_min(1)
    else:
        rows = logits.reshape(-1, logits.shape[-1])
        if kept is not None:
            indices = kept.nonzero().squeeze(-1)
            kept = None if len(indices) == count else indices
            count = len(indices)
    if normalizer is None:
        normalizer = count if isinstance(count, Tensor) else max(count, 1)
    norm = as_scalar(normalizer, logits.device)
    return rows, kept, norm.to(torch.promote_types(logits.dtype, torch.float32))


def _wide(z: Tensor, kept: Tensor | None) -> Tensor:
    """The kept rows in float32 (float64 for float64)."""
    return (z if kept is None else z[kept]).to(torch.promote_types(z.dtype, torch.float32))


def check_same_logits(name: str, value: Any, other: str, logits: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, found {describe(value)}")
    if value.shape != logits.shape:
        raise ValueError(f"{name}: expected the shape of {other}, {list(logits.shape)}, found {describe(value)}")
    if value.device != logits.device:
        raise ValueError(f"{name}: expected the device of {other}, {logits.device}, found {value.device}")
    if (value.dtype == torch.float64) != (logits.dtype == torch.float64):
        raise TypeError(f"{name}: {other} is {logits.dtype}, found {value.dtype}; float64 does not mix")
