"""The training forward of a sequence classifier: the objective of its class logits, or of its one prediction."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .attachment import Attachment, at_least_one, check_no_cache
from .config import BALoraConfig
from .functional import BALoraOutput, logits_objective, regression_objective
from .pretrained import head_modules, teacher


def checked_config(model: Any, config: BALoraConfig) -> BALoraConfig:
    """The configuration that this classifier can be trained with: a regression has no diversity and no SVD term.

    Raises:
        ValueError: it is no sequence classifier, or of a kind that the objective is not defined for.
    """
    name, problem, outputs = type(model).__name__, model.config.problem_type, model.config.num_labels
    if not name.endswith("ForSequenceClassification"):
        raise ValueError(f"config: task='nlu' expects a sequence classifier, found {name}")
    if problem == "multi_label_classification":
        raise ValueError(
            "peft_model: expected problem_type 'single_label_classification' or 'regression', found 'multi_label_"
            "classification'; the objective is not defined for labels that are not exclusive"
        )
    if problem == "regression" and outputs != 1:
        raise ValueError(f"peft_model: expected num_labels=1 with problem_type='regression', found {outputs}")
    if problem == "single_label_classification" and outputs < 2:
        raise ValueError(f"peft_model: expected num_labels of at least 2 for classification, found {outputs}")

    for part in head_modules(model):
        if not any(p.requires_grad for p in getattr(model, part).parameters()):
            warnings.warn(
                f"{name}: {part}, a part of its head, is not trained; if the checkpoint did not have it, it stays "
                f"random: name it in modules_to_save (balora.get_pissa_model does)",
                stacklevel=3,
            )
    if outputs > 1 and config.lambda_diversity and config.diversity != "covariance":
        warnings.warn(
            f"config: task='nlu' with diversity={config.diversity!r}, which is that of generation; the published "
            'terms of classifiers are BALoraConfig.preset("nlu_2025")',
            stacklevel=3,
        )
    if outputs == 1 and (config.lambda_diversity or config.lambda_svd):
        warnings.warn(
            f"{name}: a regression has one output, of which the diversity and SVD terms are not defined; they are "
            "left out",
            stacklevel=3,
        )
        config = replace(config, lambda_diversity=0.0, lambda_svd=0.0)
    return config


@torch.compiler.disable(recursive=False)  # of a compiled model its own forward is compiled
def training_forward(
    model: Any, state: Attachment, original: Callable[..., Any], arguments: dict[str, Any]
) -> tuple[BALoraOutput, Any]:
    """The objective, and the model's output with its loss in place, and with its logits.

    original: the model's own forward. arguments: those of the call, by name.
    """
    labels, normalizer = arguments.pop("labels"), arguments.pop("num_items_in_batch", None)
    if "use_cache" in inspect.signature(type(model).forward).parameters:
        arguments["use_cache"] = False  # a decoder's would keep the keys and values of every layer alive, twice
    arguments["return_dict"] = True

    config = state.config_now()
    check_no_cache(arguments, config)
    state.summed = normalizer is not None
    teacher_logits = None
    if config.lambda_consistency != 0:
        with torch.no_grad(), teacher(model, head=config.teacher_head):
            teacher_logits = original(**arguments).logits
    outputs = original(**arguments)
    logits = outputs.logits  # [M, C]
    labels = labels.to(logits.device)
    if labels.shape == (len(logits), 1):
        labels = labels[:, 0]
    objective = regression_objective if model.config.num_labels == 1 else logits_objective
    result = objective(logits, teacher_logits, labels, config, at_least_one(normalizer, logits.device))
    return result, replace(outputs, loss=result.loss)
