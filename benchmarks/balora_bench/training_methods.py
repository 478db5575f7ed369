"""One method's training steps, in a process of its own: what ``training_cost`` measures.

A step for every line on stdin, and a JSON object a step on stdout, so that several methods can take turns.
In it are the loss and, of BA-LoRA, the unweighted terms.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Size, Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
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
from balora.attachment import attachment
from balora.targets import default_targets
from balora.trainer import BALoraTrainer

from . import harness, published

METHODS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "pissa": "PiSSA",
    "published": "BA-LoRA as published",
    "balora": "BA-LoRA with balora",
}
PARTS = ("teacher", "student", "loss", "backward", "rest")
PART_STEPS = 2
TERMS = ("ce", "consistency", "diversity", "svd")
CHECKED = 64  # tokens on which balora's terms are held against balora.reference, after the last step
_TILE = 2**24  # logits that are held in float64 at a time
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
    parts, device = Parts(), DeviceTime()
    profiled = first_parts + PART_STEPS if harness.ON_GPU else 0  # the last of those steps; it has no parts then
    operations: list[int] = []
    terms: dict[str, Tensor] = {}  # of the published method's last step

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                harness.reset_peak()
            if state.global_step == first_parts:
                parts.attach(trainer.model, teacher, trainer.accelerator)
            if state.global_step == state.max_steps - 1:
                trainer.training_step = counted(trainer.training_step, operations)
            say({"ready": state.global_step})
            wait()
            harness.synchronize()
            if state.global_step + 1 == profiled:
                device.begin()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            harness.synchronize()
            self.seconds = time.perf_counter() - self.start
            if state.global_step == profiled:
                device.end()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" not in logs:
                return
            found: dict[str, Any] = {"seconds": self.seconds, "loss": float(logs["loss"]), "peak": harness.peak()}
            values = logs if spec["method"] == "balora" else terms
            found["terms"] = {name: float(values[name]) for name in TERMS if name in values}
            if state.global_step == state.max_steps:
                found["operations"] = operations[0] if operations else None
                if spec["method"] == "balora":
                    try:
                        with trainer.accelerator.autocast():
                            found["reference"] = against_reference(trainer.model, rows[0])
                            found["exact"] = against_exact(trainer.model, rows[: spec["batch"]])
                    except Exception as error:  # the row is refused; what was measured is not lost with it
                        found["unchecked"] = f"{type(error).__name__}: {str(error)[:160]}"
            elif state.global_step == profiled:
                found["device_seconds"] = device.seconds
            elif state.global_step > first_parts:
                found["parts"] = parts.of_step(self.seconds)
            say(found)
            if state.global_step == state.max_steps:
                wait()  # what follows would disturb the steps of the others

    class CostTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if teacher is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            with torch.no_grad():
                teacher_logits = teacher(**{k: v for k, v in inputs.items() if k != "labels"}).logits
            outputs = model(**inputs)
            found = published_terms(outputs.loss, outputs.logits, teacher_logits, inputs["labels"])
            terms.update((name, value.detach()) for name, value in found.items())
            return weighted(found)

    arguments = TrainingArguments(
        spec["scratch"],
        per_device_train_batch_size=spec["batch"],
        max_steps=steps_of(spec),
        # Takes the KL from 0 to some hundredths of a nat in a few steps. With ten times as much it is above a nat, and
        # rounding sends two runs of the same objective apart.
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        bf16=spec["dtype"] == "bfloat16",
        gradient_checkpointing=spec["checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        logging_nan_inf_filter=False,  # else a loss of NaN is logged as the mean of those before it
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


def wait() -> None:
    """Until the parent wants something; the end where it has closed the pipe."""
    if not sys.stdin.readline():
        sys.exit()


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
    return weighted(published_terms(ce, logits, teacher_logits, labels))


def weighted(terms: dict[str, Any]) -> Any:
    focus = ALL_TERMS.lambda_diversity * terms["diversity"] + ALL_TERMS.lambda_svd * terms["svd"]
    return terms["ce"] + ALL_TERMS.lambda_consistency * terms["consistency"] + focus


def published_terms(ce: Tensor, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """CE and L_CR, L_DR, L_SVD without their λ."""
    config = ALL_TERMS
    valid = labels[:, 1:] != -100
    z, z_teacher = (published.widened(full[:, :-1][valid]) for full in (logits, teacher_logits))  # [N, V]
    return {
        "ce": ce,
        "consistency": published.consistency(z, z_teacher, config.temperature),
        "diversity": published.diversity(z, config.entropy_top_k),
        "svd": published.svd(z, int(config.svd_rank)),
    }


def against_reference(model: Any, row: list[int]) -> list[dict[str, float]]:
    """The terms of the first tokens of a row under the model as it is, with balora and with ``balora.reference``."""
    ids = torch.tensor([row[: CHECKED + 1]], device=harness.DEVICE)
    found = []
    for impl in ("", "reference"):
        os.environ["BALORA_IMPL"] = impl
        with torch.no_grad():
            model(input_ids=ids, labels=ids)
        last = attachment(model)[0].balora_last
        found.append({name: getattr(last, name).item() for name in TERMS})
    return found


def against_exact(model: Any, rows: list[list[int]]) -> list[dict[str, float]]:
    """The SVD term of a whole step's tokens under the model as it is, with balora and from all eigenvalues."""
    ids = torch.tensor(rows, device=harness.DEVICE)
    os.environ["BALORA_IMPL"] = ""
    model(input_ids=ids, labels=ids)  # with gradients, as in training
    ours = attachment(model)[0].balora_last.svd.item()
    base = model.get_base_model()
    with torch.no_grad():
        hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    head, cap = base.get_output_embeddings(), getattr(base.config.get_text_config(), "final_logit_softcapping", None)
    return [{"svd": ours}, {"svd": exact_svd(hidden, head.weight, head.bias, cap, int(ALL_TERMS.svd_rank))}]


@torch.no_grad()
def exact_svd(hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None, rank: int) -> float:
    """−Σ_{i≤k} σ_i / ‖Z‖_F of Z = hidden·weightᵀ + bias, soft-capped: from ZZᵀ [N, N] in float64, tile by tile."""
    hidden = hidden.double()
    gram = hidden.new_zeros(len(hidden), len(hidden))
    step = max(1, _TILE // max(hidden.shape))
    for start in range(0, len(weight), step):
        z = hidden @ weight[start : start + step].double().T
        if bias is not None:
            z += bias[start : start + step].double()
        if cap:
            z = cap * torch.tanh(z / cap)
        gram.addmm_(z, z.T)
    sigma = torch.linalg.eigvalsh(gram)[-rank:].clamp_min(0).sqrt()
    return -(sigma.sum() / gram.trace().sqrt()).item()


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
    aten = torch.ops.aten

    def run(*args: Any, **kwargs: Any) -> Any:
        formulas = {aten.mm: product, aten.bmm: product, aten.addmm: added_product}
        for kind in ("flash", "efficient", "cudnn"):
            formulas[getattr(aten, f"_scaled_dot_product_{kind}_attention")] = attention
            formulas[getattr(aten, f"_scaled_dot_product_{kind}_attention_backward")] = attention_backward
        try:
            with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
                result = step(*args, **kwargs)
        except Exception:  # of the counting, for the step itself has run before; the timings must not be lost with it
            traceback.print_exc()
            return step(*args, **kwargs)
        operations.append(counter.get_total_flops())
        return result

    return run


def product(a: Size, b: Size, *args: Any, **kwargs: Any) -> int:
    """Operations of [..., m, k] times [..., k, n]. torch's own formula takes a type of the result, as ``mm.dtype_out``
    and its like have it, for a shape."""
    return 2 * math.prod(a) * b[-1]


def attention(q: Size, k: Size, v: Size, *args: Any, **kwargs: Any) -> int:
    """Operations of the two products of q [B, heads, S, d]. torch's own formula wants as many heads of k and v, of
    which grouped-query attention has fewer."""
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


def attention_backward(grad: Size, q: Size, k: Size, v: Size, *args: Any, **kwargs: Any) -> int:
    """Five products: the scores anew, and the gradients by them, q, k and v."""
    return 2 * math.prod(q[:3]) * k[2] * (3 * q[3] + 2 * v[3])


def added_product(total: Size, a: Size, b: Size, *args: Any, **kwargs: Any) -> int:
    return product(a, b)


class DeviceTime:
    """Seconds that the device is at work in a step, its kernels and copies; what fails here must not end the step."""

    def __init__(self) -> None:
        self.seconds: float | None = None

    def begin(self) -> None:
        try:
            self._profile = profile(activities=[ProfilerActivity.CUDA])  # without the host's operators, of many events
            self._profile.__enter__()
        except Exception:
            traceback.print_exc()

    def end(self) -> None:
        try:
            self._profile.__exit__(None, None, None)
            self.seconds = device_seconds(self._profile.events()) or None  # None: it saw nothing
        except Exception:
            traceback.print_exc()


def device_seconds(events: Any) -> float:
    """Of a profile's events those on the device, without the ranges that only name several of them."""
    spans = [e.time_range for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    busy, until = 0.0, -math.inf
    for span in sorted(spans, key=lambda span: span.start):  # what overlaps counts once
        busy += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return busy / 1e6


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
    CHANNEL = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # for what libraries print, native ones too
    child(json.loads(sys.argv[1]))
