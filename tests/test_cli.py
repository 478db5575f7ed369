"""The command line: flags, recipes, and errors before anything starts."""

import builtins
import json
import shutil
import subprocess
import sys

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import balora
from balora import BALoraConfig, cli, train
from balora.adapters import RESIDUAL_BASE

from .architectures import tiny
from .conftest import TEMPLATE, tiny_checkpoint, tiny_tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def write_inputs(folder):
    rows = [{"instruction": f"Count to {i}.", "output": "1 2 3"} for i in range(1, 9)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "bad.jsonl").write_text(json.dumps(rows[0]) + '\n{"instruction": "x"}')
    tiny_checkpoint(folder / "model", TEMPLATE)
    return folder


def options(inputs, out, **changes):
    values = dict(model=inputs / "model", data=inputs / "rows.jsonl", output_dir=out, r=4, max_steps=4)
    values |= dict(per_device_train_batch_size=2, logging_steps=1, use_cpu=True, disable_tqdm=True)
    return {k: str(v) if k in ("model", "data", "output_dir") else v for k, v in {**values, **changes}.items()}


def flags(values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_defaults_are_the_published_settings(inputs, tmp_path):
    words = flags(dict(model=inputs / "model", data=inputs / "rows.jsonl", output_dir=tmp_path, use_cpu=True))
    _, (run, config, training) = cli._train_arguments(train, words)
    assert (run.r, run.lora_alpha, run.form, run.adapter) == (128, None, "offset", "pissa")  # alpha: as r
    assert (training.learning_rate, training.lr_scheduler_type) == (2e-5, "cosine")
    assert (training.warmup_steps, training.num_train_epochs) == (0.03, 1)
    assert config == BALoraConfig()


@pytest.mark.usefixtures("no_pictures")
def test_the_type_of_the_base_and_the_length_of_the_tokenizer(inputs, tmp_path, capsys):
    shutil.copytree(inputs / "model", tmp_path / "model")
    about = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({**about, "model_max_length": 50}))
    values = options(inputs, tmp_path / "run", model=tmp_path / "model", dtype="bfloat16", modules_to_save="lm_head")
    assert cli.main(["train", *flags({**values, "max_steps": 1})]) == 0
    assert "8 rows cut to 50 tokens" in capsys.readouterr().out
    found = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")
    (head,) = (t for name, t in found.items() if "lm_head" in name)
    assert head.dtype == torch.bfloat16


def test_train_by_flags(inputs, tmp_path, capsys):
    out = tmp_path / "run"
    values = options(inputs, out, eval_data=inputs / "rows.jsonl", lambda_svd=0.5, entropy_top_k=7)
    values |= dict(lora_dropout=0.25, lora_alpha=6, max_length=50, target_modules="q_proj")
    assert cli.main(["train", *flags(values)]) == 0
    printed = capsys.readouterr().out
    assert "train: 8 rows," in printed
    assert "longest 50; 8 rows cut to 50 tokens" in printed
    adapter = json.loads((out / "checkpoint-4" / "adapter_config.json").read_text())
    assert (adapter["lora_dropout"], adapter["lora_alpha"], adapter["target_modules"]) == (0.25, 6, ["q_proj"])
    assert "eval:  8 rows," in printed
    assert f"LoRA:  {out / 'lora'}" in printed
    assert json.loads((out / "eval_results.json").read_text())["eval_loss"] > 0
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert history[-3]["lambda_svd"] == 0.5
    assert {"ce", "consistency", "diversity", "svd", "lambda_consistency", "lambda_diversity"} <= history[-3].keys()
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs / "model"), out / "lora")
    assert model.peft_config["default"].r == 8


@pytest.mark.usefixtures("no_pictures")
def test_train_on_splits_of_a_folder(inputs, tmp_path, capsys, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_list([{"question": f"Count to {i}.", "answer": "1 2 3"} for i in range(9)])
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    rows.select(range(3)).to_parquet(tmp_path / "set" / "test.parquet")
    folder = str(tmp_path / "set")
    values = options(inputs, tmp_path / "run", data=folder, eval_data=folder, data_split="train[2:]", max_length=30)
    assert cli.main(["train", *flags({**values, "eval_split": "tst"})]) == 2
    assert "set, split tst: Unknown split" in capsys.readouterr().err
    assert cli.main(["train", *flags(values)]) == 2
    assert "set, split train[2:]: no row has a token to train on within max_length=30" in capsys.readouterr().err
    values["max_length"] = 60
    assert cli.main(["train", *flags(values)]) == 0
    printed = capsys.readouterr().out
    assert "train: 7 rows," in printed
    assert "eval:  3 rows," in printed
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["data_split"] == "train[2:]"


@pytest.mark.usefixtures("no_pictures")
def test_rows_that_are_skipped_are_said_before_training(inputs, tmp_path, capsys):
    rows = [{"question": "q" * (500 if i == 3 else 5), "answer": "a"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert cli.main(["train", *flags(options(inputs, tmp_path / "run", data=tmp_path / "rows.jsonl"))]) == 0
    printed = capsys.readouterr().out
    assert "train: 7 rows," in printed
    assert (
        "1 row skipped: no token of them would be trained on (of 1 the answer begins after 512 tokens; line 4)"
        in printed
    )
    assert "train: warning: 1 of 8 rows were skipped: of 1 max_length=512 cuts the answers away\n" in printed


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral"])
def test_train_takes_other_architectures(inputs, tmp_path, capsys, name):
    tokenizer = tiny_tokenizer(TEMPLATE)
    changes = {"n_positions": 128} if name == "gpt2" else {"max_position_embeddings": 128}
    changes |= {"output_router_logits": True} if name == "mixtral" else {}
    model = tmp_path / "model"
    tiny(name, vocab_size=len(tokenizer), **changes).save_pretrained(model)
    tokenizer.save_pretrained(model)
    values = options(inputs, tmp_path / "run", model=model, gradient_checkpointing=True, learning_rate=1e-2)
    assert cli.main(["train", *flags(values)]) == 0
    assert f"report: {tmp_path / 'run' / 'report.html'}" in capsys.readouterr().out
    alone = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "run" / "lora")
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        change = alone(tokens).logits - AutoModelForCausalLM.from_pretrained(model)(tokens).logits
    assert change.abs().max() > 0.01


@pytest.mark.usefixtures("no_pictures")
def test_a_recipe_with_overrides_is_the_same_run_and_is_kept(inputs, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(options(inputs, tmp_path / "a", learning_rate=1e-3, target_modules=["q_proj", "v_proj"]))
    )
    assert cli.main(["train", str(recipe), "--lambda_svd", "0.25", "--seed=7"]) == 0
    kept = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
    assert kept["lambda_svd"] == 0.25
    assert kept["seed"] == 7
    assert kept["target_modules"] == ["q_proj", "v_proj"]
    assert cli.main(["train", str(tmp_path / "a" / "recipe.yaml"), "--output_dir", str(tmp_path / "b")]) == 0
    a, b = (torch.load(tmp_path / x / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"] for x in "ab")
    assert all(torch.equal(a[k]["exp_avg"], b[k]["exp_avg"]) for k in a)


@pytest.mark.usefixtures("no_pictures")
def test_a_recipe_may_say_no_and_empty_lists(inputs, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = yaml.safe_dump(options(inputs, tmp_path / "run", run_name="-x", learning_rate="2e-5"))
    recipe.write_text(text + "save_strategy: no\ntarget_modules: []\neval_data: null\nbf16: false\n")
    assert cli.main(["train", str(recipe)]) == 0
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_the_help_is_of_this_program(capsys):
    for command in ("train", "compare"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert ("or begin anew where there is none; or the folder of a checkpoint" in shown) == (command == "train")
        assert ("--resume_from_checkpoint" in shown) == (command == "train")
        assert ("folder of all runs, each in METHOD/SEED" in shown) == (command == "compare")
        for name in ("do_train", "do_eval", "do_predict", "local_rank", "label_smoothing_factor", "use_liger_kernel"):
            assert f"--{name}" not in shown
        assert "model predictions" not in shown


@pytest.mark.usefixtures("no_pictures")
def test_options_of_other_scripts_are_refused(inputs, tmp_path, capsys):
    values = options(inputs, tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, "do_eval": False}))
    for argv, name, value in [
        (["train", *flags(values), "--do_train"], "do_train", True),
        (["train", *flags(values), "--do_predict", "true"], "do_predict", True),
        (["train", str(tmp_path / "recipe.yaml")], "do_eval", False),
    ]:
        assert cli.main(argv) == 2
        error = capsys.readouterr().err
        assert f"error: {name}: expected no such option (" in error
        assert f"), found {value}" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_base_in_4_bits_without_bitsandbytes(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it raises
    prepared = tmp_path / "prepared"
    shutil.copytree(inputs / "model", prepared)
    config = json.loads((prepared / "config.json").read_text())
    (prepared / "config.json").write_text(json.dumps({**config, RESIDUAL_BASE: {"adapter": "pissa"}}))
    quantize = ["quantize", "--model", str(inputs / "model"), "--output_dir", str(tmp_path / "q")]
    for command in (
        quantize,
        ["train", *flags(options(inputs, tmp_path / "run", quantize="nf4"))],
        ["train", *flags(options(inputs, tmp_path / "run", model=prepared))],
    ):
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert "error: bitsandbytes: expected for weights in 4 bits, found none" in error
        assert "pip install 'balora[quantized]'" in error
    with pytest.raises(ImportError, match="bitsandbytes: expected for weights in 4 bits"):
        balora.load_quantized(prepared)


@pytest.mark.usefixtures("no_pictures")
def test_the_residual_form_and_a_head_that_is_trained(inputs, tmp_path, capsys):
    values = options(inputs, tmp_path / "run", form="residual", modules_to_save="lm_head", exclude_modules="up_proj")
    values |= dict(save_steps=2, learning_rate=1e-2)
    assert cli.main(["train", *flags(values)]) == 0
    assert "PiSSA: the adapters hold " in capsys.readouterr().out
    whole = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")
    assert any("lm_head" in name for name in whole)
    assert not any("up_proj" in name for name in whole)
    shutil.rmtree(tmp_path / "run" / "lora")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    assert cli.main(["train", *flags(values), "--resume_from_checkpoint", "true"]) == 0
    resumed = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(inputs / "model"), tmp_path / "run/lora"
    )
    assert model.peft_config["default"].r == 8


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("targets", ["all-linear", r".*layers\.0\.self_attn\.(q|v)_proj"])
def test_all_layers_or_a_pattern(inputs, tmp_path, targets):
    values = options(inputs, tmp_path / "run", target_modules=targets, hub_token="hf_1234")
    assert cli.main(["train", *flags(values)]) == 0
    names = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors").keys()
    assert len(names) == (28 if targets == "all-linear" else 4)
    assert all("hf_1234" not in path.read_text() for path in (tmp_path / "run").rglob("re*"))


BAD = {
    "data": (dict(data="gone.jsonl"), "data: expected a JSONL file, found nothing at gone.jsonl"),
    "split": (dict(data_split="test"), "rows.jsonl: expected no split, because a single file has none; found 'test'"),
    "split of nothing": (dict(eval_split="test"), "eval_split: expected eval_data beside it, found the split 'test'"),
    "hub": (dict(data="nobody/nothing"), "nobody/nothing: Couldn't reach 'nobody/nothing' on the Hub"),
    "row": (dict(data="BAD"), "bad.jsonl, line 2: expected the column 'output'"),
    "model": (dict(model="no/such/folder/here"), "tokenizer at no/such/folder/here; found nothing there"),
    "model of a name": (dict(model="nobody/nothing"), "tokenizer at nobody/nothing; "),
    "rank": (dict(r=40), "r: expected at most"),
    "alpha": (dict(lora_alpha=0), "lora_alpha: expected a finite number above 0, found 0"),
    "form": (dict(form="other"), "form: expected 'offset' or 'residual', found 'other'"),
    "dropout of the residual": (
        dict(form="residual", lora_dropout=0.1),
        "lora_dropout: expected 0 with form='residual'",
    ),
    "task": (dict(task="nlg", preset="nlu_2024"), "task: expected 'nlu', as in the preset nlu_2024, found 'nlg'"),
    "evaluation": (dict(eval_strategy="steps"), "eval_data: expected with eval_strategy='steps', found none"),
    "liger": (dict(use_liger_kernel=True), "use_liger_kernel: expected False"),
    "modules to save": (
        dict(modules_to_save="lm_haed"),
        "modules_to_save: expected modules of the model, found",
    ),
    "modules to save of a LoRA": (
        dict(modules_to_save="lm_haed", adapter="lora"),
        "modules_to_save: expected modules of the model, found 'lm_haed', which names none",
    ),
    "exclude modules of a LoRA": (
        dict(exclude_modules="v_porj", adapter="dora"),
        "exclude_modules: expected modules of the model, found 'v_porj', which names none",
    ),
    "dropout": (dict(lora_dropout=1), "lora_dropout: expected at least 0 and below 1, found 1"),
    "dtype": (dict(dtype="int8"), "dtype: expected auto, float32, bfloat16 or float16, found 'int8'"),
    "max_length": (dict(max_length=1), "max_length: expected at least 2 tokens, found 1"),
    "temperature": (dict(temperature=0), "temperature: expected a finite number above 0, found 0"),
    "smoothing": (dict(label_smoothing_factor=0.1), "label_smoothing_factor: expected 0"),
    "option": (dict(lambda_sdv=1), "unknown argument --lambda_sdv; did you mean --lambda_svd?"),
    "target": (dict(target_modules="qqq"), "target_modules: expected layers of the model, of down_proj, gate_proj, "),
    "target of a LoRA": (
        dict(target_modules="qqq", adapter="lora"),
        "up_proj, v_proj; found ['qqq'], which names none",
    ),
    "pattern of a LoRA": (dict(target_modules="(", adapter="lora"), "target_modules: expected a regular expression"),
    "batch size": (dict(per_device_train_batch_size=0), "per_device_train_batch_size: expected at least 1, found 0"),
    "accumulation": (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps: "),
    "learning rate": (dict(learning_rate="nan"), "learning_rate: expected a finite number of at least 0, found nan"),
    "epochs": (dict(max_steps=-1, num_train_epochs=0), "num_train_epochs: expected a number above 0, found 0"),
    "optimizer": (dict(optim="lomo"), "lomo"),
    "reporter": (dict(report_to="comet_ml"), "comet"),
    "broken weights": (dict(model="BROKEN"), "model: expected a causal language model at "),
    "vocabulary": (dict(model="NARROW"), "but the model's vocabulary ends at 89"),
    "checkpoint": (dict(resume_from_checkpoint="elsewhere"), "resume_from_checkpoint: expected 'true' or a complete"),
}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("case", BAD)
def test_an_error_names_what_is_wrong_and_nothing_is_written(inputs, tmp_path, capsys, case):
    changes, message = BAD[case]
    values = options(inputs, tmp_path / "run", **changes)
    if values["data"] == "BAD":
        values["data"] = str(inputs / "bad.jsonl")
    if values["model"] in ("BROKEN", "NARROW"):
        narrow = values["model"] == "NARROW"
        values["model"] = str(tiny_checkpoint(tmp_path / "model", TEMPLATE, **({"vocab_size": 90} if narrow else {})))
        if not narrow:
            (tmp_path / "model" / "model.safetensors").write_bytes(b"short")
    assert cli.main(["train", *flags(values)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_missing_output_dir_and_bad_recipes(inputs, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    for text, message in [
        ("model: x\nlamda_svd: 1", "recipe.yaml: unknown option 'lamda_svd'; did you mean --lambda_svd?"),
        ("- a\n- b", "recipe.yaml: expected a mapping of option names to values, found list"),
        ("r: 4\na: [", "recipe.yaml, line 2: expected YAML, found"),
        ("temperature: [1, 2]", "recipe.yaml: temperature: expected one value, found the list [1, 2]"),
    ]:
        recipe.write_text(text)
        assert cli.main(["train", str(recipe)]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["train", "nowhere.yaml"]) == 2
    assert "recipe: expected a YAML file, found No such file or directory at nowhere.yaml" in capsys.readouterr().err
    values = options(inputs, "x")
    del values["output_dir"]
    with pytest.raises(SystemExit):
        cli.main(["train", *flags(values)])
    assert "required: --output_dir" in capsys.readouterr().err


def test_a_pipe_that_breaks_in_a_run_is_an_error(monkeypatch):
    def broken(argv):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_bench", broken)
    with pytest.raises(BrokenPipeError):
        cli.main(["bench", "--impl", "torch"])


def test_a_reader_that_stops():
    process = subprocess.Popen(
        [sys.executable, "-m", "balora.cli", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 0


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("argv", "text"), [(["--help"], "train"), (["--version"], "balora 0."), (["train", "--help"], "lambda_svd")]
)
def test_help(argv, text, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 0
    assert text in capsys.readouterr().out


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["fly"])
    assert caught.value.code == 2
    assert "fly" in capsys.readouterr().err


def test_info_prints_what_runs_here(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "linear_objective  streaming" in printed
    assert "what cannot run here" in printed


@pytest.mark.parametrize(("text", "rank"), [("7", 7), ("0.3", 0.3), ("1.0", 1.0), ("1", 1)])
def test_a_rank_is_a_number_or_a_fraction(inputs, tmp_path, text, rank):

    asked, parsed = cli._train_arguments(train, flags(options(inputs, tmp_path / "a", svd_rank=text)))
    assert parsed[1].svd_rank == asked["svd_rank"] == rank
    assert type(parsed[1].svd_rank) is type(rank)


def test_bench_lists_what_there_is(capsys):
    assert cli.main(["bench", "--list"]) == 0
    listed = capsys.readouterr().out
    assert "linear_objective" in listed
    assert "randomized_svd" in listed


@pytest.mark.parametrize(("missing", "hint"), [("balora_bench", True), ("balora_bench.cli", False), ("torch", False)])
def test_the_hint_is_for_the_missing_source_alone(missing, hint, monkeypatch, capsys):
    def fail(name, *arguments):
        if name.startswith("balora_bench"):
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *arguments)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", fail)
    assert cli.main(["bench", "--list"]) == 2
    assert ("(the source is in benchmarks/)" in capsys.readouterr().err) == hint
