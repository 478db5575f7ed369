"""``balora bench``: which operations, implementations and sizes; tables, files, the exit status."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from . import harness, sweep, tables
from .measure import FAILED, OUTSIDE, Row, measure
from .operation import Operation, Shape
from .operations import OPERATIONS

_SLOW = 3.0 if harness.ON_GPU else 10.0  # seconds of a run, beyond which it is not timed
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 1 where an implementation of balora's was outside the error budget or failed, 2 for
    arguments that do not fit, else 0."""
    if argv[:1] == ["training_cost"]:  # of whole models, with options of its own
        try:
            from . import training_cost
        except ModuleNotFoundError as error:
            print(f"balora bench: error: training_cost needs {error.name}: pip install '.[train]'", file=sys.stderr)
            return 2
        if os.environ.get("BALORA_IMPL"):
            print("balora bench: error: BALORA_IMPL: expected not to be set for training_cost", file=sys.stderr)
            return 2
        return training_cost.main(argv[1:])
    arguments = _parser().parse_args(argv)
    try:
        names = _known("operation", arguments.operations, OPERATIONS) or OPERATIONS
        chosen = [OPERATIONS[name] for name in names]
        if arguments.list:
            print("\n\n".join(_listed(operation) for operation in chosen))
            return 0
        _check(arguments, chosen)
        wanted = set(arguments.impl)
        chosen = [o for o in chosen if not wanted or wanted & {i.name for i in o.implementations}]
        tables_of = _tables(arguments, chosen)
        sweeps_of = _sweeps(arguments, chosen)
    except ValueError as error:
        print(f"balora bench: error: {error}", file=sys.stderr)
        return 2
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
    bandwidth = harness.copy_bandwidth()
    machine = {**harness.machine(), "copy": f"{bandwidth / 1e9:.0f} GB/s"}
    print(harness.in_words(machine))
    found: list[Row] = []
    for operation, shapes in tables_of:
        rounds = arguments.rounds or (10 if harness.ON_GPU else 5)
        report = tables.Report(arguments.out, operation.name, machine, argv, rounds)
        implementations = [i for i in operation.implementations if i.name in (arguments.impl or [i.name])]
        for shape, dtype in product(shapes, arguments.dtypes or operation.defaults.dtypes):
            rows: list[Row] = []
            for term in [t for t in operation.terms if t in arguments.terms] or operation.terms:
                rows += measure(operation, shape, dtype, term, implementations, rounds, _SLOW, bandwidth)
            title = f"{operation.name}: {operation.describe(shape)}, {dtype}"
            report.add(title, tables.terminal(rows), tables.markdown(rows), rows)
            found += rows
    for operation, axis, sizes in sweeps_of:
        rounds = arguments.rounds or (5 if harness.ON_GPU else 3)
        report = tables.Report(arguments.out, f"{operation.name}-{axis}", machine, argv, rounds)
        dtype = (arguments.dtypes or operation.defaults.dtypes)[0]
        asked = arguments.impl or [i.name for i in operation.implementations if i.name != "reference"]
        implementations = [i for i in operation.implementations if i.name in asked]
        terms = [t for t in operation.terms if t in arguments.terms] or [*operation.terms[:2]]
        found += sweep.run(operation, axis, sizes, dtype, terms, implementations, rounds, _SLOW, bandwidth, report)
    bad = {row["implementation"] for row in found if row.get("own") and row["status"] in (OUTSIDE, FAILED)}
    if bad:
        print(f"balora bench: {', '.join(sorted(bad))}: outside the error budget, or failed", file=sys.stderr)
    return 1 if bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="balora bench",
        description="Time and peak memory of balora's operations and of their peers, beside a floor measured in the "
        "same rounds. Every implementation is first held against the reference in float64: one outside the error "
        "budget gets no figures (a peer up to twice outside keeps them, with a remark), and if it is balora's the exit "
        "status is 1. `balora bench training_cost --help`: what "
        "a whole training step costs, of every method.",
        allow_abbrev=False,
    )
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help=f"of {', '.join(OPERATIONS)} (default: all)")
    parser.add_argument("--impl", nargs="+", default=[], metavar="NAME", help="implementations (default: all; --list)")
    parser.add_argument(
        "--shapes", nargs="+", default=[], metavar="SHAPE", help="as 512,1024,32000 (--list: their axes)"
    )
    parser.add_argument("--dtypes", nargs="+", default=[], metavar="TYPE", help=f"of {', '.join(_DTYPES)}")
    parser.add_argument(
        "--terms", nargs="+", default=[], metavar="TERMS", help="of linear_objective: all, ce+kl, ce, kl"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="of the interleaved timings")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a folder for tables (Markdown, CSV) and plots (PNG)")
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="AXIS",
        help="N, V: double that size and measure each, from the first to the last of two --shapes; the reference takes "
        "part where --impl names it. With --out and without this option tables, then both sweeps of linear_objective; "
        "none: tables alone",
    )
    parser.add_argument(
        "--list", action="store_true", help="operations, shapes and implementations; what cannot run, why"
    )
    return parser


def _check(arguments: argparse.Namespace, chosen: Sequence[Operation]) -> None:
    """Raise for an argument that does not fit; the message names it."""
    _known("--impl", arguments.impl, dict.fromkeys(i.name for o in chosen for i in o.implementations))
    _known("--terms", arguments.terms, dict.fromkeys(t for o in chosen for t in o.terms))
    _known("--dtypes", arguments.dtypes, _DTYPES)
    _known("--sweep", arguments.sweep or [], ("N", "V", "none"))
    if arguments.rounds is not None and arguments.rounds < 1:
        raise ValueError(f"--rounds: expected at least 1, found {arguments.rounds}")
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out: expected a folder, found the file {arguments.out}")
    if os.environ.get("BALORA_IMPL"):
        raise ValueError("BALORA_IMPL: expected not to be set: balora bench runs what --impl names")


def _tables(arguments: argparse.Namespace, chosen: Sequence[Operation]) -> list[tuple[Operation, Sequence[Shape]]]:
    """The operations of which tables are asked for, with their shapes."""
    if arguments.sweep and arguments.sweep != ["none"]:
        return []
    return [(o, [_shape(text, o) for text in arguments.shapes] or o.defaults.shapes) for o in chosen]


def _sweeps(arguments: argparse.Namespace, chosen: Sequence[Operation]) -> list[tuple[Operation, str, list[Shape]]]:
    """The sweeps that are asked for: operation, axis, shapes."""
    axes = arguments.sweep
    if axes is None:
        axes = ["N", "V"] if arguments.out and not arguments.shapes else []
        chosen = [o for o in chosen if o.name == "linear_objective"]
    elif "none" in axes:
        axes = []
    elif not arguments.operations:
        chosen = [o for o in chosen if o.defaults.sweeps]
    found = []
    for operation, axis in product(chosen, axes):
        if not operation.defaults.sweeps:
            able = ", ".join(o.name for o in OPERATIONS.values() if o.defaults.sweeps)
            raise ValueError(f"--sweep: expected one of {able}, found {operation.name}")
        ends = [_shape(text, operation) for text in arguments.shapes] or operation.defaults.sweeps[axis]
        if [a for a, *sizes in zip(operation.axes, *ends, strict=True) if len({*sizes}) > 1] != [axis] or len(
            ends
        ) != 2:
            raise ValueError(
                f"--shapes: expected with --sweep {axis} the first and the last shape, which differ in {axis} alone, "
                f"found {' '.join(arguments.shapes)}"
            )
        found.append((operation, axis, sweep.shapes(*ends)))
    if found and arguments.out and find_spec("matplotlib") is None:
        raise ValueError("--out: the plots need matplotlib, which is not installed: pip install matplotlib")
    return found


def _known(argument: str, names: Iterable[str], known: Collection[str]) -> list[str]:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{argument}: expected one of {', '.join(known)}, found {name!r}{hint}")
    return list(names)


def _shape(text: str, operation: Operation) -> Shape:
    numbers = text.split(",")
    if len(numbers) != len(operation.axes) or not all(n.isdigit() and int(n) > 0 for n in numbers):
        raise ValueError(
            f"--shapes: expected {','.join(operation.axes)} for {operation.name}, "
            f"as {','.join(map(str, operation.defaults.shapes[0]))}, found {text!r}"
        )
    return tuple(map(int, numbers))


def _listed(operation: Operation) -> str:
    shapes = " ".join(",".join(map(str, shape)) for shape in operation.defaults.shapes)
    lines = [operation.name, f"  shapes {','.join(operation.axes)}: {shapes}"]
    for i in operation.implementations:
        terms = f" [{' '.join(i.terms)}]" if len(operation.terms) > 1 else ""
        lines.append(f"  {i.name:20}{'runs' if (reason := i.why_not()) is None else f'not here: {reason}'}{terms}")
    return "\n".join(lines)
