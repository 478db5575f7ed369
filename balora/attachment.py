"""What attach keeps on a model, where to find it, and what the forwards of all kinds of models share."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .checks import check_whole
from .config import BALoraConfig
from .output_layer import Heads


@dataclass
class Attachment:
    """What ``attach`` keeps on the model, as ``_balora``."""

    config: BALoraConfig
    heads: Heads | None  # None: the loss is computed from the model's logits
    previous: Callable[..., Any] | None  # the forward that was set on the instance, None where it was the class's
    watch: RemovableHandle | None = None  # on the decoder: notices a loss that is made around the attached forward
    inside: bool = False  # the attached forward is running
    progress: tuple[int, int] | None = None
    lambdas: tuple[float, float, float] = (0.0, 0.0, 0.0)  # those of the last training forward
    summed: bool = False  # the last terms were divided by the tokens of all micro-batches, so they add up

    @torch.compiler.disable  # λ is another number in every step
    def config_now(self) -> BALoraConfig:
        """The configuration with λ as the schedules have it at this step."""
        config = self.config
        self.lambdas = (config.lambda_consistency, config.lambda_diversity, config.lambda_svd)
        if self.progress is not None:
            self.lambdas = config.lambdas(*self.progress)
        elif (config.consistency_schedule, config.focus_schedule) != ("constant", "constant"):
            # Python shows a warning once for each place in the code.
            warnings.warn(
                "the λ schedules need to know how far training is: until balora.set_progress or "
                "balora.trainer.BALoraCallback tells, λ is constant",
                stacklevel=5,
            )
        consistency, diversity, svd = self.lambdas
        return replace(config, lambda_consistency=consistency, lambda_diversity=diversity, lambda_svd=svd)


def find(model: nn.Module) -> Any:
    """The attached model inside ``model``, or None."""
    return next((m for m in model.modules() if "_balora" in m.__dict__), None)


def attachment(model: nn.Module) -> tuple[Any, Attachment]:
    """The attached base model inside ``model`` (which DDP or torch.compile may have wrapped) and its attachment.

    Raises:
        ValueError: there is none.
    """
    base = find(model)
    if base is None:
        raise ValueError("peft_model: it is not attached; call balora.attach(peft_model, config) first")
    return base, base._balora


def set_progress(peft_model: nn.Module, step: int, max_steps: int) -> None:
    """Tell an attached model that optimizer step ``step`` (0 to ``max_steps``) is next, for the schedules of λ."""
    _, state = attachment(peft_model)
    check_whole("step", step, least=0)
    check_whole("max_steps", max_steps)
    if step > max_steps:
        raise ValueError(f"step: expected at most max_steps, which is {max_steps}, found {step}")
    state.progress = (step, max_steps)


@torch.compiler.disable
def by_name(function: Callable[..., Any], self: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those of ``**kwargs`` among them."""
    signature = inspect.signature(function)
    arguments = dict(signature.bind(self, *args, **kwargs).arguments)
    arguments.pop(next(iter(signature.parameters)))
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments


def check_no_cache(arguments: dict[str, Any], config: BALoraConfig) -> None:
    """Raise where the teacher's pass would add its keys and values to a cache that the student then reads."""
    if arguments.get("past_key_values") is not None and config.lambda_consistency != 0:
        raise ValueError(
            f"past_key_values: expected none in training with lambda_consistency={config.lambda_consistency}, whose "
            f"teacher would share them; found {type(arguments['past_key_values']).__name__}"
        )


def at_least_one(normalizer: Any, device: torch.device) -> Tensor | None:
    """The number of items in the batch as the objective takes it; of an empty batch 1."""
    return None if normalizer is None else torch.as_tensor(normalizer, device=device).clamp_min(1)
