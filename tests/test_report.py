"""The report beside a training: the same bits, resumed runs, crashes, and errors that stop nothing."""

import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

pytest.importorskip("matplotlib")

import balora
import balora.cli
from balora import BALoraConfig, elements, files, plots, report, train
from balora.report import ReportCallback
from balora.trainer import BALoraCallback, BALoraTrainer

from .conftest import tiny_checkpoint, tiny_llama
from .test_page import labels, row

CONFIG = BALoraConfig(lambda_consistency=0.5, lambda_diversity=0.3, lambda_svd=0.2, focus_warmup=0.5, focus_ramp=0.0)


def examples(n=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 97, (12,), generator=g).tolist() for _ in range(n)]
    return [dict(input_ids=ids, labels=[-100] * (1 + i % 6) + ids[1 + i % 6 :]) for i, ids in enumerate(rows)]


def build(folder, callbacks=(), kind=BALoraTrainer, eval_dataset=None, config=CONFIG, **options):
    model = balora.get_pissa_model(tiny_llama(), r=4, lora_dropout=0.2)
    balora.attach(model, config)
    defaults = dict(max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=2, save_strategy="no")
    defaults |= dict(disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True, report_to="none")
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    data = examples()
    return kind(model, arguments, train_dataset=data, eval_dataset=eval_dataset, callbacks=list(callbacks))


def adapters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def kept(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Nearly all of the time is matplotlib's, and tests/test_page.py has that."""
    monkeypatch.setattr(elements, "draw", lambda *_, **__: "<svg></svg>")


@pytest.fixture
def drawn(undrawn, monkeypatch):
    monkeypatch.setattr(elements, "draw", plots.draw)


@pytest.fixture
def eager(monkeypatch):
    """A page and a probe at every log."""
    monkeypatch.setattr(report, "_WAIT", 0.0)
    monkeypatch.setattr(report, "_DRAWING", 1e9)
    monkeypatch.setattr(report, "_PROBING", 1e9)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_training_is_the_same_bits_with_and_without(tmp_path, eager, drawn, accumulate):
    options = dict(gradient_accumulation_steps=accumulate, per_device_train_batch_size=2, logging_steps=1, max_steps=6)
    plain = build(tmp_path / "a", **options)
    plain.train()
    state = torch.get_rng_state()
    watched = build(tmp_path / "b", [ReportCallback(tmp_path / "b" / "report.html")], **options)
    watched.train()
    assert torch.equal(torch.get_rng_state(), state)
    a, b = adapters(plain.model), adapters(watched.model)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert [p["step"] for p in kept(tmp_path / "b")["probe"]] == list(range(7))
    terms = ("loss", "ce", "consistency", "diversity", "svd", "grad_norm")
    pick = lambda t: [{n: h[n] for n in terms if n in h} for h in t.state.log_history]  # noqa: E731
    assert pick(plain) == pick(watched)


class Noisy(torch.utils.data.Dataset):
    """Rows that are changed at random whenever they are read, as augmented data are."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError
        ids = list(examples()[i]["input_ids"])
        ids[-1], ids[-2] = random.randint(1, 96), int(np.random.randint(1, 97))  # noqa: NPY002
        ids[-3] = int(torch.randint(1, 97, ()))
        return dict(input_ids=ids, labels=ids)


@pytest.mark.parametrize("held_out", [False, True])
def test_examples_that_are_drawn_at_random_are_the_same_with_and_without(tmp_path, eager, held_out):
    found = []
    for watched in (False, True):
        run = build(tmp_path, max_steps=3)
        run.train_dataset = Noisy()
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        if watched:
            run.add_callback(ReportCallback(tmp_path / "report.html", Noisy() if held_out else None))
        run.train()
        draws = torch.rand(3).tolist(), random.random(), np.random.random()  # noqa: NPY002
        found.append((adapters(run.model), draws))
    (a, drawn), (b, drawn_too) = found
    assert drawn == drawn_too
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert len(kept(tmp_path)["probe"]) > 1


def test_what_a_run_leaves(tmp_path, drawn):
    path = tmp_path / "deep" / "report.html"
    held_out = examples(4, seed=9)
    done = build(tmp_path, [ReportCallback(path, held_out, {"Model": "tiny", "Data": "sixteen rows"})])
    done.train()
    html = path.read_text()
    assert "Finished: 8 steps in" in html
    assert html.count("<svg viewBox") == 13
    assert row(html, "Model") == ["tiny"]
    assert row(html, "Data") == ["sixteen rows"]
    assert row(html, "Steps") == ["8 of 8"]
    assert row(html, "Implementation") == ["linear_objective: streaming, on cpu"]
    assert row(html, "lambda_consistency") == ["0.5"]
    trained = sum(p.numel() for p in done.model.parameters() if p.requires_grad)
    assert row(html, "Trained parameters")[0].startswith(f"{trained:,} of ")
    assert f"{sum(r['labels'][i] != -100 for r in held_out for i in range(1, 12))} tokens of the first 4 rows" in html
    assert "of the evaluation data" in html
    assert len(labels(html)) == 13  # no plot is empty
    probe = kept(path.parent)["probe"]
    assert [probe[0]["step"], probe[-1]["step"]] == [0, 8]
    assert probe[0]["kl"] == 0 < probe[-1]["kl"]
    assert row(html, "probe: KL to the pre-trained model")[0] == "0"
    assert not list(path.parent.glob("*.part"))
    # the means of the logs are on the page
    last = [h for h in done.state.log_history if "ce" in h][-1]
    assert row(html, "CE")[1] == f"{last['ce']:.4g}"


def test_trained_tokens_are_counted(tmp_path):
    done = build(
        tmp_path,
        [ReportCallback(tmp_path / "report.html")],
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    done.train()
    speed = kept(tmp_path)["speed"]
    assert [p["step"] for p in speed] == [2, 4, 6, 8]
    assert all(p["steps"] == 2 for p in speed)
    epoch = sum(label != -100 for r in examples() for label in r["labels"][1:])  # 4 steps
    assert sum(p["tokens"] for p in speed) == 2 * epoch
    assert all(p["seconds"] > 0 and 1e7 < p["host"] < 1e12 for p in speed)


@pytest.mark.parametrize("other", ["eval", "save"])
def test_evaluations_and_checkpoints_do_not_count_as_training(tmp_path, monkeypatch, other):
    now = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])

    class Slow(TrainerCallback):
        def on_step_begin(self, *_, **__):
            now[0] += 1.0

        def on_evaluate(self, *_, **__):
            now[0] += 100.0

        on_save = on_evaluate

    callback = ReportCallback(tmp_path / "report.html")
    options = {f"{other}_strategy": "steps", f"{other}_steps": 1, "logging_steps": 4}
    run = build(tmp_path, [Slow(), callback], eval_dataset=examples(4), **options)
    run.train()
    assert [p["seconds"] for p in kept(tmp_path)["speed"]] == [4.0, 4.0]
    assert kept(tmp_path)["speed"][-1]["elapsed"] > 700


def test_plain_trainer_and_evaluations(tmp_path, eager):
    callbacks = [BALoraCallback(), ReportCallback(tmp_path / "report.html")]
    options = dict(eval_strategy="steps", eval_steps=4)
    run = build(tmp_path, callbacks, Trainer, examples(4), **options)
    run.train()
    html = (tmp_path / "report.html").read_text()
    assert row(html, "eval loss")[0] != row(html, "eval loss")[1]
    assert "eval loss from" in labels(html)["Loss"]
    assert "of the training data" in html
    measured = run.evaluate()["eval_loss"]  # after the training: the page takes it up
    assert row((tmp_path / "report.html").read_text(), "eval loss")[1] == f"{measured:.4g}"


class Break(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_pages_come_during_the_run_but_not_at_every_log(tmp_path, monkeypatch):
    pages = []
    write = files.write
    monkeypatch.setattr(files, "write", lambda path, text: (pages.append((path.name, text)), write(path, text)))
    now = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            now[0] += 3.0

    run = build(tmp_path, [Clock(), ReportCallback(tmp_path / "report.html")], logging_steps=1, max_steps=10)
    run.train()
    html = [text for name, text in pages if name == "report.html"]
    steps = [re.search(r"(?:Running|Finished): (?:step )?(\d+)", text)[1] for text in html]
    assert steps == ["1", "5", "9", "10"]  # every 10 s, and at the end
    assert "Running: step 5 of 10, about 15 s left." in html[1]
    assert "refresh" in html[1]
    assert "refresh" not in html[-1]


def test_drawing_and_probing_take_a_bounded_share_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    drawn, probed = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            now[0] += 10.0

    def render(run):
        drawn.append(now[0])
        now[0] += 5.0
        return ""

    measure = report.Probe.measure

    def slow(self, pre_trained=False):
        probed.append(now[0])
        now[0] += 8.0
        return measure(self, pre_trained)

    monkeypatch.setattr(report, "render", render)
    monkeypatch.setattr(report.Probe, "measure", slow)
    callback = ReportCallback(tmp_path / "report.html")
    run = build(tmp_path, [Clock(), callback], logging_steps=1, max_steps=150)
    run.train()
    # at the first log, at the next (only the first one loads fonts), every 500 s, at the end
    assert [round(b - a, -1) for a, b in pairwise(drawn)] == [20, 510, 510, 520]
    assert len(probed) == 2 + 5 + 1  # before, each 267 s, after
    assert callback._run.spent == 5 * 5 + 8 * 8


def test_a_run_that_is_stopped_and_resumed_shows_all_of_it(tmp_path, eager):
    options = dict(save_strategy="steps", save_steps=3, logging_steps=1)
    first = build(tmp_path, [ReportCallback(tmp_path / "report.html"), Break(5)], **options)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    before = kept(tmp_path)
    assert [p["step"] for p in before["speed"]] == [1, 2, 3, 4]
    (tmp_path / "report.html").unlink()
    again = build(tmp_path, [ReportCallback(tmp_path / "report.html")], **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    after = kept(tmp_path)
    for name in ("speed", "probe"):
        assert after[name][:3] == before[name][:3]
    assert [p["step"] for p in after["speed"]] == list(range(1, 9))  # step 4 once
    assert [p["step"] for p in after["probe"]] == list(range(9))
    elapsed = [p["elapsed"] for p in after["speed"]]
    assert elapsed == sorted(elapsed)
    html = (tmp_path / "report.html").read_text()
    assert row(html, "loss")[0] == f"{again.state.log_history[0]['loss']:.4g}"
    whole = build(tmp_path / "whole", [ReportCallback(tmp_path / "whole" / "report.html")], **options)
    whole.train()
    # the probe of a resumed run is that of one in a piece
    assert kept(tmp_path / "whole")["probe"] == after["probe"]


def test_a_checkpoint_keeps_the_points_that_no_page_has_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_WAIT", 1e9)
    options = dict(save_strategy="steps", save_steps=3, logging_steps=1)
    killed = build(tmp_path, [ReportCallback(tmp_path / "report.html"), Break(5)], **options)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert [p["step"] for p in kept(tmp_path)["speed"]] == [1, 2, 3]


@pytest.mark.parametrize("found", ["", "[]", '{"speed": 3}', '{"speed": [{"step": 1}], "probe": [], "spent": 0}'])
def test_a_file_of_something_else_beside_the_page_is_passed_over(tmp_path, found):
    options = dict(save_strategy="steps", save_steps=4)
    build(tmp_path, **options).train()
    (tmp_path / "report.json").write_text(found)
    run = build(tmp_path, [ReportCallback(tmp_path / "report.html")], **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [p["step"] for p in kept(tmp_path)["speed"]] == [6, 8]
    assert "Finished: 8 steps" in (tmp_path / "report.html").read_text()


def test_a_new_run_does_not_take_up_the_points_of_an_old_one(tmp_path):
    for _ in range(2):
        build(tmp_path, [ReportCallback(tmp_path / "report.html")]).train()
    assert [p["step"] for p in kept(tmp_path)["speed"]] == [2, 4, 6, 8]


def test_many_points_are_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_POINTS", 4)
    now = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            now[0] += 1.0

    run = build(tmp_path, [Clock(), ReportCallback(tmp_path / "report.html")], logging_steps=1, max_steps=11)
    run.train()
    speed = kept(tmp_path)["speed"]
    assert len(speed) <= 5
    assert sum(p["steps"] for p in speed) == sum(p["seconds"] for p in speed) == 11
    assert speed[-1]["step"] == 11
    assert [p["step"] for p in speed] == sorted(p["step"] for p in speed)


# ---- errors ----


def fails(*_, **__):
    raise RuntimeError("no ink")


@pytest.mark.parametrize("what", ["page", "disk", "probe", "psutil", "start"])
def test_an_error_of_the_report_is_said_once_and_stops_nothing(tmp_path, monkeypatch, caplog, eager, what):
    path = tmp_path / "report.html"
    if what == "disk":
        path.mkdir()  # a page cannot replace a folder
    else:
        place, name = {
            "page": (report, "render"),
            "probe": (report.Probe, "measure"),
            "psutil": (report.psutil, "Process"),
            "start": (report, "attachment"),
        }[what]
        monkeypatch.setattr(place, name, fails)
    run = build(tmp_path, [ReportCallback(path)], save_strategy="steps", save_steps=4)
    with caplog.at_level(logging.WARNING, logger="balora.report"):
        run.train()
    assert run.state.global_step == 8
    said = [r.getMessage() for r in caplog.records if r.name == "balora.report"]
    assert len(said) == 1
    assert said[0].startswith(f"report: {path} is not complete: ")
    assert what == "disk" or said[0].endswith("RuntimeError: no ink")
    if what == "probe":
        assert path.read_text().count("Not measured: RuntimeError: no ink") == 3
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("metric", [[1, 2], None, "x", {"a": 1}, True])
def test_a_metric_that_is_no_number_leaves_the_page(tmp_path, caplog, metric):
    run = build(tmp_path, [ReportCallback(tmp_path / "report.html")], eval_dataset=examples(4), eval_strategy="epoch")
    run.compute_metrics = lambda _: {"m": metric, "share": 0.5}
    run.train()
    html = (tmp_path / "report.html").read_text()
    assert "Finished: 8 steps" in html
    assert row(html, "eval share") == ["0.5", "0.5"]
    assert "<th scope=row>eval m</th>" not in html
    assert "could not be shown" not in html
    assert "balora.report" not in {r.name for r in caplog.records}


def test_labels_that_the_collator_makes(tmp_path):
    class Tokenizer:  # what the collator asks of one
        mask_token, pad_token, pad_token_id = None, "0", 0

        def pad(self, rows, return_tensors, pad_to_multiple_of):
            return {"input_ids": torch.tensor([r["input_ids"] for r in rows])}

    run = build(tmp_path, [ReportCallback(tmp_path / "report.html")])
    run.train_dataset = [dict(input_ids=r["input_ids"]) for r in examples()]
    run.data_collator = DataCollatorForLanguageModeling(Tokenizer(), mlm=False)
    run.train()
    html = (tmp_path / "report.html").read_text()
    assert f"{16 * 11} tokens of the first 16 rows of the training data" in html
    assert kept(tmp_path)["probe"][-1]["kl"] > 0


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from examples()


class Sized(Stream):
    def __len__(self):
        return 16


@pytest.mark.parametrize("kind", [Stream, Sized])
def test_a_stream_has_no_probe_unless_rows_are_held_out(tmp_path, caplog, kind):
    for held_out in (None, kind()):
        run = build(tmp_path, [ReportCallback(tmp_path / "report.html", held_out)])
        run.train_dataset = kind()
        run.train()
        html = (tmp_path / "report.html").read_text()
        why = "Not measured: the training data cannot be indexed; pass held_out.<"
        assert html.count(why) == (3 if held_out is None else 0)
        assert len(labels(html)) == (10 if held_out is None else 13)
    assert "balora.report" not in {r.name for r in caplog.records}


def test_rows_that_cannot_be_probed_leave_the_rest(tmp_path):
    run = build(tmp_path, [ReportCallback(tmp_path / "report.html", held_out=[])])
    run.train()
    html = (tmp_path / "report.html").read_text()
    assert html.count("Not measured: ValueError: rows: expected input_ids and labels") == 3
    assert len(labels(html)) == 10


def test_several_processes_have_no_probe_and_one_page(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    callback = ReportCallback(tmp_path / "report.html")
    run = build(tmp_path)
    state, args = run.state, run.args
    state.max_steps, state.is_world_process_zero = 4, False
    callback.on_train_begin(args, state, None, model=run.model)
    callback.on_train_end(args, state, None)
    callback.stop(RuntimeError(), state)
    assert not callback.written
    assert not list(tmp_path.iterdir())
    state.is_world_process_zero = True
    callback.on_train_begin(args, state, None, model=run.model)
    callback.on_train_end(args, state, None)
    assert callback.written
    html = (tmp_path / "report.html").read_text()
    assert html.count("Not measured: the run has 2 processes") == 3


# ---- balora train ----


def command(tmp_path, *more, steps=6):
    if not (tmp_path / "model").exists():
        tiny_checkpoint(tmp_path / "model")
        rows = [json.dumps({"question": f"What is {i} + {i}?", "answer": f"{2 * i}."}) for i in range(30)]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    options = dict(model=tmp_path / "model", data=tmp_path / "rows.jsonl", output_dir=tmp_path / "run", r=4)
    options |= dict(max_steps=steps, logging_steps=2, per_device_train_batch_size=2, disable_tqdm=True)
    return [*(w for name, value in options.items() for w in (f"--{name}", str(value))), "--use_cpu", *more]


def test_balora_train_writes_the_report_and_names_it(tmp_path, capsys, drawn):
    flags = command(tmp_path, "--eval_data", str(tmp_path / "rows.jsonl"))
    assert balora.cli.main(["train", *flags]) == 0
    path = tmp_path / "run" / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {path}"
    html = path.read_text()
    assert "Finished: 6 steps" in html
    assert row(html, "Model") == [str(tmp_path / "model")]
    assert row(html, "Training data")[0].startswith(f"{tmp_path / 'rows.jsonl'}: 30 rows,")
    assert row(html, "Evaluation data")[0].startswith(f"{tmp_path / 'rows.jsonl'}: 30 rows,")
    assert row(html, "Output folder") == [str(tmp_path / "run")]
    assert row(html, "logging_steps") == ["2"]  # of the recipe
    final = json.loads((tmp_path / "run" / "eval_results.json").read_text())["eval_loss"]
    assert row(html, "eval loss") == ["", f"{final:.4g}"]
    assert "of the evaluation data" in html


def test_a_run_that_crashes_says_how_far_it_came(tmp_path):
    from transformers import HfArgumentParser

    parser = HfArgumentParser((train.RunArguments, BALoraConfig, TrainingArguments))
    run, config, arguments = parser.parse_args_into_dataclasses(command(tmp_path, "--save_strategy", "no"))
    ready = train.setup(run, config, arguments)
    ready[0].add_callback(Break(5))
    with pytest.raises(KeyboardInterrupt):
        train.train(*ready)
    html = (tmp_path / "run" / "report.html").read_text()
    assert re.search(r"Stopped at step 5 of 6, after \d+ s: KeyboardInterrupt<", html)
    assert "refresh" not in html


def test_a_killed_run_leaves_a_page(tmp_path):
    flags = command(tmp_path, "--save_strategy", "no", steps=5000)
    process = subprocess.Popen(
        [sys.executable, "-m", "balora.cli", "train", *flags],
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen = 0
    for line in process.stdout:
        seen += "'loss'" in line
        if seen == 3:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    process.wait()
    html = (tmp_path / "run" / "report.html").read_text()
    assert re.search(r"Running: step [246] of 5,000, about .* left\.", html)
    assert html.endswith("</html>\n")


def test_without_matplotlib_a_run_trains_and_says_how_to_get_the_report(tmp_path, capsys, monkeypatch):
    for name in ("report", "page", "plots"):
        monkeypatch.delitem(sys.modules, f"balora.{name}")
        monkeypatch.delattr(balora, name, raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)

    class Hide:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "matplotlib":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Hide(), *sys.meta_path])
    assert balora.cli.main(["train", *command(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("pip install matplotlib") == 1
    assert "report: none of this run; balora.report needs matplotlib" in printed
    assert (tmp_path / "run" / "lora").is_dir()
    assert not (tmp_path / "run" / "report.html").exists()
