"""The public operations: checks, choice of implementation, autograd."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, reference, spectral, streaming
from .config import BALoraConfig

IGNORE_INDEX = -100


class BALoraOutput(NamedTuple):
    """The objective and its parts.

    ``loss`` carries the gradient. The terms are unweighted and detached, each a sum over the valid tokens divided by
    the normalizer (the SVD term times n_valid / normalizer): loss = ce + λ₁·consistency + λ₂·diversity + λ₃·svd.
    A term whose λ is 0 is not computed and is None.
    """

    loss: Tensor  # []
    ce: Tensor  # []
    consistency: Tensor | None  # []
    diversity: Tensor | None  # []
    svd: Tensor | None  # []
    n_valid: Tensor  # [], int64


class LinearHead:
    """A language model's output layer: logits = hidden · weightᵀ.

    Args:
        weight: [V, d], any floating type; it may be tied to the embedding. It must not require a gradient: LoRA never
            trains the head.

    The Gram matrix weightᵀ·weight that the SVD term needs is computed on first use (V·d² operations) and kept until an
    in-place operation changes the weight (one through ``weight.data`` is not seen).
    """

    def __init__(self, weight: Tensor) -> None:
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise TypeError(f"weight: expected a floating-point tensor [V, d], found {_describe(weight)}")
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"weight: expected the shape [V, d] with V and d of at least 1, found {_describe(weight)}")
        self.weight = weight
        self._gram: tuple[Any, spectral.HeadGram] | None = None

    @property
    def gram(self) -> spectral.HeadGram:
        """weightᵀ·weight and a factor of it, [d, d]."""
        version = 0 if self.weight.is_inference() else self.weight._version
        key = (self.weight.data_ptr(), self.weight.device, version)
        if self._gram is None or self._gram[0] != key:
            self._gram = (key, spectral.head_gram(self.weight))
        return self._gram[1]


def linear_objective(
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    head: LinearHead,
    labels: Tensor,
    config: BALoraConfig,
    teacher_head: LinearHead | None = None,
    normalizer: Tensor | float | None = None,
    impl: str = "auto",
) -> BALoraOutput:
    """The BA-LoRA objective from hidden states, without ever holding the [N, V] logits.

    With N valid tokens (label ≠ −100), Z = H Wᵀ and Z_P = H_P Wᵀ (2025 paper, eq. 9 to 12)::

        loss = CE + λ₁ · T² · mean KL(softmax(Z_P/T) ‖ softmax(Z/T)) − λ₂ · mean H(softmax of the K largest of Z)
                  − λ₃ · Σ_{i≤k} σ_i(Z) / ‖Z‖_F

    The gradient goes to ``hidden`` alone; it is computed in the forward, and scaled in the backward. The λ of
    ``config`` are used as given, without a schedule. K and k above what the batch has are clamped. Without a valid
    token the loss is a 0 that is still connected to ``hidden``.

    Args:
        hidden: [N, d] or [B, S, d], the student's last hidden states, float32, bfloat16, float16 or float64.
        teacher_hidden: the pre-trained model's, of the same shape, type and device; None is allowed if λ₁ = 0.
        head: the output layer of the student, and of the teacher unless that has its own.
        labels: whole numbers of hidden's leading shape, already aligned with it; −100 marks a token that is left out.
        config: weights and shapes of the terms.
        teacher_head: another output layer for the teacher, of the same vocabulary; teacher_hidden then has its width.
            The two logits are subtracted in float32, which keeps less of a small KL than a shared head does.
        normalizer: what the sums over tokens are divided by, instead of the number of valid tokens of this batch (the
            number over all micro-batches and ranks). The SVD term is weighted by n_valid / normalizer.
        impl: "auto", "streaming" or "reference" (everything materialized, autograd: for tests).

    Returns:
        BALoraOutput(loss, ce, consistency, diversity, svd, n_valid).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type, device or range; the message names it.
    """
    impl = dispatch.choose(impl)
    _check(hidden, teacher_hidden, head, labels, config, teacher_head, normalizer)
    hidden_rows = hidden.reshape(-1, hidden.shape[-1])  # [B·S, d]
    label_rows = labels.reshape(-1)
    valid = label_rows != IGNORE_INDEX
    kept = valid.nonzero().squeeze(-1)  # [N]
    n = kept.numel()
    if n != len(label_rows):
        hidden_rows, label_rows = hidden_rows[kept], label_rows[kept]
    label_rows = label_rows.long()
    _check_label_range(label_rows, head.weight.shape[0])
    teacher_rows = None
    if config.lambda_consistency != 0 and teacher_hidden is not None:
        teacher_rows = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
        if n != len(teacher_rows):
            teacher_rows = teacher_rows[kept]
    norm = torch.as_tensor(max(n, 1) if normalizer is None else normalizer, device=hidden.device)
    n_valid = torch.tensor(n, device=hidden.device)
    teacher_weight = None if teacher_head is None or teacher_head is head else teacher_head.weight.detach()

    # Autocast would round the logits to half precision; the objective is float32 arithmetic whatever surrounds it.
    with torch.autocast(hidden.device.type, enabled=False):
        run = _reference_objective if impl == "reference" else _streaming_objective
        loss, ce, consistency, diversity, svd = run(
            hidden_rows, teacher_rows, head, teacher_weight, label_rows, config, norm
        )
    return BALoraOutput(
        loss,
        ce.detach(),
        consistency.detach() if config.lambda_consistency != 0 else None,
        diversity.detach() if config.lambda_diversity != 0 else None,
        svd.detach() if config.lambda_svd != 0 else None,
        n_valid,
    )


def _reference_objective(hidden, teacher_hidden, head, teacher_weight, labels, config, norm):
    z = reference.logits(hidden, head.weight)  # [N, V]
    norm = norm.to(z.dtype)
    zero = 0.0 * hidden.sum().to(z.dtype)  # connected, also when no row is left
    ce = zero + reference.cross_entropy(z, labels) / norm
    consistency = diversity = svd = zero
    if teacher_hidden is not None:
        z_teacher = reference.logits(teacher_hidden, head.weight.detach() if teacher_weight is None else teacher_weight)
        consistency = zero + reference.consistency(z, z_teacher, config.temperature) / norm
    if config.lambda_diversity != 0:
        diversity = zero + reference.diversity(z, config.entropy_top_k) / norm
    if config.lambda_svd != 0 and len(z):
        svd = zero + reference.svd(z, config.svd_rank) * (len(z) / norm)
    loss = ce + config.lambda_consistency * consistency + config.lambda_diversity * diversity + config.lambda_svd * svd
    return loss, ce, consistency, diversity, svd


def _streaming_objective(hidden, teacher_hidden, head, teacher_weight, labels, config, norm):
    if head.weight.requires_grad:
        raise ValueError("head: a head that is trained needs impl='reference'; found a weight that requires a gradient")
    gram = head.gram if config.lambda_svd != 0 else None
    return _Streaming.apply(hidden, teacher_hidden, head.weight, teacher_weight, gram, labels, config, norm)


class _Streaming(torch.autograd.Function):
    """The gradient by the hidden states is finished in the forward; the backward scales it."""

    @staticmethod
    def forward(ctx, hidden, teacher_hidden, weight, teacher_weight, gram, labels, config, norm):
        need_grad = ctx.needs_input_grad[0]
        terms = streaming.token_terms(
            hidden,
            teacher_hidden,
            weight,
            labels,
            teacher_weight=teacher_weight,
            lambda_consistency=config.lambda_consistency,
            lambda_diversity=config.lambda_diversity,
            temperature=config.temperature,
            top_k=config.entropy_top_k,
            need_grad=need_grad,
        )
        dtype = terms.ce.dtype
        norm = norm.to(dtype)
        ce, consistency, diversity = terms.ce / norm, terms.consistency / norm, terms.diversity / norm
        svd = torch.zeros_like(ce)
        grad = terms.grad_hidden
        if grad is not None:
            grad /= norm
        if gram is not None and len(hidden):
            weight_of_batch = len(hidden) / norm
            svd, svd_grad = spectral.svd_ratio(hidden, gram, config.svd_rank, weight.shape[0], need_grad)
            svd = svd.to(dtype) * weight_of_batch
            if grad is not None:
                grad += (config.lambda_svd * weight_of_batch) * svd_grad
        if grad is not None:
            # float16 would flush the small entries before a loss scale can lift them; bfloat16 has the range.
            ctx.save_for_backward(grad if hidden.dtype == torch.float16 else grad.to(hidden.dtype))
            ctx.dtype = hidden.dtype
        loss = (
            ce + config.lambda_consistency * consistency + config.lambda_diversity * diversity + config.lambda_svd * svd
        )
        ctx.mark_non_differentiable(ce, consistency, diversity, svd)
        return loss, ce, consistency, diversity, svd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        (grad,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)  # a scale of 1/3 must not be rounded to bfloat16
        return (grad.to(wide) * grad_loss.to(wide)).to(ctx.dtype), *[None] * 7


def _check(hidden, teacher_hidden, head, labels, config, teacher_head, normalizer) -> None:
    if not isinstance(head, LinearHead):
        raise TypeError(f"head: expected a LinearHead, found {type(head).__name__}")
    if not isinstance(config, BALoraConfig):
        raise TypeError(f"config: expected a BALoraConfig, found {type(config).__name__}")
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise TypeError(f"hidden: expected a floating-point tensor, found {_describe(hidden)}")
    d = head.weight.shape[1]
    if hidden.dim() not in (2, 3) or hidden.shape[-1] != d:
        raise ValueError(f"hidden: expected the shape [N, {d}] or [B, S, {d}], found {_describe(hidden)}")
    if hidden.device != head.weight.device:
        raise ValueError(f"hidden: expected the head's device {head.weight.device}, found {hidden.device}")
    if (hidden.dtype == torch.float64) != (head.weight.dtype == torch.float64):
        raise TypeError(f"hidden: the head is {head.weight.dtype}, found {hidden.dtype}; float64 does not mix")
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels: expected whole numbers (int64), found {_describe(labels)}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels: expected hidden's leading shape {list(hidden.shape[:-1])}, found {_describe(labels)}"
        )
    if labels.device != hidden.device:
        raise ValueError(f"labels: expected hidden's device {hidden.device}, found {labels.device}")
    width = d
    if teacher_head is not None:
        if not isinstance(teacher_head, LinearHead):
            raise TypeError(f"teacher_head: expected a LinearHead, found {type(teacher_head).__name__}")
        vocab, width = teacher_head.weight.shape
        if vocab != head.weight.shape[0]:
            raise ValueError(f"teacher_head: expected head's vocabulary of {head.weight.shape[0]}, found {vocab}")
        if teacher_head.weight.device != head.weight.device:
            raise ValueError(
                f"teacher_head: expected head's device {head.weight.device}, found {teacher_head.weight.device}"
            )
        if (teacher_head.weight.dtype == torch.float64) != (head.weight.dtype == torch.float64):
            raise TypeError(f"teacher_head: the head is {head.weight.dtype}, found {teacher_head.weight.dtype}")
    if teacher_hidden is None:
        if config.lambda_consistency != 0:
            raise ValueError(
                f"teacher_hidden: lambda_consistency is {config.lambda_consistency}, so the teacher's hidden states "
                "are needed; found None"
            )
    elif not isinstance(teacher_hidden, Tensor) or teacher_hidden.dtype != hidden.dtype:
        raise TypeError(f"teacher_hidden: expected hidden's type {hidden.dtype}, found {_describe(teacher_hidden)}")
    elif teacher_hidden.shape != (*hidden.shape[:-1], width):
        raise ValueError(
            f"teacher_hidden: expected the shape {[*hidden.shape[:-1], width]}, found {_describe(teacher_hidden)}"
        )
    elif teacher_hidden.device != hidden.device:
        raise ValueError(f"teacher_hidden: expected hidden's device {hidden.device}, found {teacher_hidden.device}")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer: expected one number, found {_describe(normalizer)}")
    elif normalizer is not None:
        if isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
            raise TypeError(f"normalizer: expected a number or a tensor of one, found {_describe(normalizer)}")
        if not (math.isfinite(normalizer) and normalizer > 0):
            raise ValueError(f"normalizer: expected a finite number above 0, found {normalizer!r}")


def _check_label_range(labels: Tensor, vocab: int) -> None:
    if labels.numel() == 0:
        return
    low, high = labels.aminmax()
    if low < 0 or high >= vocab:
        worst = int(low if low < 0 else high)
        raise ValueError(f"labels: expected {IGNORE_INDEX} or 0 to {vocab - 1} (the vocabulary), found {worst}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    return f"{value!r} of type {type(value).__name__}"
