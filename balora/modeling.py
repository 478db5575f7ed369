"""attach: a PEFT-wrapped model whose own ``forward(labels=…)`` returns the BA-LoRA loss in training.

Here the model is checked and its forward replaced; ``causal_lm``, ``encoder_decoder`` and ``sequence_classifier`` hold
what the forward of each kind of model computes.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import torch
from torch import nn

from . import causal_lm, encoder_decoder, four_bit, sequence_classifier
from .adapters import RESIDUAL_BASE, form_of, warn_of_rounding
from .attachment import Attachment, attachment, by_name, find
from .checks import IGNORE_INDEX
from .config import BALoraConfig
from .output_layer import Heads, decoder_of, difference, heads_of
from .sharding import check_weights_whole, partitioned, whole

# peft initializations that write to the base weights: with the adapters off, such a model is not the pre-trained one.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "orthogonal", "lora_ga")


def attach(peft_model: peft.PeftModel, config: BALoraConfig) -> peft.PeftModel:
    """Make ``forward(labels=…)`` of a PEFT-wrapped language model or sequence classifier return the BA-LoRA loss.

    In training mode the model runs twice, first as the pre-trained one and without gradients (the teacher), then as it
    is; the unweighted terms of the last forward lie in ``peft_model.balora_last``, detached. λ follows the schedules of
    ``config`` once ``set_progress`` (or ``trainer.BALoraCallback``) says how far training is; until then it is
    constant. In evaluation mode the forward is the model's own: its plain loss, with logits.

    **Causal language models and encoder-decoders** (``task="nlg"``): the loss is ``functional.linear_objective`` of the
    two last hidden states, over the tokens that are scored; the output has no logits. An encoder-decoder's labels are
    those of its decoder's positions, not shifted; its decoder_input_ids are made of them as the model makes them. The
    auxiliary loss of a mixture of experts is added to the returned loss where a causal model's own forward adds it.

    The head may have a bias, a scale, a soft-cap, a LoRA or offset adapter without dropout, or be trained itself
    (``modules_to_save``); a trained or adapted head has the pre-trained one as its teacher. It is compared with the
    model's own logits on a few tokens. Where it is something else, ``functional.logits_objective`` of the model's
    logits takes its place, which a warning says: it holds [tokens, vocabulary] tensors.

    **Sequence classifiers** (``task="nlu"``): the loss is ``functional.logits_objective`` of the class logits [M, C],
    or, with one label (``problem_type="regression"``), ``functional.regression_objective`` of the predictions, whose
    ``ce`` is the mean squared error; diversity and SVD are not defined then and left out, which a warning says. A head
    that is new has no pre-trained logits: the teacher is the pre-trained body under the head as it is now
    (``config.teacher_head="current"``) or was at the start (``"initial"``). The model's dropout is part of the student,
    not of the teacher, so that the KL is above 0 at the first step where the model has any.

    Args:
        peft_model: from ``get_pissa_model``, or any peft LoRA, rsLoRA or DoRA model whose base weights are the
            pre-trained ones.
        config: the objective.

    Returns:
        The same model.

    Raises:
        ValueError, TypeError: the model or the config does not fit; the model is then as it was.
    """
    _check(peft_model, config)
    base = peft_model.get_base_model()
    heads = None
    if config.task == "nlu":
        config = sequence_classifier.checked_config(base, config)
    elif getattr(base, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(
            f"peft_model: {type(base).__name__} has no output embedding; expected a causal language model or an "
            "encoder-decoder (a classifier needs a config with task='nlu')"
        )
    four_bit.prepare(base)
    warn_of_rounding(base)
    if not any(p.requires_grad for p in peft_model.parameters()):
        warnings.warn("peft_model: nothing in it is trained (from_pretrained has is_trainable for that)", stacklevel=2)
    if config.task == "nlg":
        heads = _known_heads(peft_model)
    base._balora = Attachment(config, heads, base.__dict__.get("forward"))
    base.balora_last = None
    if not _is_causal(base):
        # Else the Trainer gives num_items_in_batch to those alone whose forward takes any argument.
        base.accepts_loss_kwargs = True
    decoder = decoder_of(base)
    if decoder is not None:
        base._balora.watch = decoder.register_forward_pre_hook(types.MethodType(_bypassed, base))
    base._replicate_for_data_parallel = _no_data_parallel

    @torch.compiler.disable(recursive=False)
    @functools.wraps(type(base).forward)  # the Trainer drops the columns that this signature does not name
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._balora.inside = True
        try:
            return _forward(self, *args, **kwargs)
        finally:
            self._balora.inside = False

    base.forward = types.MethodType(forward, base)
    return peft_model


def _check(peft_model: Any, config: Any) -> None:
    """Raise unless the base weights of the model are those of the pre-trained one, and stay so."""
    if not isinstance(peft_model, peft.PeftModel):
        raise TypeError(f"peft_model: expected a peft.PeftModel, found {type(peft_model).__name__}")
    if not isinstance(config, BALoraConfig):
        raise TypeError(f"config: expected a BALoraConfig, found {type(config).__name__}")
    if find(peft_model) is not None:
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
    check_weights_whole(peft_model)
    base = peft_model.get_base_model()
    if base.main_input_name != "input_ids" and getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(
            f"peft_model: expected a model that reads text, {type(base).__name__} reads {base.main_input_name}"
        )
    if getattr(base.config, RESIDUAL_BASE, None) and not any(form_of(m) == "residual" for m in base.modules()):
        raise ValueError("peft_model: its base is W_res of balora.quantize; load both with balora.load_quantized")


def _known_heads(peft_model: peft.PeftModel) -> Heads | None:
    """The model's output layer as linear maps, or None, and a warning, where it is none."""
    base: Any = peft_model.get_base_model()
    with whole(base.get_output_embeddings().parameters()):
        found = heads_of(base)
    reason: str | None = None
    if isinstance(found, str):
        reason = found
    elif not any(map(partitioned, peft_model.parameters())):  # whose forward needs DeepSpeed's engine
        reason = difference(peft_model, found)
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
    base, state = attachment(peft_model)
    if state.previous is None:
        del base.forward
    else:
        base.forward = state.previous
    if state.watch is not None:
        state.watch.remove()
    base.__dict__.pop("accepts_loss_kwargs", None)
    del base._balora, base.balora_last, base._replicate_for_data_parallel


def _bypassed(self: Any, decoder: nn.Module, args: Any) -> None:
    """In front of every forward of the decoder: warn of a training loss that is not the attached forward's."""
    state: Attachment = self._balora
    if state.inside or not (self.training and torch.is_grad_enabled()):
        return
    warnings.warn(
        f"{type(self).__name__}: its decoder was called in training around forward(labels=…), so this loss is not that "
        "of balora.attach; a trainer with a loss of its own, as TRL's SFTTrainer, needs balora.trainer.BALoraMixin",
        stacklevel=2,
    )


def _no_data_parallel() -> Any:
    raise ValueError(
        "model: torch.nn.DataParallel does not work with an attached model (its copies would all run the forward of "
        "the first); start one process a GPU with torchrun or accelerate launch, or make one GPU visible with "
        "CUDA_VISIBLE_DEVICES"
    )


def _is_causal(base: Any) -> bool:
    return base._balora.config.task == "nlg" and not getattr(base.config, "is_encoder_decoder", False)


@torch.compiler.disable(recursive=False)
def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of an attached model. ``self`` is the transformers model inside the PeftModel."""
    state: Attachment = self._balora
    original = state.previous or functools.partial(type(self).forward, self)
    if not self.training:
        return original(*args, **kwargs) if _is_causal(self) else _evaluate(original, *args, **kwargs)
    arguments = by_name(type(self).forward, self, args, kwargs)
    if arguments.get("labels") is None and arguments.get("shift_labels") is None:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        raise ValueError(
            "labels: a model attached to BA-LoRA needs labels in training, found None (label smoothing and "
            "compute_loss_func take them out of the batch: leave them off)"
        )
    as_tuple = arguments.pop("return_dict", None) is False
    kind: Any = causal_lm if _is_causal(self) else encoder_decoder
    if state.config.task == "nlu":
        kind = sequence_classifier
    result, outputs = kind.training_forward(self, state, original, arguments)
    # Detached: the loss of a kept result would keep the whole graph alive until the next step.
    self.balora_last = result._replace(loss=result.loss.detach())
    return outputs.to_tuple() if as_tuple else outputs


def _evaluate(original: Callable[..., Any], *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
    """The model's own forward: its loss, a mean over these rows, times their share of all that the Trainer counts."""
    outputs = original(*args, **kwargs)
    labels = kwargs.get("labels")
    if num_items_in_batch is None or labels is None:
        return outputs
    share = (labels != IGNORE_INDEX).sum() / num_items_in_batch
    if isinstance(outputs, tuple):
        return (outputs[0] * share.to(outputs[0].device), *outputs[1:])
    return replace(outputs, loss=outputs.loss * share.to(outputs.loss.device))
