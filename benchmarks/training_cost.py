"""What a training step costs: Full FT, LoRA, PiSSA, BA-LoRA as published, BA-LoRA with balora, under HF's Trainer.

    python benchmarks/training_cost.py ../shared/models/stories15M --length 250 --data ../shared/data/gsm8k/train.jsonl
    python benchmarks/training_cost.py llama-2-7b llama-3-8b gemma-2-2b --out benchmarks/results/training-cost-gpu

A model is a folder, or the name of a public shape; without weights they are drawn at random. Every method runs in a
process of its own: the peak is that process's while it steps, without its set-up. On a CPU the processes take turns, a
step each, so that a slow moment of the machine meets all of them; on a GPU they run one after the other. All see the
same batches, full rows of which every token is trained on. λ is constant, so that every step computes every term.

The published method is written anew from the paper's text: peft's PiSSA, a second model as the teacher, the logits of
both in full, float32 softmaxes over them, ``torch.svd_lowrank``. Its losses are the gate: balora shows no figure unless
its own follow them, step by step.

The floor is a step's products alone, their operations counted in a real step, at the rate of one large bare product.
Of a few steps more the parts are taken: the forwards of teacher and student up to the head, the loss (the head and all
behind it, forward and backward), the backward below the head, and the rest (optimizer, clipping, data).
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import balora
from balora.data import read, tokenize
from balora.targets import default_targets
from balora.trainer import BALoraTrainer

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
            found = {"seconds": self.seconds, "loss": float(logs["loss"]), "peak": harness.peak()}
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
        use_cpu=DEVICE == "cpu",
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
    model = load(spec)
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
    dtype, folder = getattr(torch, spec["dtype"]), Path(spec["model"])
    if any(folder.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    torch.manual_seed(0)
    with torch.device(DEVICE):
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

    def attach(self, model: nn.Module, teacher: nn.Module | None, accelerator: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
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


# ---------------------------------------------------------------- all methods


def steps_of(spec: dict[str, Any]) -> int:
    return spec["warm_up"] + spec["steps"] + PART_STEPS + 1  # the last one counts operations


def measure(spec: dict[str, Any], methods: list[str], data: Path | None, rate: float) -> list[dict[str, Any]]:
    """A row for each method: seconds a step, peak, parts and losses, or why there are none."""
    with tempfile.TemporaryDirectory() as scratch:
        rows_file = Path(scratch) / "rows.json"
        rows_file.write_text(json.dumps(token_rows(spec, data)))
        spec = spec | {"scratch": scratch, "rows": str(rows_file)}
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
        failed: dict[str, str] = {}
        for group in [methods] if DEVICE == "cpu" else [[name] for name in methods]:
            running = {name: Child(spec | {"method": name}) for name in group}
            for step in range(steps_of(spec)):
                for name, process in running.items():
                    harness.progress(f"{spec['model']}: step {step + 1} of {steps_of(spec)}, {METHODS[name]}")
                    if name not in failed and (answer := process.step()) is not None:
                        answers[name].append(answer)
                    elif name not in failed:
                        failed[name] = process.why()
            for process in running.values():
                process.end()
    harness.progress("")
    rows = [summary(spec, name, answers[name], failed.get(name), rate) for name in methods]
    return gated(rows)


class Child:
    """A method's process, which makes a step when it is told to."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "PYTHONPATH": harness.python_path(), "HF_HUB_OFFLINE": "1"},
        )

    def step(self) -> dict[str, Any] | None:
        """None where the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if not self.process.stdout.readline():  # "ready": set up, or back from the last step
            return None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else None

    def why(self) -> str:
        self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return lines[-1][:160] if lines else f"ended with status {self.process.returncode}"

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def summary(
    spec: dict[str, Any], name: str, steps: list[dict[str, Any]], failed: str | None, rate: float
) -> dict[str, Any]:
    given = ("dtype", "batch", "length", "r", "checkpointing")
    row: dict[str, Any] = {"model": Path(spec["model"]).name, "method": name, "note": failed or ""}
    row |= {key: spec[key] for key in given}
    if failed:
        return row
    timed = [step["seconds"] for step in steps[spec["warm_up"] : -PART_STEPS - 1]]
    ms, spread = harness.median_and_spread(timed)
    row |= {"seconds": ms / 1e3, "spread": spread / 1e3, "peak_GB": steps[-1]["peak"] / 1e9}
    row |= {"TFLOP": steps[-1]["operations"] / 1e12, "floor": steps[-1]["operations"] / rate}
    shares = [step["parts"] for step in steps[-PART_STEPS - 1 : -1]]
    row |= {part: statistics.median(share[part] for share in shares) for part in PARTS}
    return row | {"losses": [step["loss"] for step in steps]}


def gated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """balora's row without figures where its losses leave those of the published method; ratios to PiSSA in all."""
    by_method = {row["method"]: row for row in rows if "seconds" in row}
    ours, published, pissa = (by_method.get(name) for name in ("balora", "published", "pissa"))
    if ours and published:
        pairs = zip(ours["losses"], published["losses"], strict=True)
        apart = max(abs(a - b) / max(abs(b), 1e-6) for a, b in pairs)
        ours["apart"] = apart
        if not apart <= TOLERANCE:
            for key in ("seconds", "spread", "peak_GB", "TFLOP", "floor", *PARTS):
                del ours[key]
            ours["note"] = f"its losses are {apart:.1%} from the published method's, allowed {TOLERANCE:.0%}"
    elif ours:
        ours["note"] = "losses not checked: the published method did not run"
    for row in rows if pissa else []:
        if "seconds" in row:
            pairs = {"x_seconds": "seconds", "x_peak": "peak_GB", "x_TFLOP": "TFLOP"}
            row |= {ratio: row[key] / pissa[key] for ratio, key in pairs.items()}
    return rows


def token_rows(spec: dict[str, Any], data: Path | None) -> list[list[int]]:
    """Rows of exactly ``length`` tokens for all steps: the texts of a file one behind the other, or drawn."""
    count, length = spec["batch"] * steps_of(spec), spec["length"]
    if data is None:
        vocab = config_of(spec["model"]).vocab_size
        return torch.randint(vocab, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], local_files_only=True)
    examples = tokenize(read(str(data)), tokenizer, max_length=length, source=str(data)).examples
    tokens = [token for example in examples for token in example["input_ids"]]
    tokens = tokens * (count * length // len(tokens) + 1)
    return [tokens[i * length : (i + 1) * length] for i in range(count)]


# ---------------------------------------------------------------- what is shown


COLUMNS = {
    "name": "method",
    "peak": "peak, GB",
    "x_peak": "× PiSSA",
    "step": "s a step",
    "spread": "±",
    "x_seconds": "× PiSSA",
    "floor": "floor, s",
    "x_TFLOP": "× PiSSA",
    **{part: part for part in PARTS},
    "note": "",
}


def shown(row: dict[str, Any]) -> dict[str, str]:
    cells = {"name": METHODS[row["method"]], "note": row["note"]}
    if "seconds" in row:
        cells |= {"peak": f"{row['peak_GB']:.2f}", "step": f"{row['seconds']:.3f}", "spread": f"{row['spread']:.3f}"}
        cells |= {"floor": f"{row['floor']:.3f}"}
        cells |= {key: f"{row[key]:.2f}" for key in ("x_peak", "x_seconds", "x_TFLOP") if key in row}
        cells |= {part: f"{row[part]:.3f}" for part in PARTS if row[part] or part != "teacher"}
    return cells


def heading(row: dict[str, Any]) -> str:
    how = "with gradient checkpointing" if row["checkpointing"] else "without gradient checkpointing"
    return f"{row['model']}, {row['batch']} × {row['length']} tokens, {row['dtype']}, r = {row['r']}, {how}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds a step by part, and the peak, a bar for each method."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "seconds" in row][::-1]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 0.45 * len(rows) + 1.5), width_ratios=(2, 1), sharey=True, layout="constrained"
    )
    names = [METHODS[row["method"]] for row in rows]
    colours = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#999999")  # Okabe and Ito
    start = [0.0] * len(rows)
    for part, colour in zip(PARTS, colours, strict=True):
        # The parts come from other steps than the median: scaled to it.
        widths = [row["seconds"] * row[part] / sum(row[p] for p in PARTS) for row in rows]
        left.barh(names, widths, left=start, color=colour, label=part)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    right.barh(names, [row["peak_GB"] for row in rows], color="#999999")
    for axis, key, unit, ratio in ((left, "seconds", "s", "x_seconds"), (right, "peak_GB", "GB", "x_peak")):
        for i, row in enumerate(rows):
            times = f" ({row[ratio]:.2f} ×)" if ratio in row else ""
            axis.text(row[key], i, f" {row[key]:.2f} {unit}{times}", va="center", fontsize=9)
        axis.set_xlim(0, 1.35 * max(row[key] for row in rows))
        axis.spines[["top", "right"]].set_visible(False)
    left.set_xlabel("seconds a step")
    right.set_xlabel("peak memory, GB")
    floors = [row["floor"] for row in rows]
    left.plot(floors, names, "k|", markersize=14, label="floor: its products alone")
    figure.legend(loc="outside lower left", ncols=len(PARTS) + 1, frameon=False, fontsize=9)
    figure.suptitle(heading(rows[0]), x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"a folder, or one of {', '.join(SHAPES)}")
    parser.add_argument("--data", type=Path, help="of the kind that balora train takes; unset: random tokens")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--r", type=int, default=128, help="rank of the adapters (default 128)")
    parser.add_argument("--dtype", default="float32" if DEVICE == "cpu" else "bfloat16", help="of the base weights")
    parser.add_argument("--steps", type=int, default=20, help="that are timed (default 20)")
    parser.add_argument("--warm_up", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.csv, and OUT-MODEL[-checkpointing].png")
    arguments = parser.parse_args()
    for model in arguments.models:
        if model not in SHAPES and not Path(model, "config.json").is_file():
            parser.error(f"MODEL: expected a folder with a config.json or one of {', '.join(SHAPES)}, found {model!r}")
    if arguments.data and not arguments.data.is_file():
        parser.error(f"--data: expected a file, found {str(arguments.data)!r}")
    rate = harness.product_rate(getattr(torch, arguments.dtype))
    machine = harness.machine() | {"products": f"{rate / 1e12:.2f} TFLOP/s"}
    text = ["# What a training step costs", "", ", ".join(f"{k} {v}" for k, v in machine.items())]
    print("\n".join(text))
    everything: list[dict[str, Any]] = []
    for model in arguments.models:
        for checkpointing in arguments.checkpointing:
            options = ("batch", "length", "r", "dtype", "steps", "warm_up")
            spec = {"model": model, "checkpointing": checkpointing == "on"}
            spec |= {name: getattr(arguments, name) for name in options}
            rows = measure(spec, arguments.methods, arguments.data, rate)
            text.append(f"\n## {heading(rows[0])}\n\n" + harness.table([shown(row) for row in rows], COLUMNS))
            everything += rows
            print(text[-1], flush=True)
            if arguments.out:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
                without = [{k: v for k, v in row.items() if k != "losses"} | machine for row in everything]
                harness.write_csv(arguments.out.with_suffix(".csv"), without)
                suffix = "-checkpointing" if checkpointing == "on" else ""
                draw(rows, arguments.out.with_name(f"{arguments.out.name}-{Path(model).name.lower()}{suffix}.png"))
    return any(row["method"] == "balora" and "seconds" not in row for row in everything)


if __name__ == "__main__":
    CHANNEL = sys.stdout
    if sys.argv[1:2] == ["--child"]:
        sys.stdout = sys.stderr  # for what libraries print
        child(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
