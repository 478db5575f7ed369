"""PiSSA adapters on a pre-trained model.

Form "offset": W stays as it is, and the pre-trained model is the same model with its adapters off. Form "residual": W
becomes W_res = W − s·B₀A₀, and the pre-trained model is W_res with the frozen A₀ and B₀. A and B start at A₀ and B₀, so
before training student and teacher are the same bits.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import four_bit, principal
from .adapters import (
    ADAPTER,
    RESIDUAL_BASE,
    VARIANTS,
    base_weight,
    form_of,
    frozen,
    initial_scaling,
    pretrained_weight,
    subtract,
)
from .checks import check_positive, check_whole
from .four_bit import is_4bit, stored_type
from .pretrained import head_modules
from .sharding import check_weights_whole, partitioned, whole
from .targets import LINEAR, check_hits, checked_targets, default_targets, fused_error

# What peft trains in full in every model of the task type SEQ_CLS.
_PEFT_SAVES = ("classifier", "score")
# Options of peft.LoraConfig that keep the promises of this module; the others change what is trained or computed.
_LORA_OPTIONS = (
    "lora_dropout",
    "use_rslora",
    "task_type",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)


def get_pissa_model(
    model: nn.Module,
    r: int = 128,
    lora_alpha: float = 128,
    target_modules: list[str] | str | None = None,
    form: str = "offset",
    *,
    batch_bytes: int = 2**29,
    n_iter: int | None = None,
    device: torch.device | str | None = None,
    **lora_config: Any,
) -> peft.PeftModel:
    """Wrap a transformers model with PiSSA adapters, so that it can still be what it was before (``teacher``).

    W ≈ U_r S_r V_rᵀ and s = lora_alpha / r give A₀ = √(S_r/s)·V_rᵀ and B₀ = U_r·√(S_r/s) (2025 paper, eq. 1 and 2),
    rounded to W's type. The layer computes W x + s·(B(A x) − B₀(A₀ x)) in the form "offset", and W_res x + s·B(A x) in
    the form "residual", where W becomes W_res = W − s·B₀A₀, computed in float64 and rounded once. Only A and B (float32
    unless the model is float64) are trained, and ``modules_to_save``.

    Layers of the same shape, type, device and rank are decomposed together, batch by batch; ‖W − s·B₀A₀‖ is within 1e-3
    of the least that rank r allows (measured: small Llamas, random weights without decay). Nothing is left to chance:
    the same call gives the same bits on the same machine, another ``batch_bytes`` the same s·B₀A₀ up to rounding.

    On a base in 4 bits (bitsandbytes, loaded by transformers) W is the dequantized weight, and its type the one that it
    was quantized from, in which A₀ and B₀ are rounded. The form "offset" leaves such a base as it is; for the form
    "residual" see ``quantize``. peft's merging quantizes the sum anew, and unmerging does not give W back.

    A model of the residual form lives from its adapters: what takes them away (peft's ``disable_adapter``, ``unload``,
    another active adapter) leaves W_res alone, which is no model.

    Args:
        model: a transformers model in float32, bfloat16, float16, float64 or 4 bits; it is changed in place.
        r: the rank of the adapters, at most the smaller side of every adapted layer.
        lora_alpha: s·r, above 0.
        target_modules: the layers to adapt (nn.Linear, or transformers' Conv1D), as peft takes them. None: those of
            attention and dense MLPs in the model's blocks; never a router, an expert or the head. A head that is named
            is adapted; experts that are fused into 3-D parameters cannot be.
        form: "offset", or "residual", which keeps the old weights in host memory until all are changed.
        batch_bytes: of the weights that are decomposed at a time, counted in float32 (float64 for float64 models); at
            least one weight at a time. The decomposition takes a small multiple of it.
        n_iter: None: a full decomposition of small matrices, ``functional.randomized_svd`` of the others. A number: the
            latter for all, with that many power iterations.
        device: where the weights are decomposed; only A₀ and B₀ come back from there. None: those on the CPU on the
            current CUDA device, if there is one, and others where they lie.
        **lora_config: lora_dropout (0 in the residual form), use_rslora, task_type, exclude_modules, modules_to_save,
            layers_to_transform, layers_pattern, rank_pattern, alpha_pattern, as in ``peft.LoraConfig``. The head of a
            sequence classifier is trained in full, beside the modules_to_save that are named: a task_type other than
            "SEQ_CLS" leaves it to them.

    Raises:
        ValueError, TypeError: an argument does not fit; the model is then as it was.
    """
    _check_model(model, form)
    check_whole("r", r)
    check_positive("lora_alpha", lora_alpha)
    check_whole("batch_bytes", batch_bytes)
    if n_iter is not None:
        check_whole("n_iter", n_iter)
    device = _device(device)
    lora_config = _options(form, lora_config)
    if target_modules is None:
        target_modules = default_targets(model)
    else:
        target_modules = checked_targets(model, target_modules, lora_config.get("exclude_modules"))
    for argument in ("exclude_modules", "modules_to_save"):
        check_hits(model, argument, lora_config.get(argument))
    kind = task_type(model)
    if kind is not None:
        lora_config.setdefault("task_type", kind)
    if kind == "SEQ_CLS" == lora_config["task_type"]:
        lora_config["modules_to_save"] = _with_head(model, lora_config.get("modules_to_save"))

    trainable = [(p, p.requires_grad) for p in model.parameters()]
    config = peft.LoraConfig(
        r=r, lora_alpha=lora_alpha, target_modules=target_modules, init_lora_weights=False, **lora_config
    )
    try:
        with warnings.catch_warnings():
            # peft says of every Conv1D, and of every nn.Linear after one, that it sets fan_in_fan_out right.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            wrapped = peft.get_peft_model(model, config)
        layers = {name: m for name, m in wrapped.named_modules() if isinstance(m, LoraLayer)}
        for name, layer in layers.items():
            with whole(layer.get_base_layer().parameters()):
                _check_layer(name, layer, form)
        four_bit.prepare(model)
        if form == "residual":
            _check_unshared(model, layers)
        _initialize(list(layers.values()), form, batch_bytes, n_iter, device)
        if form == "residual":
            subtract(tqdm(layers.values(), desc="PiSSA: subtracting from the weights", disable=None, leave=False))
    except BaseException:
        _unwrap(model)
        for p, was in trainable:
            p.requires_grad_(was)
        raise
    return wrapped


def task_type(model: Any) -> str | None:
    """What peft calls this kind of model; None for one that is neither a language model nor a sequence classifier."""
    if getattr(model, "can_generate", bool)():
        return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"
    return "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else None


def _check_model(model: nn.Module, form: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers model, found {model!r} of type {type(model).__name__}")
    if isinstance(model, peft.PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ValueError("model: expected a model without adapters, found one that peft has wrapped already")
    check_weights_whole(model)
    if getattr(getattr(model, "config", None), RESIDUAL_BASE, None):
        raise ValueError("model: its weights are W_res of balora.quantize; load it with balora.load_quantized")
    if form not in VARIANTS:
        raise ValueError(f"form: expected 'offset' or 'residual', found {form!r}")
    if form == "residual" and any(map(partitioned, model.parameters())):
        raise ValueError("form: expected 'offset' for weights that ZeRO-3 has partitioned, found 'residual'")


def _options(form: str, lora_config: dict[str, Any]) -> dict[str, Any]:
    """Those of the user for peft.LoraConfig, without what peft does anyway, as many scripts write it out."""
    if form == "residual" and lora_config.get("lora_dropout"):
        raise ValueError(
            f"lora_dropout: expected 0 with form='residual', found {lora_config['lora_dropout']!r}; the adapters hold "
            "the principal part of the weights, which dropout would take away"
        )
    lora_config = {k: v for k, v in lora_config.items() if (k, v) not in (("bias", "none"), ("inference_mode", False))}
    unknown = sorted(set(lora_config) - set(_LORA_OPTIONS))
    if unknown:
        raise ValueError(f"lora_config: {', '.join(unknown)} cannot be used here; allowed: {', '.join(_LORA_OPTIONS)}")
    return lora_config


def _unwrap(model: Any) -> None:
    """Take off what peft has put on the model; the weights stay as they are."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.get_base_layer())
            elif isinstance(child, AuxiliaryTrainingWrapper):
                setattr(parent, name, child.original_module)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _initialize(
    layers: list[LoraLayer], form: str, batch_bytes: int, n_iter: int | None, device: torch.device | None
) -> None:
    # Weights that ZeRO-3 has partitioned are gathered one at a time: all of them may be more than a device holds.
    together: list[LoraLayer] = []
    alone: list[LoraLayer] = []
    for layer in layers:
        (alone if any(map(partitioned, layer.get_base_layer().parameters())) else together).append(layer)
    with tqdm(total=len(layers), desc="PiSSA: decomposing the weights", disable=None, leave=False) as bar:
        for group in (together, *([layer] for layer in alone)):
            with whole(p for layer in group for p in layer.get_base_layer().parameters()):
                for batch in principal.batches(
                    [_outline(layer) for layer in group], [layer.r[ADAPTER] for layer in group], batch_bytes
                ):
                    _initialize_batch([group[i] for i in batch], form, n_iter, device)
                    bar.update(len(batch))


def _initialize_batch(layers: list[LoraLayer], form: str, n_iter: int | None, device: torch.device | None) -> None:
    weights, scalings = [base_weight(layer) for layer in layers], [layer.scaling[ADAPTER] for layer in layers]
    found = principal.factors(weights, layers[0].r[ADAPTER], scalings, n_iter, device)
    for layer, (b0, a0) in zip(layers, found, strict=True):
        VARIANTS[form].init(layer, ADAPTER, a0=a0, b0=b0)


def _outline(layer: LoraLayer) -> Tensor:
    """A tensor of the shape, type and device of W [out, in], and without its memory: a 4-bit W is dequantized late."""
    base = layer.get_base_layer()
    one = torch.empty((), dtype=stored_type(base), device=base.weight.device)
    return one.expand(layer.out_features, layer.in_features)


def _device(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device: expected a device that torch has here, found {device!r}; {error}") from error
    if found.type == "meta":
        raise ValueError("device: expected a device with memory, found 'meta'")
    return found


def _check_layer(name: str, layer: LoraLayer, form: str) -> None:
    if isinstance(layer, ParamWrapper):  # peft has rewritten the name of a linear layer
        found = f"{name}.{layer.parameter_name}"
        raise fused_error(layer.parameter_name, {found: getattr(layer.get_base_layer(), layer.parameter_name)})
    base, r = layer.get_base_layer(), layer.r[ADAPTER]
    quantized = is_4bit(base) and not isinstance(layer, LoraLinear)  # peft asks transformers' is_loaded_in_4bit
    if not ((isinstance(layer, LoraLinear) or quantized) and isinstance(base, LINEAR)):
        raise ValueError(
            f"target_modules: expected linear layers of floating-point or 4-bit weights, found {type(base).__name__} "
            f"at {name}"
        )
    if quantized and form == "residual":
        raise ValueError(
            f"form: 'residual' subtracts from full-precision weights, found 4-bit ones at {name}; make its base with "
            "balora.quantize, or use form='offset'"
        )
    if not quantized and (not base.weight.is_floating_point() or base.weight.dtype.itemsize < 2):
        raise ValueError(f"model: expected floating-point weights, found {base.weight.dtype} at {name}")
    if base.weight.device.type == "meta":
        if hasattr(base, "_hf_hook"):
            raise ValueError(
                f"model: expected weights in memory, found {name} offloaded by accelerate; load the model without a "
                "device_map, or with one that offloads no adapted layer"
            )
        raise ValueError(f"model: expected weights in memory, found the meta device at {name}")
    if not (math.isfinite(layer.scaling[ADAPTER]) and layer.scaling[ADAPTER] > 0):
        raise ValueError(
            f"lora_alpha, alpha_pattern: expected a scaling above 0, found {layer.scaling[ADAPTER]} at {name}"
        )
    smaller = min(layer.out_features, layer.in_features)
    if r > smaller:
        raise ValueError(f"r: expected at most {smaller}, the smaller side of {name}, found {r}")
    low, high = base_weight(layer).aminmax()  # NaN where any entry is
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(f"model: expected finite weights, found NaN or an infinity at {name}")


def _check_unshared(model: nn.Module, layers: dict[str, LoraLayer]) -> None:
    """W_res in place of a weight that another module computes with would change that module too."""
    adapted = {id(layer.get_base_layer().weight): name for name, layer in layers.items()}
    users: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(p), []).append(name.replace(".base_layer", ""))
    for key, name in adapted.items():
        if len(users[key]) > 1:
            raise ValueError(
                f"form: 'residual' changes the weight of {name}, which is shared by {' and '.join(users[key])}; "
                "leave it out of target_modules, or use form='offset'"
            )


def _with_head(model: nn.Module, named: list[str] | str | None) -> list[str]:
    """modules_to_save with the head, but for what peft adds to those of every classifier by itself."""
    names = [named] if isinstance(named, str) else list(named or [])
    return [name for name in dict.fromkeys([*names, *head_modules(model)]) if name not in _PEFT_SAVES]


@dataclass(frozen=True)
class PrincipalError:
    """How near one layer's s·B₀A₀ is to its W. Both errors are relative to ‖W‖_F."""

    name: str
    shape: tuple[int, int]  # of W, [out, in]
    rank: int
    error: float  # ‖W − s·B₀A₀‖
    least: float  # the least of that rank, √(Σ_{i>r} σ_i²)


@dataclass(frozen=True)
class PrincipalErrors:
    """The errors of the measured layers, and of how many layers they are."""

    layers: list[PrincipalError]
    of: int

    @property
    def summary(self) -> str:
        """One line: what the adapters hold of the weights, and how far the worst layer is from the best of its rank."""
        held = [(1 - layer.error**2) ** 0.5 if layer.error < 1 else 0.0 for layer in self.layers]
        text = f"PiSSA: the adapters hold {min(held):.0%} to {max(held):.0%} of ‖W‖; error at most "
        # Below 1e-6 the rounding of the factors is all there is, and the least is not known from 0.
        ratios = [layer.error / layer.least for layer in self.layers if layer.least > 1e-6]
        text += (
            f"{max(ratios):.4f} × the least of rank r" if ratios else f"{max(x.error for x in self.layers):.1e} of ‖W‖"
        )
        return f"{text} ({len(self.layers)} of {self.of} layers measured)"


def principal_errors(
    peft_model: nn.Module, *, all_layers: bool = False, device: torch.device | str | None = None
) -> PrincipalErrors:
    """‖W − s·B₀A₀‖_F of the adapters' start against the least that their rank allows, in either form, at any time.

    In the residual form W is W_res + s·B₀A₀, up to its rounding.

    Args:
        peft_model: from ``get_pissa_model``.
        all_layers: False: the first layer of each shape and rank. A layer of 4096 x 4096 takes 6 s on one core
            of a CPU and 0.3 GB (``principal.errors``).
        device: where to compute, as in ``get_pissa_model``.

    Raises:
        ValueError: there are no PiSSA adapters, or they are merged into the weights.
    """
    layers = {name: m for name, m in peft_model.named_modules() if form_of(m)}
    if not layers:
        raise ValueError("peft_model: expected PiSSA adapters of get_pissa_model, found none")
    if any(layer.merged for layer in layers.values()):
        raise ValueError("peft_model: the adapters are merged into the weights; call unmerge_adapter() first")
    place = _device(device)
    chosen: dict[object, str] = {}
    for name, layer in layers.items():
        key = (layer.out_features, layer.in_features, layer.r[ADAPTER])
        chosen.setdefault(name if all_layers else key, name)
    found = []
    for name in tqdm(chosen.values(), desc="PiSSA: measuring the adapters", disable=None, leave=False):
        layer = layers[name]
        with whole(layer.get_base_layer().parameters()):
            weight, (a0, b0) = pretrained_weight(layer), frozen(layer)
            error, least = principal.errors(weight, b0, a0, initial_scaling(layer), place)
        found.append(PrincipalError(name, (weight.shape[0], weight.shape[1]), len(a0), error, least))
    return PrincipalErrors(found, len(layers))
