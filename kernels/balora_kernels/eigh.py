"""Small symmetric matrices, up to 64 columns: eigenvectors and inverse factors, without asking the device for anything.

Jacobi's method in parallel order: in a round every index has one partner, all pairs are rotated at once, and n − 1
rounds, a sweep, meet every pair. ``torch.linalg.eigh`` waits for the device to learn whether it converged; a captured
CUDA graph cannot. One program does it: what counts for a matrix this small is that nobody waits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .rows import FUSED, on
from .tiles import power_of_two

LARGEST = 64
_SWEEPS = 10  # the convergence is quadratic: float32 of 64 columns needs 7 to 8


@triton.jit
def _partner(i, step, N: tl.constexpr):
    """Of a round-robin of N players in round ``step``: the last stays, the others move around a circle."""
    around = (2 * step - i + 2 * (N - 1)) % (N - 1)
    return tl.where(i == N - 1, step, tl.where(i == step, N - 1, around))


@triton.jit
def jacobi(a_ptr, values_ptr, vectors_ptr, n, sweeps, N: tl.constexpr):
    """a [n, n] -> values [n], vectors [n, n] in columns, unordered. N is a power of two, at least n."""
    i = tl.arange(0, N)
    row, column = i[:, None], i[None, :]
    inside = (row < n) & (column < n)
    a = tl.load(a_ptr + row * n + column, mask=inside, other=0.0)
    v = tl.where(row == column, 1.0, 0.0)
    for round_ in range(sweeps * (N - 1)):
        p = _partner(i, round_ % (N - 1), N)
        across = column == p[:, None]  # [N, N]: where the partner of a row stands
        own = tl.sum(tl.where(row == column, a, 0.0), 1)
        other = tl.sum(tl.where(across, tl.sum(tl.where(row == column, a, 0.0), 0)[None, :], 0.0), 1)
        between = tl.sum(tl.where(across, a, 0.0), 1)
        # From the side of each of the two the angle has the opposite sign.
        apart = other - own
        sign = tl.where((apart > 0) | ((apart == 0) & (i < p)), 1.0, -1.0)
        size = tl.abs(apart) + tl.sqrt(apart * apart + 4.0 * between * between)
        # The square of a small number is 0; what is that small beside equal diagonals stays.
        t = tl.where((between == 0.0) | (size == 0.0), 0.0, sign * 2.0 * between / size)
        c = 1.0 / tl.sqrt(1.0 + t * t)
        # The same rotation of the columns, whose numbers lie along the other axis.
        t_column = tl.sum(tl.where(row == column, t[:, None], 0.0), 0)
        c_column = tl.sum(tl.where(row == column, c[:, None], 0.0), 0)
        p_rows = p[:, None] + tl.zeros([N, N], tl.int32)
        p_columns = tl.sum(tl.where(row == column, p[:, None], 0), 0)[None, :] + tl.zeros([N, N], tl.int32)
        a = c[:, None] * (a - t[:, None] * tl.gather(a, p_rows, 0))
        a = c_column[None, :] * (a - t_column[None, :] * tl.gather(a, p_columns, 1))
        v = c_column[None, :] * (v - t_column[None, :] * tl.gather(v, p_columns, 1))
    tl.store(values_ptr + i, tl.sum(tl.where(row == column, a, 0.0), 1), mask=i < n)
    tl.store(vectors_ptr + row * n + column, v, mask=inside)


@triton.jit
def cholesky_inverse(a_ptr, out_ptr, n, N: tl.constexpr):
    """out = L⁻¹ [n, n] with L Lᵀ = a. Of a column that depends on those before it, up to rounding, 0."""
    i = tl.arange(0, N)
    row, column = i[:, None], i[None, :]
    inside = (row < n) & (column < n)
    a = tl.load(a_ptr + row * n + column, mask=inside, other=0.0)
    x = tl.where(row == column, 1.0, 0.0)
    for j in range(n):
        below = tl.sum(tl.where(column == j, a, 0.0), 1)  # [N]: column j of what is left
        along = tl.sum(tl.where(row == j, a, 0.0), 0)  # row j of it, the same numbers
        pivot = tl.sum(tl.where(i == j, below, 0.0), 0)
        scale = tl.where(pivot <= 0.0, 0.0, 1.0 / tl.sqrt(pivot))  # a NaN stays
        solved = tl.sum(tl.where(row == j, x, 0.0), 0) * scale  # row j of L⁻¹
        factor = tl.where(i > j, below * scale, 0.0)
        x = tl.where(row == j, solved[None, :], x - factor[:, None] * solved[None, :])
        a -= (below * scale)[:, None] * (along * scale)[None, :]
    tl.store(out_ptr + row * n + column, x, mask=inside)


def _size(n: int) -> tuple[int, int]:
    """A power of two for the kernel, and its warps: 64 columns of two matrices need the registers of 16."""
    return max(power_of_two(n), 2), 4 if n <= 32 else 16


def inverse_factor(matrix: Tensor) -> Tensor:
    """L⁻¹ with L Lᵀ = matrix, symmetric and positive, float32 [n, n], n ≤ 64."""
    n = len(matrix)
    out = matrix.new_empty(n, n)
    size, warps = _size(n)
    with on(matrix):
        cholesky_inverse[(1,)](matrix.contiguous(), out, n, N=size, num_warps=warps, **FUSED)
    return out


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Values, descending, and vectors of a symmetric float32 matrix [n, n], n ≤ 64; NaN of one that is not finite."""
    n = len(matrix)
    values, vectors = matrix.new_empty(n), matrix.new_empty(n, n)
    size, warps = _size(n)
    with on(matrix):
        jacobi[(1,)](matrix.contiguous(), values, vectors, n, _SWEEPS, N=size, num_warps=warps, **FUSED)
    values, order = values.sort(descending=True)
    return values, vectors[:, order]
