"""Which layers get adapters: the projections of attention and of dense MLPs, never a router, an expert or the head."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
# What the projections of experts were called before transformers 5 fused them; peft rewrites these names by itself.
_BEFORE_FUSION = ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")


def default_targets(model: nn.Module) -> list[str]:
    """The linear layers inside the blocks, by the shortest names that select them and nothing else.

    Blocks are the modules of the outermost ``nn.ModuleList``s of the decoder (of both halves of an encoder-decoder, of
    an encoder). Where experts are fused into 3-D parameters, the part of the block that holds them is left out in every
    block, so attention alone remains.

    Raises:
        ValueError: there is no such layer.
    """
    stacks = _stacks(model)
    experts = {_part(stacks, name) for name in fused_experts(model)}
    chosen = [
        name
        for name, m in model.named_modules()
        if isinstance(m, LINEAR)
        and (part := _part(stacks, name))
        and part not in experts
        and not any("expert" in step for step in name.split("."))
        and not _is_router(model, name)
        and not _is_read_directly(model, name)
        and "altup" not in name.split(".")  # Gemma 3n's, which mix its residual streams
    ]
    if not chosen:
        found = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, LINEAR)})
        raise ValueError(
            "target_modules: None stands for the linear layers of attention and dense MLPs in the model's blocks, and "
            f"this model has none; name its layers, of {', '.join(found) or 'which it has none'}"
        )
    return _shortest(model, chosen)


def checked_targets(model: nn.Module, targets: list[str] | str, excluded: list[str] | str | None) -> list[str] | str:
    """The user's target_modules, as peft is to get them.

    peft rewrites a pattern, or "all-linear", for a model with fused experts: it adds the experts and the router, and
    drops what the pattern says of the layer's place. There the names of the layers take their place.

    Raises:
        ValueError: they hit a router, experts that are fused into 3-D parameters, or a layer whose weight is read
            without calling it; or they are no valid pattern.
        TypeError: they are neither a string nor a list of strings.
    """
    _check_names("target_modules", targets)
    if excluded is not None:
        _check_names("exclude_modules", excluded)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = "all-linear"
    modules = [(name, m) for name, m in model.named_modules() if not (excluded and named_by(excluded, name))]
    linear = [name for name, m in modules if isinstance(m, LINEAR)]
    if targets == "all-linear":  # but the head
        inside = set(getattr(model, "base_model", model).modules())
        hit = linear = [name for name, m in modules if isinstance(m, LINEAR) and m in inside]
    else:
        hit = [name for name, _ in modules if named_by(targets, name)]
        linear = [name for name in linear if named_by(targets, name)]
    routers = [name for name in hit if _is_router(model, name)]
    if routers:
        raise ValueError(
            f"target_modules: expected no router of a mixture of experts, found {routers[0]}; leave it out with "
            f"exclude_modules={sorted({name.rpartition('.')[2] for name in routers})}"
        )
    direct = [name for name in linear if _is_read_directly(model, name)]
    if direct:
        raise ValueError(
            f"target_modules: expected layers that the model calls, found {direct[0]}, whose weight its kernels read "
            "directly, so that an adapter would do nothing; leave it out with target_modules or exclude_modules"
        )
    experts = fused_experts(model)
    if not experts:
        check_any_hit(model, targets)
        return targets
    if targets != "all-linear":
        for target in [targets] if isinstance(targets, str) else targets:
            entry = target if isinstance(targets, str) else [target]
            fused = {name: p for name, p in experts.items() if _names_experts(entry, name)}
            gone = target.rpartition(".")[2] in _BEFORE_FUSION and not any(named_by(entry, name) for name in linear)
            if fused or gone:
                raise fused_error(target, fused or experts)
        check_any_hit(model, targets)
    return _shortest(model, linear) if isinstance(targets, str) and linear else targets


def as_named(targets: list[str] | str | None) -> list[str] | str | None:
    """target_modules of the command line, always a list there: "all-linear" or a pattern alone is a string to peft."""
    if isinstance(targets, list) and len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]):
        return targets[0]
    return targets


def check_any_hit(model: nn.Module, targets: list[str] | str) -> None:
    """Raise where no module has any of these names, warn of one that none has: a list may serve several models."""
    _check_names("target_modules", targets)
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    if not everything and not any(named_by(targets, name) for name, _ in model.named_modules()):
        found = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, LINEAR)})
        raise ValueError(
            f"target_modules: expected layers of the model, of {', '.join(found)}; found {targets!r}, which names none"
        )
    for target in [] if isinstance(targets, str) else targets:
        if not any(named_by([target], name) for name, _ in model.named_modules()):
            warnings.warn(f"target_modules: no module of the model is named {target!r}", stacklevel=2)


def check_hits(model: nn.Module, argument: str, names: list[str] | str | None) -> None:
    """Raise for a name that no module has: it is a slip, and peft passes over it."""
    modules = [name for name, _ in model.named_modules()]
    for name in [names] if isinstance(names, str) else names or []:
        if not any(named_by(names if isinstance(names, str) else [name], module) for module in modules):
            raise ValueError(f"{argument}: expected modules of the model, found {name!r}, which names none")


def fused_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D parameters [experts, ., .] of the model, by name."""
    return {
        f"{name}.{parameter_name}": p
        for name, m in model.named_modules()
        for parameter_name, p in m.named_parameters(recurse=False)
        if p.dim() == 3 and "expert" in f"{name} {type(m).__name__}".lower()
    }


def fused_error(target: str, experts: dict[str, nn.Parameter]) -> ValueError:
    """The error that names these parameters and their shapes, of one block for all."""
    shapes = {re.sub(r"\d+", "*", name): tuple(p.shape) for name, p in experts.items()}
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    return ValueError(
        f"target_modules: expected linear layers, found {target!r}, which names experts that are fused into 3-D "
        f"parameters: {listed}; name the attention's layers, or leave target_modules at None"
    )


def named_by(targets: Iterable[str] | str, name: str) -> bool:
    """Whether peft's target_modules or exclude_modules mean this module: a pattern for the whole name, or endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_names(argument: str, value: Any) -> None:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{argument}: expected a regular expression, found {value!r}; {error}") from error
    elif not (isinstance(value, (list, tuple, set)) and all(isinstance(name, str) for name in value)):
        raise TypeError(f"{argument}: expected a string or a list of strings, found {value!r}")


def _names_experts(entry: list[str] | str, parameter: str) -> bool:
    return named_by(entry, parameter) or named_by(entry, parameter.rpartition(".")[0])


def _is_router(model: nn.Module, name: str) -> bool:
    """A ``…router``, ``shared_expert_gate``, or a ``gate`` beside experts (other models call other things a gate)."""
    steps = name.split(".")
    for i, step in enumerate(steps):
        if "router" in step or ("expert" in step and "gate" in step):
            return True
        if step == "gate":
            parent = model.get_submodule(".".join(steps[:i]))
            beside = [(n, m) for n, m in parent.named_children() if n != step]
            if any("expert" in n or isinstance(m, nn.ModuleList) for n, m in beside):
                return True
    return False


def _is_read_directly(model: nn.Module, name: str) -> bool:
    """What the kernels of a state-space layer take the weight of: an adapter there would not be asked."""
    parent, _, step = name.rpartition(".")
    return step in ("x_proj", "dt_proj", "out_proj") and all(
        hasattr(model.get_submodule(parent), p) for p in ("A_log", "D")
    )


def _stacks(model: nn.Module) -> list[str]:
    """The names of the lists of blocks: below the decoder, or both halves of an encoder-decoder; outer lists first."""
    base: Any = getattr(model, "base_model", model)
    if hasattr(base, "get_decoder") and not getattr(base.config, "is_encoder_decoder", False):
        base = base.get_decoder()  # of a model that sees, not its vision tower; an encoder gives itself
    inside = set(base.modules())
    return [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and m in inside]


def _part(stacks: list[str], name: str) -> str | None:
    """The part of its block, ``self_attn`` or ``mlp``, that this layer or parameter is in; None outside of blocks."""
    for stack in stacks:
        if name.startswith(f"{stack}."):
            _, _, place = name.removeprefix(f"{stack}.").partition(".")
            return place.partition(".")[0] or None
    return None


def _shortest(model: nn.Module, chosen: list[str]) -> list[str]:
    """Endings of these names that no other module's name has, as short as can be, in the order of the names."""
    others = {name for name, _ in model.named_modules()} - set(chosen)
    taken = {ending for name in others for ending in _endings(name)}
    return list(dict.fromkeys(next((e for e in _endings(name) if e not in taken), name) for name in chosen))


def _endings(name: str) -> list[str]:
    steps = name.split(".")
    return [".".join(steps[i:]) for i in reversed(range(len(steps))) if not steps[i].isdecimal()]
