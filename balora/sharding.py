"""Weights that an engine spreads over the processes: FSDP2 (``fully_shard``) and DeepSpeed's ZeRO stage 3.

An FSDP2 parameter is a DTensor while it is sharded, a ZeRO-3 parameter an empty tensor with a ``ds_id``. Hooks on the
forward of a module gather its weights and let go of them again; what reads a weight without calling its module must do
so within such a forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import is_fsdp_enabled


def partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 holds this parameter."""
    return hasattr(tensor, "ds_id")


def sharded(model: nn.Module) -> bool:
    """Whether a process holds only a part of some parameter of the model."""
    return any(partitioned(p) or hasattr(p, "full_tensor") for p in model.parameters())


def check_weights_whole(model: nn.Module) -> None:
    """Raise where FSDP has taken the weights already, or will fill those of other processes only later.

    ZeRO-3 parameters pass: they can be gathered one by one.
    """
    name = next((name for name, p in model.named_parameters() if hasattr(p, "full_tensor")), None)
    if name is not None:
        raise ValueError(
            f"model: expected whole weights, found {name} sharded; call get_pissa_model and attach before fully_shard "
            "or Accelerate's prepare"
        )
    if is_fsdp_enabled():
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: expected false, found true; only the first process has read the weights "
            "then, and Accelerate does not send the frozen factors of the adapters, which are buffers"
        )


def check_engine(model: nn.Module) -> None:
    """Raise where the weights are those of FSDP version 1, which Accelerate takes unless it is told otherwise."""
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError(
            "fsdp_version: expected 2, found 1, which flattens the weights of a layer into one tensor; an attached "
            "model cannot read them there (examples/accelerate/fsdp2.yaml has what version 2 needs)"
        )


def whole(parameters: Iterable[Tensor]) -> AbstractContextManager:
    """Within the block the ZeRO-3 parameters among these are whole, for reading, on every process."""
    parameters = [p for p in parameters if partitioned(p)]
    if not parameters:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def full(tensor: Tensor) -> Tensor:
    """The tensor over all processes, detached. Every process has to ask; one of ZeRO-3 needs ``whole`` around it."""
    tensor = tensor.detach()
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def reshard(model: nn.Module) -> None:
    """Let FSDP2 let go of what an evaluation has left gathered, perhaps in another type."""
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def hooked(module: nn.Module) -> bool:
    """Whether an engine gathers the weights of this module, or of one inside it, only for its forward."""
    return any(hasattr(m, "unshard") for m in module.modules()) or any(map(partitioned, module.parameters()))


def within(module: nn.Module, compute: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """compute(*inputs) as the forward of the module and of those inside it, so that all their weights are whole.

    The engine sees the inputs and the result, whose gradients tell it when the backward enters and leaves the module.
    """
    for inner in reversed(list(module.modules())):
        if hasattr(inner, "unshard") or any(True for _ in inner.parameters(recurse=False)):  # not a container
            compute = functools.partial(_call, inner, compute)
    return compute(*inputs)


def _call(module: nn.Module, compute: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    previous: Any = module.__dict__.get("forward")
    module.forward = compute
    try:
        return module(*inputs)
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


def first_process() -> bool:
    """Whether this is the process that writes what all of them hold."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not there or torch.distributed.get_rank() == 0
