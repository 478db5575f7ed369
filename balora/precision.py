"""How many digits of their float32 operands products keep, which torch sets for the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def bfloat16_products(exact: bool) -> Iterator[None]:
    """Let float32 products on the CPU run on bfloat16 hardware, for as long as this takes: where both operands hold
    bfloat16 numbers nothing is rounded, the products are summed in float32."""
    if not exact:
        yield
        return
    settings: Any = torch.backends.mkldnn
    with _set(settings.matmul, "bf16"):
        yield


@contextmanager
def float32_products() -> Iterator[None]:
    """Keep all digits of float32 operands on CUDA devices, for as long as this takes, where TF32 keeps ten bits.

    A Gram matrix squares the condition of its factor: from products in TF32 the singular values and vectors that are
    small beside the first are noise. What costs, the products with the vocabulary, is left as the user has set it.
    """
    settings = torch.backends.cuda.matmul
    if settings.fp32_precision != "tf32":
        yield
        return
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by fp32_precision, of which the older setting knows nothing
        legacy = "highest"
    if legacy == "highest":
        with _set(settings, "ieee"):
            yield
        return
    # Where the two settings do not agree, torch refuses to say what holds.
    settings.allow_tf32 = False
    try:
        yield
    finally:
        settings.allow_tf32 = True  # "high"
        if legacy != "high":
            torch.set_float32_matmul_precision(legacy)


@contextmanager
def _set(settings: Any, precision: str) -> Iterator[None]:
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = "none"  # what holds for all of torch; written only where that is not what held here
        if settings.fp32_precision != before:
            settings.fp32_precision = before
