"""The pre-trained model inside of one with adapters, and evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .adapters import ADAPTER, form_of


def head_modules(model: Any) -> list[str]:
    """The names of the parts of a sequence classifier's head: what it has beside its pre-trained body, with weights."""
    return [
        name for name, m in model.named_children() if m is not model.base_model and any(True for _ in m.parameters())
    ]


@contextmanager
def teacher(model: nn.Module, head: str = "initial") -> Iterator[None]:
    """Within the block the model is the pre-trained one: adapters off, evaluation mode (no dropout).

    A layer of the residual form computes with its frozen factors instead, W_res x + s·B₀(A₀ x): W up to one rounding of
    W_res, and the same bits as the student's before training. All else is the pre-trained model exactly.

    Unlike peft's ``disable_adapter`` it never touches ``requires_grad``. On leaving, every flag is as it was, also
    after an error. Leave the block before the backward: gradient checkpointing recomputes with whatever is active then.
    (Merging the adapters and unmerging them again rounds the base weights, as always with peft.)

    Args:
        model: a model with adapters, or what holds one.
        head: "initial": the whole model is the one that the adapters were put on. "current", of a sequence classifier:
            its head stays as it is now, for a head that was new has nothing to teach; in evaluation mode too. Under it
            the body is the pre-trained one. This is what ``attach`` compares with (``BALoraConfig.teacher_head``).

    Raises:
        ValueError: the adapters are merged into the weights, which then are not the pre-trained ones; or head is
            neither of the two.
    """
    if head not in ("initial", "current"):
        raise ValueError(f"head: expected 'initial' or 'current', found {head!r}")
    flags = _teacher_flags(model, head)
    try:
        _put(flags)
        yield
    finally:
        _put_back(flags)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; on leaving, every module is in the mode that it was in."""
    flags = _evaluation_flags(model)
    try:
        _put(flags)
        yield
    finally:
        _put_back(flags)


class _Flag(NamedTuple):
    module: nn.Module
    name: str
    before: Any
    within: Any


# torch.compile leaves alone what walks over the modules: it would trace thousands of steps, of every model anew.
@torch.compiler.disable
def _evaluation_flags(model: nn.Module) -> list[_Flag]:
    return [_Flag(m, "training", True, False) for m in model.modules() if m.training]


@torch.compiler.disable
def _teacher_flags(model: nn.Module, head: str) -> list[_Flag]:
    kept: set[int] = set()
    if head == "current":
        base: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        kept = {id(m) for name in head_modules(base) for m in getattr(base, name).modules()}
    flags = _evaluation_flags(model)
    for m in model.modules():
        if not isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or id(m) in kept:
            continue
        if getattr(m, "merged", False):
            raise ValueError("model: the adapters are merged into the weights; call unmerge_adapter() first")
        residual = form_of(m) == "residual"
        flags.append(_Flag(m, "_disable_adapters", m._disable_adapters, not residual))
        if residual:
            flags.append(_Flag(m, "initial_selected", m.initial_selected, True))
            flags.append(_Flag(m, "_active_adapter", m._active_adapter, [ADAPTER]))
    return flags


@torch.compiler.disable
def _put(flags: list[_Flag]) -> None:
    """Past nn.Module's __setattr__, which asks first whether it is a parameter: of the 3,000 modules of a model of 32
    layers that takes some 10 ms in every forward of a teacher, in which a GPU would wait."""
    for flag in flags:
        _assign(flag.module, flag.name, flag.within)


@torch.compiler.disable
def _put_back(flags: list[_Flag]) -> None:
    for flag in flags:
        _assign(flag.module, flag.name, flag.before)


def _assign(module: nn.Module, name: str, value: Any) -> None:
    if isinstance(module, torch.jit.ScriptModule):  # whose flags are not Python's
        setattr(module, name, value)
    else:
        object.__setattr__(module, name, value)
