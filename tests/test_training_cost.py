"""The cost table: really run on a tiny model, and its gate."""

import csv
import json
import sys
from types import SimpleNamespace

import balora_bench
import pytest
import torch
from balora_bench import cli, training_cost, training_gate, training_methods
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType

from balora import reference

pytest.importorskip("peft")

pytestmark = pytest.mark.no_cover

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
SPEC = dict(model="m", data="", dtype="float32", batch=1, length=8, r=4, checkpointing=False, warm_up=0)


def test_without_transformers_it_says_what_it_needs(monkeypatch, capsys):
    for name in ("training_cost", "training_gate", "training_methods"):
        monkeypatch.delitem(sys.modules, f"balora_bench.{name}")
        monkeypatch.delattr(balora_bench, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["training_cost", "llama-2-7b"]) == 2
    assert "training_cost needs transformers: pip install '.[train]'" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a CPU is read from /proc")
def test_every_method_makes_its_steps_and_has_figures(tmp_path, capsys):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY))
    arguments = [str(tmp_path / "tiny"), "--length", "16", "--r", "4", "--steps", "1", "--warm_up", "0"]
    arguments += ["--checkpointing", "on", "--methods", "pissa", "published", "balora", "--out", str(tmp_path / "cost")]

    assert training_cost.main(arguments) == 0

    table = capsys.readouterr().out
    for name in ("PiSSA", "BA-LoRA as published", "BA-LoRA with balora"):
        row = next(line for line in table.splitlines() if line.startswith(f"| {name} "))
        assert "1.00" in row or name != "PiSSA"
    found = (tmp_path / "cost.csv").read_text().splitlines()
    heads = found[0].split(",")
    rows = [dict(zip(heads, line.split(",")[: len(heads)], strict=False)) for line in found[1:]]
    assert [row["method"] for row in rows] == ["pissa", "published", "balora"]
    # A second forward without a backward, and a third product at the head.
    operations = {row["method"]: float(row["TFLOP"]) for row in rows}
    assert 1.2 < operations["balora"] / operations["pissa"] < 2
    for row in rows:
        parts = [float(row[part]) for part in training_cost.PARTS]
        assert all(part >= 0 for part in parts)
        assert (float(row["teacher"]) > 0) == (row["method"] != "pissa")
        assert float(row["peak_GB"]) > 0.1
    assert (tmp_path / "cost-tiny-checkpointing.png").stat().st_size > 10_000
    assert (tmp_path / "cost.md").read_text().count("| PiSSA ") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a CPU is read from /proc")
def test_a_flat_spectrum_which_the_published_sketch_misses_takes_no_figures_away(tmp_path):
    """As every model of random weights has it: the larger its sizes, the more is missed."""
    flat = TINY | {"hidden_size": 1024, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 4000}
    flat |= {"max_position_embeddings": 600, "initializer_range": 0.05}
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "config.json").write_text(json.dumps(flat))
    arguments = [
        str(tmp_path / "flat"),
        "--length",
        "600",
        "--batch",
        "1",
        "--r",
        "4",
        "--steps",
        "1",
        "--warm_up",
        "0",
    ]
    arguments += ["--checkpointing", "off", "--methods", "published", "balora", "--out", str(tmp_path / "cost")]

    assert training_cost.main(arguments) == 0

    with (tmp_path / "cost.csv").open(encoding="utf-8") as file:
        published, ours = csv.DictReader(file)
    sketched, found = ([terms["svd"] for terms in json.loads(row["terms"])] for row in (published, ours))
    assert all(0.05 < a / b - 1 < 0.1 for a, b in zip(found, sketched, strict=True))
    a, b = (terms["svd"] for terms in json.loads(ours["exact"]))
    assert a == pytest.approx(b, rel=1e-3)
    assert float(ours["seconds"]) > 0


TERMS = {"ce": 2.0, "consistency": 0.1, "diversity": -2.0, "svd": -1.5}


def row(method, changed=None, **more):
    """Two steps, the second with the changed terms (None: missing)."""
    terms = {k: v for k, v in (TERMS | (changed or {})).items() if v is not None}
    figures = dict.fromkeys(("seconds", "spread", "peak_GB", "TFLOP", "floor", *training_cost.PARTS), 1.0)
    losses = [training_methods.weighted(TERMS | t) for t in (TERMS, terms)]
    more = {"terms": [TERMS, terms], "losses": losses, "reference": [TERMS, terms], "exact": [TERMS, TERMS]} | more
    return {"method": method, "dtype": "float32", "note": ""} | figures | more


@pytest.mark.parametrize(
    "changed",
    [{"ce": 2.1}, {"consistency": 0.15}, {"diversity": -2.2}, {"svd": -1.4}, {"svd": -1.8}, {"svd": 1.5}]
    + [{name: value} for name in TERMS for value in (None, float("nan"), 0.0)],
)
@pytest.mark.parametrize("published", [True, False])
def test_no_figure_for_a_term_that_is_missing_or_leaves_the_published_one(changed, published):
    others = [row("pissa"), row("published")] if published else [row("pissa")]
    *_, ours = training_gate.gated([*others, row("balora", changed, seconds=0.5)])
    assert "seconds" not in ours
    assert "peak_GB" not in ours
    assert f"{next(iter(changed))} " in ours["note"]
    assert "0.5" not in "".join(training_cost.shown(ours | {"note": ""}).values())


def test_the_published_sketch_may_miss_what_the_exact_svd_term_has():
    sketched = {"svd": -1.5 * 0.87}
    terms = [TERMS | sketched] * 2
    *_, ours = training_gate.gated([row("published", terms=terms), row("balora")])
    assert ours["seconds"] == 1
    assert ours["apart"]["svd"] == pytest.approx(0.13)
    *_, ours = training_gate.gated([row("published", terms=terms), row("balora", exact=[TERMS, sketched])])
    assert "seconds" not in ours
    assert ours["note"] == "away: svd 14.9% from the exact one of a step's tokens (allowed 2.0%)"


@pytest.mark.parametrize("key", ["reference", "exact"])
def test_a_check_that_fails_refuses_the_row_and_says_why(key):
    *_, ours = training_gate.gated([row("published"), row("balora", **{key: None}, unchecked="memory ended")])
    assert "seconds" not in ours
    assert ours["refused_seconds"] == 1
    assert "svd nan% from" in ours["note"]
    assert ours["note"].endswith("; memory ended")


def test_what_is_refused_stays_in_the_csv_alone(tmp_path):
    given = {"model": "m", "data": "", "batch": 4, "length": 8, "r": 4, "checkpointing": False}
    rows = [given | row("pissa"), given | row("published"), given | row("balora", {"svd": -1.3}, seconds=0.5)]
    rows = training_gate.gated(rows)
    training_cost.write(tmp_path / "cost", training_cost.section(rows), rows, {"device": "d"})
    with (tmp_path / "cost.csv").open(encoding="utf-8") as file:
        *_, ours = csv.DictReader(file)
    assert (ours["seconds"], ours["refused_seconds"], ours["refused_peak_GB"]) == ("", "0.5", "1.0")
    assert [terms["svd"] for terms in json.loads(ours["refused_terms"])] == [-1.5, -1.3]
    assert ours["terms"] == ""
    assert "0.5" not in (tmp_path / "cost.md").read_text().partition("Terms of balora")[0]


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_exact_svd_term_is_that_of_the_logits(cap, monkeypatch):
    monkeypatch.setattr(training_methods, "_TILE", 9 * 20)  # three tiles
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=g) for shape in ((9, 4), (50, 4), (50,)))
    for some in (None, bias):
        z = hidden.double() @ weight.double().T + (0 if some is None else some.double())
        z = cap * torch.tanh(z / cap) if cap else z
        sigma = torch.linalg.svdvals(z)
        found = training_methods.exact_svd(hidden, weight, some, cap, 3)
        assert found == pytest.approx(-(sigma[:3].sum() / z.norm()).item(), rel=1e-10)


def test_no_figure_for_a_loss_without_its_terms():
    *_, ours = training_gate.gated([row("published"), row("balora", losses=[2.0, 2.0])])
    assert "seconds" not in ours
    assert "loss " in ours["note"]


@pytest.mark.parametrize("name", TERMS)
def test_no_figure_for_a_term_that_leaves_the_reference_on_the_same_weights(name):
    """However near the published method's it is: a small KL of 0 would be."""
    tiny = {"consistency": 1e-4}
    terms = [TERMS | tiny, TERMS | tiny]
    losses = [training_methods.weighted(t) for t in terms]
    for factor, shown in ((1.005, True), (0.0, False)):
        at_the_end = [TERMS | tiny | {name: (TERMS | tiny)[name] * factor}, TERMS | tiny]
        *_, ours = training_gate.gated(
            [row("published", terms=terms), row("balora", terms=terms, losses=losses, reference=at_the_end)]
        )
        assert ("seconds" in ours) == shown
        assert (f"{name} 100.0% from balora.reference's" in ours["note"]) != shown


def test_on_a_gpu_what_has_run_is_written_before_the_next_method(tmp_path, monkeypatch):
    """PiSSA and balora first: what ends a run early leaves these."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    monkeypatch.setattr(training_cost.harness, "DEVICE", "cuda")
    seen = []
    spec = SPEC | dict(model=str(tmp_path), r=10_000, steps=1)
    training_cost.measure(spec, ["lora", "pissa", "balora"], None, 1e12, lambda rows: seen.append(rows))
    assert [[row["method"] for row in rows] for rows in seen] == [
        ["pissa"],
        ["pissa", "balora"],
        ["lora", "pissa", "balora"],
    ]


def test_a_row_that_the_host_binds_is_named():
    given = {"model": "m", "data": "", "batch": 4, "length": 8, "r": 4, "checkpointing": False}
    rows = [given | row("pissa", device_seconds=0.85), given | row("lora", device_seconds=0.95), given | row("full")]
    text = "\n".join(training_cost.section(rows))
    assert "device, s" in text
    assert "0.850" in text
    assert "(its share of a step): PiSSA 85%. More" in text
    assert "device, s" not in "".join(training_cost.section(rows[2:]))


def test_the_profiled_step_has_the_seconds_of_the_device_and_no_parts():
    parts = dict.fromkeys(training_cost.PARTS, 1.0)
    steps = [{"seconds": 2.0, "peak": 1, "loss": 1.0}, {"loss": 1.0, "parts": parts}]
    steps += [{"loss": 1.0, "device_seconds": 1.5}, {"loss": 1.0, "operations": 10}]
    found = training_cost.summary(SPEC | {"steps": 1}, "pissa", steps, None, 1.0)
    assert found["device_seconds"] == 1.5
    assert found["student"] == 1.0
    del steps[2]["device_seconds"]  # where the profiler failed
    assert "device_seconds" not in training_cost.summary(SPEC | {"steps": 1}, "pissa", steps, None, 1.0)


def test_the_seconds_of_the_device_are_its_kernels_and_no_ranges_around_them():
    def event(device, start, end, names=False):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(device_type=device, time_range=span, is_user_annotation=names)

    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    events = [event(cuda, 4e5, 7e5), event(cuda, 0, 2e5), event(cuda, 0, 7e5, names=True), event(cpu, 0, 9e5)]
    assert training_methods.device_seconds(events) == pytest.approx(0.5)
    events += [event(cuda, 5e5, 6e5), event(cuda, 6e5, 8e5)]  # of which some overlaps
    assert training_methods.device_seconds(events) == pytest.approx(0.6)


def test_a_profiler_that_fails_leaves_the_step(monkeypatch, capsys):
    device = training_methods.DeviceTime()
    monkeypatch.setattr(training_methods, "profile", lambda **_: 1 / 0)
    device.begin()
    device.end()
    assert device.seconds is None
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_picture_that_fails_ends_nothing(tmp_path, monkeypatch, capsys):
    def measured(spec, methods, data, rate, so_far):
        rows = [{k: spec[k] for k in SPEC if k in spec} | {"model": "m"} | row("pissa")]
        so_far(rows)
        return rows

    monkeypatch.setattr(training_cost, "measure", measured)
    monkeypatch.setattr(training_cost, "draw", lambda *_: 1 / 0)
    monkeypatch.setattr(training_cost.harness, "product_rate", lambda dtype: 1e12)
    assert training_cost.main(["llama-2-7b", "--checkpointing", "off", "--out", str(tmp_path / "cost")]) == 0
    assert "no picture: ZeroDivisionError" in capsys.readouterr().err
    assert "| PiSSA" in (tmp_path / "cost.md").read_text()


def test_terms_that_follow_have_figures_and_ratios():
    near = {"ce": 2.01, "consistency": 0.105, "diversity": -1.98, "svd": -1.54}
    more = dict(seconds=1.5, peak_GB=0.5, reference=[TERMS, TERMS])
    *_, ours = training_gate.gated([row("pissa"), row("published"), row("balora", near, **more)])
    assert (ours["x_seconds"], ours["x_peak"]) == (1.5, 0.5)
    assert ours["note"] == ""


def test_without_the_published_method_the_table_says_what_the_gate_was():
    *_, ours = training_gate.gated([row("pissa"), row("balora")])
    assert "balora.reference" in ours["note"]
    assert ours["seconds"] == 1


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_no_method_has_figures_with_a_loss_that_is_not_finite(loss):
    (found,) = [training_cost.summary(SPEC, "lora", [{"loss": 2.0}, {"loss": loss}], None, 1.0)]
    assert "seconds" not in found
    assert "step 2" in found["note"]


def test_a_table_without_figures_has_no_picture(tmp_path):
    training_cost.draw([{"method": "lora", "note": "out of memory"}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_products_with_a_wider_result_are_counted():
    a, b = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((3, 4, 5), (3, 5, 6)))
    aten, operations = torch.ops.aten, []
    takes_all = not torch.__version__.startswith(("2.10", "2.11", "2.12"))  # without numbers; on a device they do

    def step(out):
        if takes_all:
            aten.addmm.dtype_out(out[0], a[0], b[0], torch.float32, out=out[0])
            aten.bmm.dtype_out(a, b, torch.float32, out=out)
        return aten.mm.dtype_out(a[0], b[0], torch.float32, out=out[0])

    training_methods.counted(step, operations)(torch.empty(3, 4, 6, device="meta"))
    assert operations == [2 * 4 * 5 * 6 * (takes_all * (1 + 3) + 1)]
    assert training_methods.added_product((4, 6), (4, 5), (5, 6), torch.float32) == 2 * 4 * 5 * 6


def test_attention_with_fewer_heads_of_keys_is_counted():
    """As CUDA's kernels get it; torch's own formula wants as many."""
    q, k, v = (torch.empty(2, heads, 5, 8) for heads in (6, 3, 3))
    assert training_methods.attention(q.shape, k.shape, v.shape, 0.0, True) == 2 * (2 * 6 * 5 * 5 * 8) * 2
    assert training_methods.attention_backward(q.shape, q.shape, k.shape, v.shape) == 5 * (2 * 6 * 5 * 5 * 8) * 2

    def step():
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)

    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (t.to("meta") for t in (q, k, v))
        operations = []
        training_methods.counted(step, operations)()
    assert operations == [2 * (2 * 6 * 5 * 5 * 8) * 2]


def test_a_count_that_fails_leaves_the_step(monkeypatch):
    def broken(*args, **kwargs):
        raise TypeError("no such formula")

    monkeypatch.setattr(training_methods, "product", broken)
    operations = []
    found = training_methods.counted(lambda: torch.eye(2) @ torch.eye(2), operations)()
    assert found.sum() == 2
    assert operations == []


def test_a_child_sees_one_device_and_no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_USE_FSDP"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    found = training_cost.child_environment()
    assert found["CUDA_VISIBLE_DEVICES"] == "2"
    assert not {"WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_USE_FSDP"} & set(found)


def test_a_variable_that_chooses_the_implementation_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("BALORA_IMPL", "reference")
    assert cli.main(["training_cost", "llama-2-7b"]) == 2
    assert "BALORA_IMPL" in capsys.readouterr().err


def test_the_published_loss_is_the_reference_objective():
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(2, 9, 50, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(50, (2, 9), generator=g)
    labels[0, :4] = -100
    ce = torch.tensor(2.0, dtype=torch.float64)
    kept = labels[:, 1:] != -100
    config = training_methods.ALL_TERMS
    found = training_methods.published_terms(ce, z, t, labels)
    a, b = z[:, :-1][kept], t[:, :-1][kept]
    kl, entropy = reference.consistency(a, b, config.temperature), reference.diversity(a, config.entropy_top_k)
    assert found["consistency"].item() == pytest.approx(kl.item() / len(a), rel=1e-9)
    assert found["diversity"].item() == pytest.approx(entropy.item() / len(a), rel=1e-9)
    assert found["svd"].item() == pytest.approx(reference.svd(a, config.svd_rank, "fro").item(), rel=1e-3)  # a sketch
    loss = ce + config.lambda_consistency * found["consistency"]
    loss += config.lambda_diversity * found["diversity"] + config.lambda_svd * found["svd"]
    assert training_methods.published_loss(ce, z, t, labels).item() == pytest.approx(loss.item(), rel=1e-12)


def test_a_method_that_fails_is_named_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    spec = SPEC | dict(model=str(tmp_path), r=10_000, steps=1)
    (found,) = training_cost.measure(spec, ["balora"], None, 1e12)
    assert "r: expected" in found["note"]
    assert "seconds" not in found


def test_a_method_that_is_killed_is_said_to_be():
    child = training_cost.Child({"method": "pissa"})
    try:
        child.process.kill()
        assert child.step() is None
        assert child.why() == "killed by SIGKILL, as where memory ends"
    finally:
        child.end()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "MODEL"),
        (["llama-2-7b", "--data", "nowhere.jsonl"], "--data"),
        (["llama-2-7b", "--steps", "0"], "--steps"),
    ],
)
def test_bad_arguments_are_named(arguments, named, capsys):
    with pytest.raises(SystemExit):
        training_cost.main(arguments)
    assert named in capsys.readouterr().err
