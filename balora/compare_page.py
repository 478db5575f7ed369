"""The page of a comparison: one HTML file that loads nothing, with the table and the plots of all runs."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from typing import Any

from . import results
from .elements import STYLE, curves_figure, document, figure, model_name, or_why, table
from .plots import Curve, draw_bars, draw_map
from .results import MEASURES, Result

RELOAD = 30  # seconds
# Each method has one color in every plot, readable on white and on black; points of a sweep have none of their own.
_COLORS = {
    "balora": "#d9534f",
    "pissa": "#4a86d8",
    "lora": "#7d8896",
    "dora": "#0f98a6",
    "lora_reg": "#a98b1f",
    "dora_reg": "#9a6dd7",
    "consistency": "#d07a1c",
    "diversity": "#2e9b62",
    "svd": "#c0569d",
}
_CLASS_COLORS = tuple(_COLORS.values())
_SENSITIVE = ("eval_loss", "accuracy", "macro_f1", "rare_class_recall", "pearson", "drift", "distinct_2")


@dataclass
class Page:
    """What is known of a comparison so far."""

    about: Mapping[str, str]  # model, data and so on, in the words of the user
    titles: Mapping[str, str]  # of the groups, in the order of the table
    found: Sequence[Result]
    sweeps: Mapping[str, Sequence[tuple[Any, str]]] = field(default_factory=dict)  # option -> (value, group)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "nats a token"  # of the loss
    running: bool = False

    @property
    def methods(self) -> list[str]:
        return [group for group in self.titles if group in _COLORS]


def render(page: Page) -> str:
    """The page, HTML. Every text of the user is escaped."""
    title = model_name(page.about)
    done, failed = (sum(map(bool, of)) for of in zip(*[(r.measures, r.failure) for r in page.found], strict=True))
    sections = [
        ("Results", partial(_results, page)),
        ("BA-LoRA beside each method", partial(_paired, page)),
        ("Training", partial(_training, page)),
        *((f"Sensitivity to {sweep}", partial(_sweep, page, sweep)) for sweep in page.sweeps),
        ("Recall of each class", partial(_recalls, page)),
        ("Features", partial(_features, page)),
        ("What was compared", partial(_about, page)),
        ("Failed runs", partial(_failures, page)),
    ]
    shown = []
    for name, make in sections:
        inside = or_why(name, "h2", make)
        if not inside.endswith("</h2></div>"):  # nothing to show
            shown.append(f"<section>{inside}</section>")
    body = (
        f"<header><p class=kicker>BA-LoRA comparison</p><h1>{escape(title)}</h1>{_status(page, done, failed)}</header>"
    )
    refresh = f'<meta http-equiv="refresh" content="{RELOAD}">' if page.running else ""
    body += "<main>{}</main>".format("\n".join(shown))
    return document(f"{done} of {len(page.found)} runs · {title}", "", STYLE + _STYLE, body, refresh)


def _status(page: Page, done: int, failed: int) -> str:
    total = len(page.found)
    kind = "running" if page.running else "stopped" if done < total else "finished"
    text = f"{done} of {total} runs are finished" + (f", {failed} failed" if failed else "") + "."
    live = f" The page reloads itself every {RELOAD} s." if page.running else ""
    return (
        f"<div id=status class={kind}><progress aria-label='Finished runs' max={total} value={done}></progress>"
        f"<p class=state role=status>{text}</p></div>"
        f"<p class=note>Written {time.strftime('%Y-%m-%d %H:%M:%S')}.{live}</p>"
    )


# ---- tables ----


def _results(page: Page) -> str:
    names = results.measures_of(page.found)
    if not names:
        return "<p class=empty>No run is finished yet.</p>"
    _, body = results.rows(page.found, page.titles)
    marked = results.bold(page.found, page.methods)
    columns = [("seeds", ""), *((MEASURES[n].title, MEASURES[n].better) for n in names)]
    arrows = {"lower": " ↓", "higher": " ↑", "": ""}
    head = "".join(f"<th scope=col>{escape(c)}{arrows[better]}</th>" for c, better in columns)
    lines = []
    for group, (title, count, *cells) in zip(page.titles, body, strict=True):
        shown = [
            f"<td><b>{escape(c)}</b></td>" if (group, n) in marked else f"<td>{escape(c)}</td>"
            for n, c in zip(names, cells, strict=True)
        ]
        lines.append(
            f"<tr><th scope=row>{_swatch(group)}{escape(title)}</th><td>{escape(count)}</td>{''.join(shown)}</tr>"
        )
    notes = "".join(f"<li>{escape(MEASURES[n].title)}: {escape(MEASURES[n].note)}</li>" for n in names)
    return (
        f"<div class=wide><table class=numbers><thead><tr><td></td>{head}</tr></thead>{''.join(lines)}</table></div>"
        f"<p class=note>{escape(results.NOTE)} ↑ higher is better, ↓ lower is better.</p>"
        f"<details class=small><summary>What is measured</summary><ul class=note>{notes}</ul></details>"
    )


def _paired(page: Page) -> str:
    others = [g for g in page.methods if g != "balora"]
    names = [n for n in results.measures_of(page.found) if MEASURES[n].better]
    rows = []
    for other in others if "balora" in page.methods else []:
        cells = results.paired(page.found, "balora", other)
        if any(c.n for c in cells.values()):
            seeds = str(max(c.n for c in cells.values()))
            rows.append((f"BA-LoRA − {page.titles[other]}", [seeds, *(_signed(cells[n]) for n in names)]))
    if not rows:
        return ""
    note = "Differences of runs with the same seed: their mean ± standard deviation (n − 1)."
    return f"<div class=wide>{table(rows, ('', 'seeds', *(MEASURES[n].title for n in names)), note)}</div>"


def _signed(cell: results.Cell) -> str:
    return ("+" if cell.n and cell.mean > 0 else "") + str(cell)


def _about(page: Page) -> str:
    rows = dict(page.about)
    details = [r.details for r in page.found if r.measures]
    rows["Seeds"] = ", ".join(map(str, dict.fromkeys(r.seed for r in page.found)))
    for name, key in (("Steps of a run", "steps"), ("Machine", "machine")):
        values = dict.fromkeys(str(d[key]) for d in details if key in d)
        rows |= {name: "; ".join(values)} if values else {}
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in d.get("versions", {}).items()) for d in details)
    rows |= {"Versions": "; ".join(versions)} if versions else {}
    recipe = table([(name, [str(value)]) for name, value in page.recipe.items()])
    return (
        table([(name, [value]) for name, value in rows.items()])
        + f"<details class=small><summary>Recipe</summary>{recipe}</details>"
    )


def _failures(page: Page) -> str:
    failed = [(f"{page.titles[r.group]}, seed {r.seed}", [r.failure]) for r in page.found if r.failure]
    return table(failed) if failed else ""


# ---- plots ----


def _training(page: Page) -> str:
    plots: list[str] = []
    for title, key in (
        ("Cross-entropy in training", "ce"),
        ("Loss in training", "loss"),
        ("Evaluation loss", "eval_loss"),
    ):
        curves = [c for c in (_over_seeds(page, group, key) for group in page.methods) if c.y]
        if curves and (key != "loss" or not plots):
            note = "mean over the seeds, and from the lowest to the highest"
            plots.append(curves_figure(title, note, partial(list, curves), page.unit, ""))
    return f"<div class=plots>{''.join(plots)}</div>" if plots else ""


def _over_seeds(page: Page, group: str, key: str) -> Curve:
    """At the steps that all finished seeds have logged."""
    logs = [
        {h["step"]: h[key] for h in r.details.get("history", []) if isinstance(h.get(key), (int, float))}
        for r in page.found
        if r.group == group and r.measures
    ]
    steps = sorted(set.intersection(*map(set, logs))) if logs else []
    values = [[log[step] for log in logs] for step in steps]
    band = ([min(v) for v in values], [max(v) for v in values]) if len(logs) > 1 else None
    return Curve(page.titles[group], _COLORS[group], steps, [statistics.fmean(v) for v in values], band=band)


def _sweep(page: Page, sweep: str) -> str:
    points = page.sweeps[sweep]
    ticks = [f"{value:g}" if isinstance(value, float) else str(value) for value, _ in points]
    plots = []
    for name in (n for n in _SENSITIVE if n in results.measures_of(page.found)):
        values = [_values(page, group, name) for _, group in points]
        means = [statistics.fmean(v) if v else math.nan for v in values]
        band = ([min(v, default=math.nan) for v in values], [max(v, default=math.nan) for v in values])
        curve = Curve("", _COLORS["balora"], range(len(points)), means, band=band)
        plots.append(
            curves_figure(
                MEASURES[name].title,
                MEASURES[name].note,
                partial(list, [curve]),
                "",
                "No run is finished yet.",
                x_label=sweep,
                ticks=ticks,
                x_range=(-0.15, len(points) - 0.85),
            )
        )
    note = "BA-LoRA: mean over the seeds, and from the lowest to the highest; everything else is as in the recipe"
    return f"<p class=note>{note}.</p><div class=plots>{''.join(plots)}</div>" if plots else ""


def _values(page: Page, group: str, measure: str) -> list[float]:
    found = [(r.measures or {}).get(measure) for r in page.found if r.group == group]
    return [value for value in found if value is not None]


def _recalls(page: Page) -> str:
    groups = [g for g in page.methods if any(r.details.get("recalls") for r in page.found if r.group == g)]
    if not groups:
        return ""
    classes = list(next(r.details["recalls"] for r in page.found if r.details.get("recalls")))
    bars = []
    for group in groups:
        values = [
            [r.details["recalls"][c] for r in page.found if r.group == group and c in r.details.get("recalls", {})]
            for c in classes
        ]
        means = [statistics.fmean(v) if v else 0.0 for v in values]
        bars.append((_COLORS[group], means, [(min(v, default=0.0), max(v, default=0.0)) for v in values]))
    note = "on the evaluation data, mean over the seeds; the line goes from the lowest to the highest"
    picture = figure("Recall", note, partial(draw_bars, classes, bars, "recall"), "")
    return f"<div class=plots>{picture}</div>{_legend({page.titles[g]: _COLORS[g] for g in groups})}"


def _features(page: Page) -> str:
    maps = []
    colors: dict[str, str] = {}
    for group in page.methods:
        mine = [r for r in page.found if r.group == group and r.details.get("tsne")]
        if not mine:
            continue
        first = mine[0]
        classes = first.details["classes"]
        if not colors:
            names = [name for name, _ in Counter(classes).most_common()]
            colors = {name: _CLASS_COLORS[i % len(_CLASS_COLORS)] for i, name in enumerate(names)}
        x, y = zip(*first.details["tsne"], strict=True)
        dots = [colors.get(name, _CLASS_COLORS[0]) for name in classes]
        silhouette = results.cell([r.measures.get("silhouette") for r in mine if r.measures])
        note = f"silhouette {silhouette}"
        maps.append(figure(page.titles[group], note, partial(draw_map, x, y, dots, group), ""))
    if not maps:
        return ""
    seed = next(r.seed for r in page.found if r.details.get("tsne"))
    note = (
        f"t-SNE of the evaluation rows' features (perplexity 30, 1000 iterations, seed 42), up to 1,000 rows, the run "
        f"with seed {seed}; silhouette score by true class, cosine distance, of all rows, over all seeds."
    )
    legend = _legend(colors) if len(colors) <= len(_CLASS_COLORS) else ""
    return f"<p class=note>{note}</p>{legend}<div class=plots>{''.join(maps)}</div>"


def _swatch(group: str) -> str:
    return f'<i class=swatch style="background:{_COLORS[group]}"></i>' if group in _COLORS else ""


def _legend(colors: Mapping[str, str]) -> str:
    items = (f'<span><i class=swatch style="background:{c}"></i>{escape(name)}</span>' for name, c in colors.items())
    return f"<p class=legend>{''.join(items)}</p>"


_STYLE = """
.wide { overflow-x: auto }
.wide table { font-size: .8rem }
.wide th[scope=row] { white-space: nowrap; padding-right: .3rem }
.wide td, .wide th[scope=col] { padding-left: .75rem }
.wide th[scope=col] { white-space: normal; vertical-align: bottom }
.swatch { display: inline-block; width: .7rem; height: .7rem; border-radius: .15rem; margin-right: .45rem }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; font-size: .9rem; margin: .6rem 0 }
.small { margin-top: .8rem; border: 0; padding: 0; font-size: .9rem }
.small ul { margin: .4rem 0; padding-left: 1.2rem }
section > div > .note { margin: .3rem 0 .6rem }
"""
