"""The cost table: really run on a tiny model, and its gate."""

import json
import sys

import pytest
import torch
from balora_bench import training_cost, training_methods

pytest.importorskip("peft")

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


def row(method, losses, **more):
    figures = dict.fromkeys(("seconds", "spread", "peak_GB", "TFLOP", "floor", *training_cost.PARTS), 1.0)
    return {"method": method, "note": "", "losses": losses} | figures | more


def test_no_figure_for_losses_that_leave_the_published_ones():
    rows = [row("pissa", [2.0, 1.0]), row("published", [2.0, 1.0]), row("balora", [2.0, 1.03], seconds=0.5)]
    *_, ours = training_cost.gated(rows)
    assert "seconds" not in ours
    assert "peak_GB" not in ours
    assert "3.0%" in ours["note"]
    assert "0.5" not in "".join(training_cost.shown(ours).values())


@pytest.mark.parametrize("losses", [[2.0, float("nan")], [float("inf"), 1.0]])
def test_no_figure_for_losses_that_are_no_numbers(losses):
    *_, ours = training_cost.gated([row("published", [2.0, 1.0]), row("balora", losses)])
    assert "seconds" not in ours


def test_losses_that_follow_have_figures_and_ratios():
    *_, ours = training_cost.gated(
        [row("pissa", [2.0, 1.0]), row("published", [2.0, 1.0]), row("balora", [2.0, 1.01], seconds=1.5, peak_GB=0.5)]
    )
    assert (ours["x_seconds"], ours["x_peak"]) == (1.5, 0.5)


def test_without_the_published_method_the_table_says_so():
    *_, ours = training_cost.gated([row("pissa", [2.0, 1.0]), row("balora", [2.0, 1.01])])
    assert "not checked" in ours["note"]


def test_the_published_loss_is_the_reference_objective():
    g = torch.Generator().manual_seed(0)
    z, t = (torch.randn(2, 9, 50, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(50, (2, 9), generator=g)
    labels[0, :4] = -100
    zero = torch.zeros((), dtype=torch.float64)
    kept = labels[:, 1:] != -100
    found = training_methods.published_loss(zero, z, t, labels)
    config = training_methods.ALL_TERMS
    from balora import reference

    a, b = z[:, :-1][kept], t[:, :-1][kept]
    n = len(a)
    expected = (
        config.lambda_consistency * reference.consistency(a, b, config.temperature) / n
        + config.lambda_diversity * reference.diversity(a, config.entropy_top_k) / n
        + config.lambda_svd * reference.svd(a, config.svd_rank, "fro")
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)  # float32, and its own SVD


def test_a_method_that_fails_is_named_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    spec = dict(
        model=str(tmp_path), batch=1, length=8, r=10_000, dtype="float32", steps=1, warm_up=0, checkpointing=False
    )
    (found,) = training_cost.measure(spec, ["balora"], None, 1e12)
    assert "r: expected" in found["note"]
    assert "seconds" not in found


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
