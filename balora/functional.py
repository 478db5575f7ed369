"""The public operations: checks, choice of implementation, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, fused, operators, reference, spectral, streaming
from .checks import IGNORE_INDEX, as_scalar, check_normalizer, check_whole, describe, valid_rows
from .config import BALoraConfig, rank_of
from .head import LinearHead
from .losses import consistency_loss, covariance_loss, diversity_loss, svd_loss
from .objective import BALoraOutput, logits_objective, regression_objective, weighted
from .precision import float32_products

__all__ = [
    "BALoraOutput",
    "LinearHead",
    "consistency_loss",
    "covariance_loss",
    "diversity_loss",
    "linear_objective",
    "logits_objective",
    "randomized_svd",
    "regression_objective",
    "svd_loss",
]

_SCALED_AT_A_TIME = 2**22  # elements of a gradient that are widened at a time


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
    """The BA-LoRA objective from hidden states, without ever holding the [N, V] logits (``"streaming"``).

    With N valid tokens (label ≠ −100), Z = H Wᵀ and Z_P = H_P Wᵀ (2025 paper, eq. 9 to 12)::

        loss = CE + λ₁ · T² · mean KL(softmax(Z_P/T) ‖ softmax(Z/T)) − λ₂ · mean H(softmax of the K largest of Z)
                  − λ₃ · Σ_{i≤k} σ_i(Z) / ‖Z‖_F

    and the variants that ``config`` names: the squared distance of Z_P/‖Z_P‖ and Z/‖Z‖, the entropy of the whole
    vocabulary, the squared covariances (1/V) Σ_{i≠j} Cov²_ij, the nuclear norm and the variance of the leading σ (2024
    paper, eq. 5 to 12; 2025, eq. 4 to 7). ``head`` may be any ``LinearHead``: bias, scale, soft-cap, an adapter.

    Gradients go to ``hidden`` and to the tensors of ``head`` that require one; they are computed in the forward, and
    scaled in the backward. The λ of ``config`` are used as given, without a schedule. K and k above what the batch has
    are clamped. Without a valid token the loss is a 0 that is still connected. A vocabulary masked by a bias of −∞ adds
    nothing to the terms of a token; the SVD term of infinite logits is NaN.

    Memory beyond inputs and gradients is bounded whatever N (chunks of 72 MiB, on a CUDA device 448); a loss that is
    scaled before the backward has its gradients twice for a moment. Terms of the whole batch that take the logits
    themselves (covariance, normalized squares, SVD under a soft-cap or of a classifier with V < d) hold [N, N] or
    [V, V], and [N, d], besides; of a soft-cap the SVD term costs three more products of N·V·d.

    From bfloat16 inputs the KL and its gradient are within 2 % up to a KL of 6 nats per token (without T²); beyond, the
    rounding of the difference logits (1/512 of their size) shows in the gradient: 3 % at 8 nats, as plain bfloat16's.

    A regression head (V = 1, ``config.task="nlu"``, floating-point labels) has the mean squared error in place of CE
    and of the KL, not of ``consistency="normalized_mse"``; diversity and SVD are undefined for it, and None.

    Args:
        hidden: [N, d] or [B, S, d], the student's last hidden states, float32, bfloat16, float16 or float64.
        teacher_hidden: the pre-trained model's, of the same shape, type and device; None is allowed if λ₁ = 0.
        head: the output layer of the student, and of the teacher unless that has its own.
        labels: whole numbers of hidden's leading shape, already aligned with it; −100 marks a token that is left out.
        config: weights and shapes of the terms.
        teacher_head: another output layer for the teacher, of the same vocabulary; teacher_hidden then has its width.
            The two logits are subtracted in float32, which keeps less of a small KL than a shared head does. A student
            with an adapter on its head wants this: its teacher's head is the one without.
        normalizer: what the sums over tokens are divided by, instead of the number of valid tokens of this batch (the
            number over all micro-batches and ranks). Terms of the whole batch are weighted by n_valid / normalizer. A
            number must be above 0; of a tensor that is not checked, which would wait for the device.
        impl: "auto", "streaming", "triton" (CUDA devices, not for float64, ``diversity="full"`` or K above 128) or
            "reference" (everything materialized, autograd: for tests). "auto" takes "triton" where that runs. In a
            CUDA graph "triton" leaves out no row before the products and checks no label; warm up before the capture.

    Returns:
        BALoraOutput(loss, ce, consistency, diversity, svd, n_valid).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type, device or range; the message names it.
    """
    _check(hidden, teacher_hidden, head, labels, config, teacher_head, normalizer)
    impl = dispatch.choose("linear_objective", impl, hidden.device, {"triton": _no_kernel(hidden, head, config)})
    own_head = None if teacher_head is None or teacher_head is head else teacher_head
    hidden_rows = hidden.reshape(-1, hidden.shape[-1])  # [M, d]
    label_rows = labels.reshape(-1)
    teacher_rows = None
    if config.lambda_consistency != 0 and teacher_hidden is not None:
        teacher_rows = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    if labels.is_floating_point():  # of a single column of logits there is nothing to stream
        with torch.autocast(hidden.device.type, enabled=False):
            z = _logits(hidden_rows, head)
            z_teacher = None if teacher_rows is None else _logits(teacher_rows, own_head or head)
        return regression_objective(z, z_teacher, label_rows, config, normalizer)
    label_rows = label_rows.long()
    # The rows that do not count are left out before the products: that waits for the device, for their number and for
    # the range of the labels. Where a CUDA graph is captured nothing can wait; they are computed then, and masked.
    compiled = impl != "reference" and torch.compiler.is_compiling()  # then an operator does that
    masked = not compiled and impl == "triton" and _is_captured(hidden)
    kept: Tensor | None = None
    n: int | Tensor
    if masked or compiled:
        n = (label_rows != IGNORE_INDEX).sum()
    else:
        kept = valid_rows(label_rows, head.weight.shape[0])
        n = len(label_rows) if kept is None else len(kept)
    if normalizer is None:
        normalizer = n.clamp_min(1) if isinstance(n, Tensor) else max(n, 1)
    norm = as_scalar(normalizer, hidden.device)

    grad_enabled = torch.is_grad_enabled()  # within a Function it never is
    # Autocast would round the logits to half precision; the objective is float32 arithmetic whatever surrounds it.
    with torch.autocast(hidden.device.type, enabled=False):
        if impl == "reference":
            if kept is not None:
                hidden_rows, label_rows = hidden_rows[kept], label_rows[kept]
                teacher_rows = None if teacher_rows is None else teacher_rows[kept]
            sums = _reference_sums(hidden_rows, teacher_rows, head, own_head, label_rows, config)
            terms = [t / norm.to(t.dtype) for t in sums]
            loss = weighted(config, *terms)
        else:
            how = f"compiled {impl}" if compiled else "masked" if masked else impl
            loss, *terms = _Objective.apply(
                hidden_rows,
                *head.tensors,
                teacher_rows,
                head,
                own_head,
                label_rows,
                kept,
                config,
                norm,
                grad_enabled,
                how,
            )
    ce, consistency, diversity, svd = (t.detach() for t in terms)
    return BALoraOutput(
        loss,
        ce,
        consistency if config.lambda_consistency != 0 else None,
        diversity if config.lambda_diversity != 0 else None,
        svd if config.lambda_svd != 0 else None,
        as_scalar(n, hidden.device, torch.int64),
    )


def _is_captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _no_kernel(hidden: Tensor, head: LinearHead, config: BALoraConfig) -> str | None:
    """What the kernels cannot do of this."""
    if torch.float64 in (hidden.dtype, head.weight.dtype):
        return "its arithmetic is float32, hidden is float64"
    if config.lambda_diversity != 0 and config.diversity == "full":
        return "config.diversity is 'full', it has the entropy of the top K alone"
    top_k = min(config.entropy_top_k, head.weight.shape[0])
    if config.lambda_diversity != 0 and config.diversity == "topk" and top_k > fused.TOP_K_MAX:
        return f"config.entropy_top_k is {config.entropy_top_k}, it has {fused.TOP_K_MAX} at most"
    return None


def _reference_sums(
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    head: LinearHead,
    own_head: LinearHead | None,
    labels: Tensor,
    config: BALoraConfig,
) -> list[Tensor]:
    """CE, consistency, diversity and SVD as sums over the rows, everything materialized, autograd."""
    z = _logits(hidden, head)
    n, vocab = z.shape
    zero = z.sum() if n == 0 else z.new_zeros(())  # of no row a 0 that is connected; 0 · −∞ would be NaN
    ce, consistency, diversity, svd = (reference.cross_entropy(z, labels) if n else zero, zero, zero, zero)
    if teacher_hidden is not None:
        z_teacher = _logits(teacher_hidden, own_head or head).detach()
        if config.consistency == "kl":
            consistency = reference.consistency(z, z_teacher, config.temperature)
        else:
            consistency = n * reference.normalized_mse(z, z_teacher)
    if config.lambda_diversity != 0:
        if config.diversity == "topk":
            diversity = reference.diversity(z, config.entropy_top_k)
        else:
            diversity = reference.entropy(z) if config.diversity == "full" else n * reference.covariance(z)
    if config.lambda_svd != 0 and n:
        svd = n * reference.svd(z, rank_of(config.svd_rank, min(n, vocab)), config.svd_norm, config.svd_variance)
    return [ce, consistency, diversity, svd]


def _logits(hidden: Tensor, head: LinearHead) -> Tensor:
    return reference.logits(hidden, head.weight, head.bias, head.softcap, head.scale, head.lora)


class _Objective(torch.autograd.Function):
    """The gradients are finished in the forward; the backward scales them."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, lora_a, lora_b, teacher_hidden, head, own_head, labels, kept, config, norm, grad,
        how,
    ):  # fmt: skip
        need = tuple(asked and grad for asked in ctx.needs_input_grad[:5])
        inputs = hidden, teacher_hidden, head, own_head, labels
        if how.startswith("compiled "):
            sums, gradients = operators.linear_objective(*inputs, config, need, norm, how.removeprefix("compiled "))
        elif how == "streaming":
            sums, gradients = streaming.objective(*inputs, kept, config, need, norm)
        else:
            sums, gradients = fused.objective(*inputs, kept, config, need, norm, masked=how == "masked")
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias, lora_a, lora_b)]
        terms = [t / norm.to(t.dtype) for t in sums]
        ctx.mark_non_differentiable(*terms)
        return weighted(config, *terms), *terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        scaled = [_scaled(g, grad_loss, dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return *scaled, *[None] * 9


def _scaled(grad: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """grad · scale in the type ``dtype``, multiplied in float32: a scale of 1/3 must not be rounded to bfloat16."""
    if grad is None:
        return None
    wide = torch.promote_types(grad.dtype, torch.float32)
    if torch.compiler.is_compiling():
        return (grad.to(wide) * scale.to(wide)).to(dtype)
    if grad.dtype == dtype and scale.device.type == "cpu" and scale == 1:
        return grad  # the usual case; no second copy
    out = torch.empty_like(grad, dtype=dtype)
    step = max(1, _SCALED_AT_A_TIME // max(1, grad[0].numel())) if len(grad) else 1
    for part, into in zip(grad.split(step), out.split(step), strict=True):
        into.copy_(part.to(wide) * scale.to(wide))
    return out


def randomized_svd(
    a: Tensor, rank: int, oversample: int = 10, n_iter: int = 2, seed: int = 0, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets A ≈ U diag(S) Vh of a batch of matrices (Halko, Martinsson and Tropp, 2011).

    A sketch of rank + oversample random combinations of the columns, n_iter power iterations, a small decomposition;
    the whole batch at once. The expected error of a σ falls like (σ_{l+1}/σ_i)^(4·n_iter + 2), l = rank + oversample;
    where l reaches min(m, n) it is exact up to rounding. The same bits for the same seed, device and implementation.

    "cuda": kernels where l ≤ 64 (float32, bfloat16, float16; with bfloat16 the sketch's panels have 16 bits: σ within
    about 1e-6 of σ_1), batched products and one kernel for the small matrix where l is larger or the input float64.
    Nothing waits for the device up to l = 256; a batch that does not fit into 512 MiB of scratch is taken in parts.

    The gradient goes through S alone: ∂L/∂A = U diag(∂L/∂S) Vh, 0 where a σ is 0. U and Vh are detached.

    Args:
        a: [..., m, n], floating point; half precision is computed in float32.
        rank: k, at least 1; above min(m, n) it means min(m, n).
        oversample: further columns of the sketch, at least 0.
        n_iter: power iterations, at least 0.
        seed: of the sketch.
        impl: "auto", "cuda" (the compiled extension), "torch", or "reference" (a full decomposition, differentiable in
            all three: for tests). Into a CUDA graph goes "cuda" with rank + oversample up to 64, not of float64.

    Returns:
        U [..., m, k], S [..., k] descending, Vh [..., k, n], in float32 (float64 for float64 inputs), with orthonormal
        columns and rows for rank-deficient and zero matrices too. A matrix with a NaN or infinite entry gives NaN, and
        so may one with entries so near the end of its type's range that a product with it overflows.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    if not isinstance(a, Tensor) or not a.is_floating_point() or a.dtype.itemsize < 2:
        raise TypeError(f"a: expected a floating-point tensor [..., m, n] of at least 16 bits, found {describe(a)}")
    impl = dispatch.choose("randomized_svd", impl, a.device)
    if a.dim() < 2 or 0 in a.shape[-2:]:
        raise ValueError(f"a: expected the shape [..., m, n] with m and n of at least 1, found {describe(a)}")
    check_whole("rank", rank)
    for name, value in (("oversample", oversample), ("n_iter", n_iter), ("seed", seed)):
        check_whole(name, value, least=0)
        if value >= 2**63:
            raise ValueError(f"{name}: expected a number below 2**63, found {value!r}")
    oversample = min(oversample, max(a.shape[-2:]))
    with torch.autocast(a.device.type, enabled=False), float32_products():
        if impl == "reference":
            return reference.randomized_svd(a.to(torch.promote_types(a.dtype, torch.float32)), rank)
        u, s, vh = _RandomizedSVD.apply(a, rank, oversample, n_iter, seed, impl)
        return u, s, vh


class _RandomizedSVD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, rank, oversample, n_iter, seed, impl):
        if impl == "cuda":
            u, s, vh, _ = torch.ops.balora.randomized_svd(a, rank, oversample, n_iter, seed)
        else:
            u, s, vh = spectral.randomized_svd(a, rank, oversample, n_iter, seed)
        ctx.save_for_backward(u, s, vh)
        ctx.dtype = a.dtype
        ctx.mark_non_differentiable(u, vh)
        return u, s, vh

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _, grad_s, __):
        u, s, vh = ctx.saved_tensors
        noise = s[..., :1] * torch.finfo(s.dtype).eps
        grad_s = torch.where(s <= noise, torch.zeros_like(grad_s), grad_s)
        with torch.autocast(u.device.type, enabled=False):
            return ((u * grad_s[..., None, :]) @ vh).to(ctx.dtype), *[None] * 5


def _check(hidden, teacher_hidden, head, labels, config, teacher_head, normalizer) -> None:
    if not isinstance(head, LinearHead):
        raise TypeError(f"head: expected a LinearHead, found {type(head).__name__}")
    if not isinstance(config, BALoraConfig):
        raise TypeError(f"config: expected a BALoraConfig, found {type(config).__name__}")
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise TypeError(f"hidden: expected a floating-point tensor, found {describe(hidden)}")
    d = head.weight.shape[1]
    if hidden.dim() not in (2, 3) or hidden.shape[-1] != d:
        raise ValueError(f"hidden: expected the shape [N, {d}] or [B, S, {d}], found {describe(hidden)}")
    if hidden.device != head.weight.device:
        raise ValueError(f"hidden: expected the head's device {head.weight.device}, found {hidden.device}")
    if (hidden.dtype == torch.float64) != (head.weight.dtype == torch.float64):
        raise TypeError(f"hidden: the head is {head.weight.dtype}, found {hidden.dtype}; float64 does not mix")
    regression = config.task == "nlu" and head.weight.shape[0] == 1
    if not isinstance(labels, Tensor) or not (
        labels.dtype in (torch.int64, torch.int32) or (regression and labels.is_floating_point())
    ):
        raise TypeError(f"labels: expected whole numbers (int64), found {describe(labels)}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected hidden's leading shape {list(hidden.shape[:-1])}, found {describe(labels)}")
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
        raise TypeError(f"teacher_hidden: expected hidden's type {hidden.dtype}, found {describe(teacher_hidden)}")
    elif teacher_hidden.shape != (*hidden.shape[:-1], width):
        raise ValueError(
            f"teacher_hidden: expected the shape {[*hidden.shape[:-1], width]}, found {describe(teacher_hidden)}"
        )
    elif teacher_hidden.device != hidden.device:
        raise ValueError(f"teacher_hidden: expected hidden's device {hidden.device}, found {teacher_hidden.device}")
    check_normalizer(normalizer)
