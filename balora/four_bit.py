"""Layers of bitsandbytes whose weights are stored in 4 bits (QLoRA, arXiv 2305.14314), under training."""

from __future__ import annotations

import copy
import logging
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

BLOCK = 64  # weights with one scale


def without_hub_kernels() -> None:
    """Import bitsandbytes, where it is installed, as it is on the disk.

    On a CPU with AVX-512 BF16 its import takes a compiled kernel from the hub, if Hugging Face's ``kernels`` is there
    (peft imports bitsandbytes by itself). That kernel serves inference only.
    """
    if "bitsandbytes" in sys.modules:
        return
    log, known = logging.getLogger("bitsandbytes.backends.cpu.ops"), sys.modules.get("kernels")
    log.disabled, sys.modules["kernels"] = True, None  # type: ignore[assignment]  # so that importing it raises
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        pass  # not installed, or not for this machine: who loads a 4-bit model will hear of it
    finally:
        log.disabled = False
        del sys.modules["kernels"]
        if known is not None:
            sys.modules["kernels"] = known


def require() -> None:
    """Raise where bitsandbytes cannot be imported, before any work on weights in 4 bits."""
    without_hub_kernels()
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"bitsandbytes: expected for weights in 4 bits, found none ({error}): pip install 'balora[quantized]'"
        ) from error


def is_4bit(layer: nn.Module) -> bool:
    """Whether that is a 4-bit linear layer of bitsandbytes (not an adapter around one); asks without importing it."""
    return isinstance(layer, nn.Linear) and type(layer.weight).__name__ == "Params4bit"


def stored_type(layer: nn.Module) -> torch.dtype:
    """The type of a layer's weight; of a 4-bit one, the type that it was quantized from and is dequantized to."""
    weight = layer.weight
    return weight.quant_state.dtype if is_4bit(layer) else weight.dtype  # type: ignore[union-attr, return-value]


@torch.no_grad()
def dequantized(layer: nn.Module) -> Tensor:
    """W [out, in] of a 4-bit layer, in the type that it was quantized from: a new tensor."""
    weight = layer.weight
    return _dequantized(weight.data, weight.quant_state)  # type: ignore[union-attr, arg-type]


@torch.no_grad()
def nf4(weight: Tensor, double_quant: bool = False) -> Tensor:
    """What NF4 keeps of a weight [out, in]: quantized in blocks of 64, as in a ``Linear4bit``, and dequantized."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4"
    )
    return _dequantized(packed, state)


def _dequantized(packed: Tensor, state: Any) -> Tensor:
    """Block by block: on CPUs bitsandbytes 0.50 is wrong about rows that are no whole number of blocks."""
    from bitsandbytes.functional import dequantize_4bit

    shape, blocks = state.shape, state.shape.numel() // state.blocksize
    if blocks * state.blocksize != shape.numel():
        return dequantize_4bit(packed, state)
    state = copy.copy(state)
    state.shape = torch.Size((blocks, state.blocksize))
    return dequantize_4bit(packed, state).view(shape)


def prepare(model: nn.Module) -> None:
    """Keep the model's 4-bit layers as they are, in evaluation too, and refuse what the CPU computes wrongly.

    On a CPU with AVX-512 BF16 bitsandbytes repacks them in place at the first forward in evaluation mode (and the
    teacher's is one): it rounds their scales to bfloat16, fails where in_features is no multiple of 64, and from then
    on gives no gradient to what comes before.

    Raises:
        ValueError: a layer is repacked already, or its forward on the CPU is not that of its weight.
    """
    for name, layer in model.named_modules():
        if not is_4bit(layer):
            continue
        name, weight = name.removesuffix(".base_layer"), cast(Any, layer.weight)
        state = weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"model: expected 4-bit weights as they were loaded, found {name} repacked by bitsandbytes for "
                "inference on this CPU, without gradients; load the model again and adapt it before its first forward"
            )
        if weight.device.type == "cpu" and state.shape[-1] % state.blocksize and not _right_on_cpu(weight.data, state):
            raise _too_narrow(name, state.shape[-1], state.blocksize)
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def check_widths(model: nn.Module) -> None:
    """Refuse a model whose linear layers, in 4 bits, the CPU would compute wrongly; the head's is not quantized.

    Asks for the shapes only: the weights may be on the device meta.

    Raises:
        ValueError: as of :func:`prepare`.
    """
    from bitsandbytes.functional import quantize_4bit

    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer is not head and layer.in_features % BLOCK:
            packed, state = quantize_4bit(torch.rand(BLOCK, layer.in_features), blocksize=BLOCK, quant_type="nf4")
            if not _right_on_cpu(packed, state):
                raise _too_narrow(name, layer.in_features, BLOCK)


def _too_narrow(name: str, width: int, blocksize: int) -> ValueError:
    return ValueError(
        f"model: expected 4-bit layers with in_features of whole blocks of {blocksize}, found {width} at {name}, which "
        "this bitsandbytes computes wrongly on the CPU; use a GPU, or full precision"
    )


@torch.no_grad()
def _right_on_cpu(packed: Tensor, state: Any) -> bool:
    from bitsandbytes.functional import dequantize_4bit

    return torch.equal(dequantize_4bit(packed, state), _dequantized(packed, state))
