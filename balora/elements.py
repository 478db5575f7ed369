"""What the pages of a run and of a comparison are made of: tables, plots and their style."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from .plots import Curve, draw, number

Curves = Callable[[], Sequence[Curve]]  # made inside of the figure: one that fails leaves the others


def document(title: str, policy: str, style: str, body: str, refresh: str = "") -> str:
    """The page, HTML.

    Args:
        title: of the window.
        policy: what the page may load or run, beside styles, of which it has its own.
        refresh: an element that loads the page again.
    """
    policy = f"default-src 'none'; style-src 'unsafe-inline'{policy}"
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
        refresh,
        f"<title>{escape(title)} · balora</title>",
        f"<style>{style}</style>",
    ]
    return "<!DOCTYPE html>\n<html lang=en><head>{}</head>\n<body>{}</body></html>\n".format(
        "\n".join(filter(None, head)), body
    )


def model_name(about: Mapping[str, str]) -> str:
    """The last part of the model's name or folder."""
    return about.get("Model", "").rstrip("/\\").replace("\\", "/").rpartition("/")[2] or "a model"


def or_why(title: str, level: str, make: Callable[[], str]) -> str:
    """A heading and what ``make`` gives; where that fails, why: the rest of the page stays."""
    return f"<div><{level}>{escape(title)}</{level}>{_made(make)}</div>"


def _made(make: Callable[[], str]) -> str:
    try:
        return make()
    except Exception as error:
        return f"<p class=empty>{escape(f'This could not be shown: {type(error).__name__}: {error}'[:300])}</p>"


def table(rows: Sequence[tuple[str, Sequence[str]]], columns: Sequence[str] = (), note: str = "") -> str:
    head = "".join(f"<th scope=col>{escape(c)}</th>" if c else "<td></td>" for c in columns)
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th>{''.join(f'<td>{escape(v)}</td>' for v in values)}</tr>"
        for name, values in rows
    )
    note = f"<p class=note>{escape(note)}</p>" if note else ""
    kind = " class=numbers" if columns else ""
    return f"<table{kind}>{f'<thead><tr>{head}</tr></thead>' if head else ''}{body}</table>{note}"


def figure(title: str, note: str, make: Callable[[], str], empty: str) -> str:
    """A picture with its caption; where ``make`` gives nothing, ``empty``, and where it fails, why."""
    caption = f"<figcaption><h3>{escape(title)}</h3>{f'<p>{escape(note)}</p>' if note else ''}</figcaption>"
    return f"<figure>{caption}{_made(make) or f'<p class=empty>{escape(empty)}</p>'}</figure>"


def curves_figure(title: str, note: str, curves: Curves, unit: str, empty: str, **options: Any) -> str:
    """One plot, or in its place why there is none."""
    return figure(title, note, lambda: plot(title, curves(), unit, **options), empty)


def plot(title: str, curves: Sequence[Curve], unit: str, **options: Any) -> str:
    """Each curve is labelled with its name and its last value. Empty where no curve has a point."""
    shown, heard = [], []
    for curve in curves:
        finite = [v for v in curve.y if math.isfinite(v)]
        if not finite:
            continue
        last = number(finite[-1], 3)
        shown.append(curve._replace(label=f"{curve.label} {last}".strip()) if options.get("log") is None else curve)
        heard.append(f"{curve.label or unit or title} from {number(finite[0], 3)} to {last}")
    if not shown:
        return ""
    label = escape(f"{title}: {'; '.join(heard)}", quote=True)
    return f'<div role=img aria-label="{label}">{draw(shown, unit, **options)}</div>'


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #22262d; --soft: #5d6673; --line: #e3e6ea; --accent: #2f6fc4;
  --good: #23804f; --bad: #b93a36 }
@media (prefers-color-scheme: dark) { :root { --paper: #15171b; --ink: #e2e5ea; --soft: #9aa3b0; --line: #2c3038;
  --accent: #6ea4ea; --good: #5cc08c; --bad: #ee8480 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 86rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums }
h1, td, .state { overflow-wrap: anywhere }
h1, h2, h3, p { margin: 0 }
h1 { font-size: 1.75rem; line-height: 1.2; font-weight: 650 }
h2 { font-size: 1.05rem; font-weight: 650; margin-bottom: .6rem }
h3 { font-size: .95rem; font-weight: 600 }
.kicker, .note, figcaption p { color: var(--soft); font-size: .85rem }
#status { margin: 1rem 0 .3rem }
progress { display: block; width: 100%; height: .4rem; border: 0; border-radius: .2rem; background: var(--line);
  accent-color: var(--accent); overflow: hidden; appearance: none; margin-bottom: .6rem }
progress::-webkit-progress-bar { background: var(--line) }
progress::-webkit-progress-value { background: var(--accent) }
progress::-moz-progress-bar { background: var(--accent) }
.finished progress::-webkit-progress-value { background: var(--good) }
.finished progress::-moz-progress-bar { background: var(--good) }
.stopped progress::-webkit-progress-value { background: var(--bad) }
.stopped progress::-moz-progress-bar { background: var(--bad) }
.state { font-size: 1.1rem; font-weight: 600 }
.finished .state { color: var(--good) }
.stopped .state { color: var(--bad) }
section { margin-top: 2.4rem }
.summary { display: grid; gap: 2rem 3rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)) }
@media (min-width: 64rem) { .summary { grid-template-columns: 1.5fr 1.1fr 1fr } }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { padding: .3rem 0; border-top: 1px solid var(--line); text-align: left; vertical-align: top; font-weight: 400 }
th[scope=row] { color: var(--soft); padding-right: 1.2rem }
@media (min-width: 40rem) { table:not(.numbers) th { white-space: nowrap } }
.numbers td, th[scope=col] { text-align: right; padding-left: 1rem; white-space: nowrap }
thead th, thead td { border-top: 0; color: var(--soft) }
table + .note { margin-top: .5rem }
.plots { display: grid; gap: 1.8rem 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)) }
section > .note { margin: -.4rem 0 1rem }
figure { margin: 0; max-width: 32rem }
figcaption { margin-bottom: .4rem; min-height: 2.7rem }
svg { display: block; width: 100%; height: auto; font-family: inherit; overflow: visible }
.empty { border: 1px dashed var(--line); border-radius: .4rem; color: var(--soft); padding: 2.5rem 1.5rem;
  text-align: center; font-size: .9rem }
details { margin-top: 2.4rem; border-top: 1px solid var(--line); padding-top: 1rem }
summary { cursor: pointer; font-weight: 600 }
.settings { display: grid; gap: 0 3rem; max-width: 60rem }
.settings h3 { margin: 1.2rem 0 .4rem }
"""
