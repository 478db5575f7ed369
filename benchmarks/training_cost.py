"""What a training step costs: Full FT, LoRA, PiSSA, BA-LoRA as published, BA-LoRA with balora, under HF's Trainer.

    python benchmarks/training_cost.py ../shared/models/stories15M --length 250 --data ../shared/data/gsm8k/train.jsonl
    python benchmarks/training_cost.py llama-2-7b llama-3-8b gemma-2-2b --out benchmarks/results/training-cost-gpu

A model is a folder, or the name of a shape that is initialized at random (for GPUs). Every method runs in a process of
its own: peak memory is that process's while it steps, set-up left out. On a CPU the processes take turns, a step each,
so that a slow moment of the machine meets all of them; on a GPU they run one after the other. All see the same batches
of full rows. λ is constant, so that every term is computed in every step. The published method is written anew from the
paper's description: PiSSA of peft, a second model as teacher, both models' logits in full, float32 softmaxes over them,
``torch.svd_lowrank`` of the logits. Its losses are the gate: balora's must follow them, or no figure is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balora
from balora import data as balora_data
from balora import targets, trainer as balora_trainer

METHODS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "pissa": "PiSSA",
    "published": "BA-LoRA as published",
    "balora": "BA-LoRA with balora",
}
ALL_TERMS = balora.BALoraConfig(consistency_schedule="constant", focus_schedule="constant")
WARM_UP = 3  # steps that are not counted: allocators and caches fill
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 0.02  # of balora's losses, against the published method's

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


# ---------------------------------------------------------------- one method, in its own process


def child(spec: dict[str, Any]) -> None:
    """Set up, then a step for every line on stdin; one JSON object a step on stdout."""
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    set_seed(0)
    model, teacher = build(spec)
    batches = json.loads(Path(spec["batches"]).read_text())
    steps = WARM_UP + spec["steps"] + 1  # the last one is timed part by part
    timer = Parts()

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                harness.reset_peak()
            if state.global_step == steps - 1:
                timer.start(trainer.model, teacher, trainer.accelerator)
            say({"step": state.global_step})
            sys.stdin.readline()
            harness.synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            harness.synchronize()
            self.seconds = time.perf_counter() - self.start

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                found = {"seconds": self.seconds, "loss": float(logs["loss"]), "peak": harness.peak()}
                if state.global_step == steps:
                    found["parts"] = timer.parts(self.seconds)
                say(found)

    class Plain(Trainer):
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
        max_steps=steps,
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        bf16=spec["dtype"] == "bfloat16",
        gradient_checkpointing=spec["checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False} if spec["checkpointing"] else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=DEVICE == "cpu",
    )
    rows = [{"input_ids": row, "labels": row} for row in batches]
    trainer_class = balora_trainer.BALoraTrainer if spec["method"] == "balora" else Plain
    trainer = trainer_class(model, arguments, train_dataset=rows, callbacks=[Steps()])
    trainer.train()


def say(message: dict) -> None:
    print(json.dumps(message), file=CHANNEL, flush=True)


def build(spec: dict[str, Any]):
    """The model of a method, and the published method's second model."""
    import peft

    method, r = spec["method"], spec["r"]
    model = load(spec)
    model.config.use_cache = False
    if spec["checkpointing"]:
        model.enable_input_require_grads()
    if method == "full":
        return model, None
    if method == "balora":
        model = balora.get_pissa_model(model, r=r, lora_alpha=r, task_type="CAUSAL_LM")
        return balora.attach(model, ALL_TERMS), None
    config = peft.LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=targets.default_targets(model),
        task_type="CAUSAL_LM",
        init_lora_weights=True if method == "lora" else "pissa_niter_4",
    )
    model = peft.get_peft_model(model, config)
    if method != "published":
        return model, None
    return model, load(spec).eval().requires_grad_(False).to(DEVICE)


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
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, spec["dtype"])
    if spec["model"] not in SHAPES:
        return AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, local_files_only=True)
    shape = dict(SHAPES[spec["model"]])
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=dtype)


class Parts:
    """Where one step's time goes: hooks around the decoder, the backward and the gradient of the last hidden state.

    ``loss`` is the head and everything behind it, forward and backward, wherever a method computes it.
    """

    def start(self, model: nn.Module, teacher: nn.Module | None, accelerator: Any) -> None:
        self.marks: list[tuple[str, float]] = []
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        decoder = base.get_decoder()
        decoder.register_forward_pre_hook(lambda *_: self.mark("in", torch.is_grad_enabled()))
        decoder.register_forward_hook(self._out)
        if teacher is not None:
            teacher.register_forward_pre_hook(lambda *_: self.mark("in", False))
            teacher.register_forward_hook(lambda *_: self.mark("out", False))
        backward = accelerator.backward

        def timed(loss: Tensor, **kwargs: Any) -> None:
            self.mark("backward", True)
            backward(loss, **kwargs)
            self.mark("end", True)

        accelerator.backward = timed

    def mark(self, name: str, student: bool) -> None:
        harness.synchronize()
        self.marks.append((name if student else f"teacher {name}", time.perf_counter()))

    def _out(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.mark("out", torch.is_grad_enabled())
        hidden = output.last_hidden_state
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: self.mark("hidden", True))

    def parts(self, total: float) -> dict[str, float]:
        at = dict(self.marks)
        teacher = at["teacher out"] - at["teacher in"] if "teacher in" in at else 0.0
        found = {
            "teacher": teacher,
            "student": at["out"] - at["in"],
            "loss": at["hidden"] - at["out"],
            "backward": at["end"] - at["hidden"],
        }
        return found | {"rest": total - sum(found.values())}


# ---------------------------------------------------------------- all methods


def measure(spec: dict[str, Any], methods: list[str], data: Path | None, take_turns: bool) -> list[dict[str, Any]]:
    """One row a method: seconds a step, peak, parts, losses."""
    with tempfile.TemporaryDirectory() as scratch:
        batches = Path(scratch) / "rows.json"
        rows = packed(spec, data) if data else drawn(spec)
        batches.write_text(json.dumps(rows))
        found = {name: [] for name in methods}
        running: dict[str, subprocess.Popen] = {}
        for group in [methods] if take_turns else [[name] for name in methods]:
            for name in group:
                harness.progress(f"{name}: setting up")
                own = spec | {"method": name, "scratch": scratch, "batches": str(batches)}
                running[name] = start(own)
            for step in range(WARM_UP + spec["steps"] + 1):
                for name in group:
                    harness.progress(f"step {step + 1} of {WARM_UP + spec['steps'] + 1}: {name}")
                    if (answer := one_step(running[name])) is not None:
                        found[name].append(answer)
            for name in group:
                running[name].stdin.close()
                running[name].wait()
        harness.progress("")
    return [summary(spec, name, found[name], running[name]) for name in methods]


def start(spec: dict[str, Any]) -> subprocess.Popen:
    errors = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", json.dumps(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, "PYTHONPATH": harness.python_path(), "HF_HUB_OFFLINE": "1"},
    )
    process.errors = errors
    return process


def one_step(process: subprocess.Popen) -> dict[str, Any] | None:
    """Let a process make its next step; None where it has ended."""
    if not process.stdout.readline():  # it is set up and waits
        return None
    try:
        process.stdin.write("\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    answer = process.stdout.readline()
    return json.loads(answer) if answer else None


def summary(spec: dict[str, Any], name: str, steps: list[dict[str, Any]], process: subprocess.Popen) -> dict[str, Any]:
    row: dict[str, Any] = {"method": name, "checkpointing": spec["checkpointing"]}
    if len(steps) < WARM_UP + spec["steps"] + 1:
        process.errors.seek(0)
        return row | {"note": (process.errors.read().strip().splitlines() or ["ended early"])[-1][:150]}
    counted = steps[WARM_UP:-1]
    ms, spread = harness.median_and_spread([step["seconds"] for step in counted])
    row |= {"seconds": ms / 1e3, "spread": spread / 1e3, "peak": counted[-1]["peak"]}
    return row | {"losses": [step["loss"] for step in steps], "parts": steps[-1]["parts"]}


def packed(spec: dict[str, Any], data: Path) -> list[list[int]]:
    """Rows of exactly ``length`` tokens: the texts of the file one behind the other, every token trained on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec["model"], local_files_only=True)
    examples = balora_data.tokenize(balora_data.read(str(data)), tokenizer, max_length=spec["length"], source=str(data))
    tokens = [token for row in examples.examples for token in row["input_ids"]]
    count, length = spec["batch"] * (WARM_UP + spec["steps"] + 1), spec["length"]
    if len(tokens) < count * length:
        tokens = tokens * (count * length // len(tokens) + 1)
    return [tokens[i * length : (i + 1) * length] for i in range(count)]


def drawn(spec: dict[str, Any]) -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    count = spec["batch"] * (WARM_UP + spec["steps"] + 1)
    return torch.randint(SHAPES[spec["model"]]["vocab_size"], (count, spec["length"]), generator=g).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--r", type=int, default=128)
    parser.add_argument("--dtype", default="float32" if DEVICE == "cpu" else "bfloat16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"], choices=["off", "on"])
    arguments = parser.parse_args()
    for model in arguments.models:
        for checkpointing in arguments.checkpointing:
            spec = dict(
                model=model, batch=arguments.batch, length=arguments.length, r=arguments.r, dtype=arguments.dtype
            )
            spec |= dict(steps=arguments.steps, checkpointing=checkpointing == "on", learning_rate=2e-5)
            rows = measure(spec, arguments.methods, arguments.data, DEVICE == "cpu")
            base = next((r for r in rows if r["method"] == "pissa"), {})
            for row in rows:
                print({k: v for k, v in row.items() if k not in ("losses", "parts")})
                if "seconds" in row:
                    print(
                        "   ",
                        {k: f"{v:.3f}" for k, v in row["parts"].items()},
                        "losses",
                        row["losses"][0],
                        row["losses"][-1],
                        "x PiSSA",
                        row["seconds"] / base.get("seconds", 1),
                        row["peak"] / 2**20,
                        row["peak"] / base.get("peak", 1),
                        flush=True,
                    )


if __name__ == "__main__":
    CHANNEL = sys.stdout
    if sys.argv[1:2] == ["--child"]:
        sys.stdout = sys.stderr  # what libraries print
        child(json.loads(sys.argv[2]))
    else:
        main()
