"""What a run leaves to go on from, and what it refuses to go on with: recipes, data, optimizer, adapters."""

import json
import os
import shutil

import pytest
import yaml

from balora import cli, resume, train

from .test_cli import flags, options, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.usefixtures("no_pictures")
def test_a_finished_run_is_not_overwritten_and_not_resumed_with_other_adapters(inputs, tmp_path, capsys):
    values = options(inputs, tmp_path / "run", save_strategy="no")
    assert cli.main(["train", *flags(values)]) == 0
    assert cli.main(["train", *flags(values)]) == 2
    assert "holds the LoRA of an earlier run; name another folder" in capsys.readouterr().err
    values = options(inputs, tmp_path / "again", save_steps=2)
    assert cli.main(["train", *flags(values)]) == 0
    others = {"r": 3, "lora_alpha": 1, "target_modules": "q_proj", "form": "residual", "modules_to_save": "lm_head"}
    others |= {"exclude_modules": "up_proj"}
    for name, value in others.items():
        changed = {**values, name: value, "resume_from_checkpoint": "true"}
        assert cli.main(["train", *flags(changed)]) == 2
        assert f"error: {name}: expected " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("report_to", "none"),
        ("debug", "underflow_overflow"),
        ("accelerator_config", '{"split_batches": true}'),
        ("lr_scheduler_kwargs", '{"num_cycles": 2}'),
        ("warmup_steps", "0.1"),
        ("lr_scheduler_type", "cosine_with_restarts"),
        ("svd_rank", "0.3"),
    ],
)
def test_a_kept_recipe_says_what_was_given(inputs, tmp_path, name, value):
    values = flags({**options(inputs, tmp_path / "run"), name: value})
    asked, made = cli._train_arguments(train, values)
    (tmp_path / "recipe.yaml").write_text(resume.recipe_text(asked))
    again, made_again = cli._train_arguments(train, [str(tmp_path / "recipe.yaml")])
    assert again == yaml.safe_load(resume.recipe_text(asked))
    for first, second in zip(made, made_again, strict=True):
        for field in vars(first):
            if field not in ("logging_dir", "output_dir", "data", "model"):
                assert str(getattr(first, field)) == str(getattr(second, field)), field


@pytest.mark.usefixtures("no_pictures")
def test_a_run_goes_on_with_its_data_and_its_optimizer(inputs, tmp_path, capsys, monkeypatch):
    """The Trainer would take the old rate from the checkpoint, and recipe.yaml would hold the new one."""
    out = tmp_path / "run"
    values = options(inputs, out, save_steps=2, max_steps=2, learning_rate=1e-2, lr_scheduler_type="constant")
    assert cli.main(["train", *flags(values)]) == 0
    before = (out / "recipe.yaml").read_text()
    shutil.copy(inputs / "rows.jsonl", tmp_path / "others.jsonl")
    kept = out / "checkpoint-2" / "recipe.yaml"
    for name, value, expected in [
        ("learning_rate", 1e-3, "0.01"),
        ("weight_decay", 0.1, "0.0"),
        ("adam_beta1", 0.8, "0.9"),
        ("adam_beta2", 0.9, "0.999"),
        ("adam_epsilon", 1e-4, "1e-08"),
        ("optim", "sgd", "adamw_torch"),
        ("lr_scheduler_type", "reduce_lr_on_plateau", "constant"),
        ("data", tmp_path / "others.jsonl", inputs / "rows.jsonl"),
    ]:
        again = {**values, "max_steps": 4, "eval_data": inputs / "rows.jsonl", "eval_strategy": "steps", name: value}
        assert cli.main(["train", *flags(again), "--resume_from_checkpoint", "true"]) == 2
        error = capsys.readouterr().err
        assert f"error: {name}: expected {expected}" in error
        assert f", as in {kept}, found {value}" in error
        assert (out / "recipe.yaml").read_text() == before
    there = kept.read_text()
    kept.write_text("")
    assert cli.main(["train", *flags(values), "--resume_from_checkpoint", "true"]) == 2
    assert f"resume_from_checkpoint: expected options and their values in {kept}, found None" in capsys.readouterr().err
    kept.write_text(there)
    # An edited recipe is no way around it; a shorter run, another log and the same file by another name are no change.
    recipe = yaml.safe_load(before)
    (out / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "learning_rate": 1e-3}))
    resumed = ["--resume_from_checkpoint", "true", "--max_steps", "4", "--logging_steps", "2"]
    assert cli.main(["train", str(out / "recipe.yaml"), *resumed]) == 2
    monkeypatch.chdir(inputs)
    resumed += ["--learning_rate", "1e-2", "--data", "rows.jsonl", "--lr_scheduler_type", "constant_with_warmup"]
    assert cli.main(["train", str(out / "recipe.yaml"), *resumed]) == 0
    assert yaml.safe_load((out / "recipe.yaml").read_text())["learning_rate"] == 0.01
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.usefixtures("no_pictures")
def test_a_resumed_run_says_what_its_train_loss_counts_and_may_have_fewer_steps(inputs, tmp_path, capsys):
    values = options(inputs, tmp_path / "run", max_steps=3, save_steps=3)
    assert cli.main(["train", *flags(values)]) == 0
    assert "train_loss counts" not in capsys.readouterr().out
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert cli.main(["train", *flags({**values, "max_steps": 2}), "--resume_from_checkpoint", "true"]) == 0
    assert f"{checkpoint} is that of the last step, 3" in capsys.readouterr().out
    assert cli.main(["train", *flags({**values, "max_steps": 4}), "--resume_from_checkpoint", "true"]) == 0
    assert f"train_loss counts the steps after {checkpoint} only" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_a_kept_recipe_means_the_same_from_any_folder(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(inputs)
    values = options(inputs, "run", model="model", data="rows.jsonl", eval_data="rows.jsonl", save_steps=2, max_steps=2)
    values |= {"output_dir": os.path.relpath(tmp_path / "run"), "hub_token": "hf_1234"}
    assert cli.main(["train", *flags(values)]) == 0
    kept = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (kept["model"], kept["output_dir"]) == (str(inputs / "model"), str(tmp_path / "run"))
    assert kept["data"] == kept["eval_data"] == str(inputs / "rows.jsonl")
    assert all("hf_1234" not in path.read_text() for path in (tmp_path / "run").rglob("recipe.yaml"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    resumed = ["--resume_from_checkpoint", "true", "--max_steps", "3"]
    assert cli.main(["train", str(tmp_path / "run" / "recipe.yaml"), *resumed]) == 0
    assert f"resume: from {tmp_path / 'run' / 'checkpoint-2'}\n" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_lora_does_not_go_on_as_dora(inputs, tmp_path, capsys):
    values = options(inputs, tmp_path / "run", adapter="lora", max_steps=1, save_steps=1)
    assert cli.main(["train", *flags(values)]) == 0
    assert cli.main(["train", *flags({**values, "adapter": "dora", "resume_from_checkpoint": "true"})]) == 2
    error = capsys.readouterr().err
    assert "adapter: expected 'lora', as in" in error
    assert "checkpoint-1, found 'dora'" in error


@pytest.mark.usefixtures("no_pictures")
def test_an_output_folder_that_is_a_file(inputs, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert cli.main(["train", *flags(options(inputs, tmp_path / "run"))]) == 2
    assert "output_dir: expected a folder, found the file" in capsys.readouterr().err
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.usefixtures("no_pictures")
def test_an_output_folder_that_cannot_be_written(inputs, tmp_path, capsys, monkeypatch):
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and may(path, mode))
    assert cli.main(["train", *flags(options(inputs, tmp_path / "new" / "run"))]) == 2
    assert f"output_dir: expected a folder to write to, found {tmp_path}, where this user" in capsys.readouterr().err
    training = train.TrainingArguments(output_dir=str(tmp_path / "new"), use_cpu=True)
    monkeypatch.setattr(train.TrainingArguments, "should_save", False)  # a process that never writes there
    assert resume.checkpoint(training) is None


@pytest.mark.usefixtures("no_pictures")
def test_resuming_a_run_that_has_no_checkpoint_starts_it(inputs, tmp_path, capsys):
    values = options(inputs, tmp_path / "run", save_strategy="no", resume_from_checkpoint="true")
    assert cli.main(["train", *flags(values)]) == 0
    assert "resume: no complete checkpoint" in capsys.readouterr().out
    assert "resume_from_checkpoint" not in yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())


@pytest.mark.usefixtures("no_pictures")
def test_a_run_whose_steps_are_all_taken_is_exported_and_no_more(inputs, tmp_path, capsys):
    """As one that was killed between its last checkpoint and its export, in the middle of an epoch."""
    out = tmp_path / "run"
    values = options(inputs, out, save_steps=3, max_steps=3, learning_rate=1e-2, lr_scheduler_type="constant")
    assert cli.main(["train", *flags(values)]) == 0
    weights = (out / "lora" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "lora")
    state, page = (out / name for name in ("trainer_state.json", "report.html"))
    state.unlink()
    page.write_text("as it was in the middle of the run")
    capsys.readouterr()
    assert cli.main(["train", str(out / "recipe.yaml"), "--resume_from_checkpoint", "true"]) == 0
    shown = capsys.readouterr().out
    assert f"{out / 'checkpoint-3'} is that of the last step, 3; none is left to take" in shown
    assert f"report: {page}" in shown
    assert "Finished: 3 steps" in page.read_text()
    assert json.loads(state.read_text())["global_step"] == 3
    assert (out / "lora" / "adapter_model.safetensors").read_bytes() == weights
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    config = json.loads((out / "checkpoint-3" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4  # that nobody set


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("error", "status", "told"),
    [(KeyboardInterrupt(), 130, "interrupted"), (OSError(28, "No space left on device"), 1, "the run failed")],
)
def test_a_run_that_is_stopped_says_how_to_go_on(inputs, tmp_path, capsys, monkeypatch, error, status, told):
    def stop_at(last):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == last:
                raise error

        return on_step_end

    out = tmp_path / "run"
    monkeypatch.setattr(train._AllStepsTaken, "on_step_end", stop_at(1))
    assert cli.main(["train", *flags(options(inputs, out, save_steps=2))]) == status
    none_yet = f"{told}; {out} has no complete checkpoint yet (save_strategy is steps, save_steps 2)"
    assert none_yet in capsys.readouterr().err
    monkeypatch.setattr(train._AllStepsTaken, "on_step_end", stop_at(3))
    assert cli.main(["train", *flags(options(inputs, out, save_steps=2))]) == status
    shown = capsys.readouterr().err
    assert ("Traceback" in shown) == (status == 1)
    assert (
        f"{told}; `balora train {out}/recipe.yaml --resume_from_checkpoint true` goes on from checkpoint-2, "
        f"`balora export {out} OUT_DIR` writes its LoRA" in shown
    )
