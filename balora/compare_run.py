"""One run of ``balora compare``, in the process that was started for it: train, then measure what users would load."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    EvalPrediction,
    TrainerCallback,
)

from . import __version__, files, measure, tasks, train

SPECIFICATION = "run.json"  # what was asked for
PROGRESS = "progress.txt"
TRAINED = "trained.json"  # the training is over
RESULT = "result.json"  # written last
FAILED = "failed.json"
_DRAWN = 1000  # rows of the t-SNE map, at most


def write_json(path: Path, content: Any) -> None:
    files.write(path, json.dumps(content, indent=1, ensure_ascii=False))


def _check_parent(parent: int) -> None:
    """Ends this process where the one that started it is gone: the next comparison would start a second one in the same
    folder.
    """
    if os.getppid() != parent:
        raise SystemExit("error: the comparison that started this run has ended")


class _Progress(TrainerCallback):
    """Says how far the training is, and ends it where the comparison has ended."""

    def __init__(self, path: Path, parent: int) -> None:
        self.path, self.parent = path, parent

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _check_parent(self.parent)
        if state.is_world_process_zero:
            files.write(self.path, f"{state.global_step} {state.max_steps}")


def perform(folder: Path, parent: int, specification: dict[str, Any], parsed: tuple[Any, Any, Any]) -> None:
    """Train, from the last checkpoint of ``folder`` if there is one, measure, and write the result.

    The checkpoints, which are for resuming only, are removed at the end.

    Args:
        parent: the process id of the comparison; without it the run ends.
        specification: ``options`` (of ``balora train``) and ``measures``.
        parsed: the argument objects of these options.
    """
    _check_parent(parent)
    run, config, training = parsed
    if not (folder / TRAINED).is_file():
        if training.eval_strategy == "no":
            run = replace(run, eval_data=None, eval_split=None)  # it is measured below
        trainer, checkpoint = train.setup(run, config, training, recipe=specification["options"])
        _check_parent(parent)  # reading the data and PiSSA take their time
        trainer.add_callback(_Progress(folder / PROGRESS, parent))
        train.train(trainer, checkpoint)
        write_json(folder / TRAINED, {"steps": trainer.state.global_step})
        del trainer
        gc.collect()  # the model and the Trainer hold each other
    _check_parent(parent)
    found = _measured(folder, parsed, specification["measures"])
    measures = {**found.pop("measures"), **_cost(folder)}
    found["measures"] = {name: _finite(value) for name, value in measures.items()}
    found["history"] = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    found["steps"] = json.loads((folder / TRAINED).read_text())["steps"]
    found["machine"] = f"{_device(training)}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    found["versions"] = {"balora": __version__, "python": platform.python_version()}
    found["versions"] |= {package.__name__: package.__version__ for package in (torch, transformers, peft)}
    write_json(folder / RESULT, found)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def _measured(folder: Path, parsed: tuple[Any, Any, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """The measures of the exported LoRA on the base model, as ``measures``, and what the page shows beside them."""
    run, config, training = parsed
    tokenizer = tasks.tokenizer_of(run.model)
    task = tasks.find(run, config.task, tokenizer)
    assert task.evaluation is not None
    examples, size = task.evaluation.examples, training.per_device_eval_batch_size
    model = _fine_tuned(run, config.task, folder / train.LORA).to(training.device).eval()
    collate = task.collator(model)
    batches = (collate(examples[i : i + size]) for i in range(0, len(examples), size))
    if config.task == "nlu":
        return _of_classifier(model, batches, task.compute_metrics)
    found: dict[str, float | None] = {"eval_loss": measure.token_loss(model, batches)}
    length = run.max_length or tasks.CUT
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    if asked["drift_data"] is not None and not model.config.is_encoder_decoder:
        text = Path(asked["drift_data"]).read_text(encoding="utf-8")
        rows = measure.windows(tokenizer, text, asked["drift_windows"], min(measure.WINDOW, length, room))
        found |= measure.drift(model, rows)
    if asked["generations"]:
        prompts = measure.prompts_of(model, islice(examples, asked["generations"]), max(room - asked["new_tokens"], 1))
        answers = measure.continuations(model, tokenizer, prompts, asked["new_tokens"], size)
        found |= {f"distinct_{n}": measure.distinct(answers, n) for n in (1, 2, 3)}
        found["answer_tokens"] = sum(map(len, answers)) / max(len(answers), 1)
        write_json(folder / "answers.json", [tokenizer.decode(answer) for answer in answers])
    return {"measures": found}


def _fine_tuned(run: Any, kind: str, lora: Path) -> Any:
    """What users load: the base model, and on it the LoRA by peft alone."""
    if kind == "nlu":
        base = AutoModelForSequenceClassification.from_pretrained(
            run.model, config=AutoConfig.from_pretrained(lora), dtype=run.dtype, ignore_mismatched_sizes=True
        )
    else:
        seq2seq = AutoConfig.from_pretrained(run.model).is_encoder_decoder
        auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
        base = auto.from_pretrained(run.model, dtype=run.dtype)
    return peft.PeftModel.from_pretrained(base, lora)


def _of_classifier(model: Any, batches: Iterable[Any], compute_metrics: Any) -> dict[str, Any]:
    logits, features, labels = measure.classified(model, batches)
    found: dict[str, float | None] = {"eval_loss": measure.class_loss(logits, labels)}
    found |= compute_metrics(EvalPrediction(logits.numpy(), labels.numpy()))
    recalls = {n.removeprefix("recall_"): found.pop(n) for n in list(found) if n.startswith("recall_")}
    details: dict[str, Any] = {"recalls": {n: v for n, v in recalls.items() if _finite(v) is not None}}
    if logits.shape[1] > 1:
        try:
            found["silhouette"] = measure.silhouette(features, labels)
            drawn = torch.arange(0, len(labels), math.ceil(len(labels) / _DRAWN))  # rows may be sorted by class
            details["tsne"] = measure.tsne(features[drawn])
            details["classes"] = [model.config.id2label[i] for i in labels[drawn].tolist()]
        except ImportError as error:
            print(f"silhouette, t-SNE: left out; {error} (pip install balora[compare])", flush=True)
    return {"measures": found, **details}


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
