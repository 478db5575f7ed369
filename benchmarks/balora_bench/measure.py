"""One case of an operation, all its implementations: the gate, memory, then interleaved timings beside the floor."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from . import harness
from .operation import Case, Function, Implementation, Operation, Shape
from .operations import OPERATIONS

Row = dict[str, Any]
# What became of a row. The first has figures; of balora's own, the second and third end the command with status 1.
MEASURED, OUTSIDE, FAILED, NOT_HERE, STOPPED = "measured", "outside the budget", "failed", "not here", "stopped"

# How far a peer may be outside the budget, as a multiple of what is allowed, and keep its figures, with a remark: that
# it adds gradients up in half precision, as cut-cross-entropy does (1.6), is its choice and no mistake.
PEER = 2


class Refused(Exception):
    """Why an implementation gets no figures: the status of its row, and the words."""

    def __init__(self, status: str, words: str) -> None:
        super().__init__(words)
        self.status = status


def measure(
    operation: Operation,
    shape: Shape,
    dtype: str,
    terms: str,
    implementations: Sequence[Implementation],
    rounds: int,
    slow: float,
    bandwidth: float,
) -> list[Row]:
    """A row for the floor, and for each implementation that has those terms.

    Args:
        slow: seconds of a run, beyond which an implementation is not timed.
        bandwidth: bytes a second of a copy.
    """
    common: Row = {"operation": operation.name, **dict(zip(operation.axes, shape, strict=True)), "dtype": dtype}
    if len(operation.terms) > 1:
        common["terms"] = terms
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # beyond a few recompilations torch.compile would run plain Python, without a word
    case = operation.case(shape, getattr(torch, dtype), terms)
    runs: dict[str, Callable[[], object]] = {
        "floor": case.floor()
    }  # before the memory is measured: it stays, while all are timed
    rows: list[Row] = [{**common, "implementation": f"floor: {case.floor_name}", "status": MEASURED}]
    rows[0]["held_MiB"] = case.held / harness.MIB
    broken: dict[str, Refused] = {}  # while they were timed
    for implementation in (i for i in implementations if terms in i.terms):
        row = {**common, "implementation": implementation.label, "own": implementation.own}
        rows.append(row)
        harness.progress(f"{operation.name}, {operation.describe(shape)}, {dtype}: {implementation.label}")
        try:
            row |= _admitted(operation, case, shape, dtype, terms, implementation, slow)
        except Refused as refused:
            row |= {"status": refused.status, "note": str(refused)}
            continue
        remark = row.pop("remark", "")
        row |= {"status": MEASURED, "note": "; ".join(filter(None, (remark, implementation.note)))}
        if implementation.moved:
            moved = implementation.moved(case)
            row |= {"GB_moved": moved / 1e9, "ms_moved": 1e3 * moved / bandwidth}
        runs[implementation.label] = _guarded(implementation.label, case.run(implementation.function), broken)
    seconds = harness.interleaved(runs, rounds, warm_up=3 if harness.ON_GPU else 1)
    base, _ = harness.median_and_spread(seconds["floor"])
    for row, name in [(rows[0], "floor"), *((row, row["implementation"]) for row in rows[1:])]:
        if name in broken:
            for key in row.keys() - common.keys() - {"implementation", "own"}:
                del row[key]
            row |= {"status": broken[name].status, "note": str(broken[name])}
        elif name in seconds:
            ms, spread = harness.median_and_spread(seconds[name])
            row |= {"ms": ms, "spread": spread, "ratio": ms / base}
    return rows


def _guarded(name: str, run: Callable[[], object], broken: dict[str, Refused]) -> Callable[[], None]:
    """The run, which once it fails is noted and not run again: the others are timed on."""

    def guarded() -> None:
        if name in broken:
            return
        try:
            run()
        except Exception as error:
            broken[name] = _refused(error)
        if name in broken and harness.ON_GPU:
            torch.cuda.empty_cache()

    return guarded


def _admitted(
    operation: Operation, case: Case, shape: Shape, dtype: str, terms: str, implementation: Implementation, slow: float
) -> Row:
    """The errors and the memory of an implementation that runs here, within the error budget, in the time it may take.

    Raises:
        Refused: it does not.
    """
    if reason := implementation.why_not():
        raise Refused(NOT_HERE, reason)
    function = implementation.function
    try:
        errors = case.errors(function)
        small = harness.seconds_of(case.small(function))
    except Exception as broken:  # a peer's may be anything: another interface, a compiler that is not there
        raise _refused(broken) from broken
    remarks = [_hold(errors, "", implementation.own)]
    if not implementation.own:
        torch.compiler.reset()  # else what was compiled for a few rows is compiled again for any number of them
    # A small run's fixed costs do not grow with the rows: only what is far beyond the limit is refused without a run.
    # On a GPU, where no other process can end a run, they are milliseconds.
    far = 2 if harness.ON_GPU and small > 0.1 else 50
    if small > slow or small / case.share > far * slow:
        raise Refused(STOPPED, f"too slow: about {small / case.share:.0f} s a run, {slow:g} s at most")
    peak = None if harness.ON_GPU else _in_fresh_process(operation.name, shape, dtype, terms, implementation.name, slow)
    try:
        seconds, results = _one_run(case, function)
        if seconds > slow + 60:  # more than a compiler takes
            raise Refused(STOPPED, f"too slow: {seconds:.0f} s a run, {slow:g} s at most")
        if harness.ON_GPU:
            peak = harness.peak_memory(case.run(function)) - case.returned
        if seconds > slow:  # the first may have compiled
            seconds = harness.seconds_of(case.run(function))
    except Refused:
        raise
    except Exception as broken:
        raise _refused(broken) from broken
    finally:
        if harness.ON_GPU:
            torch.cuda.empty_cache()
    if seconds > slow:
        raise Refused(STOPPED, f"too slow: {seconds:.0f} s a run, {slow:g} s at most")
    try:
        of_all = case.errors_of_all(results)
        del results
        of_terms = case.errors_of_terms(function) if implementation.own else {}
    except Exception as broken:
        if not harness.out_of_memory(broken):  # balora's own, which runs once more here
            raise _refused(broken) from broken
        raise Refused(STOPPED, "not checked: the oracle of all rows is out of memory") from broken
    finally:
        if harness.ON_GPU:
            torch.cuda.empty_cache()
    remarks.append(_hold(of_all | of_terms, " of all rows", implementation.own))
    found: Row = {f"error_{name}": error.found for name, error in (errors | of_all | of_terms).items()}
    found["remark"] = "; ".join(filter(None, remarks))
    return found if peak is None else found | {"peak_MiB": max(0, peak) / harness.MIB}


def _hold(errors: dict[str, harness.Error], where: str, own: bool) -> str:
    """Refuse what is outside the error budget; of a peer that is near it the words alone."""
    outside = [name for name, error in errors.items() if not error.found <= error.allowed]
    words = ", ".join(f"{n}{where} {short(errors[n].found)}, allowed {short(errors[n].allowed)}" for n in outside)
    words = f"outside the error budget: {words}" if outside else ""
    if outside and (own or any(not errors[n].found < PEER * errors[n].allowed for n in outside)):
        raise Refused(OUTSIDE, words)
    return words


def _one_run(case: Case, function: Function) -> tuple[float, Any]:
    """Of a run on all inputs: seconds, and what it returned."""
    results: list[Any] = []
    seconds = harness.seconds_of(lambda: results.append(case.run(function)()))
    return seconds, results[0]


def short(value: float) -> str:
    """3.2e-2"""
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def _refused(broken: BaseException) -> Refused:
    if harness.out_of_memory(broken):
        return Refused(STOPPED, "out of memory")
    words = (str(broken).strip().splitlines() or [""])[0]
    if "cannot run here" in words:  # dispatch's reason: not of this type, or not of these settings
        return Refused(NOT_HERE, words)
    return Refused(FAILED, f"{type(broken).__name__}: {words[:150]}")


def _in_fresh_process(operation: str, shape: Shape, dtype: str, terms: str, name: str, slow: float) -> int | None:
    """Bytes at the peak of one run beyond inputs and gradients, on a CPU; None where the system does not tell them.

    The process is forked from one that has imported everything and computed nothing.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "liger_kernel.chunked_loss"])
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, torch.get_num_threads(), operation, shape, dtype, terms, name)
    process = context.Process(target=_child, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        # Besides the run it makes the inputs and a small run, and compiles.
        if not receiver.poll(60 + 3 * slow):
            raise Refused(STOPPED, f"too slow: no end after {60 + 3 * slow:g} s")
        found = receiver.recv()
        process.join(10)  # it cleans up
    except EOFError:  # the system may have ended it, out of memory
        process.join()
        raise Refused(FAILED, f"its process ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if isinstance(found, Exception):
        raise _refused(found) from found
    peak, seconds = found
    if seconds > slow:
        raise Refused(STOPPED, f"too slow: {seconds:.0f} s a run, {slow:g} s at most")
    return peak


def _child(sender: Connection, threads: int, operation: str, shape: Shape, dtype: str, terms: str, name: str) -> None:
    torch.set_num_threads(threads)
    try:
        harness.limit_memory()
        case = OPERATIONS[operation].case(shape, getattr(torch, dtype), terms)
        function = next(i.function for i in OPERATIONS[operation].implementations if i.name == name)
        case.small(function)()  # loads code, and caches what a frozen head keeps
        seconds = [0.0]

        def run() -> object:
            seconds[0], results = _one_run(case, function)
            return results

        sender.send((harness.peak_memory(run) - case.returned, seconds[0]))
    except Exception as broken:
        sender.send(RuntimeError(f"{type(broken).__name__}: {broken}"))
