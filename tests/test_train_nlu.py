"""``balora train`` of classifiers, from the files to the exported LoRA."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

from balora import BALoraConfig, cli, train

from .conftest import TEMPLATE, tiny_checkpoint, tiny_tokenizer
from .test_cli import flags

LETTERS = {"often": "a", "some": "b", "rare": "c"}


def texts(counts, seed=0):
    """Rows of 6 letters, most of them that of the class."""
    g = np.random.default_rng(seed)
    return [
        {"text": "".join(g.choice([LETTERS[name], "x"], 6, p=[0.8, 0.2])), "label": name}
        for name, count in counts.items()
        for _ in range(count)
    ]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def bert(folder, kind=BertModel, **changes):
    """A folder with a random BERT and its tokenizer."""
    tokenizer = tiny_tokenizer()
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id)
    shape |= dict(initializer_range=0.3, hidden_dropout_prob=0.05)  # so that letters tell
    torch.manual_seed(0)
    kind(BertConfig(**shape, **changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    bert(folder / "model")
    write(folder / "train.jsonl", texts({"often": 40, "some": 16, "rare": 8}))
    write(folder / "test.jsonl", texts({"often": 10, "some": 10, "rare": 10}, seed=1))
    return folder


def options(inputs, out, **changes):
    values = dict(task="nlu", model=inputs / "model", data=inputs / "train.jsonl", eval_data=inputs / "test.jsonl")
    values |= dict(output_dir=out, r=4, lora_alpha=4, max_steps=4, per_device_train_batch_size=8, logging_steps=1)
    values |= dict(use_cpu=True, disable_tqdm=True, learning_rate=1e-2)
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


def loaded(model, lora):
    """As the documentation says it: the classes come from the config.json beside the LoRA."""
    base = AutoModelForSequenceClassification.from_pretrained(model, config=AutoConfig.from_pretrained(lora))
    return peft.PeftModel.from_pretrained(base, lora).eval()


def logits(model, folder, rows):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])


def test_a_classifier_learns_and_its_lora_predicts_what_was_measured(inputs, tmp_path, capsys):
    out = tmp_path / "run"
    values = options(inputs, out, max_steps=24, eval_strategy="steps", eval_steps=12, save_strategy="no")
    assert cli.main(["train", *flags({**values, "eval_on_start": True})]) == 0
    printed = capsys.readouterr().out
    assert "train: 64 rows, 3 classes: often 62.5 %, some 25 %, rare 12.5 %" in printed
    assert "model: the checkpoint has no classifier; fresh ones are trained in full" in printed
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    measured = [h for h in history if "eval_accuracy" in h]
    results = json.loads((out / "eval_results.json").read_text())
    assert measured[0]["eval_macro_f1"] < 0.6 < 0.75 < results["eval_macro_f1"]
    assert {"eval_matthews", "eval_rare_class_recall", "eval_recall_often", "eval_recall_rare"} <= results.keys()
    assert results["eval_rare_class_recall"] == results["eval_recall_rare"]
    assert {"ce", "consistency", "diversity", "svd"} <= history[1].keys()
    page = (out / "report.html").read_text()
    assert "Metrics: accuracy from" in page
    assert "rare class recall" in page
    assert "Distance from the pre-trained model" not in page
    assert "not complete" not in printed

    model = loaded(inputs / "model", out / "lora")
    assert model.config.id2label == {0: "often", 1: "rare", 2: "some"}
    rows = list(map(json.loads, (inputs / "test.jsonl").read_text().splitlines()))
    predicted = [model.config.id2label[i] for i in logits(model, inputs / "model", rows).argmax(1).tolist()]
    accuracy = np.mean([name == row["label"] for name, row in zip(predicted, rows, strict=True)])
    assert accuracy == pytest.approx(results["eval_accuracy"])


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_plain_adapters_and_their_head(inputs, tmp_path, adapter):
    values = options(inputs, tmp_path / "run", adapter=adapter, max_steps=2, save_strategy="no", eval_data=None)
    assert cli.main(["train", *flags(values)]) == 0
    model = loaded(inputs / "model", tmp_path / "run" / "lora")
    config = model.peft_config["default"]
    assert (config.task_type, config.use_dora, config.r) == ("SEQ_CLS", adapter == "dora", 4)
    exported = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")
    assert any(name.endswith("classifier.weight") for name in exported)
    assert any("lora_B" in name and tensor.any() for name, tensor in exported.items())


@pytest.mark.usefixtures("no_pictures")
def test_the_best_checkpoint_is_loaded_and_a_run_goes_on_to_the_same_bits(inputs, tmp_path):
    values = options(inputs, tmp_path / "run", max_steps=6, save_steps=2, eval_strategy="steps", eval_steps=2)
    values |= dict(load_best_model_at_end=True, metric_for_best_model="eval_macro_f1", lora_dropout=0.1)
    assert cli.main(["train", *flags(values)]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    scores = [h["eval_macro_f1"] for h in state["log_history"] if "eval_macro_f1" in h]
    assert scores[2] < max(scores) == state["best_metric"]
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert results["eval_macro_f1"] == max(scores)  # of what is exported
    whole = load_file(tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors")
    assert any("classifier" in name for name in whole)
    exported = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")
    for name in ("checkpoint-6", "checkpoint-4", "lora"):
        shutil.rmtree(tmp_path / "run" / name)
    assert cli.main(["train", *flags(values), "--resume_from_checkpoint", "true"]) == 0
    resumed = load_file(tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    again = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], exported[name]) for name in exported)


def test_a_regression(inputs, tmp_path, capsys):
    g = np.random.default_rng(0)
    rows = [{"text": "".join(g.choice(["a", "x"], 6, p=[p, 1 - p]))} for p in g.uniform(size=64)]
    rows = [{**row, "label": row["text"].count("a") / 2} for row in rows]
    data = write(tmp_path / "rows.jsonl", rows)
    values = options(inputs, tmp_path / "run", data=data, eval_data=data, max_steps=24, save_strategy="no")
    assert cli.main(["train", *flags(values)]) == 0
    printed = capsys.readouterr().out
    assert "train: 64 rows, regression: labels from 0 to 3, mean" in printed
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert results["eval_pearson"] > 0.8
    assert results["eval_spearman"] > 0.8
    assert results["eval_mse"] == pytest.approx(results["eval_loss"], rel=1e-4)
    model = loaded(inputs / "model", tmp_path / "run" / "lora")
    assert (model.config.problem_type, model.config.num_labels) == ("regression", 1)
    guesses = logits(model, inputs / "model", rows)[:, 0]
    mse = ((guesses - torch.tensor([row["label"] for row in rows])) ** 2).mean().item()
    assert mse == pytest.approx(results["eval_mse"], rel=1e-4)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert "consistency" in history[0]
    assert not {"diversity", "svd"} & history[0].keys()
    assert "pearson" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_a_decoder_with_a_fresh_head_and_no_padding_token(inputs, tmp_path):
    model = tiny_checkpoint(tmp_path / "model", TEMPLATE)
    values = options(inputs, tmp_path / "run", model=model, max_steps=16, form="residual", save_strategy="no")
    assert cli.main(["train", *flags(values)]) == 0
    assert json.loads((tmp_path / "run" / "eval_results.json").read_text())["eval_accuracy"] > 0.8
    assert AutoConfig.from_pretrained(tmp_path / "run" / "lora").pad_token_id == tiny_tokenizer().pad_token_id


@pytest.mark.usefixtures("no_pictures")
def test_what_the_checkpoint_lacks_is_trained_in_full(inputs, tmp_path, capsys):
    model = bert(tmp_path / "model", BertForMaskedLM)  # without a pooler
    values = options(inputs, tmp_path / "run", model=model, modules_to_save="embeddings.LayerNorm")
    assert cli.main(["train", *flags(values)]) == 0
    assert "model: the checkpoint has no bert.pooler.dense, classifier; fresh ones" in capsys.readouterr().out
    exported = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")
    for name in ("bert.pooler.dense", "classifier", "bert.embeddings.LayerNorm"):
        assert f"base_model.model.{name}.weight" in exported


@pytest.mark.usefixtures("no_pictures")
def test_a_head_that_is_there_keeps_the_order_of_its_classes(inputs, tmp_path, capsys):
    names = ["rare", "often", "some"]
    model = bert(tmp_path / "model", BertForSequenceClassification, id2label=dict(enumerate(names)))
    assert cli.main(["train", *flags(options(inputs, tmp_path / "run", model=model, learning_rate=0))]) == 0
    assert "fresh" not in capsys.readouterr().out
    again = loaded(model, tmp_path / "run" / "lora")
    assert again.config.id2label == dict(enumerate(names))
    own = AutoModelForSequenceClassification.from_pretrained(model).eval()
    rows = list(map(json.loads, (inputs / "test.jsonl").read_text().splitlines()))
    assert torch.allclose(logits(again, model, rows), logits(own, model, rows), atol=1e-6)


@pytest.mark.usefixtures("no_pictures")
def test_a_head_is_matched_by_the_names_of_its_classes(inputs, tmp_path, capsys):
    def head(folder, *names):
        return bert(tmp_path / folder, BertForSequenceClassification, id2label=dict(enumerate(names)))

    def trained(model, out, **changes):
        return cli.main(["train", *flags(options(inputs, tmp_path / out, model=model, learning_rate=0, **changes))])

    def weight(folder, ending="classifier.weight"):
        file = next(Path(folder).glob("*model.safetensors"))
        return next(tensor for name, tensor in load_file(file).items() if name.endswith(ending))

    upper = head("upper", "RARE", "Often", "SOME")
    assert trained(upper, "a") == 0
    assert AutoConfig.from_pretrained(tmp_path / "a" / "lora").id2label == {0: "rare", 1: "often", 2: "some"}

    assert trained(head("unnamed", "LABEL_0", "LABEL_1", "LABEL_2"), "b") == 0
    said = "model: its head has no names for its 3 classes; taken, in this order, as often, rare, some"
    assert said in capsys.readouterr().out

    other = head("other", "no", "yes", "maybe")
    assert trained(other, "c") == 2
    error = capsys.readouterr().err
    assert "label: expected the classes of the head at" in error
    assert "other, no, yes, maybe; found often, rare, some; name them so, or add --ignore_mismatched_sizes" in error
    assert not (tmp_path / "c").exists()
    assert trained(other, "d", ignore_mismatched_sizes=True) == 0
    assert "model: the checkpoint has no classifier; fresh ones are trained in full" in capsys.readouterr().out
    fresh = weight(tmp_path / "d" / "lora")
    assert not torch.equal(fresh, weight(other))
    assert fresh.std() == pytest.approx(0.3, rel=0.3)  # its initializer_range
    assert not weight(tmp_path / "d" / "lora", "classifier.bias").any()


@pytest.mark.usefixtures("no_pictures")
def test_a_run_goes_on_with_the_classes_that_it_began_with(inputs, tmp_path, capsys):
    values = options(inputs, tmp_path / "run", max_steps=2, save_steps=1, eval_data=None)
    assert cli.main(["train", *flags(values)]) == 0
    rows = [{**row, "label": f"not {row['label']}"} for row in texts({"often": 4, "some": 4, "rare": 4})]
    numbers = [{**row, "label": i / 2} for i, row in enumerate(rows)]
    for others, found in ((rows, "the classes not often, not rare, not some"), (numbers, "a regression")):
        changed = {**values, "data": write(tmp_path / "others.jsonl", others), "resume_from_checkpoint": "true"}
        assert cli.main(["train", *flags(changed)]) == 2
        error = capsys.readouterr().err
        assert "label: expected the classes often, rare, some, as in" in error
        assert f"checkpoint-2; found {found}\n" in error
    assert cli.main(["train", *flags({**values, "max_steps": 3, "resume_from_checkpoint": "true"})]) == 0


@pytest.mark.usefixtures("no_pictures")
def test_a_head_of_another_size_is_replaced_only_when_that_is_said(inputs, tmp_path, capsys):
    model = bert(tmp_path / "model", BertForSequenceClassification, num_labels=2)
    values = options(inputs, tmp_path / "run", model=model)
    assert cli.main(["train", *flags(values)]) == 2
    error = capsys.readouterr().err
    assert "model: expected a head for 3 classes at" in error
    assert "(classifier.bias is [2] instead of [3]); add --ignore_mismatched_sizes true" in error
    assert not (tmp_path / "run").exists()
    assert cli.main(["train", *flags(values), "--ignore_mismatched_sizes", "true"]) == 0
    assert loaded(bert(tmp_path / "fresh"), tmp_path / "run" / "lora").config.num_labels == 3


@pytest.mark.usefixtures("no_pictures")
def test_presets_are_the_defaults_and_options_win(inputs, tmp_path, capsys):
    def parsed(*argv):
        asked, (_, config, _) = cli._train_arguments(
            train, [*flags(options(inputs, tmp_path / "run", task=None)), *argv]
        )
        return asked, config

    assert parsed()[1] == BALoraConfig()
    assert parsed("--task", "nlu")[1] == BALoraConfig.preset("nlu_2025")
    assert parsed("--preset=nlu_2024")[1] == BALoraConfig.preset("nlu_2024")
    assert parsed("--preset", "nlg_2024")[1] == BALoraConfig.preset("nlg_2024")
    asked, config = parsed("--preset", "nlu_2024", "--lambda_svd", "0.5", "--diversity", "topk")
    assert (config.lambda_svd, config.diversity, config.consistency) == (0.5, "topk", "normalized_mse")
    assert (asked["preset"], asked["lambda_svd"]) == ("nlu_2024", 0.5)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"preset": "nlu_2024", "temperature": 3.0, "model": "m", "data": "d"}))
    values = cli._train_arguments(train, [str(recipe), "--output_dir", "x", "--svd_rank", "2"])[1][1]
    assert values == BALoraConfig.from_dict(
        {**BALoraConfig.preset("nlu_2024").to_dict(), "temperature": 3.0, "svd_rank": 2}
    )
    kept = yaml.safe_dump(asked)
    recipe.write_text(kept)
    assert cli._train_arguments(train, [str(recipe)])[1][1] == config
    assert cli.main(["train", *flags(options(inputs, tmp_path / "run", preset="nlu_2023"))]) == 2
    assert "preset: expected 'nlg_2025' or 'nlu_2025' or" in capsys.readouterr().err


BAD = {
    "instructions": (
        dict(data=[{"instruction": "a", "output": "b"}]),
        "train.jsonl, line 1: expected the column label, and the text in one of: text and text_pair;",
    ),
    "unseen label": (
        dict(eval_data=[{"text": "a", "label": "often"}, {"text": "a", "label": "new"}]),
        "eval.jsonl, line 2, column 'label': expected one of the classes trained on, often, rare, some; found 'new'",
    ),
    "one class": (dict(data=[{"text": "a", "label": "x"}] * 3), "expected at least two classes, found only x"),
    "too long": (
        dict(data=[{"text": "a" * 80, "label": i} for i in range(2)], eval_data=None),
        "max_length: expected at most 64, the positions of the model, found 80",
    ),
    "preset": (dict(preset="nlg_2024"), "task: expected 'nlg', as in the preset nlg_2024, found 'nlu'"),
}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("case", BAD)
def test_an_error_names_what_is_wrong_and_nothing_is_written(inputs, tmp_path, capsys, case):
    changes, message = BAD[case]
    changes = dict(changes)
    for name, file in (("data", "train.jsonl"), ("eval_data", "eval.jsonl")):
        if isinstance(changes.get(name), list):
            changes[name] = write(tmp_path / file, changes[name])
    assert cli.main(["train", *flags(options(inputs, tmp_path / "run", **changes))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_pictures")
def test_models_that_are_no_classifier(inputs, tmp_path, capsys):
    causal = tmp_path / "causal"
    tokenizer = tiny_tokenizer()
    config = transformers.CohereConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.CohereForCausalLM(config).save_pretrained(causal)
    tokenizer.save_pretrained(causal)
    assert cli.main(["train", *flags(options(inputs, tmp_path / "run", model=causal))]) == 2
    error = capsys.readouterr().err
    assert "model: expected an architecture that transformers has a sequence classifier of, found cohere at" in error
    deeper = bert(tmp_path / "deeper")
    AutoConfig.from_pretrained(deeper, num_hidden_layers=3).save_pretrained(deeper)
    assert cli.main(["train", *flags(options(inputs, tmp_path / "run", model=deeper))]) == 2
    error = capsys.readouterr().err
    assert "model: expected the weights of BertForSequenceClassification at" in error
    assert "found none of bert.encoder.layer.2.attention.output.LayerNorm.bias and 15 others" in error
