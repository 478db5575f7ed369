"""What a run goes on from, and that it goes on with what it began with: data, optimizer, adapters, classes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from . import checkpoints, tasks
from .adapters import ADAPTER, checkpoint_form
from .sources import located

RECIPE = "recipe.yaml"
LORA = "lora"
CLASSES = "classes.json"  # of a classifier, in the order of its outputs

# What the Trainer takes from the state of the optimizer in the checkpoint, whatever it is told; another optimizer would
# get the state of this one. max_grad_norm, the seeds, and of most schedules the shape and the warm-up, do change.
_OPTIMIZER = ("learning_rate", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs")
_KEPT_SCHEDULES = {"reduce_lr_on_plateau", "greedy"}  # are in the checkpoint with all that they were made with


def checkpoint(training: TrainingArguments) -> str | None:
    """The checkpoint to resume from: the named one, or for ``true`` the last complete one of the output folder."""
    folder = Path(str(training.output_dir))
    if folder.is_file():
        raise ValueError(f"output_dir: expected a folder, found the file {folder}")
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    if training.should_save and not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir: expected a folder to write to, found {there}, where this user may not write")
    found = checkpoints.newest_first(folder)
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
        if not checkpoints.resumable(Path(asked)):
            raise ValueError(f"resume_from_checkpoint: expected 'true' or a complete checkpoint, found {asked!r}")
        return str(asked)
    path = complete(folder)
    if path is not None:
        tasks.say(f"resume: from {path}")
        return str(path)
    tasks.say(f"resume: no complete checkpoint in {folder}, starting from the beginning")
    return None


def complete(folder: Path) -> Path | None:
    """The newest checkpoint of the output folder that a run can go on from."""
    return checkpoints.newest(folder, checkpoints.resumable, lambda text: tasks.say(f"resume: {text}"))


def settled(run: Any, training: TrainingArguments) -> dict[str, Any]:
    """The options that a run cannot change when it goes on, with their values, defaults too."""
    found = {"data": located(run.data), "data_split": run.data_split}
    for name in (*_OPTIMIZER, *_SCHEDULE):
        value = getattr(training, name)
        found[name] = getattr(value, "value", value)
    return found


def recipe_text(recipe: dict[str, Any]) -> str:
    """The recipe as a file: without secrets, and with absolute paths, so that it means the same from any folder."""
    kept = {name: value for name, value in recipe.items() if not name.endswith("_token")}
    for name in ("model", "data", "eval_data"):
        if isinstance(kept.get(name), str):
            kept[name] = located(kept[name])
    if "output_dir" in kept:
        kept["output_dir"] = os.path.abspath(kept["output_dir"])
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def check_recipe(run: Any, training: TrainingArguments, checkpoint: str) -> None:
    """A run goes on with the data and the optimizer that it began with: the recipe must not hold what was not used."""
    path = Path(checkpoint) / RECIPE
    if not path.is_file():  # not one of `balora train`
        return
    now, then = settled(run, training), yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(then, dict):
        raise ValueError(f"resume_from_checkpoint: expected options and their values in {path}, found {then!r}")
    kept_schedule = _KEPT_SCHEDULES & {then.get("lr_scheduler_type"), now["lr_scheduler_type"]}
    for name in now:
        if name not in then or (name in _SCHEDULE and not kept_schedule):
            continue
        if now[name] != then[name]:
            why = "the checkpoint's optimizer goes on with its own"
            if name.startswith("data"):
                why = "a run goes on with the data that it began with (where they only moved, change it there)"
            raise ValueError(f"{name}: expected {then[name]}, as in {path}, found {now[name]}; {why}")


def check_classes(classes: list[str], checkpoint: str) -> None:
    """A run goes on with the classes that it began with: as many others would take over the outputs of those."""
    path = Path(checkpoint).parent / CLASSES
    then = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else classes  # older runs have none
    if then != classes:
        there, here = (f"the classes {tasks.listed(names)}" if names else "a regression" for names in (then, classes))
        raise ValueError(f"label: expected {there}, as in {checkpoint}; found {here}")


def check_adapters(model: Any, form: str | None, checkpoint: str) -> None:
    """A checkpoint goes on with the adapters that it was made with: others would give its factors another meaning."""
    made = checkpoint_form(checkpoint)
    if made != form:
        name = "form" if made and form else "adapter"
        raise ValueError(f"{name}: expected {made or 'no PiSSA'!r}, as in {checkpoint}, found {form or 'no PiSSA'!r}")
    now = model.peft_config[ADAPTER].to_dict()
    then = json.loads((Path(checkpoint) / "adapter_config.json").read_text())
    if now["use_dora"] != then["use_dora"]:
        asked, found = ("dora" if x["use_dora"] else "lora" for x in (then, now))
        raise ValueError(f"adapter: expected {asked!r}, as in {checkpoint}, found {found!r}")
    for name in ("r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save"):
        here, there = (sorted(x[name]) if isinstance(x[name], (list, set)) else x[name] for x in (now, then))
        if here != there:
            raise ValueError(
                f"{name}: expected {there}, as in {checkpoint}, found {here}; a run goes on with the adapters that it "
                "began with"
            )
