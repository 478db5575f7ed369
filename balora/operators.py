"""The fused operations as operators of torch, ``torch.ops.balora.…``: what torch.compile sees of them is a name and the
shapes of the results, so it neither looks into the kernels nor breaks the graph."""

from __future__ import annotations

import torch
from torch import Tensor

from . import fused, streaming
from .checks import valid_rows
from .config import BALoraConfig
from .head import LinearHead


@torch.library.custom_op(
    "balora::consistency",
    mutates_args=(),
    schema="(Tensor z, Tensor z_teacher, float temperature, Tensor? valid) -> (Tensor, Tensor)",
)
def consistency(z, z_teacher, temperature, valid):
    return fused.consistency(z, z_teacher, temperature, valid)


@consistency.register_fake
def _(z, z_teacher, temperature, valid):
    n = z.numel() // z.shape[-1]
    return z.new_empty((), dtype=torch.float64), z.new_empty(n, fused.STATS, dtype=torch.float32)


@torch.library.custom_op(
    "balora::consistency_gradient",
    mutates_args=("out",),
    schema="(Tensor z, Tensor z_teacher, float temperature, Tensor? valid, Tensor saved, Tensor(a!) out, Tensor scale)"
    " -> ()",
)
def consistency_gradient(z, z_teacher, temperature, valid, saved, out, scale):
    fused.consistency_gradient(z, z_teacher, temperature, valid, saved, out, scale)


@torch.library.custom_op(
    "balora::diversity", mutates_args=(), schema="(Tensor z, int top_k, Tensor? valid) -> (Tensor, Tensor, Tensor)"
)
def diversity(z, top_k, valid):
    return fused.diversity(z, top_k, valid)


@diversity.register_fake
def _(z, top_k, valid):
    n, k = z.numel() // z.shape[-1], min(top_k, z.shape[-1])
    total = z.new_empty((), dtype=torch.float64)
    return total, z.new_empty(n, k, dtype=torch.float32), z.new_empty(n, k, dtype=torch.int64)


@torch.library.custom_op(
    "balora::linear_objective",
    mutates_args=(),
    schema="(Tensor hidden, Tensor? teacher_hidden, Tensor?[] head, int head_key, Tensor?[] own_head, int own_key,"
    " Tensor labels, Tensor norm, float[] numbers, int top_k, str choices, bool[] need, str impl) -> Tensor[]",
    # It counts the valid rows, and may decompose WᵀW: mode="reduce-overhead" captures what is around it.
    tags=(torch.Tag.cudagraph_unsafe,),
)
def _linear_objective(
    hidden, teacher_hidden, head, head_key, own_head, own_key, labels, norm, numbers, top_k, choices, need, impl
):
    consistency, diversity, svd_norm, kind = choices.split()
    config = BALoraConfig(
        lambda_consistency=numbers[0],
        lambda_diversity=numbers[1],
        lambda_svd=numbers[2],
        temperature=numbers[3],
        svd_variance=numbers[4],
        entropy_top_k=top_k,
        consistency=consistency,
        diversity=diversity,
        svd_rank=numbers[5] if kind == "fraction" else int(numbers[5]),
        svd_norm=svd_norm,
    )
    student = LinearHead.known(head_key, head)
    own = LinearHead.known(own_key, own_head) if own_head else None
    inputs = hidden, teacher_hidden, student, own, labels
    if impl == "triton" and labels.is_cuda and torch.cuda.is_current_stream_capturing():
        terms, gradients = fused.objective(*inputs, None, config, tuple(need), norm, masked=True)
    else:
        kept = valid_rows(labels, head[0].shape[0])
        evaluate = fused.objective if impl == "triton" else streaming.objective
        terms, gradients = evaluate(*inputs, kept, config, tuple(need), norm)
    return [*(t.clone() for t in terms), *(hidden.new_empty(0) if g is None else g for g in gradients)]


@_linear_objective.register_fake
def _(hidden, teacher_hidden, head, head_key, own_head, own_key, labels, norm, numbers, top_k, choices, need, impl):
    wide = torch.float64 if torch.float64 in (hidden.dtype, head[0].dtype) else torch.float32
    found = [hidden.new_empty((), dtype=wide) for _ in range(4)]
    for i, (tensor, asked) in enumerate(zip((hidden, *head), need, strict=True)):
        dtype = hidden.dtype if i == 0 and hidden.dtype != torch.float16 else wide
        found.append(tensor.new_empty(tensor.shape, dtype=dtype) if asked else hidden.new_empty(0))
    return found


def linear_objective(
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    head: LinearHead,
    own_head: LinearHead | None,
    labels: Tensor,
    config: BALoraConfig,
    need: tuple[bool, ...],
    norm: Tensor,
    impl: str,
) -> tuple[streaming.Terms, streaming.Gradients]:
    """``streaming.objective`` or ``fused.objective`` as one operator; labels may hold −100."""
    c = config
    found = torch.ops.balora.linear_objective(
        hidden,
        teacher_hidden,
        list(head.tensors),
        head.key,
        [] if own_head is None else list(own_head.tensors),
        -1 if own_head is None else own_head.key,
        labels,
        norm,
        [c.lambda_consistency, c.lambda_diversity, c.lambda_svd, c.temperature, c.svd_variance, float(c.svd_rank)],
        c.entropy_top_k,
        f"{c.consistency} {c.diversity} {c.svd_norm} {'fraction' if isinstance(c.svd_rank, float) else 'whole'}",
        list(need),
        impl,
    )
    gradients = [found[4 + i] if asked else None for i, asked in enumerate(need)]
    return streaming.Terms(*found[:4]), streaming.Gradients(*gradients)
