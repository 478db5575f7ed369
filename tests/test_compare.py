"""balora compare: its runs, its measures, its table and its page."""

import csv
import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from balora import cli, compare, compare_page, compare_run, data, measure, results
from balora.adapters import RESIDUAL_BASE
from balora.results import Cell, Result

from .conftest import tiny_checkpoint, tiny_llama, tiny_tokenizer

TEXT = "The cat sat on the mat. " * 40


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"question": f"Count to {i}.", "answer": "1 2 3"} for i in range(1, 7)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "text.txt").write_text(TEXT)
    tiny_checkpoint(folder / "model")
    return folder


def arguments(inputs, out, **changes):
    values = dict(model=inputs / "model", data=inputs / "rows.jsonl", eval_data=inputs / "rows.jsonl", output_dir=out)
    values |= dict(drift_data=inputs / "text.txt", drift_windows=2, generations=3, new_tokens=6, r=4, max_steps=3)
    values |= dict(per_device_train_batch_size=2, logging_steps=1, use_cpu=True, learning_rate=0.05, lambda_svd=0.3)
    values |= dict(methods="lora balora", seeds="1 2", focus_warmup=0)
    words = [(f"--{name}", *str(value).split()) for name, value in {**values, **changes}.items() if value is not None]
    return ["compare", *(word for option in words for word in option)]


@pytest.fixture(scope="module")
def compared(inputs, tmp_path_factory):
    """Two methods with two seeds, really trained."""
    out = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of the processes of the runs
        assert cli.main(arguments(inputs, out, hub_token="hf_1234")) == 0
    return out


def result(folder, group="balora", seed=1):
    return json.loads((folder / group / str(seed) / "result.json").read_text())


# ---- the real runs ----


def test_the_measures_are_those_of_the_exported_lora(inputs, compared):
    found = result(compared)["measures"]
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    before = AutoModelForCausalLM.from_pretrained(inputs / "model").double()
    model = peft.PeftModel.from_pretrained(base, compared / "balora" / "1" / "lora").double().eval()
    rows = data.tokenize(data.read(inputs / "rows.jsonl"), tokenizer, 512, "rows").examples
    losses = []
    for row in rows:
        logp = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        losses += [-logp[t - 1, y].item() for t, y in enumerate(row["labels"]) if t and y != -100]
    assert found["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    tokens = tokenizer(TEXT)["input_ids"]
    kl, ce = [], []
    for i in range(2):  # no BOS: the tokenizer has none
        ids = torch.tensor([tokens[i * len(tokens) // 2 :][:256]])
        new, old = (m(ids).logits[0, :-1].log_softmax(-1) for m in (model, before))
        kl += (old.exp() * (old - new)).sum(-1).tolist()
        ce += (-new.gather(1, ids[0, 1:, None])[:, 0]).tolist()
    assert found["drift"] == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert found["drift"] > 1e-3
    assert found["perplexity"] == pytest.approx(math.exp(sum(ce) / len(ce)), rel=1e-4)
    prompt = torch.tensor([[t for t, y in zip(rows[0]["input_ids"], rows[0]["labels"], strict=True) if y == -100]])
    answer = []
    while len(answer) < 6:
        token = model(prompt).logits[0, -1].argmax()
        if token == tokenizer.eos_token_id:
            break
        answer.append(token.item())
        prompt = torch.cat([prompt, token.reshape(1, 1)], 1)
    answers = json.loads((compared / "balora" / "1" / "answers.json").read_text())
    assert len(answers) == 3
    assert answers[0] == tokenizer.decode(answer)


def test_the_methods_are_the_same_recipe_with_other_adapters_and_weights(compared):
    lora, balora = (yaml.safe_load((compared / m / "1" / "recipe.yaml").read_text()) for m in ("lora", "balora"))
    assert {k for k in lora if lora[k] != balora[k]} == {"adapter", *compare.WEIGHTS}
    assert [lora[w] for w in compare.WEIGHTS] == [0, 0, 0]
    assert [balora[w] for w in compare.WEIGHTS] == [0.025, 0.005, 0.3]
    assert yaml.safe_load((compared / "lora" / "2" / "recipe.yaml").read_text()) == {**lora, "seed": 2}
    config = json.loads((compared / "lora" / "1" / "lora" / "adapter_config.json").read_text())
    assert config["r"] == 4  # the export of PiSSA has twice the rank
    assert not list(compared.rglob("checkpoint-*"))


def test_a_token_of_the_hub_is_in_no_file(compared):
    texts = [path for path in compared.rglob("*") if path.suffix in (".json", ".yaml", ".html", ".md", ".txt", ".csv")]
    assert len(texts) > 20
    assert all("hf_1234" not in path.read_text() for path in texts)


def test_each_seed_is_another_run(compared):
    for group in ("lora", "balora"):
        assert (
            result(compared, group, 1)["measures"]["eval_loss"] != result(compared, group, 2)["measures"]["eval_loss"]
        )


def test_the_tables_are_over_the_seeds(compared):
    a, b = (result(compared, "lora", seed)["measures"]["drift"] for seed in (1, 2))
    lines = csv.DictReader((compared / "table.csv").read_text().splitlines())
    (row,) = (line for line in lines if (line["group"], line["measure"]) == ("lora", "drift"))
    assert float(row["mean"]) == pytest.approx((a + b) / 2)
    assert float(row["std"]) == pytest.approx(abs(a - b) / math.sqrt(2))
    assert row["n"] == "2"
    assert "| LoRA | 2 |" in (compared / "table.md").read_text()
    assert "| BA-LoRA | 2 |" in (compared / "table.md").read_text()
    page = (compared / "compare.html").read_text()
    assert "4 of 4 runs are finished." in page
    assert "BA-LoRA − LoRA" in page
    assert "could not be shown" not in page
    assert 'http-equiv="refresh"' not in page


def test_finished_runs_are_not_repeated(inputs, compared, capsys):
    before = {path: path.stat().st_mtime_ns for path in compared.glob("*/*/*")}
    assert cli.main(arguments(inputs, compared)) == 0
    assert {path: path.stat().st_mtime_ns for path in compared.glob("*/*/*")} == before
    assert "BA-LoRA" in capsys.readouterr().out


def test_an_interrupted_run_gives_the_same_numbers(compared, tmp_path):
    """After the training, and from the beginning."""
    exact = {k: v for k, v in result(compared)["measures"].items() if not k.startswith(("seconds", "memory"))}
    folder = tmp_path / "balora" / "1"
    shutil.copytree(compared / "balora" / "1", folder)
    (folder / "result.json").unlink()
    command = ["compare-run", str(folder), str(os.getppid())]
    trained = (folder / "trainer_state.json").stat().st_mtime_ns
    assert cli.main(command) == 0
    assert (folder / "trainer_state.json").stat().st_mtime_ns == trained
    assert result(tmp_path)["measures"] | exact == pytest.approx(result(tmp_path)["measures"], rel=1e-6)
    for name in ("result.json", "trained.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "lora")
    assert cli.main(command) == 0
    assert (folder / "trainer_state.json").stat().st_mtime_ns != trained
    assert result(tmp_path)["measures"] | exact == pytest.approx(result(tmp_path)["measures"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lambda_svd=0.2), "lambda_svd: expected 0.3, as in "),
        (dict(max_steps=None), "max_steps: expected 3, as in "),
        (dict(new_tokens=7), "new_tokens: expected 6, as in "),
    ],
)
def test_another_recipe_on_finished_runs_is_an_error(inputs, compared, capsys, changes, message):
    assert cli.main(arguments(inputs, compared, **changes)) == 2
    assert message in capsys.readouterr().err


# ---- what is checked before ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(methods="lora qlora"), "methods: expected some of lora, pissa, dora, lora_reg, dora_reg, balora, "),
        (dict(methods="lora lora"), "methods: expected different ones, at least one, found lora lora"),
        (dict(seeds="1 2 1"), "seeds: expected different ones, at least one, found 1 2 1"),
        (dict(eval_data=None), "eval_data: expected data to measure the runs on, found none"),
        (dict(eval_data="nothing.jsonl"), "data: expected a JSONL file, found nothing at nothing.jsonl"),
        (dict(drift_data="nothing.txt"), "nothing.txt"),
        (dict(drift_windows=0), "drift_windows: expected at least 1, found 0"),
        (dict(methods="svd", lambda_svd=0), "methods: expected a λ above 0 in the recipe for svd, found 0"),
        (dict(lambda_svd=-1), "lambda_svd: expected a weight of at least 0, found -1.0"),
        (dict(sweep="r"), "sweep: expected an option and its values, found 'r' alone"),
        (
            dict(sweep="rank 4"),
            "sweep: expected an option of balora train (not seed, adapter, output_dir), found 'rank'",
        ),
        (dict(sweep="r 4 8 8"), "sweep: expected different values of r, found 8 twice"),
        (dict(sweep="model a/b"), "sweep: expected values of letters, digits and . + - _, found 'a/b' for model"),
        (dict(sweep="lambda_svd 0.1 -2"), "lambda_svd: expected a weight of at least 0, found -2.0"),
        (dict(methodes="lora"), "unknown argument --methodes; did you mean --methods?"),
        (dict(adapter="dora"), "adapter: expected --methods in its place, found --adapter"),
        (dict(seed=7), "seed: expected --seeds in its place, found --seed"),
        (dict(quantize="nf4"), "quantize: expected a base in full precision, found quantize='nf4'"),
        (dict(sweep="quantize nf4"), "quantize: expected a base in full precision, found quantize='nf4'"),
    ],
)
def test_errors_come_before_any_run(inputs, tmp_path, capsys, changes, message):
    assert cli.main(arguments(inputs, tmp_path / "out", **changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("balora compare: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_folder_of_quantize_is_no_base_to_measure_on(inputs, tmp_path, capsys):
    shutil.copytree(inputs / "model", tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps({**config, RESIDUAL_BASE: {}}))
    assert cli.main(arguments(inputs, tmp_path / "out", model=tmp_path / "q")) == 2
    assert "model: expected a base in full precision, found the 4-bit residual of balora" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- the loop over the runs, with a process that trains nothing ----

FAKE = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
group, seed = folder.parts[-2:]
print("first line")
assert int(sys.argv[2]) == os.getppid()
(folder / "pid").write_text(str(os.getpid()))
if (group, seed) == ("pissa", "2") and not Path(sys.argv[1], "..", "..", "healed").exists():
    sys.exit("error: no luck")
if Path(sys.argv[1], "..", "..", "slow").exists():
    time.sleep(600)
value = len(group) + int(seed)
(folder / "result.json").write_text(json.dumps({"measures": {"eval_loss": value}}))
"""


@pytest.fixture
def fake(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_COMMAND", [sys.executable, "-c", FAKE])
    monkeypatch.setattr(compare, "_POLL", 0.01)
    return lambda **changes: cli.main(arguments(inputs, tmp_path, **changes))


def test_a_failed_run_is_shown_and_tried_again(fake, tmp_path, capsys):
    asked = dict(methods="lora pissa", seeds="1 2")
    assert fake(**asked) == 1
    printed = capsys.readouterr().out
    assert "pissa 2 failed; its log: " in printed
    assert "failed: pissa 2; the same command tries them again" in printed
    assert "exit status 1: error: no luck" in (tmp_path / "compare.html").read_text()
    assert "| PiSSA | 1, 1 failed |" in (tmp_path / "table.md").read_text()
    assert [r["measures"] for r in json.loads((tmp_path / "results.json").read_text())] == [
        {"eval_loss": 5}, {"eval_loss": 6}, {"eval_loss": 6}, None
    ]  # fmt: skip
    (tmp_path / "healed").touch()
    (tmp_path / "lora" / "1" / "pid").unlink()
    assert fake(**asked) == 0
    assert not (tmp_path / "lora" / "1" / "pid").exists()  # it was not made again
    assert result(tmp_path, "pissa", 2)["measures"] == {"eval_loss": 7}


def test_methods_seeds_and_sweeps_can_be_added(fake, tmp_path, inputs):
    assert fake(methods="balora", seeds="1") == 0
    assert fake(methods="balora lora", seeds="1 3", sweep="r 2 4 8") == 0
    assert sorted(str(p.parent.relative_to(tmp_path)) for p in tmp_path.glob("*/*/run.json")) == [
        "balora/1", "balora/3", "lora/1", "lora/3", "sweep_r_2/1", "sweep_r_2/3", "sweep_r_8/1", "sweep_r_8/3"
    ]  # fmt: skip
    asked = json.loads((tmp_path / "sweep_r_8" / "1" / "run.json").read_text())["options"]
    assert (asked["r"], asked["adapter"], asked["lambda_svd"]) == (8, "pissa", 0.3)
    assert "Sensitivity to r" in (tmp_path / "compare.html").read_text()


def test_a_sweep_knows_the_alpha_that_nobody_set(fake, tmp_path):
    assert fake(methods="balora", seeds="1", sweep="lora_alpha 4 8") == 0  # r is 4
    assert {p.parent.name for p in tmp_path.glob("*/1")} == {"balora", "sweep_lora_alpha_8"}


def test_an_interrupt_ends_the_process_and_says_how_to_go_on(fake, tmp_path, capsys, monkeypatch):
    (tmp_path / "slow").touch()

    def share(path):
        if (path.parent / "pid").exists():
            raise KeyboardInterrupt
        return 0.0

    with monkeypatch.context() as patched:
        patched.setattr(compare, "_share", share)
        assert fake() == 130
    assert "stopped in lora 1; the same command goes on with the 4 runs that are left" in capsys.readouterr().err
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "lora" / "1" / "pid").read_text()), 0)
    (tmp_path / "slow").unlink()
    assert fake() == 0


def test_a_recipe_holds_the_options_of_the_comparison(fake, tmp_path, inputs):
    recipe = dict(model=str(inputs / "model"), data=str(inputs / "rows.jsonl"), eval_data=str(inputs / "rows.jsonl"))
    recipe |= dict(r=4, adapter="dora", seed=7, methods=["lora"], seeds=[3], sweep={"lambda_svd": [0, 1e-1], "r": 2})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["compare", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out")]) == 0
    assert sorted(p.parent.parent.name for p in (tmp_path / "out").glob("*/3/run.json")) == [
        "lora", "sweep_lambda_svd_0", "sweep_lambda_svd_0.1", "sweep_r_2"
    ]  # fmt: skip


def test_options_bind_only_where_something_came_of_them(fake, tmp_path, capsys):
    assert fake(methods="pissa", seeds="2") == 1
    assert fake(methods="pissa", seeds="2", r=8) == 1  # the failed run left nothing behind
    (tmp_path / "pissa" / "2" / "checkpoint-2").mkdir()
    assert fake(methods="pissa", seeds="2", r=4) == 2
    assert "r: expected 8, as in" in capsys.readouterr().err


def test_a_folder_with_something_else_is_left_alone(fake, tmp_path, capsys):
    (tmp_path / "lora" / "1").mkdir(parents=True)
    (tmp_path / "lora" / "1" / "thesis.txt").touch()
    assert fake() == 2
    assert "output_dir: expected runs of balora compare, found other files in" in capsys.readouterr().err


class Orphaned(Exception):
    """Raised by what must not run any more once the comparison has ended."""


@pytest.mark.parametrize("after", ["start", "setup", "step", "training"])
def test_a_run_ends_with_its_comparison(tmp_path, monkeypatch, after):
    """Else the next comparison would start a second process in the same folder."""
    parent, callbacks = os.getppid(), []

    def ended(at):
        if at == after:
            monkeypatch.setattr(os, "getppid", lambda: 1)

    def setup(*_, **__):
        if after == "start":
            raise Orphaned
        ended("setup")
        state = SimpleNamespace(global_step=1, max_steps=2, is_world_process_zero=True)
        return SimpleNamespace(add_callback=callbacks.append, state=state), None

    def train(trainer, checkpoint):
        if after == "setup":
            raise Orphaned
        ended("step")
        callbacks[0].on_step_end(None, trainer.state, None)
        if after == "step":
            raise Orphaned
        ended("training")

    def measured(*_):
        raise Orphaned

    for name, stub in (("setup", setup), ("train", train)):
        monkeypatch.setattr(compare_run.train, name, stub)
    monkeypatch.setattr(compare_run, "_measured", measured)
    ended("start")
    parsed = (None, None, SimpleNamespace(eval_strategy="steps"))
    with pytest.raises(SystemExit, match="error: the comparison that started this run has ended"):
        compare_run.perform(tmp_path, parent, {"options": {}, "measures": {}}, parsed)
    assert (tmp_path / compare_run.PROGRESS).exists() == (after == "training")


# ---- the measures ----


def test_token_loss_is_the_mean_over_tokens_of_batches_of_different_size():
    model = tiny_llama().eval()
    ids = torch.arange(1, 13).reshape(2, 6)
    labels = ids.clone()
    labels[0, :5] = -100
    logp = model(ids).logits.double().log_softmax(-1)
    exact = [-logp[0, 4, ids[0, 5]]] + [-logp[1, t, ids[1, t + 1]] for t in range(5)]
    batches = [dict(input_ids=ids[i : i + 1], labels=labels[i : i + 1]) for i in range(2)]
    assert measure.token_loss(model, batches) == pytest.approx(sum(exact).item() / 6, rel=1e-6)
    with pytest.raises(ValueError, match="batches: expected a token with a label, found none"):
        measure.token_loss(model, [dict(input_ids=ids, labels=torch.full_like(ids, -100))])


def test_distinct_n():
    rows = [[1, 2, 1, 2], [1, 2], [3]]
    assert measure.distinct(rows, 1) == 3 / 7
    assert measure.distinct(rows, 2) == 2 / 4  # 12, 21, 12; 12
    assert measure.distinct(rows, 3) == 1.0
    assert measure.distinct(rows, 5) is None


def test_windows_are_spread_over_the_text():
    tokenizer = tiny_tokenizer()
    text = "".join(chr(97 + i % 26) for i in range(1000))
    ids = tokenizer(text)["input_ids"]
    assert measure.windows(tokenizer, text, 4, 100) == [ids[i : i + 100] for i in (0, 250, 500, 750)]
    assert measure.windows(tokenizer, text[:150], 4, 100) == [ids[:100]]
    assert measure.windows(tokenizer, text[:30], 4, 100) == [ids[:30]]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_classified_features_are_of_the_token_that_is_read(kind):
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    torch.manual_seed(0)
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(**shape, num_labels=3)).eval()
    else:
        model = LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=3, pad_token_id=0)).eval()
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 4, 3]])
    mask = (ids != 0).long()
    batch = dict(input_ids=ids, attention_mask=mask, labels=torch.tensor([2, 0]))
    logits, features, labels = measure.classified(model, [batch, batch])
    assert labels.tolist() == [2, 0, 2, 0]
    with torch.no_grad():
        head = (
            model.classifier(model.bert.pooler.activation(model.bert.pooler.dense(features)))
            if kind == "bert"
            else model.score(features)
        )
    torch.testing.assert_close(head, logits)
    nll = [-logits[i].log_softmax(-1)[labels[i]].item() for i in range(4)]
    assert measure.class_loss(logits, labels) == pytest.approx(sum(nll) / 4)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_classified_features_of_an_encoder_decoder_are_of_its_last_end_of_text(kind):
    from transformers import BartConfig, BartForSequenceClassification, T5Config, T5ForSequenceClassification

    torch.manual_seed(0)
    shape = dict(d_model=16, vocab_size=50, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, num_labels=3)
    if kind == "bart":
        layers = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
        config = BartConfig(**shape, **layers, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16)
        model = BartForSequenceClassification(config).eval()
    else:
        config = T5Config(**shape, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        model = T5ForSequenceClassification(config).eval()
    ids = torch.tensor([[5, 2, 7, 2, 1], [2, 9, 4, 3, 2]])
    batch = dict(input_ids=ids, attention_mask=(ids != 1).long(), labels=torch.tensor([2, 0]))
    logits, features, _ = measure.classified(model, [batch])
    with torch.no_grad():
        torch.testing.assert_close(model.classification_head(features), logits)


def test_features_that_are_not_finite_have_no_silhouette_and_no_map():
    pytest.importorskip("sklearn")
    x, labels = torch.randn(40, 5), torch.arange(40) % 2
    for value in (math.nan, math.inf):
        x[3, 1] = value
        assert math.isnan(measure.silhouette(x, labels))
        assert measure.tsne(x) is None


def test_a_classifier_is_measured_on_all_rows_and_drawn_with_some(monkeypatch):
    """Also a diverged one: its run is finished, with measures that are not finite."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(compare_run, "_DRAWN", 5)
    labels = torch.arange(10) // 5  # sorted by class, as data sets often are
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)) + labels[:, None]
    logits = torch.nn.functional.one_hot(labels, 2).float()
    model = SimpleNamespace(config=SimpleNamespace(id2label={0: "a", 1: "b"}))
    metrics = lambda _: {"accuracy": 0.7, "recall_a": 1.0, "recall_b": math.nan}  # noqa: E731
    maps = []
    monkeypatch.setattr(measure, "tsne", maps.append)
    monkeypatch.setattr(measure, "classified", lambda *_: (logits, x, labels))
    found = compare_run._of_classifier(model, [], metrics)
    assert torch.equal(maps[0], x[::2])
    assert found["classes"] == ["a", "a", "a", "b", "b"]
    assert found["recalls"] == {"a": 1.0}
    assert found["measures"]["silhouette"] == measure.silhouette(x, labels)
    monkeypatch.setattr(measure, "classified", lambda *_: (logits * math.nan, x * math.nan, labels))
    assert math.isnan(compare_run._of_classifier(model, [], metrics)["measures"]["silhouette"])


def test_silhouette_and_tsne():
    pytest.importorskip("sklearn")
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(40, 5, generator=g), torch.arange(40) % 2
    x[:, 0] += 4.0 * labels
    unit = torch.nn.functional.normalize(x.double())
    distance = 1 - unit @ unit.T
    scores = []
    for i in range(40):
        own = distance[i][(labels == labels[i]) & (torch.arange(40) != i)].mean()
        other = distance[i][labels != labels[i]].mean()
        scores.append(((other - own) / max(own, other)).item())
    assert measure.silhouette(x, labels) == pytest.approx(sum(scores) / 40, abs=1e-9)
    assert measure.silhouette(x, torch.zeros(40)) is None
    points = measure.tsne(x)
    assert (len(points), len(points[0])) == (40, 2)
    assert points == measure.tsne(x)
    assert measure.tsne(x[:4]) is None


# ---- the tables ----


def runs(group, values, measure="eval_loss"):
    return [Result(group, seed, {measure: value}) for seed, value in enumerate(values)]


def test_cells():
    found = results.cell([1.0, 2.0, 4.0, None, math.nan])
    assert found == pytest.approx((7 / 3, math.sqrt(7 / 3), 3))
    cells = ((2.3333, 1.5275, 3), (0.12345, 0.00012, 2), (1234.5, 67, 3), (-0.5, math.nan, 1), (-1.1e-6, 4.8e-6, 2))
    assert [str(Cell(*c)) for c in cells] == [
        "2.3 ± 1.5", "0.12345 ± 0.00012", "1234 ± 67", "−0.5", "−1.1e−06 ± 4.8e−06"
    ]  # fmt: skip
    assert str(results.cell([])) == "–"


def test_the_best_is_marked_only_where_intervals_are_apart():
    apart, near = runs("a", [1.0, 1.2]) + runs("b", [2.0, 2.2]), runs("a", [1.0, 1.2]) + runs("b", [1.1, 2.2])
    assert results.bold(apart, ["a", "b"]) == {("a", "eval_loss")}
    assert results.bold(near, ["a", "b"]) == set()
    assert results.bold(runs("a", [1.0]) + runs("b", [2.0]), ["a", "b"]) == set()  # one seed has no interval
    higher = runs("a", [1.0, 1.2], "accuracy") + runs("b", [2.0, 2.2], "accuracy")
    assert results.bold(higher, ["a", "b"]) == {("b", "accuracy")}


def test_a_bar_in_a_title_is_no_column():
    table = results.markdown_table(runs("a", [1.0]), {"a": "x|y"}).splitlines()
    assert table[2] == r"| x\|y | 1 | 1 |"


def test_differences_are_over_the_seeds_that_both_have():
    found = [*runs("balora", [1.0, 2.0, 5.0]), *runs("lora", [1.5, 2.5]), Result("lora", 2, None, failure="it did")]
    assert results.paired(found, "balora", "lora")["eval_loss"] == pytest.approx((-0.5, 0.0, 2))


def test_the_page_escapes_and_shows_what_there_is():
    found = [
        Result(g, s, {"eval_loss": 1.0 + s, "silhouette": 0.5}, dict(recalls={"<b>": 0.5, "x": 1.0},
               tsne=[[i, i % 3] for i in range(9)], classes=["<b>", "x", "x"] * 3, history=[dict(step=1, ce=2.0)]))
        for g in ("pissa", "balora") for s in (1, 2)
    ]  # fmt: skip
    found.append(Result("lora", 1, None, failure="<script>"))
    titles = {g: compare.METHODS[g].title for g in ("pissa", "balora", "lora")}
    page = compare_page.render(compare_page.Page({"Model": "a/<i>"}, titles, found, running=True))
    assert "could not be shown" not in page
    for text in (
        "&lt;b&gt;",
        "&lt;script&gt;",
        "4 of 5 runs are finished, 1 failed.",
        "Recall of each class",
        "silhouette 0.5",
    ):
        assert text in page
    for text in ("<script>", "<i>", "<b>"):
        assert text not in page.replace("<b>1", "")
    assert 'http-equiv="refresh"' in page
