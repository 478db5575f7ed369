"""The objective as the papers write it: one plain function an equation, everything materialized, gradients by autograd.

Slow and large on purpose. Every faster implementation is held against these functions in float64. Nothing here is
shared with them, so that an error cannot hide in both.

Shapes: N valid tokens, V vocabulary, d hidden size; Z = H Wᵀ the student's logits [N, V], Z_P the teacher's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Z = H Wᵀ, in float32 (float64 for float64 inputs). hidden [N, d], weight [V, d] -> [N, V]."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    return hidden.to(dtype) @ weight.to(dtype).T


def cross_entropy(z: Tensor, labels: Tensor) -> Tensor:
    """−Σ_n log softmax(Z_n)[y_n], a sum over the rows. z [N, V], labels [N] -> []."""
    return -z.log_softmax(-1).gather(-1, labels[:, None]).sum()


def consistency(z: Tensor, z_teacher: Tensor, temperature: float) -> Tensor:
    """T² · Σ_n KL( softmax(Z_P,n / T) ‖ softmax(Z_n / T) ), a sum over the rows (2025 paper, eq. 9).

    z, z_teacher [N, V] -> [].
    """
    log_p = (z_teacher / temperature).log_softmax(-1)  # [N, V]
    log_q = (z / temperature).log_softmax(-1)  # [N, V]
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()


def diversity(z: Tensor, top_k: int) -> Tensor:
    """−Σ_n H( softmax of Z_n restricted to its K largest entries ), a sum over the rows (2025 paper, eq. 10).

    Ties across the K-th place go to the lower index; K above V means V. No temperature, not divided by log K.
    z [N, V] -> [].
    """
    order = z.detach().sort(dim=-1, descending=True, stable=True).indices  # [N, V]
    top = z.gather(-1, order[:, :top_k])  # [N, K]
    log_q = top.log_softmax(-1)
    return (log_q.exp() * log_q).sum()


def svd(z: Tensor, rank: int) -> Tensor:
    """− Σ_{i≤k} σ_i(Z) / ‖Z‖_F, not centred (2025 paper, eq. 11). k above min(N, V) means min(N, V).

    Of a zero matrix it is 0, with a zero gradient. z [N, V] -> [].
    """
    if not z.detach().any():
        return (0.0 * z).sum()
    return -torch.linalg.svdvals(z)[:rank].sum() / torch.linalg.matrix_norm(z)
