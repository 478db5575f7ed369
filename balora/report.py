"""The report of a run: one HTML page with plots, written while a Trainer trains an attached model."""

from __future__ import annotations

import functools
import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from . import __version__, dispatch, files
from .attachment import attachment
from .page import Run, render
from .probe import ROWS, Measured, Probe

_WAIT = 10.0  # seconds between two drawings, at least
_DRAWING = 0.01  # of the time, at most, spent on drawing
_PROBES = 20  # while the model is trained, at most
_PROBING = 0.03  # of the time, at most, spent on those
_SPEED = {"step", "steps", "tokens", "seconds", "elapsed", "host"}  # what each point of speed and memory has
_POINTS = 2000  # of speed and memory, kept at most
_log = logging.getLogger(__name__)


def _harmless(method: Callable[..., None]) -> Callable[..., None]:
    """On the main process only; an error is said once and never reaches the training."""

    @functools.wraps(method)
    def guarded(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or (self._run is None and method.__name__ != "on_train_begin"):
            return
        try:
            method(self, args, state, control, **kwargs)
        except Exception as error:
            self._complain(error)

    return guarded


class ReportCallback(TrainerCallback):
    """Writes ``report.html``, one self-contained page, while a Hugging Face Trainer trains a model.

    For any Trainer of a model attached by ``balora.attach``; put it behind ``balora.trainer.BALoraCallback``, which
    adds the terms to the logs::

        trainer = BALoraTrainer(model, arguments, train_dataset=rows, callbacks=[ReportCallback("run/report.html")])

    The page is written at the first log, at later logs when 10 s have passed (more where drawing would take over 1 % of
    the time), and at the end; it replaces the one before at once. It shows what the Trainer logs, the speed in trained
    tokens, peak memory, and a probe: at most 256 tokens of fixed rows, forwarded before the training, up to 20 times in
    it (no more than 3 % of the time) and after it: cross-entropy, KL to the pre-trained model, entropy and
    the singular values of the logits. The training is bit for bit the same with it and without: what the examples draw
    at random when they are read is given back, of torch's, numpy's and Python's own generators. What cannot be had from
    the Trainer's log is kept beside the page in ``report.json``, from which a resumed run goes on.

    Of classifiers and encoder-decoders there is no probe. With several processes there is none either, and the first
    process writes. An error, such as a full disk, is logged once as a warning; the training goes on.

    Args:
        path: the file to write; its folder is made.
        held_out: examples that are not trained on, with ``input_ids`` and ``labels`` (else all tokens are scored), for
            the probe. None: the first rows of the training data; they must have an index.
        about: lines for the table of the run, by name; "Model" is also the title. None: the model's name.
        settings: tables of settings by title, shown folded, in addition to the objective's.
    """

    def __init__(
        self,
        path: str | Path,
        held_out: Iterable[Mapping[str, Any]] | None = None,
        about: Mapping[str, str] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.path = Path(path)
        with _same_random_numbers():
            self._held_out = None if held_out is None else list(islice(held_out, ROWS))
        self._about, self._settings = about, settings
        self._complained = False
        self._drawn_at: float | None = None
        self._probe: Any = None
        self._run: Any = None  # a page.Run while there is one; no other hook runs without

    @property
    def written(self) -> bool:
        """Whether the page of this run is there."""
        return self._run is not None and self._drawn_at is not None and self.path.is_file()

    @_harmless
    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        self._run = self._drawn_at = self._probe = None
        self._base, attached = attachment(model)
        config = attached.config
        about = dict(
            self._about or {"Model": str(getattr(self._base.config, "name_or_path", "") or type(self._base).__name__)}
        )
        trained, total = model.get_nb_trainable_parameters()  # of packed and of partitioned weights too
        about["Trained parameters"] = f"{trained:,} of {total:,} ({trained / max(total, 1):.2%})"
        about["Implementation"] = _implementation(args.device)
        about["Versions"] = f"balora {__version__}, " + ", ".join(map(_package, ("torch", "transformers", "peft")))
        run = Run(about, {**(self._settings or {}), "Objective": config.to_dict()}, config, processes=args.world_size)
        run.step, run.max_steps = state.global_step, state.max_steps
        if state.global_step:
            self._restore(run)
        self._elapsed_before, self._started = run.elapsed, time.perf_counter()
        if args.world_size > 1:
            run.no_probe = f"the run has {args.world_size} processes, and the probe runs in one."
        elif config.task == "nlu" or getattr(self._base.config, "is_encoder_decoder", False):
            run.no_probe = "the probe is of causal language models."
        else:
            self._begin_probe(run, args, model, train_dataloader)
        self._first_step = state.global_step
        self._mark = time.perf_counter()
        self._seconds, self._tokens = 0.0, None
        self._counted_step = state.global_step
        self._drawing_took = 0.0
        self._run = run

    @_harmless
    def on_substep_end(self, args, state, control, **kwargs):
        self._count_tokens()

    @_harmless
    def on_step_end(self, args, state, control, **kwargs):
        self._count_tokens()
        self._count_seconds()

    # What comes between the end of a step and these two is no training.
    @_harmless
    def on_evaluate(self, args, state, control, **kwargs):
        if self._run.status != "running":
            self._draw(state)  # the evaluation after the training
        self._mark = time.perf_counter()

    @_harmless
    def on_save(self, args, state, control, **kwargs):
        self._keep(self._run)
        self._mark = time.perf_counter()

    @_harmless
    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        try:
            self._count_seconds()
            self._note_speed(args, state)
            now, left = time.perf_counter(), state.max_steps - state.global_step
            if not left:
                return  # the end draws
            if self._probe_is_due(state, now):
                self._measure(state.global_step)
            wait = max(_WAIT, self._drawing_took / _DRAWING)
            if self._drawn_at is None or now - self._drawn_at >= wait:
                done = state.global_step - self._first_step
                self._run.seconds_left = (now - self._started) / done * left if done else None
                self._run.silence = max(300.0, 3 * wait, 5 * (now - (self._drawn_at or self._started)))
                self._draw(state)
        finally:
            self._mark = time.perf_counter()

    @_harmless
    def on_train_end(self, args, state, control, **kwargs):
        if state.global_step > (self._run.probe[-1]["step"] if self._run.probe else -1):
            self._measure(state.global_step)
        self._run.status = "finished"
        self._run.elapsed = self._elapsed()
        self._draw(state)

    def stop(self, error: BaseException, state: Any) -> None:
        """Say on the page that the run was stopped by an error. ``state`` is the Trainer's."""
        if self._run is None or not state.is_world_process_zero:
            return
        self._run.status, self._run.reason = "stopped", f"{type(error).__name__}: {error}".strip(": ")[:500]
        try:
            self._run.elapsed = self._elapsed()
            self._draw(state)
        except Exception as other:
            self._complain(other)

    def _elapsed(self) -> float:
        return self._elapsed_before + time.perf_counter() - self._started

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            _log.warning("report: %s is not complete: %s: %s", self.path, type(error).__name__, error)

    # ---- speed and memory ----

    def _count_tokens(self) -> None:
        last: Any = self._base.balora_last
        if last is not None:  # summed on the device: a step waits for nothing
            self._tokens = last.n_valid if self._tokens is None else self._tokens + last.n_valid

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._mark = now

    def _note_speed(self, args: Any, state: Any) -> None:
        points = self._run.speed
        peak = points[-1] if points else {}
        memory = psutil.Process().memory_info()
        point = {
            "step": state.global_step,
            "steps": state.global_step - self._counted_step,
            "tokens": int(self._tokens or 0),
            "seconds": self._seconds,
            "elapsed": self._elapsed(),
            "host": max(peak.get("host", 0), _peak_of_process() or getattr(memory, "peak_wset", memory.rss)),
        }
        if args.device.type == "cuda":
            point["device"] = max(peak.get("device", 0), torch.cuda.max_memory_allocated(args.device))
        self._seconds, self._tokens = 0.0, None
        self._counted_step = state.global_step
        points.append(point)
        if len(points) > _POINTS:
            sums = ("steps", "tokens", "seconds")
            self._run.speed = [
                {**b, **{name: a[name] + b[name] for name in sums}}
                for a, b in zip(points[::2], points[1::2], strict=False)
            ] + points[len(points) // 2 * 2 :]

    # ---- the probe ----

    def _begin_probe(self, run: Run, args: Any, model: Any, train_dataloader: Any) -> None:
        try:
            rows, where = self._held_out, "evaluation data"
            if rows is None:
                data, where = train_dataloader.dataset, "training data"
                if isinstance(data, IterableDataset) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
                    run.no_probe = "the training data cannot be indexed; pass held_out."
                    return
                with _same_random_numbers():  # not through the loader, which draws some too
                    rows = [data[i] for i in range(min(ROWS, len(data)))]
            autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
            probe = Probe(model, rows, autocast)
            run.probe_rows = f"{probe.tokens} tokens of the first {len(probe.rows)} rows of the {where}"
            self._probe = probe
            run.before = self._timed(run, pre_trained=True)
            if not run.probe:
                run.probe.append({"step": run.step, **self._timed(run)})
        except Exception as error:
            self._drop_probe(run, error)

    def _probe_is_due(self, state: Any, now: float) -> bool:
        if self._probe is None:
            return False
        since = state.global_step - self._run.probe[-1]["step"]
        return since >= state.max_steps / _PROBES and now - self._probed_at >= self._probing_took / _PROBING

    def _measure(self, step: int) -> None:
        if self._probe is None:
            return
        try:
            self._run.probe.append({"step": step, **self._timed(self._run)})
        except Exception as error:  # such as too little memory
            self._drop_probe(self._run, error)

    def _timed(self, run: Run, pre_trained: bool = False) -> dict[str, Any]:
        begun = time.perf_counter()
        found = self._probe.measure(pre_trained)._asdict()
        self._probed_at = time.perf_counter()
        self._probing_took = self._probed_at - begun
        run.spent += self._probing_took
        return found

    def _drop_probe(self, run: Run, error: Exception) -> None:
        self._probe = None
        run.no_probe = f"{type(error).__name__}: {error}"
        self._complain(error)

    # ---- files ----

    def _draw(self, state: Any) -> None:
        run = self._run
        begun = time.perf_counter()
        run.step, run.max_steps, run.history = state.global_step, state.max_steps, state.log_history
        if run.status == "running":
            run.elapsed = self._elapsed()
        try:
            files.write(self.path, render(run))
            self._keep(run)
        finally:
            took = time.perf_counter() - begun
            self._drawing_took = 0.0 if self._drawn_at is None else took  # the first one loads fonts
            self._drawn_at = begun + took
            run.spent += took

    def _keep(self, run: Run) -> None:
        kept = {"spent": run.spent, "speed": run.speed, "probe": run.probe}
        files.write(self.path.with_suffix(".json"), json.dumps(kept))

    def _restore(self, run: Run) -> None:
        """The points of the run up to the step that it goes on from."""
        try:
            kept = json.loads(self.path.with_suffix(".json").read_text(encoding="utf-8"))
            spent = float(kept["spent"])
            speed, probe = ([p for p in kept[name] if p["step"] <= run.step] for name in ("speed", "probe"))
            whole = all(p.keys() >= _SPEED for p in speed) and all({*Measured._fields} <= p.keys() for p in probe)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return  # another folder, or the file of something else
        if whole:
            run.speed, run.probe, run.spent = speed, probe, spent
            run.elapsed = speed[-1]["elapsed"] if speed else 0.0


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """What is drawn inside is drawn again after it. Data sets draw from the global generators."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _peak_of_process() -> int | None:
    """The largest resident size of this process in bytes, where Linux tells; getrusage counts its parent's too."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _implementation(device: torch.device) -> str:
    try:
        return f"linear_objective: {dispatch.choose('linear_objective', device=device)}, on {device.type}"
    except ValueError as error:
        return str(error)


def _package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name}, not installed as a package"
