"""Singular values from small matrices: the SVD term without the vocabulary, and the batched randomized SVD.

The SVD term. With Z = X Wᵀ, S = XᵀX and G = WᵀW = C Cᵀ, the squared singular values of Z are the eigenvalues of
Cᵀ S C, and with its eigenvectors x_i and g_i = C x_i every gradient that the term needs is X·K or W·K_W with [d, d]
matrices. Two products of N·d² replace a singular value decomposition of [N, V]. Where the logits are not X Wᵀ (a
soft-cap) or are given themselves, the same equations hold with S = Z Zᵀ, and C and G the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .precision import float32_products

# Up to this size a full symmetric eigendecomposition costs less than it is worth to avoid.
_EIGH_MAX_D = 512
# Block Krylov: the span of all steps together, not the last step alone. On the flat spectrum of random matrices, the
# worst case (N 2048, d 1024, V 32,000), the largest error of a σ is 1.6e-5; subspace iteration leaves 1.4e-2.
_STEPS = 12
_OVERSAMPLE = 10
_SEED = 0
_SHIFTED = 3  # steps of CholeskyQR with a shift, in float64 of float64
_ROW_BYTES = 4 * 2**20  # of rows that are widened to the accumulation type at a time


class HeadGram(NamedTuple):
    """G = WᵀW and C, in the accumulation type: C Cᵀ = G, or all of G that X = H M can meet (``head_gram``)."""

    gram: Tensor  # [d, d]
    factor: Tensor  # [d, d], with M [d', d] of such rows [d, d']


class SVDTerm(NamedTuple):
    """The value, and what its gradient is made of: by X it is X·K with K = Σ w_i g_i g_iᵀ + multiple·G."""

    value: Tensor  # []
    directions: Tensor  # [d, k]: the g_i
    weights: Tensor  # [k]
    multiple: Tensor  # []
    k_weight: Tensor | None  # [d, d]: by W the gradient is W·K_W


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 on the CPU and for float64 inputs, else float32.

    A Gram matrix squares the condition of the logits: in float32 a σ_i a hundred times below σ_1 keeps three digits,
    and one a thousand times below it is lost. float64 costs a CPU twice the time of a product that is d/V of the
    whole; most GPUs would pay 64 times.
    """
    return torch.float64 if tensor.device.type == "cpu" or tensor.dtype == torch.float64 else torch.float32


@float32_products()
def gram(blocks: Iterable[Tensor]) -> Tensor:
    """Σ blockᵀ block in ``accumulation_dtype``, over blocks of rows [n_i, d]; one block at least -> [d, d]."""
    total = None
    for block in blocks:
        for part in block.split(rows_at_a_time(block)):
            wide = part.to(accumulation_dtype(part))
            if total is None:
                total = torch.zeros(wide.shape[1], wide.shape[1], dtype=wide.dtype, device=wide.device)
            total.addmm_(wide.T, wide)
    assert total is not None
    return total


def rows_at_a_time(rows: Tensor) -> int:
    """How many rows are widened at a time. rows [n, d]."""
    return max(1, _ROW_BYTES // (rows.shape[1] * accumulation_dtype(rows).itemsize))


@float32_products()
def head_gram(
    weight: Tensor,
    extra: Tensor | None = None,
    known: Tensor | None = None,
    lift: Callable[[Tensor], Tensor] | None = None,
) -> HeadGram:
    """The Gram matrix of a head and its factor: V·d² operations, once for a frozen head.

    With an adapter X = [H | s·H Aᵀ | 1] = [H | 1] M has dependent columns, and so have W and B of PiSSA: G is singular,
    a Cholesky factorization in float32 fails, and an eigendecomposition would take its place in every step.
    M G Mᵀ, the Gram matrix of W + s·B A (and the bias), is not. With its factor L, C = G Mᵀ L⁻ᵀ does what a factor of
    G does: Cᵀ(XᵀX)C = Lᵀ([H | 1]ᵀ[H | 1])L, and C x is the same gradient's direction.

    weight [V, d]; extra [V, e] are further columns, of an adapter and a bias; known is weightᵀ·weight [d, d], where
    that is at hand; lift(Y) is M Y, with M [d or d + 1, d + e]. -> G [d + e, d + e].
    """
    g = gram([weight]) if known is None else known
    if extra is not None:
        wide = extra.to(g.dtype)
        step = rows_at_a_time(weight)
        pairs = zip(weight.split(step), wide.split(step), strict=True)
        cross = sum(w.to(g.dtype).T @ e for w, e in pairs)  # [d, e]
        corner = wide.T @ wide  # [e, e]
        g = torch.cat([torch.cat([g, cross], 1), torch.cat([cross.T, corner], 1)])
    if lift is None:
        return HeadGram(g, _factor(g))
    seen = lift(g)
    return HeadGram(g, _factor(lift(seen.T), seen))


def _factor(g: Tensor, seen: Tensor | None = None) -> Tensor:
    """C with C Cᵀ = G up to rounding, or seenᵀ C⁻ᵀ; of a singular G (dependent columns) from its eigenvectors, with
    columns of exact zeros."""
    if not torch.isfinite(g).all():
        return torch.full_like(g if seen is None else seen.T, torch.nan)
    factor, info = torch.linalg.cholesky_ex(g)
    if info.item() == 0:
        return factor if seen is None else torch.linalg.solve_triangular(factor, seen, upper=False).T
    values, vectors = torch.linalg.eigh(g)
    rounding = len(g) * torch.finfo(g.dtype).eps * values[-1:].clamp_min(0)
    roots = torch.where(values <= rounding, torch.zeros_like(values), values).sqrt()
    if seen is None:
        return vectors * roots
    return seen.T @ (vectors * torch.where(roots == 0, roots, 1 / roots))


@float32_products()
def svd_term(
    s: Tensor,
    head: HeadGram | None,
    rank: int,
    count: int,
    *,
    norm: str = "fro",
    variance: float = 0.0,
    iterate: torch.dtype | None = None,
    need_weight_grad: bool = False,
    small: Any = None,
) -> SVDTerm:
    """−( Σ_{i≤k} σ_i / ‖Z‖ + α·Var(σ_1 … σ_k) ) for Z = X Wᵀ and its gradients (2025 paper, eq. 7 and 11).

    ‖Z‖ is the Frobenius norm (``"fro"``) or the sum of all singular values (``"nuclear"``); Var divides by k.
    Exact for d ≤ 512 and for the nuclear norm. Above, 12 steps of block Krylov iteration from a seeded start, k + 10
    columns wide, then a Rayleigh-Ritz step: the same bits on every run. Of a zero matrix the value is 0, and so is its
    gradient; a σ_i of 0 adds nothing to the gradient.

    Args:
        s: XᵀX [d, d] (or Z Zᵀ, with head None: then the gradient by Z is K·Z).
        head: of W, None for the identity.
        rank: k, no more than count.
        count: the number of singular values, min(N, V). Those beyond d are 0.
        iterate: the type of the Krylov products, where that is not s's own.
        small: ``balora_kernels.eigh``, where nothing may wait for the device, which a decomposition by torch does. Then
            twelve steps of subspace iteration take the place of the Krylov iteration: on a real spectrum (stories15M)
            within 3e-5 of each σ, on the flat one of random matrices 4e-3 of their sum.
    """
    g, c = (None, None) if head is None else (m.to(s.dtype) for m in head)
    wanted = min(count if norm == "nuclear" else rank, len(s) if c is None else c.shape[1])
    if small is None:
        values, vectors = _leading_eigenpairs(s, c, wanted, iterate or s.dtype)
    else:
        values, vectors = _leading_without_waiting(s, c, wanted, small)
    squares = s.trace() if g is None else (s * g).sum()  # ‖Z‖²_F
    term, slope, inverse = _term(values, vectors if c is None else c @ vectors, squares, rank, norm, variance)
    if not need_weight_grad:
        return term
    seen = s @ term.directions
    k_weight = (seen * (slope * inverse**3)) @ seen.T + term.multiple * s
    return term._replace(k_weight=k_weight)


@float32_products()
def svd_term_of_tiles(
    tiles: Callable[[], Iterable[Tensor]], side: int, like: Tensor, rank: int, variance: float
) -> SVDTerm:
    """``svd_term`` (Frobenius norm) of Z Zᵀ without that matrix: every Krylov step is a pass over tiles of Z.

    tiles() gives Z in tiles of columns [side, v]; they are multiplied in their own type, the last step, Rayleigh-Ritz,
    in ``accumulation_dtype`` like the norm. side is above 12 (k + 10).
    """

    def step(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for z in tiles():
            y.addmm_(z, z.T @ x)
        return y

    basis = _krylov(step, _random(side, rank + _OVERSAMPLE).to(like), accumulation_dtype(like))
    small = basis.new_zeros(basis.shape[1], basis.shape[1])
    squares = basis.new_zeros(())
    for z in tiles():
        wide = z.to(basis.dtype)
        seen = basis.T @ wide
        small.addmm_(seen, seen.T)
        squares += wide.square().sum()
    values, vectors = _eigh(small)
    vectors = basis @ vectors[:, -rank:].flip(1)
    return _term(values[-rank:].flip(0), vectors, squares, rank, "fro", variance)[0]


def iterates(side: int, rank: int) -> bool:
    """Whether so large a matrix takes Krylov iteration for so few singular values."""
    return side > _EIGH_MAX_D and _STEPS * (rank + _OVERSAMPLE) < side


def _term(
    values: Tensor, directions: Tensor, squares: Tensor, rank: int, norm: str, variance: float
) -> tuple[SVDTerm, Tensor, Tensor]:
    """The term from eigenvalues σ_i², directions g_i and ‖Z‖²_F; ∂value/∂σ_i and 1/σ_i, 0 for a σ_i of 0."""
    # Below the rounding of the Gram matrices an eigenvalue is noise, and its direction arbitrary: it counts as 0.
    noise = values[:1] * torch.finfo(values.dtype).eps * 8
    sigma = torch.where(values <= noise, torch.zeros_like(values), values).sqrt()  # keeps NaN
    leading = sigma[:rank]
    whole = sigma.sum() if norm == "nuclear" else squares.clamp_min(0).sqrt()
    zero = whole == 0
    whole = whole.masked_fill(zero, 1.0)
    mean = leading.sum() / rank  # zeros beyond d count too
    value = -(leading.sum() / whole + variance * (leading.square().sum() / rank - mean**2).clamp_min(0))
    slope = torch.zeros_like(sigma)  # ∂value/∂σ_i, at fixed ‖Z‖_F
    slope[:rank] = -1 / whole - (2 * variance / rank) * (leading - mean)
    multiple = torch.zeros_like(whole)  # what ‖Z‖_F adds: this multiple of Z
    if norm == "nuclear":
        slope += leading.sum() / whole**2
    else:
        multiple = leading.sum() / whole**3
    slope = torch.where((sigma == 0) | zero, torch.zeros_like(slope), slope)
    inverse = torch.where(sigma == 0, torch.zeros_like(sigma), 1 / sigma)
    return SVDTerm(value, directions, slope * inverse, multiple.masked_fill(zero, 0.0), None), slope, inverse


@float32_products()
def gradient_matrix(term: SVDTerm, head: HeadGram) -> Tensor:
    """K [d, d]: the gradient of the term by X is X·K."""
    g = head.gram.to(term.directions.dtype)
    return (term.directions * term.weights) @ term.directions.T + term.multiple * g


def _leading_eigenpairs(s: Tensor, c: Tensor | None, k: int, iterate: torch.dtype) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues of Cᵀ S C, descending, and their vectors. s [m, m], c [m, d] -> [k], [d, k]."""
    d = len(s) if c is None else c.shape[1]
    if not iterates(d, k):
        values, vectors = _eigh(s if c is None else c.T @ s @ c)
        return values[-k:].flip(0), vectors[:, -k:].flip(1)
    # Rounding of the iteration tilts the basis a little; the Ritz step sees that only squared. So the iteration may
    # run in a narrower type than the step.
    step = _product(s.to(iterate), None if c is None else c.to(iterate))
    basis = _krylov(step, _random(d, k + _OVERSAMPLE).to(s.device, iterate), s.dtype)
    del step  # with its copies of both
    y = basis if c is None else c @ basis
    values, small = _eigh(y.T @ (s @ y))
    return values[-k:].flip(0), basis @ small[:, -k:].flip(1)


def _product(s: Tensor, c: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x ↦ Cᵀ S C x."""
    if c is None:
        return lambda x: s @ x
    left = c.T.contiguous()
    return lambda x: left @ (s @ (c @ x))


def _krylov(step: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """Orthonormal columns, in that type, that span those of 12 steps from x [d, k + 10] -> [d, 12 (k + 10)]."""
    blocks = []
    for _ in range(_STEPS):
        x = torch.linalg.qr(step(x)).Q
        blocks.append(x)
    return torch.linalg.qr(torch.cat(blocks, dim=1).to(dtype)).Q


def _random(rows: int, columns: int) -> Tensor:
    """The same numbers every time, in float64 on the CPU."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)


def _leading_without_waiting(s: Tensor, c: Tensor | None, k: int, small: Any) -> tuple[Tensor, Tensor]:
    """As ``_leading_eigenpairs``, by products and the kernels for small matrices alone; float32."""
    d = len(s) if c is None else c.shape[1]
    if d <= small.LARGEST:
        values, vectors = small.eigh(s if c is None else c.T @ s @ c)
        return values[:k], vectors[:, :k]
    x = _start(d, waits_for_nothing(k, small), s.device)
    for _ in range(_STEPS):
        x = x if c is None else c @ x
        x = s @ x
        x = x if c is None else c.T @ x
        # Columns of length 1, a shift for those that depend on each other: near enough to orthonormal for a next step.
        x = x / torch.linalg.vector_norm(x, dim=0).clamp_min(torch.finfo(x.dtype).tiny)
        g = x.T @ x
        g.diagonal().add_(4 * len(g) * torch.finfo(g.dtype).eps)
        x = x @ small.inverse_factor(g).T
    lengths, turned = small.eigh(x.T @ x)
    dependent = lengths <= lengths[:1] * 100 * torch.finfo(x.dtype).eps
    basis = x @ (turned * torch.where(dependent, torch.zeros_like(lengths), lengths.rsqrt()))
    y = basis if c is None else c @ basis
    values, vectors = small.eigh(y.T @ (s @ y))
    return values[:k], basis @ vectors[:, :k]


def waits_for_nothing(k: int, small: Any) -> int:
    """How many columns ``_leading_without_waiting`` has for k of them; 0 where that is too many."""
    width = 1 << (k + _OVERSAMPLE - 1).bit_length()
    return width if width <= small.LARGEST else 0


@cache
def _start(d: int, width: int, device: torch.device) -> Tensor:
    """Kept, so that a captured graph copies nothing to its device."""
    return _random(d, width).to(device, torch.float32)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric eigendecomposition, ascending; NaN in, NaN out (LAPACK raises; a diverged run must show)."""
    if torch.isfinite(matrix).all():
        return torch.linalg.eigh(matrix)
    return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)


def randomized_svd(a: Tensor, rank: int, oversample: int, n_iter: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of a batch of matrices (Halko, Martinsson and Tropp, 2011, alg. 4.4 and 5.1).

    A sketch AΩ of rank + oversample columns, n_iter power iterations, each orthonormalized by shifted CholeskyQR:
    products and small factorizations of the whole batch at once. The products with A in float32 for half precision.
    The bases are held as rows, the layout in which products with A are fastest. csrc/binding.cpp has the same steps.

    a [..., m, n] -> U [..., m, k], S [..., k], Vh [..., k, n] with k = min(rank, m, n), in the arithmetic's type. U and
    Vh have orthonormal columns and rows for rank-deficient and zero matrices too. A matrix with a NaN or infinite entry
    gives NaN.
    """
    shape = a.shape
    a = a.reshape(-1, *shape[-2:])
    broken = ~torch.isfinite(_largest(a))  # [batch, 1, 1]
    if broken.any():
        a = a.masked_fill(broken, 0.0)
    a = a.to(torch.promote_types(a.dtype, torch.float32))
    m, n = a.shape[-2:]
    k = min(rank, m, n)
    width = min(k + oversample, m, n)
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(width, n, generator=generator, dtype=torch.float64).to(a)  # [l, n]
    q = orthonormal(omega @ a.mT, generator, polish=n_iter == 0)  # [batch, l, m]
    for i in range(n_iter):
        p = orthonormal(q @ a, generator, polish=False)  # [batch, l, n]
        q = orthonormal(p @ a.mT, generator, polish=i == n_iter - 1)
    b = q @ a  # [batch, l, n]
    p = orthonormal(b, generator)
    # Projected anew: the triangular factor would carry the shifts.
    small = b.double() @ p.double().mT  # [batch, l, l]
    broken |= ~torch.isfinite(_largest(small))  # entries near the end of float32 overflow in a product
    u, s, vh = (x.to(a) for x in torch.linalg.svd(small.masked_fill(broken, 0.0)))
    u, s, vh = q.mT @ u[..., :k], s[..., :k], vh[..., :k, :] @ p
    u, s, vh = (x.masked_fill(broken.view(-1, *[1] * (x.dim() - 1)), torch.nan) for x in (u, s, vh))
    return u.reshape(*shape[:-2], m, k), s.reshape(*shape[:-2], k), vh.reshape(*shape[:-2], k, n)


def orthonormal(y: Tensor, generator: torch.Generator, polish: bool = True) -> Tensor:
    """Orthonormal rows that span those of Y, by shifted CholeskyQR (Fukaya et al., 2020) in float64.

    Products and Cholesky factorizations batch where ``torch.linalg.qr`` loops over the matrices. Where rows depend on
    each other, noise of the size of their rounding takes the missing directions: the condition is then 1/eps. For
    float32, float64 (Yamazaki, Tomov and Dongarra, 2015) sees the square of that: one shifted step leaves a condition
    that a plain one finishes. In float64 itself every shifted step takes a factor of about sqrt(shift): three of them
    and two plain ones. The shifted steps alone (polish false: rows that are merely well-conditioned, those without a
    direction nearly 0) are enough for the next power iteration. y [batch, l, m], l ≤ m.
    """
    width, m = y.shape[-2:]
    dtype, eps = y.dtype, torch.finfo(y.dtype).eps
    shifted, plain = (1, 1) if dtype == torch.float32 else (_SHIFTED, 2)
    size = _largest(y)
    y = (y / torch.where(size == 0, torch.ones_like(size), size)).double()
    if polish:
        y += eps * torch.randn(width, m, generator=generator, dtype=torch.float64).to(y)
    eye = torch.eye(width, dtype=y.dtype, device=y.device)
    for step in range(shifted + plain * polish):
        g = y @ y.mT
        if step < shifted:
            diagonal = g.diagonal(dim1=-2, dim2=-1)
            squares = diagonal.sum(-1, keepdim=True).clamp_min(1)  # ‖Y‖²_F, of a zero matrix 1
            diagonal += 2 * m**0.5 * torch.finfo(y.dtype).eps * squares
        factor, _ = torch.linalg.cholesky_ex(g)  # y = factor · q
        y = torch.linalg.solve_triangular(factor, eye, upper=False) @ y
    return y.to(dtype)


def _largest(a: Tensor) -> Tensor:
    """The largest |entry| of each matrix, NaN where there is one. a [batch, m, n] -> [batch, 1, 1]."""
    return torch.maximum(a.amax((-2, -1), keepdim=True), -a.amin((-2, -1), keepdim=True))
