"""The training forward of an encoder-decoder: the objective of the decoder's tokens, whose labels are not shifted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attachment import Attachment, check_no_cache
from .causal_lm import from_logits, head_objective
from .checks import IGNORE_INDEX
from .config import BALoraConfig
from .functional import BALoraOutput
from .output_layer import run_to_head
from .pretrained import teacher


@torch.compiler.disable(recursive=False)  # of a compiled model its own forward is compiled
def training_forward(
    model: Any, state: Attachment, original: Callable[..., Any], arguments: dict[str, Any]
) -> tuple[BALoraOutput, Any]:
    """The objective, and the model's output with its loss in place and without logits.

    The adapters of the encoder are trained too, so student and teacher each encode the input: once.

    original: the model's own forward. arguments: those of the call, by name.

    Raises:
        ValueError: encoder_outputs are given, which cannot be the student's and the teacher's; or a loss of experts is
            asked for.
    """
    labels, normalizer = arguments.pop("labels"), arguments.pop("num_items_in_batch", None)
    config = state.config_now()
    check_no_cache(arguments, config)
    if arguments.get("encoder_outputs") is not None and config.lambda_consistency != 0:
        raise ValueError(
            "encoder_outputs: expected None in training, the pre-trained model encodes the input by itself; give "
            "input_ids, or leave the consistency term out (lambda_consistency=0)"
        )
    if arguments.get("output_router_logits") or getattr(model.config, "output_router_logits", False):
        raise ValueError(
            "output_router_logits: the auxiliary loss of experts is not added for encoder-decoders; leave it off"
        )
    if arguments.get("decoder_input_ids") is None and arguments.get("decoder_inputs_embeds") is None:
        arguments["decoder_input_ids"] = _decoder_inputs(model, labels)
    # A cache would keep the keys and values of every layer alive, twice.
    arguments["use_cache"] = False
    arguments["return_dict"] = True

    state.summed = normalizer is not None
    run = from_logits if state.heads is None else _from_hidden
    result, outputs = run(model, original, arguments, labels, normalizer, config)
    return result, replace(outputs, loss=result.loss, logits=None)


@torch.compiler.disable(recursive=False)
def _from_hidden(
    model: Any,
    original: Callable[..., Any],
    arguments: dict[str, Any],
    labels: Tensor,
    normalizer: Any,
    config: BALoraConfig,
) -> tuple[BALoraOutput, Any]:
    """The objective by the head, and the outputs of the student's forward."""
    teacher_hidden = None
    if config.lambda_consistency != 0:
        with torch.no_grad(), teacher(model):
            teacher_hidden = run_to_head(model, original, arguments)[0]
    hidden, outputs = run_to_head(model, original, arguments)
    return head_objective(model, hidden, teacher_hidden, labels, normalizer, config), outputs


def _decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """The tokens that the decoder reads: its start token, and the labels but the last, as the model makes them."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    config = model.config
    if config.decoder_start_token_id is None or config.pad_token_id is None:
        raise ValueError(
            f"decoder_input_ids: {type(model).__name__} has no decoder_start_token_id or pad_token_id to make them "
            "of the labels; give them"
        )
    shifted = F.pad(labels[..., :-1], (1, 0), value=config.decoder_start_token_id)
    return shifted.masked_fill(shifted == IGNORE_INDEX, config.pad_token_id)
