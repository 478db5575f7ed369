"""The objective as the papers write it: one plain function an equation, everything materialized, gradients by autograd.

Slow and large on purpose. Every faster implementation is held against these functions in float64. Nothing here is
shared with them, so that an error cannot hide in both.

Shapes: N valid tokens (or M examples), V vocabulary (or C classes), d hidden size, r rank of an adapter on the head;
Z the student's logits [N, V], Z_P the teacher's. The terms that are means over the rows are given as sums over them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Z = cap · tanh(a / cap) with a = scale · (H (W + s·B A)ᵀ + b), in float32 (float64 for float64 inputs).

    Without a soft-cap Z = a. lora is (A, B, s). hidden [N, d], weight [V, d], bias [V], A [r, d], B [V, r] -> [N, V].
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    weight = weight.to(dtype)
    if lora is not None:
        a, b, s = lora
        weight = weight + s * (b.to(dtype) @ a.to(dtype))
    z = hidden.to(dtype) @ weight.T
    if bias is not None:
        z = z + bias.to(dtype)
    z = scale * z
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def cross_entropy(z: Tensor, labels: Tensor) -> Tensor:
    """−Σ_n log softmax(Z_n)[y_n], a sum over the rows. z [N, V], labels [N] -> []."""
    return -z.log_softmax(-1).gather(-1, labels[:, None]).sum()


def squared_error(z: Tensor, target: Tensor) -> Tensor:
    """Σ_n (z_n − target_n)², the task loss and the consistency of a regression head. z, target [N] -> []."""
    return (z - target).square().sum()


def consistency(z: Tensor, z_teacher: Tensor, temperature: float) -> Tensor:
    """T² · Σ_n KL( softmax(Z_P,n / T) ‖ softmax(Z_n / T) ), a sum over the rows (2025 paper, eq. 4 and 9).

    T = 1 is the 2024 paper's (eq. 10). An entry that the teacher gives no probability contributes 0.
    z, z_teacher [N, V] -> [].
    """
    log_p = (z_teacher / temperature).log_softmax(-1)  # [N, V]
    log_q = (z / temperature).log_softmax(-1)  # [N, V]
    p = log_p.exp()
    difference = torch.where(p == 0, torch.zeros_like(p), log_p - log_q)
    return temperature**2 * (p * difference).sum()


def normalized_mse(z: Tensor, z_teacher: Tensor) -> Tensor:
    """‖ Z_P/‖Z_P‖_F − Z/‖Z‖_F ‖²_F, norms over the whole batch (2024 paper, eq. 5). A zero matrix stays zero.

    z, z_teacher [N, V] -> [].
    """
    norm, norm_teacher = (torch.where(n == 0, 1.0, n) for n in (_norm(z), _norm(z_teacher)))
    return (z_teacher / norm_teacher - z / norm).square().sum()


def diversity(z: Tensor, top_k: int) -> Tensor:
    """−Σ_n H( softmax of Z_n restricted to its K largest entries ), a sum over the rows (2025 paper, eq. 10).

    Ties across the K-th place go to the lower index; K above V means V. No temperature, not divided by log K.
    z [N, V] -> [].
    """
    order = z.detach().sort(dim=-1, descending=True, stable=True).indices  # [N, V]
    return entropy(z.gather(-1, order[:, :top_k]))


def entropy(z: Tensor) -> Tensor:
    """−Σ_n H( softmax(Z_n) ), a sum over the rows. z [N, V] -> [].

    The 2024 paper prints its equation 11 without the minus, while its text says that entropy is maximized: this
    follows the text.
    """
    log_q = z.log_softmax(-1)
    q = log_q.exp()
    return (q * torch.where(q == 0, torch.zeros_like(q), log_q)).sum()


def covariance(z: Tensor) -> Tensor:
    """(1/C) Σ_{i≠j} Cov(Z)²_{ij} with Cov = (Z − Z̄)ᵀ(Z − Z̄)/(M − 1) (2024 paper, eq. 6 and 7; 2025, eq. 5 and 6).

    Of fewer than two rows it is a 0 that is connected to z. z [M, C] -> [].
    """
    m, c = z.shape
    if m < 2:
        return (0.0 * z).sum()
    centred = z - z.mean(0)
    cov = centred.T @ centred / (m - 1)  # [C, C]
    return (cov - cov.diag().diag()).square().sum() / c


def svd(z: Tensor, rank: int, norm: str = "fro", variance: float = 0.0) -> Tensor:
    """−( Σ_{i≤k} σ_i(Z) / ‖Z‖ + α · Var(σ_1 … σ_k) ), not centred. k above min(N, V) means min(N, V).

    ‖Z‖ is the Frobenius norm (``"fro"``; 2025 paper, eq. 11) or the sum of all singular values (``"nuclear"``; 2025,
    eq. 7; 2024, eq. 8 and 12, which alone has α). Var divides by k. Of a zero matrix it is 0, with a zero gradient; of
    one that is not finite NaN. z [N, V] -> [].
    """
    if not z.detach().isfinite().all():  # a decomposition would raise
        return (math.nan * z).sum()
    if not z.detach().any():
        return (0.0 * z).sum()
    sigma = torch.linalg.svdvals(z)
    leading = sigma[:rank]
    whole = sigma.sum() if norm == "nuclear" else torch.linalg.matrix_norm(z)
    return -(leading.sum() / whole + variance * leading.var(correction=0))


def randomized_svd(a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets, by a full decomposition. a [..., m, n] -> [..., m, k], [..., k], [..., k, n].

    Those of a matrix that is not finite are NaN.
    """
    finite = a.detach().isfinite().all(-1, keepdim=True).all(-2, keepdim=True)  # [..., 1, 1]
    u, s, vh = torch.linalg.svd(torch.where(finite, a, 0.0), full_matrices=False)
    u, vh = (torch.where(finite, t, math.nan) for t in (u, vh))
    s = torch.where(finite[..., 0], s, math.nan)
    return u[..., :rank], s[..., :rank], vh[..., :rank, :]


def _norm(z: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(z) if z.detach().any() else (0.0 * z).sum()
