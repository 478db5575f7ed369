"""The output layer of a language model as linear maps: the student's, and the pre-trained model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from . import reference
from .adapters import ADAPTER, form_of, frozen, initial_scaling
from .functional import LinearHead
from .pretrained import evaluating, teacher

Adapter = tuple[Tensor, Tensor, float]  # A, B, s


class Heads(NamedTuple):
    """The output layer of the model, and of the pre-trained one where that is another (a trained or adapted head)."""

    student: LinearHead
    teacher: LinearHead | None


def heads_of(base: Any, known: Heads | None = None) -> Heads | str:
    """The output layer of a language model as linear maps, or why it is none.

    known: an earlier answer, whose heads are kept where they have the same tensors: they know their Gram matrices.
    """
    layer = base.get_output_embeddings()
    pre_trained: tuple[Any, Adapter | None] | None = None  # its layer and adapter, where it has another head
    if isinstance(layer, ModulesToSaveWrapper):
        original = layer.original_module
        if not layer.disable_adapters and layer.active_adapters and layer.active_adapters[0] in layer.modules_to_save:
            pre_trained = original, None
            layer = layer.modules_to_save[layer.active_adapters[0]]
        else:
            layer = original
    lora: Adapter | None = None
    if isinstance(layer, LoraLayer) and not (layer.merged or layer.disable_adapters):
        adapters = [name for name in layer.active_adapters if name in layer.lora_A]
        if len(adapters) > 1:
            return f"its head has the adapters {', '.join(adapters)} at once"
        if adapters:
            found = _head_adapter(layer, adapters[0])
            if isinstance(found, str):
                return found
            lora, initial = found
            pre_trained = layer.get_base_layer(), initial
    if isinstance(layer, BaseTunerLayer):
        layer = layer.get_base_layer()
    tensors = _linear(layer, lora)
    if isinstance(tensors, str):
        return tensors
    weight, bias, lora = tensors
    bias = _with_logits_bias(base, bias)
    student = LinearHead(weight, bias, *_softcap_and_scale(base.config.get_text_config(decoder=True)), lora)
    own = None
    if pre_trained is not None:
        tensors = _linear(*pre_trained)
        if isinstance(tensors, str):
            return tensors
        own = student.replaced(tensors[0], _with_logits_bias(base, tensors[1]), tensors[2])
    if known is None:
        return Heads(student, own)
    return Heads(known.student.replaced(weight, bias, lora), _kept(known.teacher, own))


def heads_now(base: Any, known: Heads) -> Heads:
    """The output layer of a model that was attached with the heads ``known``: adapters come and go.

    Raises:
        ValueError: it is no linear map any more.
    """
    heads = heads_of(base, known)
    if isinstance(heads, str):
        raise ValueError(f"peft_model: {heads}, which was not so when it was attached; detach and attach it again")
    return heads


def without_adapter(heads: Heads) -> Heads:
    """These heads, to be kept: an adapter's tensors, made for one forward, would keep its graph alive."""
    student = heads.student
    return heads if student.lora is None else Heads(student.replaced(student.weight, student.bias), heads.teacher)


def _with_logits_bias(base: Any, bias: Tensor | None) -> Tensor | None:
    """The head's bias, and BART's final_logits_bias [1, V], which the model adds to its logits."""
    extra = getattr(base, "final_logits_bias", None)
    if not isinstance(extra, Tensor):
        return bias
    return extra[0] if bias is None else bias + extra[0].to(bias.device)


def _softcap_and_scale(config: Any) -> tuple[float | None, float]:
    """Gemma's final_logit_softcapping, Cohere's logit_scale, Granite's logits_scaling; ``difference`` finds others."""
    names = "final_logit_softcapping", "logit_scale", "logits_scaling"
    values = (getattr(config, name, None) for name in names)
    softcap, scale, divisor = (v if isinstance(v, (int, float)) else None for v in values)
    return softcap, (1.0 if scale is None else scale) / (1.0 if divisor is None else divisor)


def decoder_of(base: Any) -> Any:
    """What the model calls before its head; None where that is no module of its own."""
    for found in (base.base_model, base.get_decoder(), getattr(base, "model", None)):
        if isinstance(found, nn.Module) and found is not base:
            return found
    return None


def run_to_head(base: Any, forward: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Tensor, Any]:
    """What the head is given, [B, S, d], in a forward of the model; and its output, with the first token's logits.

    For encoder-decoders, where no one module holds all that comes before the head (T5 scales the states in between).
    """
    captured: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        captured.append(args[0])
        return args[0][:, :1], *args[1:]

    handle = base.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        outputs = forward(**arguments)
    finally:
        handle.remove()
    return captured[0], outputs


def _linear(layer: Any, lora: Adapter | None) -> tuple[Tensor, Tensor | None, Adapter | None] | str:
    if isinstance(layer, nn.Linear) and layer.weight.is_floating_point() and layer.weight.dim() == 2:
        return layer.weight, layer.bias, lora
    return f"its head is no plain linear layer but {type(layer).__name__}"


def _kept(old: LinearHead | None, new: LinearHead | None) -> LinearHead | None:
    return new if old is None or new is None else old.replaced(new.weight, new.bias, new.lora)


def _head_adapter(layer: LoraLayer, name: str) -> tuple[Adapter, Adapter | None] | str:
    """The adapter on the head as (A, B, s), the one of the pre-trained model if it has one; or why it is none."""
    if layer.lora_dropout[name].__class__ is not nn.Identity and layer.lora_dropout[name].p > 0:
        return f"its head has an adapter with dropout ({layer.lora_dropout[name].p})"
    if getattr(layer, "use_dora", {}).get(name) or layer.lora_B[name].bias is not None:
        return "its head has a DoRA adapter, or one with a bias"
    a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    form = form_of(layer)
    if form == "residual":
        return (a, b, scaling), (*frozen(layer), initial_scaling(layer))
    if form == "offset" and name == ADAPTER:  # s·(BA − B₀A₀) as one product, its roundings relative to the change
        a0, b0 = (t.to(a.dtype) for t in frozen(layer))
        return (torch.cat([a - a0, a0]), torch.cat([b, b - b0], dim=1), scaling), None
    if layer.lora_variant.get(name) is not None:
        return f"its head has an adapter of the kind {type(layer.lora_variant[name]).__name__}"
    return (a, b, scaling), None


def difference(peft_model: peft.PeftModel, heads: Heads) -> str | None:
    """How the model's own logits differ from those of the heads on a few tokens; None where they do not.

    A model may do what its configuration does not tell.
    """
    base: Any = peft_model.get_base_model()
    head = heads.student
    two_halves = getattr(base.config, "is_encoder_decoder", False)
    decoder = decoder_of(base)
    if decoder is None and not two_halves:
        return "it has no decoder apart from its head"
    if head.weight.device.type == "meta":
        return None
    tokens = torch.arange(min(8, len(head.weight)), device=base.get_input_embeddings().weight.device)[None]  # [1, S]
    arguments: dict[str, Any] = dict(input_ids=tokens, use_cache=False)
    if two_halves:
        arguments["decoder_input_ids"] = tokens
    for head, mode in ((heads.student, evaluating), (heads.teacher or heads.student, teacher)):
        with torch.no_grad(), mode(peft_model):
            logits = base(**arguments).logits  # [1, S, V]
            if two_halves:
                hidden, _ = run_to_head(base, base, arguments)
            else:
                hidden = decoder(**arguments).last_hidden_state
            rows = hidden.flatten(0, 1).to(head.weight.device)
            found = reference.logits(rows, head.weight, head.bias, head.softcap, head.scale, head.lora)
        if found.shape != logits.shape[1:]:
            return f"its logits have the shape {list(logits.shape[1:])}, its head gives {list(found.shape)}"
        error = (logits[0].to(found) - found).abs().max().item()
        # The model rounds its logits, their scaling and their soft-cap; float32 sums have another order.
        allowed = max(4 * torch.finfo(hidden.dtype).eps, 1e-4) * logits.abs().max().item()
        if not error <= allowed:
            return f"its logits are not those of a linear head (difference {error:.3g}, allowed {allowed:.3g})"
    return None
