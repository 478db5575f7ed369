"""attach: a PEFT-wrapped causal language model whose own ``forward(labels=…)`` returns the BA-LoRA loss in training."""

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
from transformers.modeling_outputs import CausalLMOutputWithPast

from .config import BALoraConfig
from .functional import IGNORE_INDEX, LinearHead, linear_objective
from .pissa import teacher

# peft initializations that write to the base weights: with the adapters off, such a model is not the pre-trained one.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "orthogonal", "lora_ga")
# Arguments of a causal model's forward that are the loss's, not the decoder's.
_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "ignore_index")


@dataclass
class Attachment:
    """What ``attach`` keeps on the model, as ``_balora``."""

    config: BALoraConfig
    head: LinearHead
    previous: Callable[..., Any] | None  # the forward that was set on the instance, None where it was the class's
    progress: tuple[int, int] | None = None
    lambdas: tuple[float, float, float] = (0.0, 0.0, 0.0)  # those of the last training forward
    summed: bool = False  # the last terms were divided by the tokens of all micro-batches, so they add up


def attach(peft_model: peft.PeftModel, config: BALoraConfig) -> peft.PeftModel:
    """Make ``forward(labels=…)`` of a PEFT-wrapped causal language model return the BA-LoRA loss.

    In training mode the model runs twice, first with its adapters off and without gradients (the teacher), then as it
    is; the loss is ``functional.linear_objective`` of the two last hidden states, the output has no logits, and the
    unweighted terms of the last forward lie in ``peft_model.balora_last``, detached. λ follows the schedules of
    ``config`` once ``set_progress`` (or ``trainer.BALoraCallback``) says how far training is; until then it is
    constant. In evaluation mode the forward is the model's own: plain cross-entropy, with logits.

    Args:
        peft_model: from ``get_pissa_model``, or any peft LoRA model whose base weights are the pre-trained ones. The
            output layer must be a plain linear map: no bias, scale, soft-cap or adapter, and not trained.
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
    if config.task != "nlg":
        raise ValueError(f"config: task={config.task!r} is not supported by attach so far; use balora.functional")
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
    head = _plain_head(base)
    _check_head(peft_model, base, head)

    base._balora = Attachment(config, head, base.__dict__.get("forward"))
    base.balora_last = None

    @functools.wraps(type(base).forward)  # the Trainer drops the columns that this signature does not name
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, *args, **kwargs)

    base.forward = types.MethodType(forward, base)
    return peft_model


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


def _plain_head(base: Any) -> LinearHead:
    config = base.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("peft_model: encoder-decoder models are not supported so far")
    layer = getattr(base, "get_output_embeddings", lambda: None)()
    if layer is None:
        raise ValueError(f"peft_model: {type(base).__name__} has no output embedding; expected a causal language model")
    if not isinstance(layer, nn.Linear) or isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
        raise ValueError(f"peft_model: expected a plain linear head, found {type(layer).__name__}")
    if layer.bias is not None:
        raise ValueError("peft_model: a head with a bias is not supported so far")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        value = getattr(config, name, None)
        if value is not None and value != 1:
            raise ValueError(f"peft_model: a head with {name}={value} is not supported so far")
    if getattr(config, "output_router_logits", False):
        raise ValueError("peft_model: the auxiliary loss of a mixture of experts is not supported so far")
    return LinearHead(layer.weight)


def _check_head(peft_model: peft.PeftModel, base: Any, head: LinearHead) -> None:
    """On a few tokens, hidden · weightᵀ must be the model's own logits: a head may do what its config does not tell."""
    if head.weight.device.type == "meta":
        return
    tokens = torch.arange(min(8, head.weight.shape[0]), device=head.weight.device)[None]  # [1, S]
    with torch.no_grad(), teacher(peft_model):
        logits = base(input_ids=tokens, use_cache=False).logits.float()
        hidden = base.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    error = (logits - hidden.float() @ head.weight.float().T).abs().max().item()
    allowed = 8 * torch.finfo(hidden.dtype).eps * logits.abs().max().item() + 1e-6
    if not error <= allowed:
        raise ValueError(
            f"peft_model: the logits of {type(base).__name__} are not hidden · weightᵀ (difference {error:.3g}, "
            f"allowed {allowed:.3g}); only plain linear heads are supported so far"
        )


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
    loss_arguments = {name: arguments.pop(name, None) for name in _LOSS_ARGUMENTS}
    if loss_arguments["ignore_index"] not in (None, IGNORE_INDEX):
        raise ValueError(f"ignore_index: expected {IGNORE_INDEX}, found {loss_arguments['ignore_index']}")
    if arguments.get("output_router_logits"):
        raise ValueError("output_router_logits: the auxiliary loss of a mixture of experts is not supported so far")
    as_tuple = arguments.pop("return_dict", None) is False
    # A cache would keep the keys and values of every layer alive, twice.
    arguments["use_cache"] = False

    config = _config_now(state)
    decoder = self.get_decoder()
    teacher_hidden = None
    if config.lambda_consistency != 0:
        with torch.no_grad(), teacher(self):
            teacher_hidden = decoder(**arguments).last_hidden_state
    outputs = decoder(**arguments)
    hidden = outputs.last_hidden_state  # [B, S, d]

    normalizer = loss_arguments["num_items_in_batch"]
    state.summed = normalizer is not None
    if normalizer is not None:
        normalizer = torch.as_tensor(normalizer, device=hidden.device).clamp_min(1)
    labels = _aligned(loss_arguments["labels"], loss_arguments["shift_labels"]).to(hidden.device)
    result = linear_objective(hidden, teacher_hidden, state.head, labels, config, normalizer=normalizer)
    # Detached: the loss of a kept result would keep the whole graph alive until the next step.
    self.balora_last = result._replace(loss=result.loss.detach())
    output = CausalLMOutputWithPast(
        loss=result.loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions
    )
    return output.to_tuple() if as_tuple else output


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
