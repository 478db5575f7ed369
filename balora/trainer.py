"""BA-LoRA under Hugging Face's Trainer and trainers built on it: progress for the schedules, every term in the logs.

What becomes of the terms when a step has several micro-batches or processes:

- The token sums (cross-entropy, consistency, diversity) of a step are divided by the step's number of trained tokens,
  ``num_items_in_batch``, which the Trainer counts over the micro-batches and, with ``average_tokens_across_devices``
  (the default), over the processes: a step is the same whatever it is split into. Without that option each process
  divides by its own tokens, and the processes are averaged.
- The SVD term is a ratio of singular values and belongs to the micro-batch: that of a whole step is never computed.
  Each micro-batch has its own, weighted by its share of the step's trained tokens, so that the weights add up to 1 over
  micro-batches and processes. Smaller micro-batches are another, noisier objective: choose the micro-batch as large as
  memory allows.
- Loops that do not pass ``num_items_in_batch`` divide every micro-batch by its own tokens; if they then average over
  the micro-batches, the terms of each, its SVD term too, have the same weight.

Trainers of preferences or rewards (DPO, GRPO, …) have no labels that this objective could use: out of scope.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from .adapters import (
    ADAPTER,
    check_alike,
    form_of,
    restore_frozen_factors,
    shard_frozen_factors,
    warn_of_rounding,
)
from .attachment import attachment, set_progress
from .functional import BALoraOutput
from .sharding import check_engine

_TERMS = ("ce", "consistency", "diversity", "svd")

_CARD = """---
library_name: peft
---
# A training checkpoint, for resuming only
Loaded by peft alone these adapters make a wrong model, because balora trains them beside their frozen start.
`balora export RUN OUT` makes the LoRA that loads without balora, and `balora.export_lora` that of a model in memory.
"""


class BALoraCallback(TrainerCallback):
    """Tells an attached model how far training is, and adds its loss terms and λ to the logs. Raises when training
    begins where the processes have different frozen factors A₀ and B₀.

    Logged beside ``loss``: ce, consistency, diversity and svd (unweighted, means over the optimizer steps since the
    last log, and over the processes; a term whose λ is 0 is left out) and lambda_consistency, lambda_diversity,
    lambda_svd (those of the last step). The terms stay on the device until a log, so a step costs no host
    synchronization and no communication.

    Reporting callbacks that come before this one in the Trainer's list do not see what it adds: use ``BALoraMixin``,
    which puts it first.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._step: dict[str, torch.Tensor] = {}  # sums over the micro-batches of the running step
        self._micro_batches = 0
        self._checked = False  # that every trained tensor gets a gradient
        self._since_log: dict[str, tuple[torch.Tensor, int]] = {}  # sums over steps, number of steps

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._begin()  # an earlier run may have ended between two logs, or within a step
        check_engine(model)
        base: Any = attachment(model)[0]
        base.balora_last = None  # of an earlier run
        if args.world_size > 1:
            check_alike(model, args.device)
        if args.deepspeed_plugin is None:  # whose optimizer has the float32 weights
            warn_of_rounding(model)
        self.on_step_begin(args, state, control, model=model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        # A run may be resumed with fewer steps than it has had.
        set_progress(model, min(state.global_step, state.max_steps), state.max_steps)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        last = _last(model)
        self._micro_batches += 1
        for name in _TERMS:
            value = getattr(last, name)
            if value is not None:
                self._step[name] = self._step[name] + value if name in self._step else value

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        _last(model)  # before the weights change
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


def _last(model: Any) -> BALoraOutput:
    last: Any = attachment(model)[0].balora_last
    if last is None:
        raise ValueError(
            "model: the forward that balora.attach set was not called; something has replaced it since "
            "(use_liger_kernel does), or the trainer has a loss of its own (TRL's has: put BALoraMixin in front of it)"
        )
    return last


class BALoraMixin:
    """For a Trainer class: ``class MySFTTrainer(BALoraMixin, SFTTrainer)`` trains the loss of an attached model.

    In training the loss is what the attached forward returns, as Hugging Face's Trainer takes it, whatever
    ``compute_loss`` the class has; ``BALoraCallback`` stands in front of every reporter; adapters keep their type.
    Evaluation is the class's own. DDP sends the buffers, A₀ and B₀ among them, once and not before every forward,
    unless ``ddp_broadcast_buffers`` asks for it. FSDP2 shards A₀ and B₀, and gathers the adapters of a bfloat16 base
    in float32, so that layers see all that changes of them: Accelerate's policy for bf16 gives way to that.

    TRL's SFTTrainer (tried: 0.27, 1.0, 1.8 and 1.16) makes its loss around the model's forward. What follows for it:

    - masks of prompts, completions and assistants, packing and padding_free are in the labels and positions: they work.
      The micro-batch of the SVD term is then the packed row.
    - mean_token_accuracy, entropy and num_tokens are not logged in training: they are by-products of its own loss.
      Evaluation logs them.
    - other values of loss_type raise, as do label smoothing and compute_loss_func, which take the labels away.
    - an adapter on the head is refused by SFTTrainer itself, and so is ``peft_config`` beside an attached model.

    Raises:
        ValueError: loss_type is none that the attached loss stands for.
    """

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
        trained = [(p, p.data) for p in parameters if p.requires_grad]
        super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]
        loss_type = getattr(self.args, "loss_type", None)  # type: ignore[attr-defined]
        if loss_type not in (None, "nll"):
            raise ValueError(f"loss_type: expected 'nll' (the loss is that of the attached model), found {loss_type!r}")
        for p, data in trained:
            if p.dtype != data.dtype:  # TRL rounds adapters on a 4-bit model: they would not start as their teacher
                p.data = data.to(p.device)
        self._prepare_for_fsdp2()
        self.callback_handler.callbacks.insert(0, BALoraCallback())  # type: ignore[attr-defined]

    def _prepare_for_fsdp2(self) -> None:
        """Before Accelerate shards the model: A₀ and B₀ are sharded too, and A and B are gathered as they are stored.

        Accelerate's policy for bf16 gathers A and B in that, which hides what has changed of them by less than half a
        step of it. Layers of the offset form multiply bfloat16 inputs in bfloat16, whatever A and B have; where
        anything else is trained, or the base is not in bfloat16, the policy stays.
        """
        args, model = self.args, self.model  # type: ignore[attr-defined]
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)  # type: ignore[attr-defined]
        if getattr(plugin, "fsdp_version", 1) != 2:
            return
        if args.world_size > 1:
            check_alike(model, args.device)
        shard_frozen_factors(model)
        # Of two trainers with the same arguments the second must not find what the first has left.
        policy = vars(plugin).setdefault("_policy_of_accelerate", plugin.mixed_precision_policy)
        layers: Any = [m for m in model.modules() if form_of(m) == "offset"]
        own = {p for m in layers for p in (m.lora_A[ADAPTER].weight, m.lora_B[ADAPTER].weight)}
        alone = all(p in own for p in model.parameters() if p.requires_grad)
        types = {p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad}
        bf16 = policy is not None and policy.param_dtype == torch.bfloat16 and types == {torch.bfloat16}
        plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32) if bf16 and alone else policy

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        restore_frozen_factors(self.model, resume_from_checkpoint)  # type: ignore[attr-defined]

    def compute_loss(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In training ``Trainer.compute_loss``, which asks the model; in evaluation that of the class."""
        if isinstance(model, DistributedDataParallel) and not self.args.ddp_broadcast_buffers:  # type: ignore[attr-defined]
            model.broadcast_buffers = False  # asked for beforehand, they would not be sent at the start either
        if model.training:
            return Trainer.compute_loss(self, model, *args, **kwargs)
        return super().compute_loss(model, *args, **kwargs)  # type: ignore[misc]


class BALoraTrainer(BALoraMixin, Trainer):
    """Hugging Face's Trainer for an attached model. Its checkpoints hold the model's config.json too."""

    report: Any = None  # the ReportCallback of ``balora train``
    recipe: str | None = None  # what ``balora train`` keeps in every checkpoint, for when it goes on

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; what base the adapters are for, and the classes, are then known without loading it."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            model: Any = self.accelerator.unwrap_model(self.model)
            folder = Path(str(output_dir or self.args.output_dir))
            model.config.save_pretrained(folder)
            if any(form_of(m) for m in model.modules()):
                (folder / "README.md").write_text(_CARD, encoding="utf-8")  # in place of peft's, which says how to load
            if self.recipe is not None:
                (folder / "recipe.yaml").write_text(self.recipe, encoding="utf-8")
