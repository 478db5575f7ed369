"""The page of a run: what stands on it, that it loads nothing, that it escapes, and the plots' SVG."""

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import matplotlib

from balora import BALoraConfig, elements, page, plots
from balora.page import Run, render
from balora.plots import Curve, draw

VOID = {"meta", "br", "link"}


class Reader(HTMLParser):
    """Checks that tags are closed in order; keeps texts, attributes and tags."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.attributes, self.tags = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def history(steps=40, every=2, begins=8):
    logs = []
    for step in range(every, steps + 1, every):
        log = dict(loss=3.0 - step / 40, ce=2.9 - step / 40, consistency=step / 100, learning_rate=1e-4, grad_norm=1.5)
        log |= dict(lambda_consistency=0.02, lambda_diversity=0.0, lambda_svd=0.0, step=step, epoch=0.1)
        if step > begins:
            log |= dict(diversity=-1.5, svd=-0.75, lambda_diversity=0.005, lambda_svd=0.25)
        logs.append(log)
    return logs


def run(**changes):
    steps = changes.get("step", 40)
    values = dict(
        about={"Model": "models/tiny", "Training data": "rows.jsonl"},
        settings={"Recipe": {"learning_rate": 1e-4}},
        config=BALoraConfig(),
        step=steps,
        max_steps=40,
        elapsed=754.0,
        history=history(steps),
        speed=[dict(step=s, steps=2, tokens=300, seconds=1.5, elapsed=s, host=2e9, device=5e9) for s in (2, 20, 40)],
        before=dict(ce=3.1, kl=0.0, entropy=1.9, spectrum=[0.9, 0.3, 0.1]),
        probe=[
            dict(step=0, ce=3.1, kl=0.0, entropy=1.9, spectrum=[0.9, 0.3, 0.1]),
            dict(step=40, ce=2.25, kl=0.125, entropy=1.75, spectrum=[0.8, 0.4, 0.2]),
        ],
        probe_rows="512 tokens of the first 7 rows of the evaluation data",
    )
    return Run(**{**values, **changes})


def row(html, name):
    """The cells beside a row's header."""
    found = re.search(rf"<th scope=row>{re.escape(name)}</th>((?:<td>.*?</td>)+)", html)
    return re.findall(r"<td>(.*?)</td>", found[1])


def labels(html):
    return {label.partition(":")[0]: label for label in re.findall(r'role=img aria-label="([^"]*)"', html)}


def test_the_summary():
    html = render(run(status="finished"))
    assert row(html, "loss") == ["2.95", "2"]
    assert row(html, "CE") == ["2.85", "1.9"]
    assert row(html, "consistency") == ["0.02", "0.4"]
    assert row(html, "diversity") == ["−1.5", "−1.5"]
    assert row(html, "SVD") == ["−0.75", "−0.75"]
    assert row(html, "probe: CE") == ["3.1", "2.25"]
    assert row(html, "probe: KL to the pre-trained model") == ["0", "0.125"]
    assert row(html, "probe: entropy, top 20") == ["1.9", "1.75"]
    assert row(html, "Steps") == ["40 of 40"]
    assert row(html, "trained tokens a second") == ["200"]
    assert row(html, "seconds a step") == ["0.75"]
    assert row(html, "peak memory, device") == ["5.00 GB"]
    assert row(html, "peak memory, host") == ["2.00 GB"]
    assert row(html, "wall time") == ["13 min"]
    assert row(html, "learning_rate") == ["0.0001"]
    assert "512 tokens of the first 7 rows of the evaluation data" in html


def test_evaluations():
    extra = [
        dict(step=20, epoch=0.5, eval_loss=2.5, eval_accuracy=0.5, eval_runtime=3.0),
        dict(step=40, epoch=1.0, eval_loss=2.25, eval_accuracy=0.75, eval_runtime=3.0),
    ]
    html = render(run(history=history() + extra))
    assert row(html, "eval loss") == ["2.5", "2.25"]
    assert row(html, "eval accuracy") == ["0.5", "0.75"]
    assert "eval runtime" not in html
    assert "eval loss from 2.5 to 2.25" in labels(html)["Loss"]
    assert row(render(run(history=history() + extra[:1])), "eval loss") == ["", "2.5"]


@pytest.mark.parametrize("value", [[1, 2], None, "x", {"a": 1}, True])
def test_what_is_no_number_is_passed_over(value):
    logs = history()
    logs[-1] |= dict(loss=value, ce=value, svd=value, lambda_svd=value, grad_norm=value)
    logs += [
        dict(step=20, eval_loss=2.5, eval_m=value, eval_n=1),
        dict(step=30, eval_loss=value, eval_m=value, eval_n=value),
        dict(step=40, eval_loss=2.25, eval_m=value, eval_n=3),
    ]
    html = render(run(history=logs))
    assert "could not be shown" not in html
    assert row(html, "loss") == ["2.95", "2.05"]
    assert row(html, "eval loss") == ["2.5", "2.25"]
    assert row(html, "eval n") == ["1", "3"]
    assert "<th scope=row>eval m</th>" not in html
    assert "loss from 2.95 to 2.05; CE from 2.85 to 1.95; eval loss from 2.5 to 2.25" in labels(html)["Loss"]
    assert len(labels(html)) == 13


def test_a_table_or_plot_that_fails_leaves_the_rest(monkeypatch):
    html = render(run(speed=[dict(step=2, steps=2, tokens=3, seconds="x", host=2e9)]))
    assert Reader(html).text.count("This could not be shown: TypeError: ") == 2  # the costs and the speed
    assert row(html, "loss") == ["2.95", "2"]
    assert len(labels(html)) == 12
    assert "Speed" not in labels(html)
    html = render(run(probe=[dict(step=0, ce="<x>", kl=0.0, entropy=1.9, spectrum=[0.9])]))
    assert {"Entropy", "Spectrum of the logits", "Weights", "Speed"} <= labels(html).keys()
    assert "Loss" not in labels(html)
    assert row(html, "seconds a step") == ["0.75"]
    html = render(run(settings={"Odd": {"a": {(1, 2): 3}}, "Recipe": {"learning_rate": 1e-4}}))
    assert html.count("This could not be shown: TypeError: keys must be str") == 1
    assert row(html, "learning_rate") == ["0.0001"]

    def no_ink(*_, **__):
        raise RuntimeError("<no ink>")

    monkeypatch.setattr(elements, "draw", no_ink)
    html = render(run())
    assert html.count("This could not be shown: RuntimeError: &lt;no ink&gt;") == 13
    assert row(html, "loss") == ["2.95", "2"]


def test_seconds_without_a_step_have_no_quotient():
    html = render(run(step=0, speed=[dict(step=0, steps=0, tokens=0, seconds=1.5, elapsed=2.0, host=2e9)]))
    assert "seconds a step" not in html
    assert row(html, "peak memory, host") == ["2.00 GB"]


def test_the_spectrum_leaves_out_rounding():
    sigma = [0.9, 0.3, 1e-4, 1e-6, 8e-7, 2e-8, 0.0]
    probe = [dict(step=40, ce=2.25, kl=0.125, entropy=1.75, spectrum=sigma)]
    html = render(run(before=dict(ce=3.1, entropy=1.9, spectrum=sigma[::6]), probe=probe, status="finished"))
    assert labels(html)["Spectrum of the logits"].endswith(": pre-trained from 0.9 to 0.9; after from 0.9 to 1e−6")


def test_the_loss_is_not_said_to_be_less_than_it_is():
    """A mixture of experts adds an auxiliary loss of its own, which is none of the terms."""
    assert "CE + Σ λ" not in render(run())
    assert "what is minimized, and the cross-entropy in it" in render(run())


def test_every_plot_says_in_words_what_it_shows():
    found = labels(render(run()))
    assert found.keys() == {
        "Loss",
        "Weighted terms",
        "Weights",
        "Consistency term",
        "Diversity term",
        "SVD term",
        "KL to the pre-trained model",
        "Entropy",
        "Spectrum of the logits",
        "Learning rate",
        "Gradient norm",
        "Speed",
        "Peak memory",
    }
    assert found["Loss"] == "Loss: loss from 2.95 to 2; CE from 2.85 to 1.9; probe CE from 3.1 to 2.25"
    assert (
        "consistency from 0.0004 to 0.008; diversity from −0.0075 to −0.0075; SVD from −0.188"
        in found["Weighted terms"]
    )
    assert "λ₁ from 0.02 to 0.02; λ₂ from 0 to 0.005; λ₃ from 0 to 0.25" in found["Weights"]
    assert "device from 5 to 5; host from 2 to 2" in found["Peak memory"]
    assert "trained tokens a second from 200 to 200" in found["Speed"]


def test_an_empty_plot_says_why():
    html = render(run(step=4, probe=[], before=None, speed=[], no_probe="the run has 4 processes."))
    assert "λ₂ is 0 for the first 20% of the steps: the term begins after step 8." in html
    assert "λ₃ is 0 for the first 20% of the steps" in html
    assert html.count("Not measured: the run has 4 processes.") == 3
    assert "Consistency term" in labels(html)
    assert "Diversity term" not in labels(html)
    html = render(run(config=BALoraConfig(lambda_svd=0.0), history=history(begins=99)))
    assert "λ₃ is 0 in this run: the term is not computed." in html
    html = render(run(history=[], probe=[], before=None, speed=[]))
    assert "Nothing has been logged yet." in html
    assert "Not measured yet." in html
    assert labels(html) == {}


def test_a_running_page_reloads_itself_and_a_finished_one_does_not():
    html = render(run(step=12, seconds_left=725.0))
    assert "Running: step 12 of 40, about 12 min left." in Reader(html).text
    assert '<meta http-equiv="refresh" content="10">' in html
    assert "<progress aria-label='Progress of the run' max=40 value=12>" in html
    assert "location.reload()" in html
    for status, text in [
        ("finished", "Finished: 40 steps in 13 min."),
        ("stopped", "Stopped at step 40 of 40, after 13 min: OSError: disk"),
    ]:
        html = render(run(status=status, reason="OSError: disk"))
        assert text in Reader(html).text
        assert "refresh" not in html
        assert "<script" not in html
    assert "Finished early, at step 12 of 40" in render(run(step=12, status="finished"))


def test_a_page_that_nobody_writes_any_more_has_its_time_of_death(monkeypatch):
    monkeypatch.setattr(page.time, "time", lambda: 1000.0)
    assert "data-dead=1300 data-place='step 12 of 40'" in render(run(step=12))


NASTY = "<script>alert('x')</script>\"&$x_1$"


def test_texts_of_the_user_are_escaped():
    html = render(run(about={"Model": NASTY, NASTY: NASTY}, settings={NASTY: {NASTY: [NASTY]}}, probe_rows=NASTY))
    html += render(run(status="stopped", reason=NASTY, no_probe=NASTY, probe=[]))
    assert "<script>alert" not in html
    assert "alert(&#x27;x&#x27;)" in html
    assert NASTY in Reader(render(run(about={"Model": "a", "Data": NASTY}))).text


def test_a_secret_among_the_settings_is_left_out():
    html = render(run(settings={"Recipe": {"hub_token": "hf_abc", "seed": 1}}))
    assert "hf_abc" not in html
    assert row(html, "hub_token") == ["(a secret, left out)"]


def test_the_page_is_sound_html_and_loads_nothing():
    reader = Reader(render(run()))
    assert not {"link", "img", "iframe", "object", "base"} & set(reader.tags)
    for tag, name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "action", "srcset"):
            assert value.startswith("#"), (tag, name, value)
        assert not name.startswith("on"), (tag, name)
    html = render(run())
    assert not re.search(r"@import|url\((?!#)|https?:(?!//www\.w3\.org)", html)
    policy = next(v for _, name, v in reader.attributes if name == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    headings = [int(tag[1]) for tag in reader.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(headings))
    assert reader.tags.count("th") == sum(name == "scope" for tag, name, _ in reader.attributes)
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_long_run_stays_below_a_megabyte():
    steps = 100_000
    wave = np.sin(np.arange(steps)) + np.arange(steps) / steps
    logs = [
        {**log, "loss": float(w), "ce": float(w), "consistency": float(w), "diversity": float(w), "svd": float(w)}
        for log, w in zip(history(steps, 1), wave, strict=True)
    ]
    speed = [dict(step=s, steps=50, tokens=300 + s % 7, seconds=1.5, host=s, device=s) for s in range(0, steps, 50)]
    html = render(run(step=steps, max_steps=steps, history=logs, speed=speed))
    assert len(html.encode()) < 1_000_000
    assert row(html, "loss") == [plots.number(logs[0]["loss"]), plots.number(logs[-1]["loss"])]


# ---- plots ----


def paths(svg, color):
    """The points of the curves of that color."""
    found = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {color};', svg)
    return [[tuple(map(float, p.split())) for p in re.split("[ML]", d) if p.strip()] for d in found]


def test_a_curve_is_where_its_values_are():
    svg = draw([Curve("a", "#123456", [0, 1, 2], [0.0, 1.0, 0.5])], "nats")
    ((left, low), (_, high), (right, middle)) = next(p for p in paths(svg, "#123456") if len(p) == 3)
    assert left < right
    assert low > middle > high  # SVG counts downwards
    assert middle == pytest.approx((low + high) / 2, abs=0.02)
    ElementTree.fromstring(svg)
    assert ">a</text>" in svg
    assert "nats</text>" in svg
    assert "#010203" not in svg
    assert "currentColor" in svg


@pytest.mark.parametrize(("values", "bottom"), [([0.0, 0.0], "0"), ([5.0, 6.0], "0"), ([-1.0, 2.0], "−1")])
def test_an_axis_from_zero(values, bottom):
    svg = draw([Curve("", "#123456", [0, 1], values)], "", x_range=(0, 1), from_zero=True)
    ticks = [text for text in re.findall(r"text-anchor: end[^>]*>([^<]*)</text>", svg) if text != "step"]
    assert ticks[0] == bottom
    assert len(ticks) >= 3


def test_values_that_are_not_finite_leave_a_gap():
    svg = draw([Curve("", "#123456", range(5), [1.0, math.nan, 2.0, math.inf, 1.0])], "")
    assert "nan" not in svg.lower()
    assert "inf" not in svg.lower()
    svg = draw([Curve("", "#123456", range(4), [1.0, 0.0, 0.1, -1.0])], "", log=True)
    assert "nan" not in svg.lower()
    assert draw([Curve("", "#123456", [3], [0.5])], "", x_range=(0, 3)).count("<use") >= 1


def test_labels_do_not_overlap():
    curves = [Curve(f"curve {i}", "#123456", [0, 1], [0.0, 1.0 + i * 1e-6]) for i in range(4)]
    curves.append(Curve("low", "#123456", [0, 1], [0.0, 0.0]))
    svg = draw(curves, "")
    ys = sorted(float(y) for y in re.findall(r'<text [^>]*y="([\d.]+)"[^>]*>(?:curve \d|low)</text>', svg))
    assert len(ys) == 5
    assert min(b - a for a, b in pairwise(ys)) > 9
    assert ys[0] > 0


def test_thinning_keeps_spikes_and_the_ends():
    x, y = np.arange(50_000.0), np.ones(50_000)
    y[31_234], y[-1] = 100.0, 7.0
    thin_x, thin_y = plots._thinned(x, y)
    assert len(thin_x) <= plots.POINTS
    assert thin_y.max() == 100
    assert (thin_x[0], thin_x[-1], thin_y[-1]) == (0, 49_999, 7)
    assert (np.diff(thin_x) > 0).all()
    y[31_200:31_230] = y[31_240:31_250] = y[:100] = np.nan
    thin_y = plots._thinned(x, y)[1]
    assert np.nanmax(thin_y) == 100  # NaN hides nothing
    assert np.isnan(thin_y[0])


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    render(run())
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in vars(plots)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.01235"), (-1.5, "−1.5"), (12345.6, "12,346"), (2e-5, "2e−5"), (math.nan, "nan")],
)
def test_numbers(value, text):
    assert plots.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.2, "3 s"), (89, "89 s"), (120, "2 min"), (4000, "67 min"), (7300, "2 h 2 min")]
)
def test_durations(seconds, text):
    assert page.duration(seconds) == text


def test_the_metrics_of_a_classifier_are_plotted_and_the_probe_is_left_out():
    history = [{"step": i, "eval_loss": 1.0, "eval_accuracy": i / 4, "eval_recall_rare": 0.0} for i in (1, 2)]
    run = Run({"Model": "m"}, {}, BALoraConfig.preset("nlu_2024"), step=2, max_steps=2, history=history)
    page = render(run)
    assert "Metrics: accuracy from 0.25 to 0.5" in page
    assert "squared covariances between the classes" in page
    assert "squared distance of the normalized logits" in page
    assert "Distance from the pre-trained model" not in page
    assert "nats" not in page
    run.history = [{"step": 1, "loss": 1.0, "eval_loss": 1.0}]
    assert "<h2>Evaluation" not in render(run)
