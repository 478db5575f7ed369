"""The training forward of a causal language model: two decoder passes, and the objective by the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from .attachment import Attachment, at_least_one, check_no_cache
from .checks import IGNORE_INDEX
from .config import BALoraConfig
from .functional import BALoraOutput, LinearHead, linear_objective, logits_objective
from .output_layer import decoder_of, heads_now, without_adapter
from .pretrained import teacher
from .sharding import hooked, within

# Arguments of a causal model's forward that are the loss's, not the decoder's.
_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "ignore_index")


@torch.compiler.disable(recursive=False)  # of a compiled model the decoder is compiled
def training_forward(
    model: Any, state: Attachment, original: Callable[..., Any], arguments: dict[str, Any]
) -> tuple[BALoraOutput, Any]:
    """The objective, and the model's output with its loss in place and without logits.

    original: the model's own forward. arguments: those of the call, by name.
    """
    loss_arguments = {name: arguments.pop(name, None) for name in _LOSS_ARGUMENTS}
    if loss_arguments["ignore_index"] not in (None, IGNORE_INDEX):
        raise ValueError(f"ignore_index: expected {IGNORE_INDEX}, found {loss_arguments['ignore_index']}")
    routed = arguments.pop("output_router_logits", None)
    routed = getattr(model.config.get_text_config(), "output_router_logits", False) if routed is None else routed
    # A cache would keep the keys and values of every layer alive, twice.
    arguments["use_cache"] = False

    config = state.config_now()
    check_no_cache(arguments, config)
    normalizer = loss_arguments["num_items_in_batch"]
    state.summed = normalizer is not None
    labels = _aligned(loss_arguments["labels"], loss_arguments["shift_labels"])
    run = _from_hidden if state.heads is not None else from_logits
    result, outputs = run(model, original, arguments, labels, normalizer, config, routed)
    kept = dict(loss=result.loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
    if not routed:
        return result, CausalLMOutputWithPast(**kept)
    kept["loss"] = result.loss + _aux_weight(model) * outputs.aux_loss.to(result.loss.device)
    return result, MoeCausalLMOutputWithPast(**kept, aux_loss=outputs.aux_loss, router_logits=outputs.router_logits)


@torch.compiler.disable(recursive=False)
def _from_hidden(
    model: Any,
    original: Callable[..., Any],
    arguments: dict[str, Any],
    labels: Tensor,
    normalizer: Any,
    config: BALoraConfig,
    routed: bool,
) -> tuple[BALoraOutput, Any]:
    """The objective by the head, and the outputs of the student's forward."""
    teacher_hidden = None
    decoder = decoder_of(model)
    if config.lambda_consistency != 0:
        with torch.no_grad(), teacher(model):
            teacher_hidden = decoder(**arguments).last_hidden_state
    if not routed:
        outputs = decoder(**arguments)
        hidden = outputs.last_hidden_state
    else:
        # The model's own forward knows its auxiliary loss; of the logits it makes one token's.
        captured: list[Any] = []
        handle = decoder.register_forward_hook(lambda module, args, output: captured.append(output[0]))
        try:
            outputs = original(**arguments, output_router_logits=True, logits_to_keep=1)
        finally:
            handle.remove()
        hidden = captured[0]
    return head_objective(model, hidden, teacher_hidden, labels, normalizer, config), outputs


@torch.compiler.disable
def head_objective(
    model: Any,
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    labels: Tensor,
    normalizer: Any,
    config: BALoraConfig,
) -> BALoraOutput:
    """The objective of the two last hidden states [B, S, d] by the head, which is not called.

    Where an engine gathers the head's weights for its forward alone, they are read inside of one.
    """
    found: list[BALoraOutput] = []

    def objective(hidden: Tensor, teacher_hidden: Tensor | None) -> Tensor:
        heads = heads_now(model, model._balora.heads)
        if model._balora.config.lambda_svd:
            heads.student.prepare_svd()  # not when the schedule first asks: what does not fit should fail at once
        device = heads.student.weight.device
        result = linear_objective(
            _as_the_head_takes(hidden, heads.student),
            None if teacher_hidden is None else _as_the_head_takes(teacher_hidden, heads.student),
            heads.student,
            labels.to(device),
            config,
            teacher_head=heads.teacher,
            normalizer=at_least_one(normalizer, device),
        )
        found.append(result)
        # For the next step, with what they know of their weights by now.
        model._balora.heads = without_adapter(heads)
        return result.loss

    layer = model.get_output_embeddings()
    loss = within(layer, objective, hidden, teacher_hidden) if hooked(layer) else objective(hidden, teacher_hidden)
    return found[0]._replace(loss=loss)


@torch.compiler.disable(recursive=False)
def from_logits(
    model: Any,
    original: Callable[..., Any],
    arguments: dict[str, Any],
    labels: Tensor,
    normalizer: Any,
    config: BALoraConfig,
    routed: bool = False,
) -> tuple[BALoraOutput, Any]:
    """The objective by the model's logits, and the outputs of the student's forward."""
    teacher_logits = None
    if config.lambda_consistency != 0:
        with torch.no_grad(), teacher(model):
            teacher_logits = original(**arguments).logits
    outputs = original(**arguments, **({"output_router_logits": True} if routed else {}))
    device = outputs.logits.device
    result = logits_objective(
        outputs.logits, teacher_logits, labels.to(device), config, at_least_one(normalizer, device)
    )
    return result, outputs


def _as_the_head_takes(hidden: Tensor, head: LinearHead) -> Tensor:
    """On the head's device. Under autocast a LayerNorm gives float32, which a head of autocast's type would round; so
    a KL below what that rounding makes of equal distributions is lost, as in the model's own logits.
    """
    device, dtype = head.weight.device, hidden.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(device.type):
        rounded = torch.get_autocast_dtype(device.type)
        dtype = rounded if rounded == head.weight.dtype else dtype
    return hidden.to(device, dtype)


def _aux_weight(model: Any) -> float:
    """The weight that the model's own forward gives the auxiliary loss of its experts."""
    for owner in (model, model.config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if isinstance(getattr(owner, name, None), (int, float)):
                return getattr(owner, name)
    raise ValueError(
        f"output_router_logits: {type(model).__name__} does not tell the weight of its auxiliary loss "
        "(router_aux_loss_coef); leave it off"
    )


def _aligned(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    """The label of each position: position t is scored against label t + 1; shift_labels are shifted already."""
    if shift_labels is not None:
        return shift_labels
    assert labels is not None
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
