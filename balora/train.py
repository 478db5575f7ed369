"""A run of ``balora train``: read and check everything, build the model, train it, export the LoRA."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import (
    AutoConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from . import _import, quantized, resume, tasks
from .adapters import FROZEN, RESIDUAL_BASE
from .attachment import attachment
from .config import BALoraConfig
from .export import export_lora, how_to_load
from .modeling import attach
from .pissa import get_pissa_model, principal_errors, task_type
from .resume import CLASSES, LORA, RECIPE
from .sharding import sharded
from .targets import as_named, check_any_hit, check_hits, default_targets
from .tokenized import Tokenized
from .trainer import BALoraTrainer


@dataclass
class RunArguments:
    """What ``balora train`` needs beside the objective and Hugging Face's TrainingArguments."""

    model: str = field(metadata={"help": "folder or name of a pre-trained model"})
    data: str = field(
        metadata={
            "help": "what to train on: a JSONL, JSON, CSV, TSV or Parquet file, a folder of such files, or owner/name "
            "or owner/name:config of a data set on the hub. Its columns: instruction, query, question, problem (input "
            "or context beside them is appended) or prompt, and output, response, answer, solution or completion; "
            "or messages or conversations. With --task nlu: label, and text, text and text_pair, or the names of GLUE"
        }
    )
    data_split: str | None = field(
        default=None,
        metadata={"help": "split of a folder or hub data set, or a slice: train[:1000]; unset: train, or the only one"},
    )
    eval_data: str | None = field(default=None, metadata={"help": "data of the same kind, evaluated at the end"})
    eval_split: str | None = field(default=None, metadata={"help": "split of eval_data; unset: test, or the only one"})
    preset: str | None = field(
        default=None,
        metadata={
            "help": "published settings of the objective, over which its options win: nlg_2025, nlg_2024, nlu_2025 or "
            "nlu_2024; unset: nlg_2025, with --task nlu nlu_2025"
        },
    )
    adapter: str = field(
        default="pissa",
        metadata={
            "help": "pissa, or for comparisons lora or dora with their usual random start (all three take every λ)"
        },
    )
    r: int = field(default=128, metadata={"help": "rank of the adapters"})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "the adapters' scaling times their rank; unset: r, a scaling of 1"}
    )
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
        default=None,
        metadata={
            "help": "modules to train in full beside the adapters, such as lm_head; a classifier's head always is"
        },
    )
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={
            "help": "a classifier's head of another size or of other classes is replaced by a fresh one, which else is "
            "an error"
        },
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "type of the base weights: auto (the checkpoint's), float32, bfloat16 or float16"},
    )
    quantize: str | None = field(
        default=None,
        metadata={
            "help": "nf4: load the base of a causal language model in 4 bits (bitsandbytes), for the offset form; the "
            "residual form takes a folder of `balora quantize` as its model"
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "rows are cut to this many tokens; unset: 512, or what the tokenizer's model takes if less"},
    )


# The published settings where they differ from Hugging Face's (2025 paper, appendix), and a log that one can watch.
TRAINING_DEFAULTS = {
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "num_train_epochs": 1.0,
    "logging_steps": 10,
}
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
    if run.lora_alpha is None:
        run = replace(run, lora_alpha=run.r)
    _check_run(run, config)
    _check_training(training)
    checkpoint = resume.checkpoint(training)
    if training.eval_strategy != "no" and run.eval_data is None:
        raise ValueError(f"eval_data: expected with eval_strategy={training.eval_strategy.value!r}, found none")
    if run.eval_split is not None and run.eval_data is None:
        raise ValueError(f"eval_split: expected eval_data beside it, found the split {run.eval_split!r} alone")
    tokenizer = tasks.tokenizer_of(run.model)
    task = tasks.find(run, config.task, tokenizer)
    sets = [task.train, *([task.evaluation] if task.evaluation else [])]
    _check_vocabulary(run.model, sets)
    if checkpoint is not None:
        if task.classes is not None:
            resume.check_classes(task.classes, checkpoint)
        resume.check_recipe(run, training, checkpoint)

    set_seed(training.seed)  # of a fresh head, and of adapters with a random start
    model, trained_in_full = task.load()
    _check_positions(model, sets)
    model = _adapted(model, run, trained_in_full)
    if checkpoint is not None:
        resume.check_adapters(model, run.form if run.adapter == "pissa" else None, checkpoint)
    attach(model, config)
    start = principal_errors(model).summary if run.adapter == "pissa" else {"lora": "LoRA", "dora": "DoRA"}[run.adapter]
    tasks.say(start)
    trained, total = model.get_nb_trainable_parameters()  # of packed and of partitioned weights too
    tasks.say(f"model: {trained:,} trained parameters of {total:,}")

    training.dataloader_pin_memory = training.dataloader_pin_memory and torch.accelerator.is_available()
    trainer = BALoraTrainer(
        model=model,
        args=training,
        train_dataset=task.train.examples,
        eval_dataset=task.evaluation.examples if task.evaluation else None,
        data_collator=task.collator(model),
        processing_class=tokenizer,
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.predictions,
    )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(f"fsdp_state_dict_type: expected FULL_STATE_DICT, found {plugin.state_dict_type}")
    _add_report(trainer, _about(run, task, start), recipe)
    if training.should_save:
        _keep(Path(str(training.output_dir)), task.classes, recipe, checkpoint is not None)
    trainer.recipe = resume.recipe_text({**(recipe or {}), **resume.settled(run, training)})
    trainer.add_callback(_AllStepsTaken())
    return trainer, checkpoint


def _about(run: RunArguments, task: tasks.Task, start: str) -> dict[str, str]:
    """The run in words, for its report."""
    about = {"Model": run.model}
    for name, source, rows in (("Training", run.data, task.train), ("Evaluation", run.eval_data, task.evaluation)):
        words = "; ".join(filter(None, [task.about.get(f"{name} data"), rows.summary()])) if rows else ""
        about[f"{name} data"] = f"{source}: {words}" if rows else "none"
    form = f", {run.form} form" if run.adapter == "pissa" else ""
    return about | {"Adapters": f"{start}{form}, r = {run.r}, alpha = {run.lora_alpha:g}"}


def _keep(folder: Path, classes: list[str] | None, recipe: dict[str, Any] | None, resumed: bool) -> None:
    """What a run goes on with: its classes, which stay those that it began with, and its recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    if classes is not None and not (resumed and (folder / CLASSES).exists()):
        (folder / CLASSES).write_text(json.dumps(classes, ensure_ascii=False), encoding="utf-8")
    if recipe is not None:
        (folder / RECIPE).write_text(resume.recipe_text(recipe), encoding="utf-8")


def _adapted(model: Any, run: RunArguments, trained_in_full: list[str]) -> peft.PeftModel:
    if quantized.is_prepared(run.model):
        return quantized.with_initial_adapter(model, run.model)
    targets = as_named(run.target_modules)
    options: dict[str, Any] = dict(
        r=run.r,
        lora_alpha=run.lora_alpha,
        lora_dropout=run.lora_dropout,
        exclude_modules=run.exclude_modules,
        modules_to_save=list(dict.fromkeys([*trained_in_full, *(run.modules_to_save or [])])) or None,
    )
    if run.adapter == "pissa":
        return get_pissa_model(model, target_modules=targets, form=run.form, **options)
    if targets is None:
        targets = default_targets(model)
    check_any_hit(model, targets)
    for argument in ("exclude_modules", "modules_to_save"):
        check_hits(model, argument, options[argument])
    options |= dict(target_modules=targets, use_dora=run.adapter == "dora", task_type=task_type(model))
    config = peft.LoraConfig(**options)
    wrapped = peft.get_peft_model(model, config)
    if config.modules_to_save:
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))  # peft adds the head's to those named
    return wrapped


class _NothingLeft(Exception):
    """The checkpoint that a run goes on from is that of its last step."""


class _AllStepsTaken(TrainerCallback):
    """The Trainer would take one step more, where the last one was not the end of an epoch. After the other callbacks,
    which have begun then, and are ended in ``train``.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise _NothingLeft


def train(trainer: BALoraTrainer, checkpoint: str | None) -> Path:
    """Train, from ``checkpoint`` if there is one, and write the LoRA to ``<output_dir>/lora``; returns that folder."""
    result = None
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except _NothingLeft:
        tasks.say(f"train: {checkpoint} is that of the last step, {trainer.state.global_step}; none is left to take")
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        trainer.is_in_train = False
    except BaseException as error:
        if trainer.report is not None:
            trainer.report.stop(error, trainer.state)
        raise
    if result is not None:
        if checkpoint is not None:
            tasks.say(f"train: train_loss counts the steps after {checkpoint} only")
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    folder = Path(str(trainer.args.output_dir)) / LORA
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    made_of = getattr(model.get_base_model().config, RESIDUAL_BASE, None)
    if trainer.args.should_save or sharded(model):
        export_lora(model, folder, "residual" if made_of else "pretrained")
    if attachment(model)[1].config.task == "nlu" and trainer.args.should_save:
        model.config.save_pretrained(folder)  # the classes, and their names
    tasks.say(f"LoRA:  {folder} ({how_to_load(folder)}; the checkpoints are for resuming only)")
    if made_of:
        if trainer.args.should_save or sharded(model):
            export_lora(model, folder.with_name(LORA_PRETRAINED))
        tasks.say(f"       {folder.with_name(LORA_PRETRAINED)}: the same for {made_of['base_model']} in full precision")
    if trainer.report is not None and trainer.report.written:
        print(f"report: {trainer.report.path}", flush=True)
    return folder


def how_to_go_on(trainer: BALoraTrainer) -> str:
    """What is left of a run that did not end: for the user."""
    folder = Path(str(trainer.args.output_dir))
    found = resume.complete(folder)
    if found is None:
        strategy = trainer.args.save_strategy.value
        steps = f", save_steps {trainer.args.save_steps:g}" if strategy == "steps" else ""
        return f"{folder} has no complete checkpoint yet (save_strategy is {strategy}{steps})"
    return (
        f"`balora train {folder / RECIPE} --resume_from_checkpoint true` goes on from {found.name}, "
        f"`balora export {folder} OUT_DIR` writes its LoRA"
    )


def _add_report(trainer: BALoraTrainer, about: dict[str, str], recipe: dict[str, Any] | None) -> None:
    try:
        report = _import("report")
    except ImportError as error:
        tasks.say(f"report: none of this run; {error}")
        return
    folder = Path(str(trainer.args.output_dir))
    about = {**about, "Output folder": str(folder)}
    held_out = trainer.eval_dataset  # None: the report takes rows of the training data
    trainer.report = report.ReportCallback(folder / REPORT, held_out, about, {"Recipe": recipe} if recipe else None)
    trainer.add_callback(trainer.report)


def _check_run(run: RunArguments, config: BALoraConfig) -> None:
    if run.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: expected auto, float32, bfloat16 or float16, found {run.dtype!r}")
    if run.quantize not in (None, "nf4"):
        raise ValueError(f"quantize: expected nf4 or none, found {run.quantize!r}")
    if run.max_length is not None and run.max_length < 2:
        raise ValueError(f"max_length: expected at least 2 tokens, found {run.max_length}")
    if not 0 <= run.lora_dropout < 1:
        raise ValueError(f"lora_dropout: expected at least 0 and below 1, found {run.lora_dropout}")
    if run.adapter not in ("pissa", "lora", "dora"):
        raise ValueError(f"adapter: expected pissa, lora or dora, found {run.adapter!r}")
    if run.form not in FROZEN:
        raise ValueError(f"form: expected {' or '.join(map(repr, FROZEN))}, found {run.form!r}")
    if run.form == "residual" and run.lora_dropout:
        raise ValueError(f"lora_dropout: expected 0 with form='residual', found {run.lora_dropout}")
    if run.preset is not None and (asked := BALoraConfig.preset(run.preset).task) != config.task:
        raise ValueError(f"task: expected {asked!r}, as in the preset {run.preset}, found {config.task!r}")


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


def _check_vocabulary(model: str, sets: list[Tokenized]) -> None:
    vocab = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    highest = max(max(s.examples.columns["input_ids"]) for s in sets)
    if highest >= vocab:
        raise ValueError(
            f"model: the tokenizer of {model} gives token {highest}, but the model's vocabulary ends at {vocab - 1}"
        )


def _check_positions(model: Any, sets: list[Tokenized]) -> None:
    """Of a model with a table of positions a row beyond it would stop the run."""
    longest = max(int(s.examples.lengths().max()) for s in sets)
    for name, m in model.named_modules():
        if isinstance(m, torch.nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "wpe"):
            room = m.num_embeddings - (0 if m.padding_idx is None else m.padding_idx + 1)  # RoBERTa's begin behind it
            if longest > room:
                raise ValueError(f"max_length: expected at most {room}, the positions of the model, found {longest}")
