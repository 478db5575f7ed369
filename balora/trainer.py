"""BA-LoRA under Hugging Face's Trainer: progress for the schedules, and every term in the logs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from .modeling import attachment, set_progress

_TERMS = ("ce", "consistency", "diversity", "svd")


class BALoraCallback(TrainerCallback):
    """Tells an attached model how far training is, and adds its loss terms and λ to the logs.

    Logged beside ``loss``: ce, consistency, diversity and svd (unweighted, means over the optimizer steps since the
    last log, and over the processes; a term whose λ is 0 is left out) and lambda_consistency, lambda_diversity,
    lambda_svd (those of the last step). The terms stay on the device until a log, so a step costs no host
    synchronization and no communication.

    Reporting callbacks that come before this one in the Trainer's list do not see what it adds: use ``BALoraMixin``,
    which puts it first.
    """

    def __init__(self) -> None:
        self._step: dict[str, torch.Tensor] = {}  # sums over the micro-batches of the running step
        self._micro_batches = 0
        self._checked = False  # that every trained tensor gets a gradient
        self._since_log: dict[str, tuple[torch.Tensor, int]] = {}  # sums over steps, number of steps

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        set_progress(model, state.global_step, state.max_steps)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        set_progress(model, state.global_step, state.max_steps)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        last = attachment(model)[0].balora_last
        if last is None:
            raise ValueError(
                "model: the forward that balora.attach set was not called; something has replaced it since "
                "(use_liger_kernel does), or the trainer has a loss of its own"
            )
        self._micro_batches += 1
        for name in _TERMS:
            value = getattr(last, name)
            if value is not None:
                self._step[name] = self._step[name] + value if name in self._step else value

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self._checked or args.deepspeed_plugin is not None:  # whose engine keeps the gradients elsewhere
            return
        self._checked = True
        idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        if idle:
            warnings.warn(
                f"{len(idle)} trained tensors got no gradient, {idle[0]} first: nothing that the loss depends on calls "
                "their layers, leave them out of target_modules",
                stacklevel=2,
            )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.on_substep_end(args, state, control, model=model)
        # Terms divided by the tokens of all micro-batches add up; means over a micro-batch are averaged.
        share = 1 if attachment(model)[1].summed else self._micro_batches
        for name, value in self._step.items():
            total, steps = self._since_log.get(name, (torch.zeros_like(value), 0))
            self._since_log[name] = (total + value / share, steps + 1)
        self._step, self._micro_batches = {}, 0

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        added: dict[str, float] = {}
        if self._since_log:
            means = torch.stack([total / steps for total, steps in self._since_log.values()])
            if args.world_size > 1:
                torch.distributed.all_reduce(means)
                # Terms divided by the tokens of all processes add up; others are each process's own means.
                if not (attachment(model)[1].summed and args.average_tokens_across_devices):
                    means /= args.world_size
            added.update(zip(self._since_log, means.tolist(), strict=True))
        names = ("lambda_consistency", "lambda_diversity", "lambda_svd")
        added.update(zip(names, attachment(model)[1].lambdas, strict=True))
        self._since_log = {}
        logs.update(added)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(added)


class BALoraMixin:
    """For a Trainer class: ``class MyTrainer(BALoraMixin, Trainer)`` has the callback in front of every reporter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.callback_handler.callbacks.insert(0, BALoraCallback())  # type: ignore[attr-defined]


class BALoraTrainer(BALoraMixin, Trainer):
    """Hugging Face's Trainer for an attached model."""

    report: Any = None  # the ReportCallback of ``balora train``
