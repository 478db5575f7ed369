"""The two forms of a PiSSA layer, as variants of peft's LoRA layer.

offset:   ``W x + s·(B(A x) − B₀(A₀ x))``; W is untouched, and the pre-trained layer is the one with its adapter off.
residual: ``W_res x + s·B(A x)`` with ``W_res = W − s·B₀A₀``; the pre-trained layer is the one with A₀ and B₀ selected.

A and B start at A₀ and B₀, which are frozen: buffers in the type of W (parameters: ``shard_frozen_factors``). peft
saves them with the adapter, because their names hold ``lora_`` and the adapter's name. Each form has names of its own,
so that a checkpoint tells its form.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from .adapter_paths import FrozenPath, OffsetPath, ResidualPath, product_dtype
from .checkpoints import WEIGHTS
from .four_bit import dequantized, is_4bit
from .sharding import full, partitioned

ADAPTER = "default"
# The attribute of a model's configuration that says: the weights are W_res, and the adapter lies in this folder beside.
RESIDUAL_BASE = "pissa_residual"
# form: the names of the layer's modules that hold A₀ and B₀
FROZEN = {"offset": ("lora_offset_A", "lora_offset_B"), "residual": ("lora_initial_A", "lora_initial_B")}


class _Frozen(nn.Module):
    """One tensor an adapter name: a buffer, so that it is saved and moved with the layer and never trained."""

    def __init__(self, adapter: str, tensor: Tensor) -> None:
        super().__init__()
        self.register_buffer(adapter, tensor)

    def as_parameters(self) -> None:
        for name, tensor in list(self.named_buffers()):
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _casts_by_itself(module: Any, args: tuple[Any, ...]) -> None:
    """Before a forward: peft hands the input over as it is where the offset adapter is the only active one."""
    wanted = module.active_adapters != [ADAPTER]
    if module.cast_input_dtype_enabled != wanted:
        module.cast_input_dtype_enabled = wanted


class _PiSSAVariant(LoraVariant):
    """What both forms have in common."""

    def merged(self, module: LoraLayer) -> Tensor:
        """What merging adds to the weight [out, in], in float64."""
        raise NotImplementedError

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return _plus(module, orig_weight, self.merged(module))

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data.copy_(_plus(module, orig_weight, self.merged(module)))

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return _plus(module, orig_weight, -self.merged(module))

    def supports_lora_conversion(self) -> bool:
        return False  # peft would convert s·BA; export_lora converts s·(BA − B₀A₀)


class OffsetVariant(_PiSSAVariant):
    """``W x + s·(B(A x) − B₀(A₀ x))``: the bracket by itself, one dropout mask for both."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, *, a0: Tensor, b0: Tensor, **kwargs: Any) -> None:
        """Start A and B, and freeze A₀ and B₀, at these factors in W's type: from other roundings the bracket would not
        be zero."""
        _start(module, adapter_name, "offset", a0, b0)
        module.lora_variant[adapter_name] = OffsetVariant()
        module.register_forward_pre_hook(_casts_by_itself)

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        down, up, dropout = (m[active_adapter] for m in (module.lora_A, module.lora_B, module.lora_dropout))
        scaling = module.scaling[active_adapter]
        if _gathered(down, up):
            x = dropout(x.to(down.weight.dtype))
            return result + (up(down(x)) - FrozenPath.apply(x, *frozen(module))) * scaling
        dtype = product_dtype(x, down.weight)
        if not isinstance(dropout, nn.Identity):
            x = dropout(x.to(dtype))
        return result + OffsetPath.apply(x, down.weight, up.weight, *frozen(module), scaling, dtype)

    def merged(self, module: LoraLayer) -> Tensor:
        left, right = factors(module)
        return left @ right  # s·BA and s·B₀A₀ cancel, hence float64


class ResidualVariant(_PiSSAVariant):
    """``W_res x + s·B(A x)``, or with ``module.initial_selected`` (``balora.teacher``) ``W_res x + s·B₀(A₀ x)``.

    Where A and B are multiplied in a smaller type than their own (autocast), the first is the second and the bracket of
    the offset form: three times the products of A and B forward, the same backward.

    ``module.initial_scaling`` is the s that W_res was made with. ``init`` leaves the weight alone: ``subtract`` it.
    """

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, *, a0: Tensor, b0: Tensor, **kwargs: Any) -> None:
        """Start A and B, and freeze A₀ and B₀, at these factors in W's type."""
        _start(module, adapter_name, "residual", a0, b0)
        module.initial_scaling = module.scaling[adapter_name]
        module.initial_selected = False
        module.lora_variant[adapter_name] = ResidualVariant()

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        if module.initial_selected:
            return result + FrozenPath.apply(x, *frozen(module)) * module.initial_scaling
        down, up, scaling = module.lora_A[active_adapter], module.lora_B[active_adapter], module.scaling[active_adapter]
        dtype = product_dtype(x, down.weight)
        if _gathered(down, up) or dtype.itemsize >= down.weight.dtype.itemsize:
            return result + up(down(x)) * scaling
        return result + ResidualPath.apply(x, down.weight, up.weight, *frozen(module), scaling, dtype)

    def merged(self, module: LoraLayer) -> Tensor:
        a, b = (m[ADAPTER].weight.detach().double() for m in (module.lora_A, module.lora_B))
        return module.scaling[ADAPTER] * b @ a


VARIANTS: dict[str, type[OffsetVariant] | type[ResidualVariant]] = {
    "offset": OffsetVariant,
    "residual": ResidualVariant,
}


def _gathered(down: nn.Module, up: nn.Module) -> bool:
    """Whether A and B are whole in their own forwards alone; FSDP puts another class in the place of what it wraps."""
    return not type(down) is type(up) is nn.Linear or partitioned(down.weight) or partitioned(up.weight)


def _start(module: LoraLayer, adapter: str, form: str, a0: Tensor, b0: Tensor) -> None:
    for name, tensor in zip(FROZEN[form], (a0, b0), strict=True):
        setattr(module, name, _Frozen(adapter, tensor))
    module.lora_A[adapter].weight.data.copy_(a0)
    module.lora_B[adapter].weight.data.copy_(b0)
    module.register_load_state_dict_pre_hook(_before_load)
    if form == "residual":
        module.register_load_state_dict_post_hook(_after_load)


def form_of(module: nn.Module) -> str | None:
    """The form of a layer that ``get_pissa_model`` made; None for any other module."""
    return next((form for form, names in FROZEN.items() if hasattr(module, names[0])), None)


def frozen(module: LoraLayer) -> tuple[Tensor, Tensor]:
    """A₀ [r, in] and B₀ [out, r] as they are stored."""
    a0, b0 = (getattr(getattr(module, name), ADAPTER) for name in FROZEN[str(form_of(module))])
    return a0, b0


@torch.no_grad()
def check_alike(model: nn.Module, device: torch.device) -> None:
    """Raise where the processes have other A₀ and B₀. All of them have to ask, with a device that they communicate by,
    before the factors are sharded.

    DDP makes parameters and buffers alike when it wraps a model; FSDP and ZeRO leave each process its own buffers, and
    FSDP its own slices of A and B too. A decomposition by another kind of device has other bits.
    """
    tensors = [t for m in model.modules() if form_of(m) is not None for t in frozen(m)]
    tensors = [t for t in tensors if not hasattr(t, "full_tensor")]
    if not tensors:
        return
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = torch.stack([t.view(kinds[t.dtype.itemsize]).sum(dtype=torch.int64).to(device) for t in tensors])
    most = torch.cat([sums, -sums])
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    differ = int((most[: len(sums)] != -most[len(sums) :]).sum())
    if differ:
        raise ValueError(
            f"model: expected the same PiSSA factors in all processes, found others in {differ} of {len(tensors)}: are "
            "their devices of different kinds? Wrap the model on one of them, save it, and load its adapters in all"
        )


def shard_frozen_factors(model: nn.Module) -> None:
    """Let ``fully_shard``, which comes after, spread A₀ and B₀ of the offset form over the processes like the weights.

    They are buffers otherwise, which are whole in every process: r·(in + out) numbers for each adapted layer. As frozen
    parameters they are gathered with their layer. Not for DeepSpeed, which leaves frozen parameters out of checkpoints;
    so does Accelerate: ``restore_frozen_factors``.
    """
    for module in model.modules():
        if form_of(module) == "offset":
            for name in FROZEN["offset"]:
                module.get_submodule(name).as_parameters()  # type: ignore[operator]


@torch.no_grad()
def restore_frozen_factors(model: nn.Module, folder: str | Path) -> None:
    """Take sharded A₀ and B₀ from the adapters of a checkpoint: Accelerate's own files of FSDP2 are without them.

    All processes have to ask, and see the folder; where it has no adapters beside those files, these are complete.
    """
    path = Path(folder) / WEIGHTS
    layers = [
        (n, m) for n, m in model.named_modules() if form_of(m) == "offset" and hasattr(frozen(m)[0], "device_mesh")
    ]
    if not layers or not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        for name, module in layers:
            own: Any
            for factor, own in zip(FROZEN["offset"], frozen(module), strict=True):
                saved = file.get_tensor(f"{name}.{factor}").to(own.dtype)
                own.to_local().copy_(distribute_tensor(saved, own.device_mesh, own.placements).to_local())


def warn_of_rounding(model: nn.Module) -> None:
    """Warn where what is trained and does not start at 0 is in half precision itself: factors, modules in full."""
    layers: Iterable[Any] = (m for m in model.modules() if form_of(m) is not None)
    types = (layer.lora_A[ADAPTER].weight.dtype for layer in layers if ADAPTER in layer.lora_A)
    half = next((dtype for dtype in types if dtype.itemsize < 4), None)
    in_full = [(n, p.dtype) for n, p in model.named_parameters() if p.requires_grad and ".modules_to_save." in n]
    name, of_module = next(((n, dtype) for n, dtype in in_full if dtype.itemsize < 4), ("", None))
    for found, way in (
        (half and f"its adapters are in {half}", "keep A and B in float32 (as get_pissa_model makes them)"),
        (of_module and f"{name} is trained in {of_module}", "load the base in float32 (--dtype float32 --bf16 true)"),
    ):
        if found:
            warnings.warn(
                f"peft_model: {found}, where an update below half a step of an entry is lost, and most are; {way} and "
                "train under autocast",
                stacklevel=1,
            )


def initial_scaling(module: LoraLayer) -> float:
    """The s of s·B₀A₀: in the offset form, the bracket's."""
    return module.initial_scaling if form_of(module) == "residual" else module.scaling[ADAPTER]


def factors(module: LoraLayer) -> tuple[Tensor, Tensor]:
    """left [out, 2r], right [2r, in] in float64 with left·right = s·(BA − B₀A₀), the change of W."""
    tensors = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, *frozen(module)
    a, b, a0, b0 = map(full, tensors)
    if form_of(module) == "offset":
        a0, b0 = rounded_alike(a, b, a0, b0)
    return side_by_side(a, b, a0, b0, module.scaling[ADAPTER], initial_scaling(module))


def rounded_alike(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """A₀ and B₀ as the offset form's forward takes them: rounded where A and B have a smaller type than the base."""
    return (a0, b0) if torch.promote_types(a.dtype, a0.dtype) == a.dtype else (a0.to(a.dtype), b0.to(b.dtype))


def side_by_side(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, s: float, s0: float) -> tuple[Tensor, Tensor]:
    """left [out, 2r], right [2r, in] in float64 with left·right = s·BA − s₀·B₀A₀."""
    left = [b.double() * s, -b0.double() * s0]
    return torch.cat(left, dim=1), torch.cat([a.double(), a0.double()], dim=0)


def base_weight(module: LoraLayer) -> Tensor:
    """The weight [out, in] under the adapter: as it is stored, or dequantized."""
    base = module.get_base_layer()
    weight = dequantized(base) if is_4bit(base) else base.weight.detach()
    return weight.T if module.fan_in_fan_out else weight


def pretrained_weight(module: LoraLayer) -> Tensor:
    """W [out, in] before it was adapted: as it is stored (dequantized), or W_res + s·B₀A₀ in float64."""
    weight = base_weight(module)
    if form_of(module) != "residual":
        return weight
    return weight.double() + _initial(module, *frozen(module)).to(weight.device)


def _initial(module: LoraLayer, a0: Tensor, b0: Tensor) -> Tensor:
    return module.initial_scaling * b0.double() @ a0.double()


def _plus(module: LoraLayer, weight: Tensor, update: Tensor) -> Tensor:
    """weight + update [out, in], summed in float64 and rounded once; a Conv1D has its weight as [in, out]."""
    update = update.T if module.fan_in_fan_out else update
    return (weight.detach().double() + update.to(weight.device)).to(weight.dtype)


@torch.no_grad()
def subtract(layers: Iterable[LoraLayer]) -> None:
    """W ← W − s·B₀A₀ in every layer of the residual form: all or, after an error, none.

    The old weights wait in host memory until the last one is done, because W_res + s·B₀A₀ would round them.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for layer in layers:
            weight = layer.get_base_layer().weight
            residual = _plus(layer, weight, -_initial(layer, *frozen(layer)))
            kept.append((weight, weight.to("cpu", copy=True)))
            weight.copy_(residual)
    except BaseException:
        for weight, was in kept:
            weight.copy_(was)
        raise


def _before_load(module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse the factors of another form, whose A and B mean something else; keep A₀ and B₀ for ``_after_load``."""
    form, layer = str(form_of(module)), prefix.rstrip(".")
    found = [saved for saved, (a0, _) in FROZEN.items() if any(key.startswith(prefix + a0) for key in state)]
    if found not in ([], [form]):
        raise ValueError(
            f"checkpoint: expected PiSSA adapters of the {form} form, found the {found[0]} form at {layer}"
        )
    if found and f"{prefix}{FROZEN[form][0]}.{ADAPTER}" not in state:
        raise ValueError(f"adapter_name: expected {ADAPTER!r}, the one PiSSA adapter of {layer}, found another name")
    if not found and any(key.startswith(f"{prefix}lora_A.{ADAPTER}.") for key in state):
        raise ValueError(f"checkpoint: expected PiSSA adapters of the {form} form, found an ordinary LoRA at {layer}")
    if form == "residual" and found and is_4bit(module.get_base_layer()):
        saved = (state[f"{prefix}{name}.{ADAPTER}"] for name in FROZEN[form])
        if not all(torch.equal(t.to(own), own) for t, own in zip(saved, frozen(module), strict=True)):
            raise ValueError(
                f"checkpoint: expected the A₀ and B₀ that the 4-bit base was made with, found others at {layer}"
            )
        return
    # A state dict with the base weights brings the W_res of its own factors.
    if form == "residual" and found and not any(key.startswith(f"{prefix}base_layer.") for key in state):
        module.__dict__["_frozen_before_load"] = [t.clone() for t in frozen(module)]


@torch.no_grad()
def _after_load(module: Any, incompatible: Any) -> None:
    """W_res follows the loaded A₀ and B₀: another machine's SVD gives others. Equal factors change no bit."""
    before, after = module.__dict__.pop("_frozen_before_load", None), frozen(module)
    if before is None or all(torch.equal(*pair) for pair in zip(before, after, strict=True)):
        return
    weight = module.get_base_layer().weight
    weight.copy_(_plus(module, weight, _initial(module, *before) - _initial(module, *after)))


def checkpoint_form(folder: str | Path) -> str | None:
    """ "offset" or "residual" for a folder that a model of ``get_pissa_model`` was saved to; None for another LoRA.

    Reads the names of the tensors in ``adapter_model.safetensors``, nothing else.

    Raises:
        FileNotFoundError: the folder has no such file.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"folder: expected {WEIGHTS} in {folder}, found none")
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    return next((form for form, (a0, _) in FROZEN.items() if any(f".{a0}" in name for name in names)), None)
