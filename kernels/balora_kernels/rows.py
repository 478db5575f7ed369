"""Launchers of the row kernels: terms of rows of logits, and their gradient."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import row_kernels as kernels
from . import tiles
from .numerics import LOG2E

# a·b + c in one step: which is no default of later releases of triton
FUSED = {} if triton.knobs.runtime.interpret else {"enable_fp_fusion": True}


class Logits(NamedTuple):
    """Logits as the kernels read them: cap·tanh(scale·(values + bias)/cap), without a cap scale·(values + bias)."""

    values: Tensor  # [N, V] or [B, S, V], of any strides
    bias: Tensor | None = None  # [V], contiguous
    scale: float = 1.0
    cap: float | None = None


class Teacher(NamedTuple):
    logits: Logits
    difference: bool  # values are Z_P − Z, before the scale and the soft-cap of the student; else they are Z_P
    factor: Tensor | None = None  # [1] float32: the values are still to be multiplied by it


class Found(NamedTuple):
    """What ``forward`` finds of every row; 0 of a row that is not valid."""

    terms: Tensor  # [3, N] float32: CE, KL without T², −H of the top K; 0 where a term was not asked for
    stats: Tensor | None  # [N, 8], for ``gradient``
    top_gradient: Tensor | None  # [N, K]: of −H by the raw logit (a soft-cap's slope is in it)
    top_index: Tensor | None  # [N, K] int64


def forward(
    student: Logits,
    teacher: Teacher | None = None,
    *,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    padded: bool = False,
) -> Found:
    """CE (with labels), KL (with a teacher) and −H of the top K (with top_k) of every row; each logit is read once.

    labels [N] int64, contiguous, a negative one is not valid; valid [N] bool; top_k from 1 to min(128, V). padded says
    that the rows of all logits go on in memory, to a multiple of 16 columns; what stands there does not matter.
    """
    z = student.values
    n, vocab = z.numel() // z.shape[-1], z.shape[-1]
    cut = tiles.tiling(vocab)
    new = z.new_empty
    terms = z.new_zeros(3, n, dtype=torch.float32)
    exact = labels is not None or teacher is not None
    states = new(kernels.STATES, n, cut.tiles, dtype=torch.float32) if exact else None
    stats = new(n, kernels.STATS.value, dtype=torch.float32) if exact else None
    maxima = new(n, cut.blocks, dtype=torch.float32) if top_k else None
    top_gradient = new(n, top_k, dtype=torch.float32) if top_k else None
    top_index = new(n, top_k, dtype=torch.int64) if top_k else None
    if n == 0:
        return Found(terms, stats, top_gradient, top_index)
    flags = _flags(student, teacher, labels, temperature)
    padded = padded and vocab % 16 != 0
    numbers = _numbers(student, teacher, temperature)
    t = None if teacher is None else teacher.logits
    with on(z):
        kernels.tile_states[(n, cut.tiles)](
            z, t and t.values, student.bias, t and t.bias, labels, _bytes(valid), teacher and teacher.factor,
            states, maxima, n, vocab, cut.tiles, cut.blocks, *_strides(z), *_strides(t and t.values), *numbers,
            **flags, TOP=top_k is not None, PADDED=padded, TILE=cut.tile, BLOCK=cut.block,
            num_warps=tiles.tile_warps(cut), **FUSED,
        )  # fmt: skip
        kp = tiles.power_of_two(max(top_k, 2)) if top_k else 0
        kernels.merge[(n,)](
            z, student.bias, labels, _bytes(valid), states, maxima, terms, stats, top_gradient, top_index,
            n, vocab, cut.tiles, cut.blocks, *_strides(z), student.scale, numbers[2], numbers[4], top_k or 0,
            **{name: flags[name] for name in ("TEACHER", "CAP", "SCALED", "T")}, TILES=tiles.power_of_two(cut.tiles),
            BLOCK=cut.block, BLOCKS=max(tiles.power_of_two(cut.blocks), kp) if kp else 1, KP=kp,
            num_warps=tiles.merge_warps(cut, top_k), **FUSED,
        )  # fmt: skip
    return Found(terms, stats, top_gradient, top_index)


def gradient(
    student: Logits,
    teacher: Teacher | None,
    found: Found,
    out: Tensor,
    *,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    strength: float = 0.0,
    lambda_diversity: float = 0.0,
    out_scale: float = 1.0,
    scale: Tensor | None = None,
    padded: bool = False,
) -> None:
    """out = out_scale·scale·the gradient of CE + strength·T·KL + λ₂·(−H) by the student's scale·(values + bias).

    Each logit is read once. A row that is not valid becomes 0. out has the shape of the logits, any type and strides;
    it may be the values of the teacher or of the student themselves. scale [] float32, not beside λ₂, whose kernel does
    not take it; the others as in ``forward``, where padded is said of out too: it is written up to there.
    """
    z = student.values
    n, vocab = z.numel() // z.shape[-1], z.shape[-1]
    if n == 0:
        return
    cut = tiles.tiling(vocab)
    flags = _flags(student, teacher, labels, temperature)
    t = None if teacher is None else teacher.logits
    with on(z):
        kernels.gradient[(n, cut.tiles)](
            z, t and t.values, student.bias, t and t.bias, labels, _bytes(valid), teacher and teacher.factor,
            found.stats, out, scale, vocab, *_strides(z), *_strides(t and t.values), *_strides(out),
            *_numbers(student, teacher, temperature), strength, out_scale,
            **flags, PADDED=padded and vocab % 16 != 0, TILE=cut.tile, num_warps=tiles.tile_warps(cut), **FUSED,
        )  # fmt: skip
        if found.top_gradient is not None and found.top_index is not None and lambda_diversity != 0:
            top_k = found.top_gradient.shape[1]
            kernels.add_top[(n,)](
                found.top_gradient, found.top_index, out, lambda_diversity * out_scale, *_strides(out), top_k,
                KP=tiles.power_of_two(max(top_k, 2)), num_warps=1,
            )  # fmt: skip


def cap(z: Tensor, factor: float, out: Tensor, out_scale: float = 1.0) -> None:
    """out = out_scale·tanh(factor·z). z [n, V] float32; out [n, V] of any floating type, or z itself."""
    n, vocab = z.shape
    cut = tiles.tiling(vocab)
    with on(z):
        kernels.cap[(n, cut.tiles)](
            z, out, vocab, z.stride(0), out.stride(0), float(factor), float(out_scale),
            TILE=cut.tile, num_warps=tiles.tile_warps(cut), **FUSED,
        )  # fmt: skip


def capped_gradient(t: Tensor, multiple: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = (multiple·t + left·right)·(1 − t²): the gradient of an SVD term by what the hyperbolic tangents t are of.

    t [n, V], multiple [], left [n, k], right [k, V], all float32; out [n, V] of any floating type.
    """
    n, vocab = t.shape
    left, right = left.contiguous(), right.contiguous()
    grid = (-(-vocab // tiles.OUTER_COLUMNS), -(-n // tiles.OUTER_ROWS))
    with on(t):
        kernels.capped_gradient[grid](
            t, multiple, left, right, out, n, vocab, left.shape[1], t.stride(0), right.stride(0), out.stride(0),
            ROWS=tiles.OUTER_ROWS, COLUMNS=tiles.OUTER_COLUMNS, num_warps=8, **FUSED,
        )  # fmt: skip


def _flags(student: Logits, teacher: Teacher | None, labels: Tensor | None, temperature: float) -> dict:
    power = {1.0: 1, 2.0: 2}.get(float(temperature), 3)  # how e^z comes from e^(z/T): as it is, squared, anew
    return {
        "TEACHER": 0 if teacher is None else (kernels.DIFFERENCE if teacher.difference else kernels.LOGITS).value,
        "CAP": student.cap is not None,
        "TEACHER_CAP": teacher is not None and teacher.logits.cap is not None,
        "SCALED": student.scale != 1,
        "TEACHER_SCALED": teacher is not None and teacher.logits.scale != 1,
        "T": 0 if labels is None else 1 if teacher is None else power,
    }


def _numbers(student: Logits, teacher: Teacher | None, temperature: float) -> tuple[float, ...]:
    """scale, t_scale, cap, t_cap, k = 1/(T log 2)."""
    t = student if teacher is None else teacher.logits
    k = LOG2E if teacher is None else LOG2E / temperature
    return float(student.scale), float(t.scale), float(student.cap or 1), float(t.cap or 1), k


def _strides(values: Tensor | None) -> tuple[int, int, int, int]:
    """Rows of an inner dimension; strides of the outer one, the inner one and the columns."""
    if values is None:
        return 1, 0, 0, 1
    if values.dim() == 2:  # an inner dimension of 1 takes no division
        return 1, values.stride(0), 0, values.stride(1)
    outer, inner, column = values.stride()
    return values.shape[1], outer, inner, column


def _bytes(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.contiguous().view(torch.uint8)


def on(tensor: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
