"""``balora export``: from a checkpoint, the LoRA that ``balora train`` would have written there."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import balora
from balora import cli, export

from .conftest import TEMPLATE, tiny_checkpoint, tiny_llama, train_a_little
from .test_train_nlu import bert, loaded, logits, texts, write

WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write(folder / "rows.jsonl", [{"question": f"Count to {i}.", "answer": "1 2 3"} for i in range(8)])
    write(folder / "texts.jsonl", texts({"often": 8, "some": 4, "rare": 4}))
    tiny_checkpoint(folder / "model", TEMPLATE, dtype=torch.bfloat16)
    bert(folder / "bert")
    return folder


def trained(inputs, out, **changes):
    """A run of 2 steps with a checkpoint of each."""
    values = dict(model=inputs / "model", data=inputs / "rows.jsonl", output_dir=out, r=4, lora_alpha=6, max_steps=2)
    values |= dict(save_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1)
    values |= dict(use_cpu=True, disable_tqdm=True, **changes)
    assert cli.main(["train", *(str(word) for k, v in values.items() for word in (f"--{k}", v))]) == 0
    return out


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    return trained(inputs, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def killed(run, tmp_path):
    """A copy of the run as it is when the process dies after its last checkpoint."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("lora"))
    return tmp_path / "run"


def adapter_config(folder):
    fields = json.loads((folder / "adapter_config.json").read_text())
    return {name: sorted(value) if isinstance(value, list) else value for name, value in fields.items()}


def assert_same_lora(found, expected):
    one, two = load_file(found / WEIGHTS), load_file(expected / WEIGHTS)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        assert torch.equal(one[name], two[name]), name
    assert any(name.endswith("lora_B.weight") and tensor.any() for name, tensor in one.items())
    assert adapter_config(found) == adapter_config(expected)
    assert (found / "config.json").is_file() == (expected / "config.json").is_file()


def test_a_killed_run_is_exported_from_its_newest_checkpoint(inputs, run, killed, tmp_path, capsys):
    out = tmp_path / "lora"
    assert cli.main(["export", str(killed), str(out)]) == 0
    assert capsys.readouterr().out == (
        f"LoRA:  {out}, of {killed / 'checkpoint-2'} (load it with peft.PeftModel.from_pretrained)\n"
    )
    assert_same_lora(out, run / "lora")
    alone = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs / "model"), out)
    assert alone.peft_config["default"].r == 8


def test_a_checkpoint_says_what_it_is_for(inputs, run, tmp_path):
    """peft's card, which says nothing of it, stays where peft alone loads the adapters right."""
    text = (run / "checkpoint-2" / "README.md").read_text()
    assert "for resuming only" in text
    assert "`balora export RUN OUT`" in text
    assert not (run / "lora" / "README.md").exists()
    plain = trained(inputs, tmp_path / "run", adapter="lora")
    assert "for resuming only" not in (plain / "checkpoint-2" / "README.md").read_text()


def test_a_lora_is_written_over_an_earlier_one_and_not_over_a_file(tmp_path):
    model = balora.get_pissa_model(tiny_llama(), r=4)
    balora.export_lora(model, tmp_path / "lora")
    train_a_little(model)
    balora.export_lora(model, tmp_path / "lora")  # as of a run that goes on
    assert load_file(tmp_path / "lora" / WEIGHTS)[KEY].any()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="directory: expected a folder, found the file .*file"):
        balora.export_lora(model, tmp_path / "file")


def test_one_checkpoint_is_exported_by_its_name(run, tmp_path):
    assert export.export_run(run / "checkpoint-1", tmp_path / "one") == run / "checkpoint-1"
    assert export.export_run(run / "checkpoint-2", tmp_path / "two") == run / "checkpoint-2"
    assert_same_lora(tmp_path / "two", run / "lora")
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    assert any(not torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "changes",
    [
        dict(form="residual"),
        dict(modules_to_save="lm_head"),
        dict(target_modules="lm_head"),
        dict(adapter="lora"),
        dict(adapter="dora", modules_to_save="lm_head"),
    ],
    ids=["residual", "head in full", "adapted head", "lora", "dora"],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_other_adapters(inputs, tmp_path, changes):
    run = trained(inputs, tmp_path / "run", **changes)
    export.export_run(run, tmp_path / "lora")
    assert_same_lora(tmp_path / "lora", run / "lora")
    in_full = [name for name in load_file(tmp_path / "lora" / WEIGHTS) if "lora_" not in name]
    assert len(in_full) == ("modules_to_save" in changes)


@pytest.mark.parametrize("adapter", ["pissa", "lora"])
def test_a_classifier_keeps_its_classes(inputs, tmp_path, adapter, capsys):
    model, data = inputs / "bert", inputs / "texts.jsonl"
    run = trained(inputs, tmp_path / "run", task="nlu", model=model, data=data, adapter=adapter)
    capsys.readouterr()
    shutil.move(run / "checkpoint-2", tmp_path / "alone")  # needs nothing of the folder that it lay in
    assert cli.main(["export", str(tmp_path / "alone"), str(tmp_path / "lora")]) == 0
    assert "on AutoModelForSequenceClassification with the config.json that lies there" in capsys.readouterr().out
    assert_same_lora(tmp_path / "lora", run / "lora")
    assert (tmp_path / "lora" / "config.json").read_text() == (run / "lora" / "config.json").read_text()
    rows = texts({"often": 2, "rare": 2}, seed=1)
    one, two = (logits(loaded(model, folder), model, rows) for folder in (tmp_path / "lora", run / "lora"))
    assert torch.equal(one, two)


@pytest.mark.parametrize("form", ["offset", "residual"])
def test_ranks_and_scalings_of_patterns(tmp_path, form):
    """Of a model that Hugging Face's Trainer trains: no recipe, and in the residual form no config.json."""
    patterns = dict(
        rank_pattern={"q_proj": 3, "^model.layers.1.mlp.up_proj": 5},
        alpha_pattern={"^model.layers.1.self_attn.v_proj": 7},
    )
    model = balora.get_pissa_model(tiny_llama(), r=4, lora_alpha=6, use_rslora=True, form=form, **patterns)
    train_a_little(model)
    trainer = Trainer(model, TrainingArguments(tmp_path / "run", use_cpu=True))
    checkpoint = tmp_path / "run" / "checkpoint-4"
    trainer.save_model(str(checkpoint))
    trainer.state.save_to_json(str(checkpoint / "trainer_state.json"))
    if form == "residual":
        with pytest.raises(
            ValueError, match=r"run_dir: expected config.json in .*checkpoint-4.*call balora.export_lora"
        ):
            export.export_run(checkpoint, tmp_path / "found")
        model.config.save_pretrained(checkpoint)
    export.export_run(tmp_path / "run", tmp_path / "found")
    balora.export_lora(model, tmp_path / "expected")
    assert_same_lora(tmp_path / "found", tmp_path / "expected")


def break_state(checkpoint):
    (checkpoint / "trainer_state.json").unlink()


def break_weights(checkpoint):
    whole = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("harm", [break_state, break_weights])
def test_a_half_written_checkpoint_is_passed_over_and_said(run, killed, tmp_path, harm, capsys):
    harm(killed / "checkpoint-2")
    assert cli.main(["export", str(killed), str(tmp_path / "found")]) == 0
    printed = capsys.readouterr().out
    assert f"export: {killed / 'checkpoint-2'} is incomplete (the run ended while it was written)" in printed
    assert f"of {killed / 'checkpoint-1'} (" in printed
    export.export_run(run / "checkpoint-1", tmp_path / "expected")
    assert_same_lora(tmp_path / "found", tmp_path / "expected")
    with pytest.raises(ValueError, match="run_dir: expected .* found .*checkpoint-2, which is incomplete"):
        export.export_run(killed / "checkpoint-2", tmp_path / "none")
    harm(killed / "checkpoint-1")
    with pytest.raises(ValueError, match="run_dir: expected a complete checkpoint in .*run, found none"):
        export.export_run(killed, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_exported_is_named(run, killed, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    out = tmp_path / "out"
    for run_dir, out_dir, message in [
        (tmp_path / "nowhere", out, "run_dir: expected the folder of a run or of a checkpoint, found nothing at"),
        (run / "recipe.yaml", out, "found a file at"),
        (tmp_path / "empty", out, "found neither in"),
        (run / "lora", out, "found adapters alone in"),
        (run, tmp_path / "full", "out_dir: expected a new or empty folder, found"),
        (run, run / "recipe.yaml", "out_dir: expected a new or empty folder, found"),
    ]:
        assert cli.main(["export", str(run_dir), str(out_dir)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"balora export: error: {'run' if out_dir == out else 'out'}_dir: expected ")
        assert message in said
    assert cli.main(["export", str(run), str(out), "--onto", "residual"]) == 2
    assert "onto: 'residual' expects a base of balora.quantize, found another in" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note.txt"]

    weights = killed / "checkpoint-2" / WEIGHTS
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    missing = {key: tensor for key, tensor in tensors.items() if key != name}
    not_finite = {**tensors, name: torch.full_like(tensors[name], torch.nan)}
    for changed, message in [
        (missing, f"run_dir: expected '{name}' in"),
        (not_finite, f"run_dir: expected finite adapters, found NaN or an infinity at {name.partition('.lora_')[0]}"),
        ({}, "found none; under ZeRO-3 and FSDP the checkpoints hold them with stage3_gather_16bit_weights_on_model"),
    ]:
        save_file(changed, weights, metadata={"format": "pt"})
        assert cli.main(["export", str(killed), str(out)]) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
    assert cli.main(["export", str(run), str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / WEIGHTS).is_file()
