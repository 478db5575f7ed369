"""How many digits of their float32 operands products keep, which torch sets for the whole process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from typing import Any

import torch


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 operands should be multiplied as such there. A CPU without AVX-512 (on x86) takes 5 to 40 times
    as long for them as for their float32 copies."""
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def bfloat16_products(exact: bool) -> Iterator[None]:
    """Let float32 products on the CPU run on bfloat16 hardware, for as long as this takes: where both operands hold
    bfloat16 numbers nothing is rounded, the products are summed in float32."""
    if not exact:
        yield
        return
    settings: Any = torch.backends.mkldnn
    put_back = _put(settings.matmul, "bf16")
    try:
        yield
    finally:
        put_back()


class float32_products(ContextDecorator):
    """Keep all digits of float32 operands on CUDA devices, for as long as this takes, where TF32 keeps ten bits.

    A Gram matrix squares the condition of its factor: from products in TF32 the singular values and vectors that are
    small beside the first are noise. What costs, the products with the vocabulary, is left as the user has set it.

    The setting is the process's: another thread that computes meanwhile sees it, and may switch it back. Where both
    ``torch.backends.fp32_precision`` and the one of products were set, the latter follows the former afterwards. What
    torch.compile traces keeps the user's setting.
    """

    def __enter__(self) -> None:
        self._restore: Callable[[], None] | None = None
        if torch.compiler.is_compiling():
            return
        settings: Any = torch.backends.cuda.matmul
        if settings.fp32_precision != "tf32":
            return
        try:
            legacy = torch.get_float32_matmul_precision()
        except RuntimeError:  # set by fp32_precision, of which the older setting knows nothing
            legacy = "highest"
        if legacy == "highest":
            self._restore = _put(settings, "ieee")
        else:  # where the two settings do not agree, torch refuses to say what holds
            settings.allow_tf32 = False
            self._restore = functools.partial(_put_legacy, settings, legacy)

    def __exit__(self, *error: object) -> None:
        if self._restore is not None:
            self._restore()

    def _recreate_cm(self) -> float32_products:
        return float32_products()


def _put_legacy(settings: Any, precision: str) -> None:
    settings.allow_tf32 = True  # "high"
    if precision != "high":
        torch.set_float32_matmul_precision(precision)


def _put(settings: Any, precision: str) -> Callable[[], None]:
    """Set it; what is returned sets it back."""
    before = settings.fp32_precision
    settings.fp32_precision = precision

    def put_back() -> None:
        settings.fp32_precision = "none"  # what holds for all of torch; written only where that is not what held here
        if settings.fp32_precision != before:
            settings.fp32_precision = before

    return put_back
