"""One run of ``balora compare``, in the process that was started for it: train, then measure what users would load."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainerCallback

from . import __version__, data, measure, train

SPECIFICATION = "run.json"  # what was asked for
PROGRESS = "progress.txt"
TRAINED = "trained.json"  # the training is over
RESULT = "result.json"  # written last
FAILED = "failed.json"


def write(path: Path, content: Any) -> None:
    """A file that is there whole or not at all: text as it is, anything else as JSON."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


class _Progress(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write(self.path, f"{state.global_step} {state.max_steps}")


def perform(folder: Path, specification: dict[str, Any], parsed: tuple[Any, Any, Any]) -> None:
    """Train, from the last checkpoint of ``folder`` if there is one, measure, and write the result.

    The checkpoints, which are for resuming only, are removed at the end.

    Args:
        specification: ``options`` (of ``balora train``) and ``measures``.
        parsed: the argument objects of these options.
    """
    run, config, training = parsed
    if not (folder / TRAINED).is_file():
        trainer, checkpoint = train.setup(run, config, training, recipe=specification["options"])
        trainer.add_callback(_Progress(folder / PROGRESS))
        train.train(trainer, checkpoint)
        write(folder / TRAINED, {"steps": trainer.state.global_step})
        del trainer
        gc.collect()  # the model and the Trainer hold each other
    found = {
        "measures": {
            k: _finite(v)
            for k, v in {**_measured(folder, run, training, specification["measures"]), **_cost(folder)}.items()
        },
        "history": json.loads((folder / "trainer_state.json").read_text())["log_history"],
        "steps": json.loads((folder / TRAINED).read_text())["steps"],
        "machine": f"{_device(training)}, {os.cpu_count()} CPU cores",
        "versions": {
            "balora": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
    write(folder / RESULT, found)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def _measured(folder: Path, run: Any, training: Any, asked: dict[str, Any]) -> dict[str, float | None]:
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=run.dtype)
    model = peft.PeftModel.from_pretrained(model, folder / train.LORA).to(training.device).eval()
    rows = data.read(run.eval_data, run.eval_split, usual="test")
    examples = data.tokenize(rows, tokenizer, run.max_length, rows.name).examples
    size = training.per_device_eval_batch_size
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=data.IGNORE_INDEX)
    batches = (collate(examples[i : i + size]) for i in range(0, len(examples), size))
    found: dict[str, float | None] = {"eval_loss": measure.token_loss(model, batches)}
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or run.max_length
    if asked["drift_data"] is not None:
        text = Path(asked["drift_data"]).read_text(encoding="utf-8")
        length = min(measure.WINDOW, run.max_length, room)
        found |= measure.drift(model, measure.windows(tokenizer, text, asked["drift_windows"], length))
    if asked["generations"]:
        prompts = measure.prompts_of(islice(examples, asked["generations"]), max(room - asked["new_tokens"], 1))
        answers = measure.continuations(model, tokenizer, prompts, asked["new_tokens"], size)
        found |= {f"distinct_{n}": measure.distinct(answers, n) for n in (1, 2, 3)}
        found["answer_tokens"] = sum(map(len, answers)) / max(len(answers), 1)
        written = [tokenizer.decode(a) for a in answers]
        write(folder / "answers.json", written)
    return found


def _cost(folder: Path) -> dict[str, float]:
    """Seconds a step and peak memory of the training, from its report."""
    try:
        points = json.loads((folder / train.REPORT).with_suffix(".json").read_text())["speed"]
    except OSError:
        return {}
    found = {}
    seconds, steps = (sum(p[name] for p in points) for name in ("seconds", "steps"))
    if steps:
        found["seconds_per_step"] = seconds / steps
    for name in ("device", "host"):
        peaks = [p[name] for p in points if name in p]
        if peaks:
            found[f"memory_{name}"] = max(peaks) / 1e9
    return found


def _device(training: Any) -> str:
    if training.device.type == "cuda":
        return torch.cuda.get_device_name(training.device)
    return f"{platform.processor() or platform.machine()} (CPU)"


def _finite(value: float | None) -> float | None:
    """JSON knows no NaN and no infinity."""
    return value if value is None or math.isfinite(value) else None
