"""The objective from logits that are there already: for models whose head is no ``LinearHead``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import losses
from .checks import IGNORE_INDEX, as_scalar, check_normalizer, describe, valid_rows
from .config import BALoraConfig


class BALoraOutput(NamedTuple):
    """The objective and its parts.

    ``loss`` carries the gradient. The terms are unweighted and detached, each a sum over the valid tokens divided by
    the normalizer (those of the whole batch, as SVD and covariance, times n_valid / normalizer), so that
    loss = ce + λ₁·consistency + λ₂·diversity + λ₃·svd. A term whose λ is 0 is not computed and is None.
    """

    loss: Tensor  # []
    ce: Tensor  # []
    consistency: Tensor | None  # []
    diversity: Tensor | None  # []
    svd: Tensor | None  # []
    n_valid: Tensor  # [], int64


def weighted(
    config: BALoraConfig, ce: Tensor, consistency: Tensor | None, diversity: Tensor | None, svd: Tensor | None
) -> Tensor:
    """CE + λ₁·consistency + λ₂·diversity + λ₃·svd, of the terms that are there."""
    loss = ce
    for weight, term in (
        (config.lambda_consistency, consistency),
        (config.lambda_diversity, diversity),
        (config.lambda_svd, svd),
    ):
        if term is not None:
            loss = loss + weight * term
    return loss


def logits_objective(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    config: BALoraConfig,
    normalizer: Tensor | float | None = None,
) -> BALoraOutput:
    """The objective of ``functional.linear_objective``, from the logits themselves.

    The terms are those of ``consistency_loss``, ``diversity_loss``, ``svd_loss`` and ``covariance_loss``, which store
    no softmax; but the logits of student and teacher are there, the cross-entropy takes a float32 copy of them, and
    the gradients of the terms are [N, V] each while they are added. From logits in half precision a small KL is mostly
    rounding: where the head is known, ``linear_objective`` is both smaller and more accurate.

    Args:
        logits: Z [N, V] or [B, S, V], the student's, floating point.
        teacher_logits: Z_P, the pre-trained model's, of the same shape and device; None is allowed if λ₁ = 0.
        labels: whole numbers of the leading shape, already aligned with it; −100 marks a row that is left out.
        config: weights and shapes of the terms; λ are used as given.
        normalizer: as in ``linear_objective``.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type, device or range; the message names it.
    """
    if not isinstance(config, BALoraConfig):
        raise TypeError(f"config: expected a BALoraConfig, found {type(config).__name__}")
    losses.check_logits("logits", logits, None)
    if config.lambda_consistency != 0 and teacher_logits is None:
        raise ValueError(
            f"teacher_logits: lambda_consistency is {config.lambda_consistency}, so the teacher's logits are needed; "
            "found None"
        )
    if teacher_logits is not None:
        losses.check_same_logits("teacher_logits", teacher_logits, "logits", logits)
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels: expected whole numbers (int64), found {describe(labels)}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels: expected the shape {list(logits.shape[:-1])}, found {describe(labels)}")
    if labels.device != logits.device:
        raise ValueError(f"labels: expected the device of logits, {logits.device}, found {labels.device}")
    check_normalizer(normalizer)

    z = logits.reshape(-1, logits.shape[-1])  # [M, V]
    z_teacher = None if teacher_logits is None else teacher_logits.detach().reshape(z.shape)
    y = labels.reshape(-1).long()  # [M]
    kept = valid_rows(y, z.shape[1])
    valid = None if kept is None else y != IGNORE_INDEX
    n = len(y) if kept is None else len(kept)
    norm = as_scalar(max(n, 1) if normalizer is None else normalizer, z.device)

    with torch.autocast(z.device.type, enabled=False):
        wide = torch.promote_types(z.dtype, torch.float32)
        share = n / norm.to(wide)  # of the terms of the whole batch
        rows, y = (z, y) if kept is None else (z[kept], y[kept])
        # Of no row a 0 that is connected; 0 · −∞ would be NaN.
        ce = F.cross_entropy(rows.to(wide), y, reduction="sum") / norm.to(wide) if n else rows.sum().to(wide)
        consistency = diversity = svd = None
        if config.lambda_consistency != 0 and config.consistency == "kl":
            consistency = losses.consistency_loss(z, z_teacher, config.temperature, valid, norm)  # type: ignore[arg-type]
        elif config.lambda_consistency != 0:
            consistency = share * losses.batch_term(z, kept, z_teacher, lambda_consistency=1.0)
        if config.lambda_diversity != 0 and config.diversity == "covariance":
            diversity = share * losses.batch_term(z, kept, lambda_covariance=1.0)
        elif config.lambda_diversity != 0:
            top_k = config.entropy_top_k if config.diversity == "topk" else z.shape[1]
            diversity = losses.diversity_loss(z, top_k, valid, norm)
        if config.lambda_svd != 0:
            svd = share * losses.batch_term(
                z, kept, lambda_svd=1.0, rank=config.svd_rank, norm=config.svd_norm, variance=config.svd_variance
            )
    loss = weighted(config, ce, consistency, diversity, svd)
    consistency, diversity, svd = (None if t is None else t.detach() for t in (consistency, diversity, svd))
    return BALoraOutput(loss, ce.detach(), consistency, diversity, svd, as_scalar(n, z.device, torch.int64))


def regression_objective(
    predictions: Tensor,
    teacher_predictions: Tensor | None,
    labels: Tensor,
    config: BALoraConfig,
    normalizer: Tensor | float | None = None,
) -> BALoraOutput:
    """CE + λ₁·consistency of a regression: ``ce`` is the mean of (z − y)², ``consistency`` that of (z − z_P)².

    With ``config.consistency="normalized_mse"`` it is ‖Z_P/‖Z_P‖ − Z/‖Z‖‖² (2024 paper, eq. 5). Of one output neither
    covariances nor singular values say anything: λ₂ and λ₃ are not looked at, their terms are None.

    Args:
        predictions: z [M] or [M, 1], the student's, floating point.
        teacher_predictions: z_P, the pre-trained model's, of the same shape and device; None is allowed if λ₁ = 0.
        labels: y, [M] or [M, 1]; every row counts.
        config: λ₁ and the kind of the consistency; used as given.
        normalizer: what the sums over the rows are divided by, instead of M.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type or device; the message names it.
    """
    if not isinstance(config, BALoraConfig):
        raise TypeError(f"config: expected a BALoraConfig, found {type(config).__name__}")
    if not isinstance(predictions, Tensor) or not predictions.is_floating_point():
        raise TypeError(f"predictions: expected a floating-point tensor, found {describe(predictions)}")
    m = len(predictions) if predictions.dim() else 0
    if predictions.shape not in ((m,), (m, 1)):
        raise ValueError(f"predictions: expected the shape [M] or [M, 1], found {describe(predictions)}")
    if config.lambda_consistency != 0 and teacher_predictions is None:
        raise ValueError(
            f"teacher_predictions: lambda_consistency is {config.lambda_consistency}, so the teacher's predictions are "
            "needed; found None"
        )
    if not isinstance(labels, Tensor) or labels.shape not in ((m,), (m, 1)):
        raise ValueError(f"labels: expected a tensor of shape [{m}], found {describe(labels)}")
    for name, tensor in (("teacher_predictions", teacher_predictions), ("labels", labels)):
        if tensor is not None and tensor.device != predictions.device:
            raise ValueError(f"{name}: expected the device of predictions, {predictions.device}, found {tensor.device}")
    if teacher_predictions is not None and teacher_predictions.shape != predictions.shape:
        raise ValueError(
            f"teacher_predictions: expected the shape {list(predictions.shape)}, found {describe(teacher_predictions)}"
        )
    check_normalizer(normalizer)

    with torch.autocast(predictions.device.type, enabled=False):
        z = predictions.reshape(-1).to(torch.promote_types(predictions.dtype, torch.float32))  # [M]
        norm = as_scalar(max(m, 1) if normalizer is None else normalizer, z.device).to(z.dtype)
        loss = ce = (z - labels.reshape(-1).to(z.dtype)).square().sum() / norm
        consistency = None
        if config.lambda_consistency != 0 and teacher_predictions is not None:
            z_teacher = teacher_predictions.detach().reshape(-1).to(z.dtype)
            if config.consistency == "kl":
                consistency = (z - z_teacher).square().sum() / norm
            else:
                consistency = m / norm * losses.batch_term(z[:, None], None, z_teacher[:, None], lambda_consistency=1.0)
            loss = weighted(config, ce, consistency, None, None)
            consistency = consistency.detach()
    return BALoraOutput(loss, ce.detach(), consistency, None, None, as_scalar(m, z.device, torch.int64))
