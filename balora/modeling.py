"""attach: a PEFT-wrapped causal language model whose own ``forward(labels=…)`` returns the BA-LoRA loss in training.

The loss is computed from hidden states where the head is a ``LinearHead``, which is checked on a few tokens; else from
the model's own logits.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from . import four_bit
from .adapters import RESIDUAL_BASE, form_of
from .config import BALoraConfig
from .functional import IGNORE_INDEX, BALoraOutput, linear_objective, logits_objective
from .output_layer import Heads, decoder_of, difference, heads_of
from .pissa import head_modules, teacher

# peft initializations that write to the base weights: with the adapters off, such a model is not the pre-trained one.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "orthogonal", "lora_ga")
# Arguments of a causal model's forward that are the loss's, not the decoder's.
_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "ignore_index")


@dataclass
class Attachment:
    """What ``attach`` keeps on the model, as ``_balora``."""

    config: BALoraConfig
    heads: Heads | None  # None: the loss is computed from the model's logits
    previous: Callable[..., Any] | None  # the forward that was set on the instance, None where it was the class's
    progress: tuple[int, int] | None = None
    lambdas: tuple[float, float, float] = (0.0, 0.0, 0.0)  # those of the last training forward
    summed: bool = False  # the last terms were divided by the tokens of all micro-batches, so they add up


def attach(peft_model: peft.PeftModel, config: BALoraConfig) -> peft.PeftModel:
    """Make ``forward(labels=…)`` of a PEFT-wrapped causal language model return the BA-LoRA loss.

    In training mode the model runs twice, first as the pre-trained one and without gradients (the teacher), then as it
    is; the loss is ``functional.linear_objective`` of the two last hidden states, the output has no logits, and the
    unweighted terms of the last forward lie in ``peft_model.balora_last``, detached. λ follows the schedules of
    ``config`` once ``set_progress`` (or ``trainer.BALoraCallback``) says how far training is; until then it is
    constant. In evaluation mode the forward is the model's own: plain cross-entropy, with logits. The auxiliary loss of
    a mixture of experts is added to the returned loss where the model's own forward adds it.

    The head may have a bias, a scale, a soft-cap, a LoRA or offset adapter without dropout, or be trained itself
    (``modules_to_save``); a trained or adapted head has the pre-trained one as its teacher. It is compared with the
    model's own logits on a few tokens. Where it is something else, ``functional.logits_objective`` of the model's
    logits takes its place, which a warning says: it holds [tokens, vocabulary] tensors.

    Args:
        peft_model: from ``get_pissa_model``, or any peft LoRA, rsLoRA or DoRA model whose base weights are the
            pre-trained ones.
        config: the objective, of language generation (``task="nlg"``).

    Returns:
        The same model.

    Raises:
        ValueError, TypeError: the model or the config does not fit; the model is then as it was.
    """
    if not isinstance(peft_model, peft.PeftModel):
        raise TypeError(f"peft_model: expected a peft.PeftModel, found {type(peft_model).__name__}")
    if not isinstance(config, BALoraConfig):
        raise TypeError(f"config: expected a BALoraConfig, found {type(config).__name__}")
    if _find(peft_model) is not None:
        raise ValueError("peft_model: it is attached already; call balora.detach first")
    for adapter in peft_model.peft_config.values():
        if adapter.peft_type != peft.PeftType.LORA:
            raise ValueError(f"peft_model: expected LoRA adapters, found {adapter.peft_type}")
        how = getattr(adapter, "init_lora_weights", True)
        if isinstance(how, str) and how.startswith(_REWRITES_BASE):
            raise ValueError(
                f"peft_model: init_lora_weights={how!r} changes the base weights, so the pre-trained model is lost; "
                "use balora.get_pissa_model"
            )
    for name, p in peft_model.named_parameters():
        if p.requires_grad and "lora_" not in name and "modules_to_save" not in name:
            raise ValueError(
                f"peft_model: {name} is trained and no adapter, so the pre-trained model would be lost; expected "
                "frozen base weights"
            )
    base = peft_model.get_base_model()
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError("peft_model: encoder-decoder models are not supported so far")
    if config.task == "nlg" and getattr(base, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(f"peft_model: {type(base).__name__} has no output embedding; expected a causal language model")
    if config.task == "nlu" and not type(base).__name__.endswith("ForSequenceClassification"):
        raise ValueError(f"config: task='nlu' expects a sequence classifier, found {type(base).__name__}")
    if getattr(base.config, RESIDUAL_BASE, None) and not any(form_of(m) == "residual" for m in base.modules()):
        raise ValueError("peft_model: its base is W_res of balora.quantize; load both with balora.load_quantized")
    four_bit.prepare(base)
    heads = None if config.task == "nlu" else _known_heads(peft_model)
    base._balora = Attachment(config, heads, base.__dict__.get("forward"))
    base.balora_last = None

    @functools.wraps(type(base).forward)  # the Trainer drops the columns that this signature does not name
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, *args, **kwargs)

    base.forward = types.MethodType(forward, base)
    return peft_model


def _known_heads(peft_model: peft.PeftModel) -> Heads | None:
    """The model's output layer as linear maps, or None, and a warning, where it is none."""
    base: Any = peft_model.get_base_model()
    found = heads_of(base)
    reason = found if isinstance(found, str) else difference(peft_model, found)
    if reason is None and not isinstance(found, str):
        return found
    warnings.warn(
        f"{type(base).__name__}: {reason}; the loss is computed from the model's logits, which takes "
        "[tokens, vocabulary] tensors and more time",
        stacklevel=3,
    )
    return None


def detach(peft_model: nn.Module) -> None:
    """Undo ``attach``: the model's own forward again. The adapters and what they learned stay."""
    base = _attached(peft_model)
    if base._balora.previous is None:
        del base.forward
    else:
        base.forward = base._balora.previous
    del base._balora, base.balora_last


def set_progress(peft_model: nn.Module, step: int, max_steps: int) -> None:
    """Tell an attached model that optimizer step ``step`` of ``max_steps`` is next, for the schedules of λ."""
    base = _attached(peft_model)
    for name, value in (("step", step), ("max_steps", max_steps)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected a whole number, found {value!r} of type {type(value).__name__}")
    if max_steps < 1 or step < 0:
        raise ValueError(f"step, max_steps: expected 0 or more and 1 or more, found {step} and {max_steps}")
    base._balora.progress = (step, max_steps)


def attachment(model: nn.Module) -> tuple[nn.Module, Attachment]:
    """The attached base model inside ``model`` (which DDP or torch.compile may have wrapped) and its attachment."""
    base = _attached(model)
    return base, base._balora


def _find(model: nn.Module) -> Any:
    return next((m for m in model.modules() if "_balora" in m.__dict__), None)


def _attached(model: nn.Module) -> Any:
    base = _find(model)
    if base is None:
        raise ValueError("peft_model: it is not attached; call balora.attach(peft_model, config) first")
    return base


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of an attached model. ``self`` is the causal language model inside the PeftModel."""
    state: Attachment = self._balora
    original = state.previous or functools.partial(type(self).forward, self)
    if not self.training:
        return original(*args, **kwargs)
    arguments = _by_name(type(self).forward, self, args, kwargs)
    if arguments.get("labels") is None and arguments.get("shift_labels") is None:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        raise ValueError(
            "labels: a model attached to BA-LoRA needs labels in training, found None (label smoothing and "
            "compute_loss_func take them out of the batch: leave them off)"
        )
    if state.config.task == "nlu":
        return _classify(self, original, arguments)
    loss_arguments = {name: arguments.pop(name, None) for name in _LOSS_ARGUMENTS}
    if loss_arguments["ignore_index"] not in (None, IGNORE_INDEX):
        raise ValueError(f"ignore_index: expected {IGNORE_INDEX}, found {loss_arguments['ignore_index']}")
    as_tuple = arguments.pop("return_dict", None) is False
    routed = arguments.pop("output_router_logits", None)
    routed = getattr(self.config.get_text_config(), "output_router_logits", False) if routed is None else routed
    # A cache would keep the keys and values of every layer alive, twice.
    arguments["use_cache"] = False

    config = _config_now(state)
    normalizer = loss_arguments["num_items_in_batch"]
    state.summed = normalizer is not None
    labels = _aligned(loss_arguments["labels"], loss_arguments["shift_labels"])
    run = _from_hidden if state.heads is not None else _from_logits
    result, outputs = run(self, original, arguments, labels, normalizer, config, routed)
    # Detached: the loss of a kept result would keep the whole graph alive until the next step.
    self.balora_last = result._replace(loss=result.loss.detach())
    kept = dict(loss=result.loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
    if not routed:
        output = CausalLMOutputWithPast(**kept)
    else:
        kept["loss"] = result.loss + _aux_weight(self) * outputs.aux_loss.to(result.loss.device)
        output = MoeCausalLMOutputWithPast(**kept, aux_loss=outputs.aux_loss, router_logits=outputs.router_logits)
    return output.to_tuple() if as_tuple else output


def _classify(self: Any, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The forward of an attached sequence classifier: the objective of its class logits, [B, C]."""
    state: Attachment = self._balora
    labels, normalizer = arguments.pop("labels"), arguments.pop("num_items_in_batch", None)
    config = _config_now(state)
    state.summed = normalizer is not None
    teacher_logits = None
    if config.lambda_consistency != 0:
        with torch.no_grad(), teacher(self, keep=tuple(head_modules(self))):
            teacher_logits = original(**arguments).logits
    outputs = original(**arguments)
    result = logits_objective(outputs.logits, teacher_logits, labels, config, _at_least_one(normalizer, labels.device))
    self.balora_last = result._replace(loss=result.loss.detach())
    outputs.loss = result.loss
    return outputs


def _from_hidden(
    self: Any,
    original: Callable[..., Any],
    arguments: dict[str, Any],
    labels: Tensor,
    normalizer: Any,
    config: BALoraConfig,
    routed: bool,
) -> tuple[BALoraOutput, Any]:
    """The objective by the head, and the outputs of the student's forward."""
    heads = heads_of(self, self._balora.heads)  # adapters come and go
    if isinstance(heads, str):
        raise ValueError(f"peft_model: {heads}, which was not so when it was attached; detach and attach it again")
    self._balora.heads = heads
    teacher_hidden = None
    device = heads.student.weight.device
    decoder = decoder_of(self)
    if config.lambda_consistency != 0:
        with torch.no_grad(), teacher(self):
            teacher_hidden = decoder(**arguments).last_hidden_state.to(device)
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
    result = linear_objective(
        hidden.to(device),
        teacher_hidden,
        heads.student,
        labels.to(device),
        config,
        teacher_head=heads.teacher,
        normalizer=_at_least_one(normalizer, device),
    )
    return result, outputs


def _from_logits(
    self: Any,
    original: Callable[..., Any],
    arguments: dict[str, Any],
    labels: Tensor,
    normalizer: Any,
    config: BALoraConfig,
    routed: bool,
) -> tuple[BALoraOutput, Any]:
    """The objective by the model's logits, and the outputs of the student's forward."""
    teacher_logits = None
    if config.lambda_consistency != 0:
        with torch.no_grad(), teacher(self):
            teacher_logits = original(**arguments).logits
    outputs = original(**arguments, **({"output_router_logits": True} if routed else {}))
    device = outputs.logits.device
    result = logits_objective(
        outputs.logits, teacher_logits, labels.to(device), config, _at_least_one(normalizer, device)
    )
    return result, outputs


def _at_least_one(normalizer: Any, device: torch.device) -> Tensor | None:
    return None if normalizer is None else torch.as_tensor(normalizer, device=device).clamp_min(1)


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


def _by_name(function: Callable[..., Any], self: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those of ``**kwargs`` among them."""
    signature = inspect.signature(function)
    arguments = dict(signature.bind(self, *args, **kwargs).arguments)
    arguments.pop(next(iter(signature.parameters)))
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments


def _config_now(state: Attachment) -> BALoraConfig:
    config = state.config
    state.lambdas = (config.lambda_consistency, config.lambda_diversity, config.lambda_svd)
    if state.progress is not None:
        state.lambdas = config.lambdas(*state.progress)
    elif (config.consistency_schedule, config.focus_schedule) != ("constant", "constant"):
        # Python shows a warning once for each place in the code.
        warnings.warn(
            "the λ schedules need to know how far training is: until balora.set_progress or "
            "balora.trainer.BALoraCallback tells, λ is constant",
            stacklevel=4,
        )
    consistency, diversity, svd = state.lambdas
    return replace(config, lambda_consistency=consistency, lambda_diversity=diversity, lambda_svd=svd)


def _aligned(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    """The label of each position: position t is scored against label t + 1; shift_labels are shifted already."""
    if shift_labels is not None:
        return shift_labels
    assert labels is not None
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
