"""What an adapter adds to the output of its layer, of either form, as functions with gradients of their own.

Shapes: x [..., in], A and A₀ [r, in], B and B₀ [out, r].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class FrozenPath(torch.autograd.Function):
    """B₀(A₀ x). Keeps A₀ and B₀ for the backward as they are stored; autograd would keep their float32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a0: Tensor, b0: Tensor) -> Tensor:
        ctx.save_for_backward(a0, b0)
        ctx.dtype = x.dtype
        return F.linear(F.linear(x, a0.to(x.dtype)), b0.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        a0, b0 = ctx.saved_tensors
        return ((grad @ b0.to(grad.dtype)) @ a0.to(grad.dtype)).to(ctx.dtype), None, None


class OffsetPath(torch.autograd.Function):
    """s·(B(A x) − B₀(A₀ x)), in ``dtype``, as s·[B, B − B₀] ([A − A₀; A₀] x).

    The differences are taken before anything is rounded, so that every rounding is relative to what training has
    changed. On a half precision base A and B start at numbers of that type: rounded to it by themselves they would stay
    there until an update reaches half a step of it (2⁻⁹ to 2⁻⁸ of an entry in bfloat16; at a learning rate of 2e-5 that
    takes many steps), and the student would be the teacher meanwhile. Without a change the result is exactly 0.

    Keeps x as the layer got it, or rounded to ``dtype`` where that is smaller: in a half precision model layers that
    share an input share it. With modules in its place every layer would keep an x of its own, and autocast rounded
    copies of A and B: for LLaMA-2-7B at r = 128 these are 0.64 GB (counted), as much as A₀ and B₀ take.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, scaling: float, dtype: torch.dtype
    ) -> Tensor:
        result, kept, seen = _offset(ctx, x, a, b, a0, b0, scaling, dtype)
        ctx.save_for_backward(kept, seen, a, b, a0, b0)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, seen, a, b, a0, b0 = ctx.saved_tensors
        down, up = _stacked(a, b, a0, b0, ctx.scaling, ctx.dtype)
        return *_gradients(ctx, grad, x, seen, down, up, a, b), None, None, None, None


class ResidualPath(torch.autograd.Function):
    """s·B(A x), in ``dtype``, as s·B₀(A₀ x) + s·(B(A x) − B₀(A₀ x)): the bits of the teacher's, and the offset.

    So the changes of A and B show that rounding A and B would hide (``OffsetPath``). The gradients need no such care:
    they are those of s·B(A x).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, scaling: float, dtype: torch.dtype
    ) -> Tensor:
        result, kept, seen = _offset(ctx, x, a, b, a0, b0, scaling, dtype)
        ctx.save_for_backward(kept, seen, a, b)
        initial = F.linear(F.linear(x.to(dtype), a0.to(dtype)), b0.to(dtype))
        return result + initial * scaling  # in place, the gradients are lost where torch 2.11 compiles this

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, seen, a, b = ctx.saved_tensors
        down, up = a.to(ctx.dtype), (b * ctx.scaling).to(ctx.dtype)
        return *_gradients(ctx, grad, x, seen, down, up, a, b), None, None, None, None


def _offset(
    ctx: Any, x: Tensor, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """s·(B(A x) − B₀(A₀ x)) [..., out], and what its backward keeps: x in the smaller type, A x [..., r]."""
    ctx.scaling, ctx.dtype, ctx.input_dtype = scaling, dtype, x.dtype
    rounded = x.to(dtype)
    down, up = _stacked(a, b, a0, b0, scaling, dtype)
    both = F.linear(rounded, down)  # [..., 2r]
    kept = rounded if dtype.itemsize < x.dtype.itemsize else x
    return F.linear(both, up), kept, both[..., : len(a)] + both[..., len(a) :]


def _stacked(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[A − A₀; A₀] [2r, in] and s·[B, B − B₀] [out, 2r], the differences rounded once."""
    if torch.promote_types(a.dtype, a0.dtype) != a.dtype:  # A and B were rounded, by an engine or a user
        a0, b0 = a0.to(a.dtype), b0.to(b.dtype)
    r = len(a)
    down, up = a.new_empty(2 * r, a.shape[1], dtype=dtype), b.new_empty(len(b), 2 * r, dtype=dtype)
    torch.sub(a, a0, out=down[:r])
    down[r:] = a0
    up[:, :r], up[:, r:] = (b, b - b0) if scaling == 1 else (b * scaling, (b - b0) * scaling)
    return down, up


def _gradients(
    ctx: Any, grad: Tensor, x: Tensor, seen: Tensor, down: Tensor, up: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """By x, A and B, where x meets down [r or 2r, in] and then up [out, r or 2r], which begins with s·B."""
    dtype, (need_x, need_a, need_b) = ctx.dtype, ctx.needs_input_grad[:3]
    grad = grad.to(dtype)
    by_x = by_a = by_b = None
    by_down = grad @ up  # [..., r or 2r]
    if need_x:
        by_x = (by_down @ down).to(ctx.input_dtype)
    if need_a:
        by_a = (_rows(by_down[..., : len(a)]).T @ _rows(x.to(dtype))).to(a.dtype)
    if need_b:
        by_b = (_rows(grad).T @ (_rows(seen) * ctx.scaling)).to(b.dtype)
    return by_x, by_a, by_b


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The type to multiply in: autocast's, else bfloat16 where x is, else that of A and B."""
    device = x.device.type  # autocast knows no "meta"; torch 2.11 does not trace torch.amp.is_autocast_available
    if device != "meta" and torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    return x.dtype if x.dtype == torch.bfloat16 else weight.dtype
