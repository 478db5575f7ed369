"""PiSSA adapters as an offset: W stays as it is, and the pre-trained model is the same model with its adapters off.

An adapted layer computes ``W x + s·(B(A x) − B₀(A₀ x))``. A and B start at the principal part of W, A₀ and B₀ are that
start, frozen. While nothing is trained the bracket is exactly zero, so student and teacher are the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import principal
from .checks import check_whole

_ADAPTER = "default"
# The projections of dense Llama-like models: attention and MLP, never the embedding or the head.
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Options of peft.LoraConfig that keep the promises of this module; the others change what is trained or computed.
_LORA_OPTIONS = (
    "lora_dropout",
    "use_rslora",
    "task_type",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)


class _Frozen(nn.Module):
    """One tensor an adapter name: a buffer, so that it is saved and moved with the layer and never trained."""

    def __init__(self, adapter: str, tensor: Tensor) -> None:
        super().__init__()
        self.register_buffer(adapter, tensor)


class _FrozenPath(torch.autograd.Function):
    """B₀(A₀ x). Keeps A₀ and B₀ for the backward as they are stored; autograd would keep their float32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a0: Tensor, b0: Tensor) -> Tensor:
        ctx.save_for_backward(a0, b0)
        ctx.dtype = x.dtype
        return F.linear(F.linear(x, a0.to(x.dtype)), b0.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        a0, b0 = ctx.saved_tensors
        return ((grad @ b0.to(grad.dtype)) @ a0.to(grad.dtype)).to(ctx.dtype), None, None


class OffsetVariant(LoraVariant):
    """``W x + s·(B(A x) − B₀(A₀ x))``: the bracket first, one dropout mask for both.

    A₀ and B₀ are the modules ``lora_offset_A`` and ``lora_offset_B`` of the layer, in the type of W; peft saves them
    with the adapter, because their names hold ``lora_`` and the adapter's name.
    """

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, *, a0: Tensor, b0: Tensor, **kwargs: Any) -> None:
        """Start A and B, and freeze A₀ and B₀, at these factors in W's type: from other roundings the bracket would not
        be zero."""
        module.lora_offset_A = _Frozen(adapter_name, a0)
        module.lora_offset_B = _Frozen(adapter_name, b0)
        module.lora_A[adapter_name].weight.data.copy_(a0)
        module.lora_B[adapter_name].weight.data.copy_(b0)
        module.lora_variant[adapter_name] = OffsetVariant()

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        x = module.lora_dropout[active_adapter](x)
        trained = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        initial = _FrozenPath.apply(x, *_offset(module, active_adapter))
        return result + (trained - initial) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + _change(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += _change(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - _change(module, active_adapter).to(orig_weight.dtype)

    def supports_lora_conversion(self) -> bool:
        return False  # peft would convert s·BA; export_lora converts s·(BA − B₀A₀)


def _offset(module: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A₀ [r, in] and B₀ [out, r] as they are stored."""
    return getattr(module.lora_offset_A, adapter), getattr(module.lora_offset_B, adapter)


def _factors(module: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """left [out, 2r], right [2r, in] in float64 with left·right = s·(BA − B₀A₀)."""
    a0, b0 = _offset(module, adapter)
    a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
    left = torch.cat([b.double(), -b0.double()], dim=1) * module.scaling[adapter]
    return left, torch.cat([a.double(), a0.double()], dim=0)


def _change(module: LoraLayer, adapter: str) -> Tensor:
    """s·(BA − B₀A₀), the change of W [out, in], in float64: its two parts cancel."""
    left, right = _factors(module, adapter)
    return left @ right


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
    """Wrap a dense Llama-like causal language model with PiSSA adapters that leave its weights alone.

    W ≈ U_r S_r V_rᵀ and s = lora_alpha / r give A₀ = √(S_r/s)·V_rᵀ and B₀ = U_r·√(S_r/s) (2025 paper, eq. 1 and 2). The
    layer computes W x + s·(B(A x) − B₀(A₀ x)), and only A and B (float32 unless the model is float64) are trained.

    Layers of the same shape, type, device and rank are decomposed together, batch by batch; ‖W − s·B₀A₀‖ is within 1e-3
    of the least that rank r allows (measured: small Llamas, random weights without decay). Nothing is left to chance:
    the same call gives the same bits on the same machine, another ``batch_bytes`` the same s·B₀A₀ up to rounding.

    Args:
        model: a transformers model in float32, bfloat16, float16 or float64; it is changed in place.
        r: the rank of the adapters, at most the smaller side of every adapted layer.
        lora_alpha: s·r, above 0.
        target_modules: the layers to adapt, as peft takes them. None: q, k, v, o, gate, up and down projections.
        form: "offset".
        batch_bytes: of the weights that are decomposed at a time, counted in float32 (float64 for float64 models); at
            least one weight at a time. The decomposition takes a small multiple of it.
        n_iter: None: a full decomposition of small matrices, ``functional.randomized_svd`` of the others. A number: the
            latter for all, with that many power iterations.
        device: where the weights are decomposed; only A₀ and B₀ come back from there. None: those on the CPU on the
            current CUDA device, if there is one, and others where they lie.
        **lora_config: lora_dropout, use_rslora, task_type, exclude_modules, layers_to_transform, layers_pattern,
            rank_pattern, alpha_pattern, as in ``peft.LoraConfig``.

    Raises:
        ValueError, TypeError: an argument does not fit; the model is then as it was.
    """
    if isinstance(model, peft.PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ValueError("model: expected a model without adapters, found one that peft has wrapped already")
    check_whole("r", r)
    if not (isinstance(lora_alpha, (int, float)) and math.isfinite(lora_alpha) and lora_alpha > 0):
        raise ValueError(f"lora_alpha: expected a finite number above 0, found {lora_alpha!r}")
    if form != "offset":
        raise ValueError(f"form: expected 'offset', found {form!r}")
    check_whole("batch_bytes", batch_bytes)
    if n_iter is not None:
        check_whole("n_iter", n_iter)
    device = _device(device)
    unknown = sorted(set(lora_config) - set(_LORA_OPTIONS))
    if unknown:
        raise ValueError(f"lora_config: {', '.join(unknown)} cannot be used here; allowed: {', '.join(_LORA_OPTIONS)}")
    if target_modules is None:
        target_modules = _default_targets(model)
    if getattr(model, "can_generate", bool)():
        lora_config.setdefault("task_type", "CAUSAL_LM")

    trainable = [(p, p.requires_grad) for p in model.parameters()]
    config = peft.LoraConfig(
        r=r, lora_alpha=lora_alpha, target_modules=target_modules, init_lora_weights=False, **lora_config
    )
    try:
        wrapped = peft.get_peft_model(model, config)
        layers = [(name, m) for name, m in wrapped.named_modules() if isinstance(m, LoraLayer)]
        for name, layer in layers:
            _check_layer(name, layer)
        _initialize(layers, batch_bytes, n_iter, device)
    except BaseException:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, BaseTunerLayer):
                    setattr(parent, name, child.get_base_layer())
        for p, was in trainable:
            p.requires_grad_(was)
        if hasattr(model, "peft_config"):
            del model.peft_config
        raise
    return wrapped


def _initialize(
    layers: list[tuple[str, LoraLayer]], batch_bytes: int, n_iter: int | None, device: torch.device | None
) -> None:
    adapted = [layer for _, layer in layers]
    weights = [layer.get_base_layer().weight.detach() for layer in adapted]
    ranks, scalings = [layer.r[_ADAPTER] for layer in adapted], [layer.scaling[_ADAPTER] for layer in adapted]
    with tqdm(total=len(layers), desc="PiSSA: decomposing the weights", disable=None, leave=False) as bar:
        for batch in principal.batches(weights, ranks, batch_bytes):
            found = principal.factors(
                [weights[i] for i in batch], ranks[batch[0]], [scalings[i] for i in batch], n_iter, device
            )
            for i, (b0, a0) in zip(batch, found, strict=True):
                OffsetVariant.init(adapted[i], _ADAPTER, a0=a0, b0=b0)
            bar.update(len(batch))


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


def _default_targets(model: nn.Module) -> list[str]:
    found = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = [name for name in _PROJECTIONS if name in found]
    if not targets:
        raise ValueError(
            f"target_modules: None stands for {', '.join(_PROJECTIONS)}, and this model has none of them; "
            f"name its layers, of {', '.join(sorted(found)) or 'which it has none'}"
        )
    return targets


def _check_layer(name: str, layer: LoraLayer) -> None:
    base, r = layer.get_base_layer(), layer.r[_ADAPTER]
    if not (isinstance(layer, LoraLinear) and isinstance(base, nn.Linear)):
        raise ValueError(f"target_modules: expected nn.Linear layers, found {type(base).__name__} at {name}")
    if not base.weight.is_floating_point() or base.weight.dtype.itemsize < 2:
        raise ValueError(f"model: expected floating-point weights, found {base.weight.dtype} at {name}")
    if base.weight.device.type == "meta":
        raise ValueError(f"model: expected weights in memory, found the meta device at {name}")
    if not (math.isfinite(layer.scaling[_ADAPTER]) and layer.scaling[_ADAPTER] > 0):
        raise ValueError(
            f"lora_alpha, alpha_pattern: expected a scaling above 0, found {layer.scaling[_ADAPTER]} at {name}"
        )
    if r > min(base.weight.shape):
        raise ValueError(f"r: expected at most {min(base.weight.shape)}, the smaller side of {name}, found {r}")
    low, high = base.weight.detach().aminmax()  # NaN where any entry is
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(f"model: expected finite weights, found NaN or an infinity at {name}")


@contextmanager
def teacher(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the pre-trained one, exactly: adapters off, evaluation mode (no dropout).

    Unlike peft's ``disable_adapter`` it never touches ``requires_grad``. On leaving, every flag is as it was, also
    after an error. Leave the block before the backward: gradient checkpointing recomputes with whatever is active then.
    (Merging the adapters and unmerging them again rounds the base weights, as always with peft.)

    Raises:
        ValueError: the adapters are merged into the weights, which then are not the pre-trained ones.
    """
    switched = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if any(getattr(m, "merged", False) for m in switched):
        raise ValueError("model: the adapters are merged into the weights; call unmerge_adapter() first")
    disabled = [m._disable_adapters for m in switched]
    in_training = [m for m in model.modules() if m.training]
    try:
        for m in switched:
            m._disable_adapters = True
        for m in in_training:
            m.training = False
        yield
    finally:
        for m, was in zip(switched, disabled, strict=True):
            m._disable_adapters = was
        for m in in_training:
            m.training = True


def export_lora(peft_model: peft.PeftModel, directory: str | Path) -> None:
    """Write the trained adapters as a plain PEFT LoRA that loads without balora, onto the unchanged base model.

    s·(BA − B₀A₀) has rank 2r at most. It is refactored in float64 into balanced factors B'A' of rank 2r (alpha = 2r),
    so that the two parts do not have to cancel again in whatever type the LoRA is loaded in. A model with ordinary LoRA
    adapters is saved as it is.

    Files: ``adapter_config.json`` and ``adapter_model.safetensors``. The exported model equals the trained one within
    the rounding of its type.
    """
    if not isinstance(peft_model, peft.PeftModel):
        raise TypeError(f"peft_model: expected a peft.PeftModel, found {type(peft_model).__name__}")
    directory = Path(directory)
    layers = {name: m for name, m in peft_model.named_modules() if hasattr(m, "lora_offset_A")}
    if not layers:
        peft_model.save_pretrained(directory)
        return
    if peft_model.active_adapters != [_ADAPTER]:
        raise ValueError(
            f"peft_model: expected {_ADAPTER!r}, which balora made, to be the active adapter; "
            f"found {peft_model.active_adapters}"
        )
    tensors = {}
    for name, layer in layers.items():
        a, b = _balanced(*_factors(layer, _ADAPTER))
        dtype = layer.lora_A[_ADAPTER].weight.dtype
        tensors[f"{name}.lora_A.weight"] = a.to(dtype).cpu().contiguous()
        tensors[f"{name}.lora_B.weight"] = b.to(dtype).cpu().contiguous()
    fields = peft_model.peft_config[_ADAPTER].to_dict()
    ranks = {pattern: 2 * rank for pattern, rank in (fields["rank_pattern"] or {}).items()}
    fields.update(
        r=2 * fields["r"],
        lora_alpha=2 * fields["r"],  # alpha = r everywhere: the scaling is in the factors
        rank_pattern=ranks,
        alpha_pattern=ranks,
        use_rslora=False,
        init_lora_weights=True,
        inference_mode=True,
    )
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    peft.LoraConfig(**fields).save_pretrained(directory)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """a [q, in], b [out, q] with b·a = left·right and equal singular values. left [out, q], right [q, in]."""
    q = left.shape[1]
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    root = s.sqrt()
    a, b = root[:, None] * (vh @ q_right.T), (q_left @ u) * root
    missing = q - len(s)  # a layer narrower than 2r
    return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
