"""Checks of arguments: the message names the argument, what was expected and what was found."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100  # the label of a row that does not count


def describe(value: Any) -> str:
    """A value as an error message shows it."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    return f"{value!r} of type {type(value).__name__}"


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Raise unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, found {describe(value)}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, found {value!r}")


def check_rank(name: str, value: Any) -> None:
    """Raise unless ``value`` is a whole number of at least 1, or a fraction: a float above 0 and up to 1."""
    if not isinstance(value, float):
        return check_whole(name, value)
    if not 0 < value <= 1:
        raise ValueError(f"{name}: expected a whole number, or a fraction above 0 and up to 1, found {value!r}")


def check_number(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, found {describe(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, found {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number above 0."""
    check_number(name, value)
    if value <= 0:
        raise ValueError(f"{name}: expected a finite number above 0, found {value!r}")


def check_normalizer(normalizer: Any) -> None:
    """Raise unless ``normalizer`` is None, a finite number above 0, or a tensor of one number (of any value)."""
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer: expected one number, found {describe(normalizer)}")
    elif normalizer is not None:
        check_positive("normalizer", normalizer)


def valid_rows(labels: Tensor, vocab: int) -> Tensor | None:
    """Places of the labels that count [N], None for all of them; raise unless these are below ``vocab``.

    On a device this waits. labels [M].
    """
    kept = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
    all_count = len(kept) == len(labels)
    if not all_count:
        labels = labels[kept]
    if len(labels):
        low, high = torch.stack(labels.aminmax()).tolist()  # at once
        if low < 0 or high >= vocab:
            worst = low if low < 0 else high
            raise ValueError(f"labels: expected {IGNORE_INDEX} or 0 to {vocab - 1} (the vocabulary), found {worst}")
    return None if all_count else kept


def as_scalar(value: Tensor | float, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor [] on the device; a number is written there by the device itself, which waits for nothing."""
    if isinstance(value, Tensor):
        return value.to(device).reshape(())
    return torch.full((), value, dtype=dtype or torch.float64, device=device)
