"""``balora compare``: one recipe under several methods and seeds, each run in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm.auto import tqdm

from . import files, quantized, sources
from .compare_page import Page, render
from .compare_run import FAILED, PROGRESS, RESULT, SPECIFICATION, TRAINED, write_json
from .results import Result, csv_table, markdown_table, measures_of, terminal_table

WEIGHTS = ("lambda_consistency", "lambda_diversity", "lambda_svd")
PAGE = "compare.html"
_COMMAND = [sys.executable, "-m", "balora.cli", "compare-run"]  # of a run, before its folder and our process id
_POLL = 0.2  # seconds
_PATIENCE = 10.0  # seconds that a run has to end when it is told to
_LAST_LINES = 4  # of a failed run's log


class Method(NamedTuple):
    adapter: str
    weights: tuple[str, ...]  # the λ of the recipe that stay; the others are 0
    title: str


METHODS = {
    "lora": Method("lora", (), "LoRA"),
    "pissa": Method("pissa", (), "PiSSA"),
    "dora": Method("dora", (), "DoRA"),
    "lora_reg": Method("lora", WEIGHTS, "LoRA + Reg"),
    "dora_reg": Method("dora", WEIGHTS, "DoRA + Reg"),
    "balora": Method("pissa", WEIGHTS, "BA-LoRA"),
    "consistency": Method("pissa", ("lambda_consistency",), "PiSSA + consistency"),
    "diversity": Method("pissa", ("lambda_diversity",), "PiSSA + diversity"),
    "svd": Method("pissa", ("lambda_svd",), "PiSSA + SVD"),
}


@dataclass
class CompareArguments:
    """What ``balora compare`` needs beside the options of ``balora train``."""

    methods: list[str] = field(
        default_factory=lambda: ["lora", "pissa", "balora"],
        metadata={
            "help": "what to compare: lora, pissa and dora train on the cross-entropy alone; lora_reg, dora_reg and "
            "balora (PiSSA) with the recipe's three λ; consistency, diversity and svd are PiSSA with that one λ"
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [42, 1024, 2024], metadata={"help": "each method is run once with each of them"}
    )
    drift_data: str | None = field(
        default=None,
        metadata={"help": "a text file; on it the drift from the pre-trained model and the perplexity are measured"},
    )
    drift_windows: int = field(default=32, metadata={"help": "so many windows of up to 256 tokens of drift_data"})
    generations: int = field(
        default=32, metadata={"help": "greedy answers to so many prompts of eval_data, for distinct-n; 0: none"}
    )
    new_tokens: int = field(default=64, metadata={"help": "length of those answers, at most"})


@dataclass(frozen=True)
class Run:
    """One method, or one value of a sweep, with one seed."""

    group: str  # a method, or sweep_NAME_VALUE
    seed: int
    folder: Path
    specification: Mapping[str, Any]  # the options of its training and of its measures

    @property
    def name(self) -> str:
        return f"{self.group} {self.seed}"


@dataclass
class Comparison:
    """All runs, and which of them belong to which point of a sweep."""

    folder: Path
    runs: list[Run]
    titles: dict[str, str]  # of the groups, in the order of the table
    sweeps: dict[str, list[tuple[Any, str]]]  # option -> its values and their groups
    about: dict[str, str]
    recipe: dict[str, Any]
    unit: str  # of the loss


# What turns options into the argument objects of a run: (RunArguments, BALoraConfig, TrainingArguments).
Parse = Callable[[Mapping[str, Any]], Sequence[Any]]


def plan(
    arguments: CompareArguments, sweeps: Sequence[Sequence[str]], asked: Mapping[str, Any], parse: Parse
) -> Comparison:
    """Check everything that can be known before a model is built, and name the runs.

    Args:
        sweeps: each an option of ``balora train`` and its values; runs of the method balora.
        asked: the options of ``balora train`` that were given. Its adapter and seed give way to methods and seeds.
        parse: raises where options do not fit.

    Raises:
        ValueError, TypeError, OSError: something does not fit, or the folder holds runs of another recipe. Nothing has
            been trained or written then.
    """
    folder = Path(asked["output_dir"])
    # A token of the hub is for nothing that a run does, and must stand neither in its files nor on the page.
    kept = {k: v for k, v in asked.items() if k not in ("output_dir", "adapter", "seed") and not k.endswith("_token")}
    run, config, _ = parse(kept)
    _check_arguments(arguments, run, config)
    options = {}
    for name in arguments.methods:
        if METHODS[name].weights and not any(getattr(config, w) for w in METHODS[name].weights):
            raise ValueError(f"methods: expected a λ above 0 in the recipe for {name}, found 0")
        options[name] = _options_of(name, kept, config)
    points: dict[str, list[tuple[Any, str]]] = {}
    for sweep, *values in sweeps:
        points[sweep] = points.get(sweep, []) + _swept(sweep, values, kept, config, parse, options)
    titles = {name: METHODS[name].title for name in arguments.methods}
    titles |= {g: f"BA-LoRA, {name} = {v}" for name, found in points.items() for v, g in found if g not in titles}
    measures = {k: v for k, v in vars(arguments).items() if k not in ("methods", "seeds")}
    runs = [
        Run(group, seed, folder / group / str(seed), {"options": {**chosen, "seed": seed}, "measures": measures})
        for seed in arguments.seeds  # seed by seed: the table is of use early
        for group, chosen in options.items()
    ]
    for one in runs:
        _check_unchanged(one)
    about = {"Model": run.model, "Training data": _with_split(run.data, run.data_split)}
    about["Evaluation data"] = _with_split(run.eval_data, run.eval_split)
    return Comparison(
        folder, runs, titles, points, about, kept, "mean over the rows" if config.task == "nlu" else "nats a token"
    )


def _options_of(method: str, kept: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The options of a run. One checkpoint and no bar of its own, where nothing else was asked for."""
    adapter, weights, _ = METHODS[method]
    chosen = {w: getattr(config, w) if w in weights else 0.0 for w in WEIGHTS}
    return {"save_total_limit": 1, "disable_tqdm": True, **kept, "adapter": adapter, **chosen}


def _swept(
    sweep: str, values: Sequence[str], kept: Mapping[str, Any], config: Any, parse: Parse, options: dict[str, Any]
) -> list[tuple[Any, str]]:
    """(value, group) of each point; new groups are added to ``options``."""
    if not values:
        raise ValueError(f"sweep: expected an option and its values, found {sweep!r} alone")
    base = _options_of("balora", kept, config)
    parsed = {k: v for part in parse(base) for k, v in vars(part).items()}
    if parsed["lora_alpha"] is None:
        parsed["lora_alpha"] = parsed["r"]
    if sweep not in parsed or sweep in ("seed", "adapter", "output_dir"):
        raise ValueError(f"sweep: expected an option of balora train (not seed, adapter, output_dir), found {sweep!r}")
    found: list[tuple[Any, str]] = []
    for text in values:
        if not re.fullmatch(r"[\w.+-]+", str(text)):
            raise ValueError(f"sweep: expected values of letters, digits and . + - _, found {text!r} for {sweep}")
        chosen = {**base, sweep: yaml.safe_load(str(text))}
        parts = parse(chosen)
        _check_base(parts[0])
        value = {k: v for part in parts for k, v in vars(part).items()}[sweep]
        value = getattr(value, "value", value)
        if any(value == other for other, _ in found):
            raise ValueError(f"sweep: expected different values of {sweep}, found {text} twice")
        group = f"sweep_{sweep}_{text}"
        if "balora" in options and value == parsed[sweep]:
            group = "balora"  # the recipe's own value: that run is there already
        options.setdefault(group, chosen)
        found.append((value, group))
    return found


def _check_arguments(arguments: CompareArguments, run: Any, config: Any) -> None:
    for name, values in (("methods", arguments.methods), ("seeds", arguments.seeds)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}: expected different ones, at least one, found {' '.join(map(str, values))}")
    unknown = [m for m in arguments.methods if m not in METHODS]
    if unknown:
        raise ValueError(f"methods: expected some of {', '.join(METHODS)}, found {unknown[0]!r}")
    for name, least in (("drift_windows", 1), ("generations", 0), ("new_tokens", 1)):
        if getattr(arguments, name) < least:
            raise ValueError(f"{name}: expected at least {least}, found {getattr(arguments, name)}")
    _check_base(run)
    if run.eval_data is None:
        raise ValueError("eval_data: expected data to measure the runs on, found none")
    sources.find(run.data, run.data_split, "train")
    sources.find(run.eval_data, run.eval_split, "test")
    if arguments.drift_data is not None and not Path(arguments.drift_data).read_text(encoding="utf-8").strip():
        raise ValueError(f"drift_data: expected a text file, found an empty one at {arguments.drift_data}")


def _check_base(run: Any) -> None:
    """The runs' LoRAs are measured on the base that ``run.model`` names, loaded as it is."""
    prepared = quantized.is_prepared(run.model)
    if prepared or run.quantize is not None:
        found = f"the 4-bit residual of balora quantize in {run.model}" if prepared else f"quantize={run.quantize!r}"
        raise ValueError(f"{'model' if prepared else 'quantize'}: expected a base in full precision, found {found}")


def _check_unchanged(run: Run) -> None:
    """A folder that holds the run, finished or with a checkpoint, must hold it with these options."""
    try:
        there = json.loads((run.folder / SPECIFICATION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if run.folder.exists() and any(run.folder.iterdir()):
            raise ValueError(
                f"output_dir: expected runs of balora compare, found other files in {run.folder}"
            ) from None
        return
    if not (any((run.folder / name).exists() for name in (RESULT, TRAINED)) or any(run.folder.glob("checkpoint-*"))):
        return
    for part, values in run.specification.items():
        for name in sorted({*values, *there[part]}):
            then, now = (json.loads(json.dumps(v.get(name))) for v in (there[part], values))
            if then != now:
                raise ValueError(
                    f"{name}: expected {then!r}, as in {run.folder}, found {now!r}; compare in another output_dir, or "
                    "remove that folder"
                )


def _with_split(name: str, split: str | None) -> str:
    return name if split is None else f"{name}, split {split}"


# ---- the runs ----


def run_all(comparison: Comparison) -> list[Result]:
    """Make the runs that are not finished, one after the other, and keep table and page up to date.

    A run that fails leaves the others alone; it is shown as failed, and begun again the next time. On an interrupt the
    process of the running one is ended first; the next time it goes on from its checkpoint.

    Returns: the results of all runs, failed ones without measures.

    Raises:
        KeyboardInterrupt: with the message how to go on.
    """
    comparison.folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(comparison.runs), unit="run", disable=None, bar_format=_BAR) as bar:
        for done, run in enumerate(comparison.runs):
            if result_of(run) is None:
                bar.set_description(run.name)
                try:
                    _make(run, partial(_show, bar, done))
                except KeyboardInterrupt:
                    left = sum(result_of(r) is None for r in comparison.runs)
                    raise KeyboardInterrupt(
                        f"stopped in {run.name}; the same command goes on with the {left} runs that are left"
                    ) from None
                failure = _failure(run)
                if failure:
                    tqdm.write(f"{run.name} failed; its log: {run.folder / 'log.txt'}\n  {failure}")
            _show(bar, done, 1.0)
            found = _write_results(comparison, running=done + 1 < len(comparison.runs))
    return found


_BAR = "{desc}: {percentage:.0f} %|{bar}| {n:.1f} of {total} runs [{elapsed}<{remaining}]"


def _show(bar: Any, done: int, share: float) -> None:
    """So many runs, and that share of one more."""
    bar.n = done + share
    bar.refresh()


def _make(run: Run, progress: Callable[[float], None]) -> None:
    """One run in a process of its own; its output goes to log.txt."""
    run.folder.mkdir(parents=True, exist_ok=True)
    for old in (FAILED, PROGRESS):
        (run.folder / old).unlink(missing_ok=True)
    write_json(run.folder / SPECIFICATION, {"group": run.group, "seed": run.seed, **run.specification})
    with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
        # A session of its own: an interrupt from the terminal reaches this process only, which then ends that one.
        process = subprocess.Popen(
            [*_COMMAND, str(run.folder), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            while process.poll() is None:
                progress(_share(run.folder / PROGRESS))
                time.sleep(_POLL)
        finally:
            signal.signal(signal.SIGTERM, before)
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    if result_of(run) is None:
        write_json(run.folder / FAILED, {"why": _why(run.folder / "log.txt", process.returncode)})


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _share(progress: Path) -> float:
    try:
        step, steps = map(int, progress.read_text().split())
    except (OSError, ValueError):
        return 0.0
    return 0.9 * step / max(steps, 1)  # the rest is for the measures


def _why(log: Path, status: int) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ended = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{ended}: {' / '.join(lines[-_LAST_LINES:] if status < 0 else lines[-1:])[-500:]}"


def result_of(run: Run) -> dict[str, Any] | None:
    """What a finished run wrote; None while there is nothing."""
    try:
        return json.loads((run.folder / RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _failure(run: Run) -> str:
    try:
        return json.loads((run.folder / FAILED).read_text(encoding="utf-8"))["why"]
    except FileNotFoundError:
        return ""


def _write_results(comparison: Comparison, running: bool) -> list[Result]:
    found = []
    for run in comparison.runs:
        got = result_of(run) or {}
        found.append(Result(run.group, run.seed, got.get("measures"), got, "" if got else _failure(run)))
    folder = comparison.folder
    write_json(folder / "results.json", [vars(r) for r in found])
    files.write(folder / "table.md", markdown_table(found, comparison.titles))
    files.write(folder / "table.csv", csv_table(found))
    about = (comparison.about, comparison.titles, found, comparison.sweeps, comparison.recipe)
    page = Page(*about, unit=comparison.unit, running=running)
    files.write(folder / PAGE, render(page))
    return found


def summary(comparison: Comparison, found: list[Result]) -> str:
    """The table for a terminal, and where the rest is."""
    lines = []
    if any(measures_of(found)):
        lines.append(terminal_table(found, comparison.titles))
    failed = [f"{r.group} {r.seed}" for r in found if r.failure]
    if failed:
        lines.append(f"failed: {', '.join(failed)}; the same command tries them again")
    lines.append(f"page: {comparison.folder / PAGE}")
    return "\n".join(lines)
