"""A run of ``balora train``: read and check everything, build the model, train it, export the LoRA."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from . import _import, data, quantized
from .adapters import FROZEN, RESIDUAL_BASE, checkpoint_form
from .config import BALoraConfig
from .modeling import attach
from .pissa import export_lora, get_pissa_model, principal_errors
from .targets import as_named, default_targets
from .trainer import BALoraTrainer


@dataclass
class RunArguments:
    """What ``balora train`` needs beside the objective and Hugging Face's TrainingArguments."""

    model: str = field(metadata={"help": "folder or name of a pre-trained causal language model"})
    data: str = field(
        metadata={
            "help": "what to train on: a JSONL, JSON, CSV, TSV or Parquet file, a folder of such files, or owner/name "
            "or owner/name:config of a data set on the hub. Its columns: instruction, query, question, problem (input "
            "or context beside them is appended) or prompt, and output, response, answer, solution or completion; "
            "or messages or conversations"
        }
    )
    data_split: str | None = field(
        default=None,
        metadata={"help": "split of a folder or hub data set, or a slice: train[:1000]; unset: train, or the only one"},
    )
    eval_data: str | None = field(default=None, metadata={"help": "data of the same kind, evaluated at the end"})
    eval_split: str | None = field(default=None, metadata={"help": "split of eval_data; unset: test, or the only one"})
    adapter: str = field(
        default="pissa",
        metadata={
            "help": "pissa, or for comparisons lora or dora with their usual random start (all three take every λ)"
        },
    )
    r: int = field(default=128, metadata={"help": "rank of the adapters"})
    lora_alpha: float = field(default=128, metadata={"help": "the adapters' scaling times their rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout in front of the adapters"})
    form: str = field(
        default="offset",
        metadata={"help": "of PiSSA adapters: offset (the base weights stay), or residual (W − s·B₀A₀; no dropout)"},
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "layers to adapt; unset: those of attention and dense MLPs, never a router or the head"},
    )
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "layers of those to leave out"})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules to train in full beside the adapters, such as lm_head"}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "type of the base weights: auto (the checkpoint's), float32, bfloat16 or float16"},
    )
    quantize: str | None = field(
        default=None,
        metadata={
            "help": "nf4: load the base in 4 bits (bitsandbytes), for the offset form; the residual form takes a "
            "folder of `balora quantize` as its model"
        },
    )
    max_length: int = field(default=512, metadata={"help": "rows are cut to this many tokens"})


# The published settings where they differ from Hugging Face's (2025 paper, appendix), and a log that one can watch.
TRAINING_DEFAULTS = {
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "num_train_epochs": 1.0,
    "logging_steps": 10,
}
RECIPE = "recipe.yaml"
LORA = "lora"
LORA_PRETRAINED = "lora_pretrained"
REPORT = "report.html"


def setup(
    run: RunArguments, config: BALoraConfig, training: TrainingArguments, recipe: dict[str, Any] | None = None
) -> tuple[BALoraTrainer, str | None]:
    """Read and check everything, build the model, and return the trainer and the checkpoint to go on from, if any.

    ``recipe`` is what the user asked for; it is kept as ``recipe.yaml`` in the output folder.

    Raises:
        ValueError, TypeError, OSError: something does not fit; nothing has been trained or overwritten then.
    """
    run = quantized.settled(run, recipe)
    if run.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: expected auto, float32, bfloat16 or float16, found {run.dtype!r}")
    if run.quantize not in (None, "nf4"):
        raise ValueError(f"quantize: expected nf4 or none, found {run.quantize!r}")
    if run.max_length < 2:
        raise ValueError(f"max_length: expected at least 2 tokens, found {run.max_length}")
    if not 0 <= run.lora_dropout < 1:
        raise ValueError(f"lora_dropout: expected at least 0 and below 1, found {run.lora_dropout}")
    if run.adapter not in ("pissa", "lora", "dora"):
        raise ValueError(f"adapter: expected pissa, lora or dora, found {run.adapter!r}")
    if run.form not in FROZEN:
        raise ValueError(f"form: expected {' or '.join(map(repr, FROZEN))}, found {run.form!r}")
    if run.form == "residual" and run.lora_dropout:
        raise ValueError(f"lora_dropout: expected 0 with form='residual', found {run.lora_dropout}")
    if config.task != "nlg":
        raise ValueError(f"task: expected 'nlg' so far, found {config.task!r}")
    _check_training(training)
    checkpoint = _checkpoint(training)
    if training.eval_strategy != "no" and run.eval_data is None:
        raise ValueError(f"eval_data: expected with eval_strategy={training.eval_strategy.value!r}, found none")
    if run.eval_split is not None and run.eval_data is None:
        raise ValueError(f"eval_split: expected eval_data beside it, found the split {run.eval_split!r} alone")
    rows = data.read(run.data, run.data_split)
    eval_rows = data.read(run.eval_data, run.eval_split, usual="test") if run.eval_data else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(run.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: expected a model and its tokenizer at {run.model}; {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ValueError(
            f"model: expected a tokenizer with a padding or end-of-text token, found neither in {run.model}"
        )
    train_set = data.tokenize(rows, tokenizer, run.max_length, rows.name)
    _say("train: ", train_set)
    eval_set = None
    if eval_rows:
        eval_set = data.tokenize(eval_rows, tokenizer, run.max_length, eval_rows.name)
        _say("eval:  ", eval_set)
    _check_vocabulary(run.model, [train_set, *([eval_set] if eval_set else [])])

    try:
        options = quantized.load_options(run.model, run.quantize, run.dtype)
        model = AutoModelForCausalLM.from_pretrained(run.model, dtype=run.dtype, **options)
    except Exception as error:  # the readers of weights raise types of their own
        raise ValueError(f"model: expected a causal language model at {run.model}; {error}") from error
    model = _adapted(model, run)
    if checkpoint is not None:
        _check_adapters(model, run.form if run.adapter == "pissa" else None, checkpoint)
    attach(model, config)
    start = principal_errors(model).summary if run.adapter == "pissa" else {"lora": "LoRA", "dora": "DoRA"}[run.adapter]
    print(start, flush=True)
    print("model: {:,} trained parameters of {:,}".format(*model.get_nb_trainable_parameters()), flush=True)

    training.dataloader_pin_memory = training.dataloader_pin_memory and torch.accelerator.is_available()
    trainer = BALoraTrainer(
        model=model,
        args=training,
        train_dataset=train_set.examples,
        eval_dataset=eval_set.examples if eval_set else None,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=data.IGNORE_INDEX),
        processing_class=tokenizer,
    )
    about = {"Model": run.model, "Training data": f"{run.data}: {train_set.summary()}"}
    about["Evaluation data"] = f"{run.eval_data}: {eval_set.summary()}" if eval_set else "none"
    form = f", {run.form} form" if run.adapter == "pissa" else ""
    about["Adapters"] = f"{start}{form}, r = {run.r}, alpha = {run.lora_alpha:g}"
    _add_report(trainer, about, recipe)
    if recipe is not None:
        Path(training.output_dir).mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in recipe.items() if not name.endswith("_token")}  # no secret in a file
        text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
        (Path(training.output_dir) / RECIPE).write_text(text, encoding="utf-8")
    return trainer, checkpoint


def _adapted(model: Any, run: RunArguments) -> peft.PeftModel:
    if quantized.is_prepared(run.model):
        return quantized.with_initial_adapter(model, run.model)
    targets = as_named(run.target_modules)
    options: dict[str, Any] = dict(
        r=run.r,
        lora_alpha=run.lora_alpha,
        lora_dropout=run.lora_dropout,
        exclude_modules=run.exclude_modules,
        modules_to_save=run.modules_to_save,
    )
    if run.adapter == "pissa":
        return get_pissa_model(model, target_modules=targets, form=run.form, **options)
    targets = default_targets(model) if targets is None else targets
    return peft.get_peft_model(
        model,
        peft.LoraConfig(target_modules=targets, use_dora=run.adapter == "dora", task_type="CAUSAL_LM", **options),
    )


def train(trainer: BALoraTrainer, checkpoint: str | None) -> Path:
    """Train, from ``checkpoint`` if there is one, and write the LoRA to ``<output_dir>/lora``; returns that folder."""
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException as error:
        if trainer.report is not None:
            trainer.report.stop(error, trainer.state)
        raise
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    folder = Path(str(trainer.args.output_dir)) / LORA
    if trainer.args.should_save:
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        made_of = getattr(model.get_base_model().config, RESIDUAL_BASE, None)
        export_lora(model, folder, "residual" if made_of else "pretrained")
        print(f"LoRA:  {folder} (load it with peft.PeftModel.from_pretrained; the checkpoints are for resuming only)")
        if made_of:
            export_lora(model, folder.with_name(LORA_PRETRAINED))
            print(f"       {folder.with_name(LORA_PRETRAINED)}: the same for {made_of['base_model']} in full precision")
    if trainer.report is not None and trainer.report.written:
        print(f"report: {trainer.report.path}", flush=True)
    return folder


def _add_report(trainer: BALoraTrainer, about: dict[str, str], recipe: dict[str, Any] | None) -> None:
    try:
        report = _import("report")
    except ImportError as error:
        print(f"report: none of this run; {error}", flush=True)
        return
    folder = Path(str(trainer.args.output_dir))
    about = {**about, "Output folder": str(folder)}
    held_out = trainer.eval_dataset  # None: the report takes rows of the training data
    trainer.report = report.ReportCallback(folder / REPORT, held_out, about, {"Recipe": recipe} if recipe else None)
    trainer.add_callback(trainer.report)


def _checkpoint(training: TrainingArguments) -> str | None:
    """The checkpoint to resume from: the named one, or for ``true`` the last complete one of the output folder."""
    folder = Path(str(training.output_dir))
    if folder.is_file():
        raise ValueError(f"output_dir: expected a folder, found the file {folder}")
    found = sorted(folder.glob("checkpoint-*"), key=_step, reverse=True)
    asked = training.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        if found:
            raise ValueError(
                f"output_dir: {folder} holds {found[0].name} of an earlier run; add --resume_from_checkpoint true to "
                "go on from it, or name another folder"
            )
        if (folder / LORA).exists():
            raise ValueError(f"output_dir: {folder} holds the LoRA of an earlier run; name another folder")
        return None
    if str(asked).lower() != "true":
        if not _complete(Path(asked)):
            raise ValueError(f"resume_from_checkpoint: expected 'true' or a complete checkpoint, found {asked!r}")
        return str(asked)
    for path in found:
        if _complete(path):
            print(f"resume: from {path}", flush=True)
            return str(path)
        print(f"resume: {path} is incomplete (the run ended while it was written), looking further back", flush=True)
    print(f"resume: no complete checkpoint in {folder}, starting from the beginning", flush=True)
    return None


def _check_training(training: TrainingArguments) -> None:
    """What Hugging Face's arguments let pass, and what would stop or spoil the run only later."""
    if training.label_smoothing_factor != 0:
        raise ValueError(
            f"label_smoothing_factor: expected 0 (it takes the labels away from the objective), found "
            f"{training.label_smoothing_factor}"
        )
    if training.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel: expected False (its forward would replace that of the objective), found True"
        )
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training, name) < 1:
            raise ValueError(f"{name}: expected at least 1, found {getattr(training, name)}")
    if not (math.isfinite(training.learning_rate) and training.learning_rate >= 0):
        raise ValueError(f"learning_rate: expected a finite number of at least 0, found {training.learning_rate}")
    if training.max_steps <= 0 and not training.num_train_epochs > 0:
        raise ValueError(f"num_train_epochs: expected a number above 0, found {training.num_train_epochs}")
    Trainer.get_optimizer_cls_and_kwargs(training)  # raises where the optimizer's package is missing


def _check_adapters(model: Any, form: str | None, checkpoint: str) -> None:
    """A checkpoint goes on with the adapters that it was made with: others would give its factors another meaning."""
    made = checkpoint_form(checkpoint)
    if made != form:
        name = "form" if made and form else "adapter"
        raise ValueError(f"{name}: expected {made or 'no PiSSA'!r}, as in {checkpoint}, found {form or 'no PiSSA'!r}")
    now = model.peft_config["default"].to_dict()
    then = json.loads((Path(checkpoint) / "adapter_config.json").read_text())
    for name in ("r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save"):
        here, there = (sorted(x[name]) if isinstance(x[name], (list, set)) else x[name] for x in (now, then))
        if here != there:
            raise ValueError(
                f"{name}: expected {there}, as in {checkpoint}, found {here}; a run goes on with the adapters that it "
                "began with"
            )


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _complete(path: Path) -> bool:
    """The Trainer writes trainer_state.json last."""
    try:
        json.loads((path / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return all((path / name).is_file() for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt"))


def _say(what: str, rows: data.Tokenized) -> None:
    print(what + rows.summary(), flush=True)
    for warning in rows.warnings():
        print(f"{what}warning: {warning}", flush=True)


def _check_vocabulary(model: str, sets: list[data.Tokenized]) -> None:
    vocab = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    highest = max(max(s.examples.columns["input_ids"]) for s in sets)
    if highest >= vocab:
        raise ValueError(
            f"model: the tokenizer of {model} gives token {highest}, but the model's vocabulary ends at {vocab - 1}"
        )
