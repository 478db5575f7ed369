"""The principal parts of a model's weights, in batches: where PiSSA adapters start.

With W ≈ U_r S_r V_rᵀ and the scaling s of the adapter, B₀ = U_r·√(S_r/s) and A₀ = √(S_r/s)·V_rᵀ, so that s·B₀A₀ is the
principal part of W (2025 paper, eq. 1 and 2). Layers of the same shape are decomposed together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .functional import randomized_svd

# ‖W − s·B₀A₀‖ is then at most 1e-3 above the least of rank r, and no larger than after 16 iterations of
# torch.svd_lowrank with q = r: on the weights of small Llamas, and on random ones without decay up to 4096 x 4096.
_ITERATIONS = 10
# Where the sketch is wider than this part of the smaller side, a full decomposition takes about as long on a CPU.
_SKETCH_SHARE = 1 / 4
# Rows of a weight that are in float64 at a time.
_ROWS = 4096


def _oversample(rank: int) -> int:
    return 16 + rank // 2


def batches(weights: Sequence[Tensor], ranks: Sequence[int], batch_bytes: int) -> list[list[int]]:
    """Places of the weights that are decomposed together: one shape, type, device and rank.

    A batch has at most ``batch_bytes`` in the arithmetic of the decomposition, and at least one weight.
    """
    groups = defaultdict(list)
    for i, (w, rank) in enumerate(zip(weights, ranks, strict=True)):
        groups[w.shape, w.dtype, w.device, rank].append(i)
    found = []
    for (shape, dtype, _, _), group in groups.items():
        at_a_time = max(1, batch_bytes // (shape.numel() * _arithmetic(dtype).itemsize))
        found += [group[i : i + at_a_time] for i in range(0, len(group), at_a_time)]
    return found


@torch.no_grad()
def factors(
    weights: Sequence[Tensor],
    rank: int,
    scalings: Sequence[float],
    n_iter: int | None = None,
    device: torch.device | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """(B₀ [m, r], A₀ [r, n]) of each of these weights [m, n], which have one shape, type and device.

    They are rounded to the weights' type, contiguous, and lie where the weights do.

    Args:
        weights: finite; half precision is decomposed in float32.
        rank: r, at most min(m, n).
        scalings: s of each weight.
        n_iter: None: ``randomized_svd`` where its sketch is narrow, else a full decomposition. A number: always the
            former, with that many power iterations.
        device: where they are decomposed. None: on a CUDA device if there is one, else where they lie.
    """
    first = weights[0]
    stack = _stacked(weights, _place(first, device))
    if n_iter is None and rank + _oversample(rank) > _SKETCH_SHARE * min(first.shape):
        u, s, vh = torch.linalg.svd(stack.to(_arithmetic(stack.dtype)), full_matrices=False)
    else:
        iterations = _ITERATIONS if n_iter is None else n_iter
        u, s, vh = randomized_svd(stack, rank, _oversample(rank), iterations)
    found = []
    for i, scaling in enumerate(scalings):
        root = (s[i, :rank] / scaling).sqrt()
        pair = u[i, :, :rank] * root, root[:, None] * vh[i, :rank]
        # Contiguous, as A and B are: LAPACK's column order would take another path through the same product.
        b0, a0 = (t.to(first.dtype).to(first.device).contiguous() for t in pair)
        found.append((b0, a0))
    return found


@torch.no_grad()
def errors(
    weight: Tensor, b0: Tensor, a0: Tensor, scaling: float, device: torch.device | None = None
) -> tuple[float, float]:
    """(‖W − s·B₀A₀‖_F, the least of rank r, √(Σ_{i>r} σ_i²)), both relative to ‖W‖_F; zeros for a zero matrix.

    In float64: the σ² are the eigenvalues of the Gram matrix of W's smaller side, so a least error below 1e-7 is not
    told from 0. With n ≤ m the sides of W, that costs 2·m·n² + O(n³) operations and 16·n² bytes: 4096 x 4096 takes
    6 s on one core of a CPU.

    Args:
        weight: W [m, n], of any floating-point type.
        b0, a0: [m, r] and [r, n].
        scaling: s.
        device: where to compute. None: on a CUDA device if there is one, else where the weight lies.
    """
    device = _place(weight, device)
    left, right, rank = b0.to(device).double() * scaling, a0.to(device).double(), len(a0)
    if len(weight) < weight.shape[1]:
        weight, left, right = weight.T, right.T, left.T
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=device)
    error = torch.zeros((), dtype=torch.float64, device=device)
    for rows, start in zip(weight.split(_ROWS), left.split(_ROWS), strict=True):
        rows = rows.to(device).double()
        gram.addmm_(rows.T, rows)
        error += (rows - start @ right).square().sum()
    energy = gram.trace().item()  # ‖W‖²
    if energy == 0:
        return 0.0, 0.0
    least = torch.linalg.eigvalsh(gram)[: len(gram) - rank].clamp_min(0).sum()
    return (error.item() / energy) ** 0.5, (least.item() / energy) ** 0.5


def _place(weight: Tensor, device: torch.device | None) -> torch.device:
    if device is not None:
        return device
    return torch.device("cuda") if weight.is_cpu and torch.cuda.is_available() else weight.device


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _stacked(weights: Sequence[Tensor], device: torch.device) -> Tensor:
    """[batch, m, n] on the device, copied there one by one; a single weight that lies there is not copied."""
    if len(weights) == 1:
        return weights[0].to(device)[None]
    stack = torch.empty((len(weights), *weights[0].shape), dtype=weights[0].dtype, device=device)
    for place, w in zip(stack, weights, strict=True):
        place.copy_(w)
    return stack
