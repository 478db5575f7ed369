"""BA-LoRA's terms as the paper's text has them (2025), written anew: every [N, V] tensor materialized, autograd.

Float32 at least; z and z_teacher are the logits [N, V] of the scored tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def widened(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def consistency(z: Tensor, z_teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(Z_P/T) ‖ softmax(Z/T)), the mean over the rows; nothing for the teacher."""
    with torch.no_grad():
        target = (z_teacher.to(z.dtype) / temperature).softmax(-1)
    return temperature**2 * F.kl_div((z / temperature).log_softmax(-1), target, reduction="batchmean")


def diversity(z: Tensor, top_k: int) -> Tensor:
    """The negative entropy of the softmax of each row's K largest, the mean over the rows."""
    q = z.topk(top_k, dim=-1).values.softmax(-1)
    return (q * (q + 1e-12).log()).sum(-1).mean()


def svd(z: Tensor, rank: int, q: int = 15, niter: int = 2) -> Tensor:
    """−Σ_{i≤k} σ_i / ‖Z‖_F, the σ by ``torch.svd_lowrank``."""
    sigma = torch.svd_lowrank(z, q=min(q, *z.shape), niter=niter)[1]
    return -sigma[:rank].sum() / torch.linalg.matrix_norm(z)
