"""The command line: argument parsing, no logic."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import traceback
from typing import Any

from . import __version__, _import, info


def main(argv: list[str] | None = None) -> int:
    """``balora train | export | compare | quantize | bench | info …``; returns the exit status: 0, 1 where a run
    failed or a result of a benchmark was wrong, 2 for arguments or data that do not fit, 130 for an interruption."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare-run"]:  # the process of one run of a comparison
        return _compare_run(*argv[1:])
    parser = argparse.ArgumentParser(
        prog="balora", description="BA-LoRA fine-tuning: output regularizers without the [tokens, vocabulary] tensors."
    )
    parser.add_argument("--version", action="version", version=f"balora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("train", add_help=False, help="fine-tune a model; `balora train --help` lists every option")
    commands.add_parser("export", add_help=False, help="the LoRA of a run that was ended early, from its checkpoint")
    commands.add_parser(
        "compare",
        add_help=False,
        help="several methods and seeds, one table; `balora compare --help` lists every option",
    )
    commands.add_parser("quantize", add_help=False, help="split a model into 4-bit weights and PiSSA adapters to train")
    commands.add_parser("bench", add_help=False, help="time and memory of every operation, beside its peers")
    commands.add_parser("info", help="versions, devices, which implementation runs, and why the others do not")
    command = parser.parse_args(argv if argv[:1] == ["info"] else argv[:1]).command
    run = {"train": _train, "export": _export, "compare": _compare, "quantize": _quantize, "bench": _bench}
    try:
        if command != "info":
            return run[command](argv[1:])
        info()
        sys.stdout.flush()
    except BrokenPipeError:
        if command != "info" and not {"-h", "--help"} & set(argv):
            raise
        # Who reads it has seen enough, as head does. Else Python's last flush raises it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _train(argv: list[str]) -> int:
    try:
        run = _import("train")
        asked, parsed = _train_arguments(run, argv)
        ready = run.setup(*parsed, recipe=asked)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"balora train: error: {error}", file=sys.stderr)
        return 2
    try:
        run.train(*ready)
    except KeyboardInterrupt:
        print(f"\nbalora train: interrupted; {run.how_to_go_on(ready[0])}", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        print(f"balora train: the run failed; {run.how_to_go_on(ready[0])}", file=sys.stderr)
        return 1
    return 0


def _export(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="balora export",
        description="The LoRA that `balora train` writes at its end, made from a checkpoint of a run that did not get "
        "there. It is a plain PEFT LoRA, which loads without balora. Neither the base model nor the data are read.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        help="output folder of `balora train`, of which the newest complete checkpoint is taken, or one checkpoint",
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", help="a new or empty folder")
    parser.add_argument(
        "--onto",
        choices=("pretrained", "residual"),
        help="what the LoRA is for: the full-precision model (pretrained), or the 4-bit weights of `balora quantize` "
        "(residual, the default of a run on those; of other runs pretrained is all there is)",
    )
    options = parser.parse_args(argv)
    try:
        export = _import("export")
        checkpoint = export.export_run(options.run_dir, options.out_dir, options.onto)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"balora export: error: {error}", file=sys.stderr)
        return 2
    print(f"LoRA:  {options.out_dir}, of {checkpoint} ({export.how_to_load(options.out_dir)})")
    return 0


def _compare(argv: list[str]) -> int:
    try:
        run, compare = _import("train"), _import("compare")
        parser = _train_parser(run, compare.CompareArguments)
        parser.prog = "balora compare"
        parser.usage = (
            "balora compare recipe.yaml --output_dir DIR [--methods METHOD ...] [--seeds SEED ...]\n"
            "                      [--sweep OPTION VALUE ...] [options of balora train]"
        )
        parser.description = (
            "Train and measure several methods with the same recipe, data, budget and seeds. A recipe is that of "
            "`balora train`, with eval_data and a base in full precision; its adapter and seed give way to --methods "
            "and --seeds, and it may hold the options of this command too (sweep: {r: [4, 16]}). Each run is a folder "
            "OUTPUT_DIR/METHOD/SEED and a process; finished ones are not repeated. The results: table.md, table.csv, "
            "results.json and the page compare.html."
        )
        parser.add_argument(
            "--sweep",
            nargs="+",
            action="append",
            default=[],
            metavar=("OPTION", "VALUE"),
            help="an option of balora train and its values, each a run of the method balora; may be given again. "
            "Other options stay: with r, a lora_alpha that is set",
        )
        _describe(parser, output_dir="folder of all runs, each in METHOD/SEED; finished ones are not repeated")
        _describe(parser, resume_from_checkpoint=argparse.SUPPRESS)  # an interrupted run always goes on
        for option, instead in (("--adapter", "--methods"), ("--seed", "--seeds")):
            if _given(option, argv):
                raise ValueError(f"{option[2:]}: expected {instead} in its place, found {option}")
        asked, (*_, own, more) = _parsed(parser, argv)
        beside = {*vars(own), *vars(more)}
        asked = {name: value for name, value in asked.items() if name not in beside}

        def parse(options: Any) -> Any:
            return _parsed(_train_parser(run), ["--output_dir=.", *_as_arguments(options)])[1]

        comparison = compare.plan(own, more.sweep, asked, parse)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"balora compare: error: {error}", file=sys.stderr)
        return 2
    try:
        found = compare.run_all(comparison)
    except KeyboardInterrupt as stop:
        print(f"balora compare: {stop}", file=sys.stderr)
        return 130
    print(compare.summary(comparison, found))
    return 1 if any(result.failure for result in found) else 0


def _compare_run(folder: str, parent: str) -> int:
    from pathlib import Path

    try:
        run, compare_run = _import("train"), _import("compare_run")
        specification = json.loads((Path(folder) / compare_run.SPECIFICATION).read_text(encoding="utf-8"))
        options = {**specification["options"], "output_dir": folder, "resume_from_checkpoint": "true"}
        parsed = _parsed(_train_parser(run), _as_arguments(options))[1]
        compare_run.perform(Path(folder), int(parent), specification, parsed)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _quantize(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="balora quantize",
        description="Split a causal language model into W_res = W − s·B₀A₀ in 4 bits (NF4) and PiSSA adapters in full "
        "precision. `balora train --model OUTPUT_DIR` trains the adapters; alone the 4-bit weights are no model.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="folder or name of a causal language model in full precision")
    parser.add_argument("--output_dir", required=True, help="a new or empty folder")
    parser.add_argument("--r", type=int, default=128, help="rank of the adapters (default: 128)")
    parser.add_argument("--lora_alpha", type=float, help="their scaling times their rank (default: r)")
    parser.add_argument("--target_modules", nargs="+", help="layers to adapt, or one pattern; the others are quantized")
    parser.add_argument("--exclude_modules", nargs="+", help="layers of those to leave out")
    parser.add_argument("--double_quant", action="store_true", help="quantize the scales of the blocks too")
    parser.add_argument("--dtype", default="auto", help="of the adapters' start: auto (the checkpoint's), float32, …")
    options = vars(parser.parse_args(argv))
    try:
        quantized = _import("quantized")
        errors = quantized.quantize(**{name: value for name, value in options.items() if value is not None})
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"balora quantize: error: {error}", file=sys.stderr)
        return 2
    print(quantized.summary(errors))
    print(f"model: {options['output_dir']} (balora train --model {options['output_dir']} …)")
    return 0


def _bench(argv: list[str]) -> int:
    try:
        from balora_bench import cli
    except ModuleNotFoundError as error:
        hint = " (the source is in benchmarks/)" if error.name == "balora_bench" else ""
        print(f"balora bench: error: {error}{hint}", file=sys.stderr)
        return 2
    return cli.main(argv)


def _train_arguments(run: Any, argv: list[str]) -> tuple[dict[str, Any], tuple]:
    """What the user asked for, by name, and the three argument objects made of it."""
    return _parsed(_train_parser(run), argv)


# What TrainingArguments has for scripts of another kind, and why not here.
_NO_OPTIONS = {
    "do_train": "it always trains",
    "do_eval": "eval_data are evaluated at the end, and as eval_strategy says",
    "do_predict": "it writes no predictions",
}
# In place of Hugging Face's; hidden is what does nothing here, or is refused.
_HELP = {
    "output_dir": "folder of the run: checkpoints, recipe.yaml, report.html, at the end lora; a new one, but to resume",
    "resume_from_checkpoint": "true: go on from the newest complete checkpoint in output_dir, or begin anew where "
    "there is none; or the folder of a checkpoint",
    **dict.fromkeys(_NO_OPTIONS, argparse.SUPPRESS),
    **dict.fromkeys(("label_smoothing_factor", "use_liger_kernel", "liger_kernel_config"), argparse.SUPPRESS),
    "local_rank": argparse.SUPPRESS,  # torch.distributed.launch gives it to every script
}


def _describe(parser: argparse.ArgumentParser, **help_of: str) -> None:
    for action in parser._actions:
        action.help = help_of.get(action.dest, action.help)


def _train_parser(run: Any, *further: type) -> Any:
    """The parser of ``balora train``, with the fields of further dataclasses."""
    from transformers import HfArgumentParser

    from .config import BALoraConfig

    parser = HfArgumentParser(
        (run.RunArguments, BALoraConfig, run.TrainingArguments, *further),
        prog="balora train",
        usage="balora train --model DIR_OR_NAME --data FILE --output_dir DIR [options]\n"
        "       balora train recipe.yaml [options]",
        description="Fine-tune a language model, with --task nlu a classifier or a regression, with PiSSA adapters "
        "and the BA-LoRA objective. A recipe is a YAML file of the same options; options on the command line win. The "
        "trained LoRA goes to OUTPUT_DIR/lora, a page with plots of the run to OUTPUT_DIR/report.html.",
        allow_abbrev=False,
    )
    parser.set_defaults(**run.TRAINING_DEFAULTS)
    _describe(parser, **_HELP)
    for action in parser._actions:
        action.required |= action.dest == "output_dir"  # not a default folder of somebody else's name
        if action.dest == "svd_rank":  # annotated as a float; 10 is a number of singular values, 0.3 a fraction of them
            action.type = _rank
    return parser


def _parsed(parser: Any, argv: list[str]) -> tuple[dict[str, Any], tuple]:
    """What the user asked for, by name, and the argument objects made of it."""
    actions = {option: action for action in parser._actions for option in action.option_strings}
    known = set(actions)
    asked: dict[str, Any] = {}
    if argv and not argv[0].startswith("-"):
        asked = _read_recipe(argv[0], actions)
        argv = argv[1:]
    both = [*_as_arguments(asked), *argv]
    parser.set_defaults(**_preset(both).to_dict())
    *parsed, rest = parser.parse_args_into_dataclasses(both, return_remaining_strings=True, look_for_args_file=False)
    if rest:
        raise ValueError(f"unknown argument {rest[0]}{_did_you_mean(rest[0], known)}")
    given = {a.dest for a in parser._actions if any(o in known and _given(o, argv) for o in a.option_strings)}
    values = {k: v for part in parsed for k, v in vars(part).items()}
    for name, value in vars(parser.parse_known_args(both)[0]).items():
        if name in given:  # TrainingArguments makes others of some, which cannot be read back
            asked[name] = _plain(values[name] if values.get(name) == value else value)
    asked.pop("resume_from_checkpoint", None)  # said of one start, not of the run
    for name in asked.keys() & _NO_OPTIONS.keys():
        raise ValueError(f"{name}: expected no such option ({_NO_OPTIONS[name]}), found {asked[name]!r}")
    return asked, tuple(parsed)


def _preset(argv: list[str]) -> Any:
    """The settings that the options in ``argv`` change: those of the preset that it names, or of its task."""
    from .config import BALoraConfig

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--task", default="nlg")
    asked, _ = first.parse_known_args(argv)
    return BALoraConfig.preset(asked.preset or ("nlu_2025" if asked.task == "nlu" else "nlg_2025"))


def _rank(text: str) -> float:
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _read_recipe(path: str, actions: dict[str, argparse.Action]) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            recipe = yaml.safe_load(file)
    except OSError as error:
        raise ValueError(f"recipe: expected a YAML file, found {error.strerror} at {path}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: expected YAML, found {str(error).splitlines()[0]}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: expected a mapping of option names to values, found {type(recipe).__name__}")
    for name, value in recipe.items():
        action = actions.get(f"--{name}")
        if action is None:
            raise ValueError(f"{path}: unknown option {name!r}{_did_you_mean(f'--{name}', set(actions))}")
        if isinstance(value, list) and action.nargs is None:
            raise ValueError(f"{path}: {name}: expected one value, found the list {value}")
        if value is False and action.nargs is None and getattr(action.type, "__name__", "") != "string_to_bool":
            recipe[name] = "no"  # YAML reads a bare no as false
    return recipe


def _as_arguments(options: dict[str, Any]) -> list[str]:
    arguments: list[str] = []
    for name, value in options.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)] if value else []
        elif name == "sweep" and isinstance(value, dict):
            for option, values in value.items():
                arguments += ["--sweep", option, *map(str, values if isinstance(values, list) else [values])]
        elif value is not None:
            arguments.append(f"--{name}={json.dumps(value) if isinstance(value, (dict, bool)) else value}")
    return arguments


def _did_you_mean(option: str, known: set[str]) -> str:
    close = difflib.get_close_matches(option, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _given(option: str, argv: list[str]) -> bool:
    return any(a == option or a.startswith(f"{option}=") for a in argv)


def _plain(value: Any) -> Any:
    """A value as YAML can hold it: enumerations by their value."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    value = getattr(value, "value", value)
    return value if isinstance(value, (str, int, float, bool, dict, type(None))) else str(value)


if __name__ == "__main__":
    sys.exit(main())
