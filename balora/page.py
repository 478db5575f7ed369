"""The page of a run: one HTML file that loads nothing, from plain values."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from html import escape
from typing import Any

from .config import BALoraConfig
from .elements import STYLE, Curves, curves_figure, document, model_name, or_why, table
from .plots import Curve, number

RELOAD = 10  # seconds

# One color a quantity, in every plot; each readable on white and on black.
_LOSS, _CE, _EVAL, _PROBE = "#4a86d8", "#0f98a6", "#9a6dd7", "#c0569d"
_CONSISTENCY, _DIVERSITY, _SVD, _NEUTRAL, _PRE_TRAINED = "#d07a1c", "#2e9b62", "#d9534f", "#6f7f99", "#8a8f98"
_TERMS = (("consistency", "λ₁", _CONSISTENCY), ("diversity", "λ₂", _DIVERSITY), ("svd", "λ₃", _SVD))
_NAMES = {"consistency": "consistency", "diversity": "diversity", "svd": "SVD"}
_NOTES = {  # what a term is, by the setting of its kind
    "kl": "T² · KL to the pre-trained model, at temperature T",
    "normalized_mse": "squared distance of the normalized logits to the pre-trained model's",
    "topk": "negative entropy of the most likely tokens",
    "full": "negative entropy of the whole vocabulary",
    "covariance": "squared covariances between the classes",
    "fro": "leading singular values over ‖Z‖, negative",
    "nuclear": "leading singular values over their sum, negative",
}
# What an evaluation may measure between 0 and 1, or −1 and 1; balora.metrics has them.
_METRICS = {
    "accuracy": _LOSS,
    "macro_f1": _DIVERSITY,
    "matthews": _EVAL,
    "rare_class_recall": _SVD,
    "pearson": _LOSS,
    "spearman": _EVAL,
    "exact_match": _LOSS,
}
_LEAST_SIGMA = 1e-6  # of the largest one: what is below is rounding, and would squash the rest of the plot


@dataclass
class Run:
    """What is known of a run so far."""

    about: dict[str, str]  # model, data and so on, in the words of the user
    settings: dict[str, Mapping[str, Any]]
    config: BALoraConfig
    step: int = 0
    max_steps: int = 0
    status: str = "running"  # "running", "finished" or "stopped"
    reason: str = ""  # why it was stopped
    seconds_left: float | None = None
    silence: float = 300.0  # seconds without a new page after which a running run is taken for dead
    elapsed: float = 0.0  # seconds, evaluations and checkpoints included
    spent: float = 0.0  # of them, seconds that the probe and this page took
    history: list[dict[str, Any]] = field(default_factory=list)  # the Trainer's log_history
    speed: list[dict[str, float]] = field(default_factory=list)  # step, steps, tokens, seconds, host, device (bytes)
    before: dict[str, Any] | None = None  # the probe of the pre-trained model: ce, entropy, spectrum
    probe: list[dict[str, Any]] = field(default_factory=list)  # step, ce, kl, entropy, spectrum
    probe_rows: str = ""  # which rows the probe is of
    no_probe: str = ""  # why there is none
    processes: int = 1


def render(run: Run) -> str:
    """The page, HTML. Every text of the user is escaped."""
    title = model_name(run.about)
    running = run.status == "running"
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    refresh = f'<noscript><meta http-equiv="refresh" content="{RELOAD}"></noscript>' if running else ""
    settings = "".join(or_why(name, "h3", partial(_settings_table, values)) for name, values in run.settings.items())
    body = [
        f"<header><p class=kicker>BA-LoRA run</p><h1>{escape(title)}</h1>{_status(run)}</header><main>",
        f"<section aria-label=Summary class=summary>{_summary(run)}</section>",
        *_plots(run),
        f"<details><summary>Settings of the run</summary><div class=settings>{settings}</div></details>",
        f"</main><script>{_SCRIPT}</script>" if running else "</main>",
    ]
    name = f"{_short_status(run)} · {title}"
    return document(name, f"; script-src 'sha256-{digest}'", STYLE, "\n".join(body), refresh)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60} min"


def _short_status(run: Run) -> str:
    if run.status == "finished":
        return "finished"
    return f"{'stopped at ' if run.status == 'stopped' else ''}step {run.step} of {run.max_steps}"


def _status(run: Run) -> str:
    now = time.time()
    written = datetime.fromtimestamp(now).astimezone()
    place = f"step {run.step:,} of {run.max_steps:,}"
    if run.status == "finished":
        text = f"Finished: {run.step:,} steps in {duration(run.elapsed)}."
        if run.step < run.max_steps:
            text = f"Finished early, at {place}, after {duration(run.elapsed)}."
    elif run.status == "stopped":
        text = f"Stopped at {place}, after {duration(run.elapsed)}: {run.reason}"
    else:
        left = "" if run.seconds_left is None else f", about {duration(run.seconds_left)} left"
        text = f"Running: {place}{left}."
    stamp = f"<time datetime={written.isoformat(timespec='seconds')}>{written:%Y-%m-%d %H:%M:%S}</time>"
    live = ""
    if run.status == "running":
        live = f" The page reloads itself every {RELOAD} s; if that time stands still, the run ended there."
    return (
        f"<div id=status class={run.status} data-dead={now + run.silence:.0f} data-place='{escape(place)}'>"
        f"<progress aria-label='Progress of the run' max={max(run.max_steps, 1)} value={run.step}></progress>"
        f"<p class=state role=status>{escape(text)}</p></div><p class=note>Written {stamp}.{live}</p>"
    )


# ---- the summary ----


def _summary(run: Run) -> str:
    about = [*run.about.items(), ("Steps", f"{run.step:,} of {run.max_steps:,}")]
    note = f"{_unit(run)}, the SVD term a ratio"
    return (
        or_why("Run", "h2", lambda: table([(name, [value]) for name, value in about]))
        + or_why("Results", "h2", lambda: table(_results(run), ("", "first", "last"), note))
        + or_why("Cost", "h2", lambda: table(_cost(run)))
    )


def _results(run: Run) -> list[tuple[str, list[str]]]:
    logs = [h for h in run.history if "loss" in h]
    evaluations = [h for h in run.history if "eval_loss" in h]
    names = ("loss", "ce", *(name for name, *_ in _TERMS))
    rows = [(name if name not in ("ce", "svd") else name.upper(), _ends(h.get(name) for h in logs)) for name in names]
    if evaluations:
        for key in evaluations[-1]:
            if key.startswith("eval_") and not key.endswith(("_runtime", "_per_second", "_steps")):
                values = [h[key] for h in evaluations if _is_number(h.get(key))]  # a metric may be anything
                if values:
                    rows.append((key.replace("_", " "), _ends(values) if len(values) > 1 else ["", number(values[0])]))
    if run.before and run.probe:
        last = run.probe[-1]
        rows.append(("probe: CE", [number(run.before["ce"]), number(last["ce"])]))
        rows.append(("probe: KL to the pre-trained model", [number(0.0), number(last["kl"])]))
        rows.append((f"probe: entropy, {_entropy_of(run)}", [number(run.before["entropy"]), number(last["entropy"])]))
    return rows


def _cost(run: Run) -> list[tuple[str, list[str]]]:
    seconds, tokens, steps = (sum(p[name] for p in run.speed) for name in ("seconds", "tokens", "steps"))
    each = " (of this process)" if run.processes > 1 else ""
    rows = []
    if seconds and tokens:
        rows.append((f"trained {_counted(run)} a second" + each, [number(tokens / seconds)]))
    if seconds and steps:
        rows.append(("seconds a step", [number(seconds / steps)]))
    if run.speed:
        last = run.speed[-1]
        if "device" in last:
            rows.append(("peak memory, device" + each, [f"{last['device'] / 1e9:.2f} GB"]))
        rows.append(("peak memory, host" + each, [f"{last['host'] / 1e9:.2f} GB"]))
    rows.append(("wall time", [duration(run.elapsed)]))
    if run.elapsed:
        rows.append(("probe and this page", [f"{duration(run.spent)} ({run.spent / run.elapsed:.1%})"]))
    return rows


def _ends(values: Iterable[Any]) -> list[str]:
    found = [v for v in values if _is_number(v)]
    return [number(found[0]), number(found[-1])] if found else ["–", "–"]


def _entropy_of(run: Run) -> str:
    return "whole vocabulary" if run.config.diversity == "full" else f"top {run.config.entropy_top_k}"


def _counted(run: Run) -> str:
    """What the loss is a mean over."""
    return "rows" if run.config.task == "nlu" else "tokens"


def _unit(run: Run) -> str:
    return "mean over the rows" if run.config.task == "nlu" else "nats a token"  # of a regression no nats


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _settings_table(values: Mapping[str, Any]) -> str:
    return table([(name, [_setting(name, value)]) for name, value in values.items()])


def _setting(name: str, value: Any) -> str:
    if name.endswith("_token") and value:
        return "(a secret, left out)"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# ---- the plots ----


class _Curves:
    """Those of a run, by what they show."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.logs = [h for h in run.history if "loss" in h]
        self.evaluations = [h for h in run.history if "eval_loss" in h]
        self.before = run.before or {}
        self.x_range = (0.0, float(max(run.step, 1)))

    def logged(self, name: str, label: str, color: str, weight: str | None = None) -> Curve:
        found = [h for h in self.logs if _is_number(h.get(name)) and (weight is None or _is_number(h.get(weight)))]
        values = [h[name] * (1.0 if weight is None else h[weight]) for h in found]
        return Curve(label, color, [h["step"] for h in found], values)

    def evaluated(self) -> Curve:
        found = [h for h in self.evaluations if _is_number(h["eval_loss"])]
        return Curve("eval loss", _EVAL, [h["step"] for h in found], [h["eval_loss"] for h in found])

    def measured(self) -> list[Curve]:
        curves = []
        for name, color in _METRICS.items():
            found = [h for h in self.evaluations if _is_number(h.get(f"eval_{name}"))]
            values = [h[f"eval_{name}"] for h in found]
            curves.append(Curve(name.replace("_", " "), color, [h["step"] for h in found], values))
        return curves

    def probed(self, name: str, label: str, color: str) -> Curve:
        return Curve(label, color, [p["step"] for p in self.run.probe], [p[name] for p in self.run.probe])

    def level(self, name: str, label: str) -> Curve:
        value = self.before.get(name, math.nan)
        return Curve(label, _PRE_TRAINED, self.x_range, [value, value], dashed=True)

    def losses(self) -> list[Curve]:
        loss = self.logged("loss", "loss", _LOSS)._replace(width=2.8)  # CE lies on it
        return [loss, self.logged("ce", "CE", _CE), self.evaluated(), self.probed("ce", "probe CE", _PROBE)]

    def shares(self) -> list[Curve]:
        return [self.logged(name, _NAMES[name], color, f"lambda_{name}") for name, _, color in _TERMS]

    def weights(self) -> list[Curve]:
        return [self.logged(f"lambda_{name}", symbol, color) for name, symbol, color in _TERMS]

    def entropies(self) -> list[Curve]:
        return [self.probed("entropy", "fine-tuned", _DIVERSITY), self.level("entropy", "pre-trained")]

    def sigma(self) -> list[Curve]:
        if not (self.before.get("spectrum") and self.run.probe and self.run.probe[-1]["spectrum"]):
            return []
        now = ("now" if self.run.status == "running" else "after", _SVD, self.run.probe[-1]["spectrum"])
        curves = []
        for label, color, values in (("pre-trained", _PRE_TRAINED, self.before["spectrum"]), now):
            kept = [v for v in values if v >= _LEAST_SIGMA * values[0]]
            curves.append(Curve(label, color, range(1, len(kept) + 1), kept, dashed=label == "pre-trained"))
        return curves

    def speed(self) -> list[Curve]:
        points = [p for p in self.run.speed if p["tokens"] and p["seconds"]]
        return [Curve("", _NEUTRAL, [p["step"] for p in points], [p["tokens"] / p["seconds"] for p in points])]

    def memory(self) -> list[Curve]:
        curves = []
        for name, color in (("device", _LOSS), ("host", _NEUTRAL)):
            points = [p for p in self.run.speed if name in p]
            curves.append(Curve(name, color, [p["step"] for p in points], [p[name] / 1e9 for p in points]))
        return curves


def _plots(run: Run) -> list[str]:
    of = _Curves(run)
    kinds = {"consistency": run.config.consistency, "diversity": run.config.diversity, "svd": run.config.svd_norm}
    unit = _unit(run)
    no_log = "Nothing has been logged yet."
    no_probe = f"Not measured: {run.no_probe}" if run.no_probe else "Not measured yet."

    def figure(title: str, note: str, curves: Curves, unit: str, empty: str, from_zero: bool = False) -> str:
        return curves_figure(title, note, curves, unit, empty, x_range=of.x_range, from_zero=from_zero)

    def one(curve: Callable[..., Curve], *arguments: str) -> Curves:
        return lambda: [curve(*arguments)]

    no_norm = "The Trainer logs no gradient norm in this run." if of.logs else no_log
    per_second = f"trained {_counted(run)} a second"
    no_speed = f"No {_counted(run)} have been counted." if of.logs else no_log
    kl, entropy = "KL(pre-trained ‖ fine-tuned), temperature 1", f"of the next token, {_entropy_of(run)}"
    spectrum = ("Spectrum of the logits", "singular values over their Frobenius norm", of.sigma, "σᵢ / ‖Z‖", no_probe)
    sections = {
        "Loss": [
            figure("Loss", "what is minimized, and the cross-entropy in it", of.losses, unit, no_log),
            figure("Weighted terms", "λ · term, what each adds to the loss", of.shares, unit, no_log),
            figure("Weights", "λ₁ consistency, λ₂ diversity, λ₃ SVD", of.weights, "λ", no_log, from_zero=True),
        ],
        "Regularizers, unweighted": [
            figure(
                f"{_NAMES[name][0].upper()}{_NAMES[name][1:]} term",
                _NOTES[kinds[name]],
                one(of.logged, name, "", color),
                "ratio" if name == "svd" else unit,
                _why_empty(run, name, symbol) or no_log,
            )
            for name, symbol, color in _TERMS
        ],
        "Evaluation": [figure("Metrics", "on the evaluation data", of.measured, "", no_log)],
        "Distance from the pre-trained model": [
            figure("KL to the pre-trained model", kl, one(of.probed, "kl", "", _CONSISTENCY), unit, no_probe, True),
            figure("Entropy", entropy, of.entropies, "nats", no_probe),
            curves_figure(*spectrum, x_label="i", log=True),
        ],
        "Optimization": [
            figure("Learning rate", "", one(of.logged, "learning_rate", "", _NEUTRAL), "", no_log, from_zero=True),
            figure("Gradient norm", "before clipping", one(of.logged, "grad_norm", "", _NEUTRAL), "", no_norm, True),
        ],
        "Cost": [
            figure("Speed", "without evaluations and checkpoints", of.speed, per_second, no_speed, True),
            figure("Peak memory", "so far", of.memory, "GB", no_log, from_zero=True),
        ],
    }
    if not any(f"eval_{name}" in h for h in of.evaluations for name in _METRICS):
        del sections["Evaluation"]
    if run.config.task == "nlu":
        del sections["Distance from the pre-trained model"]  # the probe's
    notes = {"Distance from the pre-trained model": f"Probe: {run.probe_rows}." if run.probe_rows else ""}
    return [
        f"<section><h2>{escape(name)}</h2>{f'<p class=note>{escape(notes[name])}</p>' if notes.get(name) else ''}"
        f"<div class=plots>{''.join(figures)}</div></section>"
        for name, figures in sections.items()
    ]


def _why_empty(run: Run, name: str, symbol: str) -> str:
    config = run.config
    if getattr(config, f"lambda_{name}") == 0:
        return f"{symbol} is 0 in this run: the term is not computed."
    if name != "consistency" and config.focus_schedule == "two_phase" and config.focus_warmup:
        begins = math.ceil(config.focus_warmup * run.max_steps)
        return (
            f"{symbol} is 0 for the first {config.focus_warmup:.0%} of the steps: the term begins after step {begins}."
        )
    return ""


# A page that nobody writes any more says so: a killed process cannot.
_SCRIPT = (
    f"const wait = {1000 * RELOAD};"
    + """
const s = document.getElementById('status');
if (Date.now() / 1000 < s.dataset.dead) setTimeout(() => location.reload(), wait);
else {
  s.className = 'stopped';
  s.querySelector('.state').textContent = 'No sign of life: the run seems to have ended at ' + s.dataset.place + '.';
}
"""
)
