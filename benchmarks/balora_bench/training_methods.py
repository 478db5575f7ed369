"""One method's training steps, in a process of its own: what ``training_cost`` measures.

A step for every line on stdin, and a JSON object a step on stdout, so that several methods can take turns.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import balora
from balora.targets import default_targets
from balora.trainer import BALoraTrainer

from . import harness

METHODS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "pissa": "PiSSA",
    "published": "BA-LoRA as published",
    "balora": "BA-LoRA with balora",
}
PARTS = ("teacher", "student", "loss", "backward", "rest")
PART_STEPS = 3
ALL_TERMS = balora.BALoraConfig(consistency_schedule="constant", focus_schedule="constant")

# Public configurations, for models of random weights.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": dict(
        model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5,
    ),
    "llama-3-8b": dict(
        model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, rms_norm_eps=1e-5,
    ),
    "gemma-2-2b": dict(
        model_type="gemma2", hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, vocab_size=256000, max_position_embeddings=8192, tie_word_embeddings=True,
        final_logit_softcapping=30.0, attn_logit_softcapping=50.0,
    ),
}  # fmt: skip


def steps_of(spec: dict[str, Any]) -> int:
    return spec["warm_up"] + spec["steps"] + PART_STEPS + 1  # the last one counts operations


def child(spec: dict[str, Any]) -> None:
    """Set up, then a step for every line on stdin, and a JSON object a step on stdout."""
    torch.manual_seed(0)
    model, teacher = build(spec)
    rows = json.loads(Path(spec["rows"]).read_text())
    first_parts = spec["warm_up"] + spec["steps"]
    parts = Parts()
    operations: list[int] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                harness.reset_peak()
            if state.global_step == first_parts:
                parts.attach(trainer.model, teacher, trainer.accelerator)
            if state.global_step == state.max_steps - 1:
                trainer.training_step = counted(trainer.training_step, operations)
            say({"ready": state.global_step})
            sys.stdin.readline()
            harness.synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            harness.synchronize()
            self.seconds = time.perf_counter() - self.start

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" not in logs:
                return
            found: dict[str, Any] = {"seconds": self.seconds, "loss": float(logs["loss"]), "peak": harness.peak()}
            if state.global_step == state.max_steps:
                found["operations"] = sum(operations)
            elif state.global_step > first_parts:
                found["parts"] = parts.of_step(self.seconds)
            say(found)
            if state.global_step == state.max_steps:
                sys.stdin.readline()  # what follows would disturb the steps of the others

    class CostTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if teacher is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            with torch.no_grad():
                teacher_logits = teacher(**{k: v for k, v in inputs.items() if k != "labels"}).logits
            outputs = model(**inputs)
            return published_loss(outputs.loss, outputs.logits, teacher_logits, inputs["labels"])

    arguments = TrainingArguments(
        spec["scratch"],
        per_device_train_batch_size=spec["batch"],
        max_steps=steps_of(spec),
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        bf16=spec["dtype"] == "bfloat16",
        gradient_checkpointing=spec["checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=harness.DEVICE == "cpu",
    )
    trainer_class = BALoraTrainer if spec["method"] == "balora" else CostTrainer
    examples = [{"input_ids": row, "labels": row} for row in rows]
    trainer = trainer_class(model, arguments, train_dataset=examples, callbacks=[Steps()])
    trainer.train()


def say(message: dict) -> None:
    print(json.dumps(message), file=CHANNEL, flush=True)


def build(spec: dict[str, Any]):
    """The model of a method, and the published method's second model."""
    method, r = spec["method"], spec["r"]
    model: Any = load(spec)
    model.config.use_cache = False
    if method == "full":
        return model, None
    if method == "balora":
        model = balora.get_pissa_model(model, r=r, lora_alpha=r, task_type="CAUSAL_LM")
        return balora.attach(model, ALL_TERMS), None
    config = peft.LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=default_targets(model),
        task_type="CAUSAL_LM",
        init_lora_weights=True if method == "lora" else "pissa_niter_4",
    )
    model = peft.get_peft_model(model, config)
    if method != "published":
        return model, None
    return model, load(spec).eval().requires_grad_(False).to(harness.DEVICE)


def published_loss(ce: Tensor, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """CE + λ₁·L_CR + λ₂·L_DR + λ₃·L_SVD (2025 paper) as its text has them, every [N, V] tensor materialized."""
    config = ALL_TERMS
    valid = labels[:, 1:] != -100
    z, z_teacher = logits[:, :-1][valid].float(), teacher_logits[:, :-1][valid].float()  # [N, V]
    t = config.temperature
    kl = F.kl_div(F.log_softmax(z / t, -1), F.softmax(z_teacher / t, -1), reduction="batchmean") * t**2
    q = F.softmax(z.topk(config.entropy_top_k, -1).values, -1)
    diversity = (q * torch.log(q + 1e-12)).sum(-1).mean()
    sigma = torch.svd_lowrank(z, q=15, niter=2)[1]
    svd = -sigma[: int(config.svd_rank)].sum() / torch.linalg.matrix_norm(z)
    return ce + config.lambda_consistency * kl + config.lambda_diversity * diversity + config.lambda_svd * svd


def load(spec: dict[str, Any]) -> nn.Module:
    dtype, folder = getattr(torch, spec["dtype"]), Path(spec["model"])
    if any(folder.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    torch.manual_seed(0)
    with torch.device(harness.DEVICE):
        return AutoModelForCausalLM.from_config(config_of(spec["model"]), dtype=dtype)


def config_of(model: str) -> PreTrainedConfig:
    if model in SHAPES:
        return AutoConfig.for_model(**SHAPES[model])
    return AutoConfig.from_pretrained(model, local_files_only=True)


def counted(step: Callable[..., Any], operations: list[int]) -> Callable[..., Any]:
    """The training step, adding the floating-point operations of its products, forward and backward, to the list."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = step(*args, **kwargs)
        operations.append(counter.get_total_flops())
        return result

    return run


class Parts:
    """Where a step's time goes: hooks around the decoder, the backward and the gradient of the last hidden state."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}

    def attach(self, model: Any, teacher: nn.Module | None, accelerator: Any) -> None:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        decoder = base.get_decoder()
        decoder.register_forward_pre_hook(lambda *_: self.mark("in" if torch.is_grad_enabled() else "teacher in"))
        decoder.register_forward_hook(self._out)
        if teacher is not None:
            teacher.register_forward_pre_hook(lambda *_: self.mark("teacher in"))
            teacher.register_forward_hook(lambda *_: self.mark("teacher out"))
        backward = accelerator.backward

        def timed(loss: Tensor, **kwargs: Any) -> None:
            backward(loss, **kwargs)
            self.mark("end")

        accelerator.backward = timed

    def mark(self, name: str) -> None:
        harness.synchronize()
        self.at[name] = time.perf_counter()

    def _out(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not torch.is_grad_enabled():
            return self.mark("teacher out")
        output.last_hidden_state.register_hook(lambda grad: self.mark("hidden"))
        return self.mark("out")

    def of_step(self, seconds: float) -> dict[str, float]:
        at = self.at
        found = {
            "teacher": at.get("teacher out", 0.0) - at.get("teacher in", 0.0),
            "student": at["out"] - at["in"],
            "loss": at["hidden"] - at["out"],
            "backward": at["end"] - at["hidden"],
        }
        return found | {"rest": seconds - sum(found.values())}


if __name__ == "__main__":
    CHANNEL = sys.stdout
    sys.stdout = sys.stderr  # for what libraries print
    child(json.loads(sys.argv[1]))
