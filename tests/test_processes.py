"""Two processes train what one does: FSDP2 by hand and through Accelerate, ZeRO, and a process that is killed."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.torch_version import TorchVersion

import balora
from balora import cli
from balora.export import export_run

from .conftest import tiny_checkpoint, tiny_llama
from .sharded import CASES, CONFIG

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "accelerate"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def finished(command, **environment):
    """(exit status, all that was printed) of a launcher; far more time than it needs ends the test."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **environment}
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def accelerate(config, *command):
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]  # 0: one that is free
    return [sys.executable, *launch, "--config_file", config, *command]


# ---- FSDP2 by hand ----


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded")
    status, text = finished([*TORCHRUN, ROOT / "tests" / "sharded.py", out])
    assert status == 0, text
    return out, json.loads((out / "found.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_fsdp2_trains_what_one_process_does(sharded, name):
    folder, found = sharded[0] / name, sharded[1][name]
    assert found["same_start"]  # PiSSA gives the same bits in both processes
    assert found["consistency"] == 0  # student and teacher are the same bits before the first step
    assert found["moved"] > 0.01
    if CASES[name].bfloat16 or CASES[name].model.get("dtype") is torch.bfloat16:
        assert found["loss"] < 0.02  # of 4.6
    else:
        assert found["loss"] < 5e-6
        assert found["weights"] < 5e-6
        assert found["logits"] < 1e-5
        one, two = products(folder / "whole"), products(folder / "sharded")
        assert one.keys() == two.keys()
        for layer in one:
            torch.testing.assert_close(two[layer], one[layer], rtol=1e-4, atol=2e-6, msg=layer)
    if not CASES[name].bfloat16:
        exact = CASES[name].pissa.get("form") != "residual"
        assert found["teacher"] <= (0 if exact else 1e-6)


def test_frozen_factors_are_spread_where_they_are_parameters(sharded):
    # r·(in + out) of q, v, up in two layers and of the head, divided by two; of the head's 97 rows the first has 49
    assert sharded[1]["frozen factors"]["factors"] == 4 * ((2 * (32 + 32 + 32 + 16 + 32 + 48) + 32) // 2 + 49)
    assert sharded[1]["layers"]["factors"] == 0  # buffers


def test_the_gram_matrix_of_a_head_that_is_gathered_in_every_step_is_computed_once(sharded):
    assert sharded[1]["svd"]["grams"] == 1


def test_attach_refuses_a_model_that_is_sharded_already(sharded):
    assert sharded[1]["refused"].startswith("model: expected whole weights, found base_model.model.model.embed_tokens")


def test_weights_that_only_the_first_process_has_read_are_refused(monkeypatch):
    model = balora.get_pissa_model(tiny_llama(), r=4)
    monkeypatch.setattr(balora.sharding, "is_fsdp_enabled", lambda: True)
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: expected false, found true"):
        balora.get_pissa_model(tiny_llama(), r=4)
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: expected false, found true"):
        balora.attach(model, CONFIG)


# ---- balora train under the launchers ----


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The options of a run, and the folder in which one process did it with the whole batch."""
    folder = tmp_path_factory.mktemp("alone")
    tiny_checkpoint(folder / "model")
    rows = [{"question": f"What is {i} + {i}?", "answer": f"{2 * i}."} for i in range(32)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = dict(model=folder / "model", data=folder / "rows.jsonl", r=4, max_steps=6, save_steps=3, lambda_svd=0.0)
    values |= dict(lora_alpha=128)  # so that a few steps change much
    values |= dict(logging_steps=2, learning_rate=1e-2, gradient_accumulation_steps=2, disable_tqdm=True, use_cpu=True)
    assert cli.main(train(values, folder / "run", per_device_train_batch_size=4)) == 0
    return values, folder / "run"


def train(values, out, **more):
    values = {"per_device_train_batch_size": 2, **values, "output_dir": out, **more}
    return ["train", *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def products(folder):
    """The change of each weight, which is unique: B·A of an exported LoRA; and other trained tensors."""
    tensors = {name: t.double() for name, t in load_file(folder / "adapter_model.safetensors").items()}
    found = {name: t for name, t in tensors.items() if ".lora_" not in name}
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            found[name] = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    return found


def assert_same_run(found, alone):
    one, two = products(alone / "lora"), products(found / "lora")
    assert one.keys() == two.keys()
    for layer in one:
        torch.testing.assert_close(two[layer], one[layer], rtol=1e-2, atol=1e-3, msg=layer)
        assert one[layer].abs().max() > 0.02, layer


def trained_and_resumed(config, alone, folder, **environment):
    """Two runs in one launch: a whole one, and one from its first checkpoint on. What was printed."""
    values, run = alone
    commands = [
        train(values, folder / "a"),
        train(values, folder / "b", resume_from_checkpoint=folder / "a" / "checkpoint-3"),
    ]
    words = json.dumps(commands, default=str)
    environment["OTHER_FACTORS"] = "1"  # those of the checkpoint have to win
    status, text = finished(accelerate(config, ROOT / "tests" / "launched.py", words), **environment)
    assert status == 0, text
    start = load_file(folder / "a" / "checkpoint-3" / "adapter_model.safetensors")
    for name in "ab":
        assert_same_run(folder / name, run)
        end = load_file(folder / name / "checkpoint-6" / "adapter_model.safetensors")
        factors = [key for key in start if "lora_offset_" in key]
        assert len(factors) == 28
        assert all(torch.equal(end[key], start[key]) for key in factors)
        assert (
            text.count(f"LoRA:  {folder / name}") == text.count(f"report: {folder / name}") == 1
        )  # one process says it
        export_run(folder / name, folder / "exported" / name)  # the last checkpoint holds whole adapters
        both = (folder / name / "lora", folder / "exported" / name)
        one, two = (load_file(lora / "adapter_model.safetensors") for lora in both)
        assert one.keys() == two.keys()
        assert all(torch.equal(t, two[key]) for key, t in one.items())
    assert text.count("train: 32 rows") == 2
    assert "got no gradient" not in text
    return text


def test_balora_train_with_fsdp2(alone, tmp_path):
    trained_and_resumed(EXAMPLES / "fsdp2.yaml", alone, tmp_path)


def test_balora_train_with_fsdp2_on_a_bfloat16_base(alone, tmp_path):
    """Accelerate's policy, which would round A and B, and the loss to steps of 0.03, is not asked."""
    values, _ = alone
    more = dict(dtype="bfloat16", bf16=True, max_steps=3, logging_steps=1, save_strategy="no", lambda_diversity=0.0)
    words = json.dumps([train({**values, **more}, tmp_path / "run")], default=str)
    status, text = finished(accelerate(EXAMPLES / "fsdp2.yaml", ROOT / "tests" / "launched.py", words))
    assert status == 0, text
    logs = [ast.literal_eval(line) for line in text.splitlines() if line.startswith("{'loss'")]
    assert len(logs) == 3
    assert float(logs[0]["consistency"]) == 0
    assert float(logs[-1]["consistency"]) > 0
    for log in logs:
        weighted = float(log["ce"]) + float(log["lambda_consistency"]) * float(log["consistency"])
        assert float(log["loss"]) == pytest.approx(weighted, abs=2e-3)


def test_balora_train_with_zero_3(alone, tmp_path):
    pytest.importorskip("deepspeed")
    # DeepSpeed leaves parameters below 100,000 elements whole: here it must not.
    engine = {
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    (tmp_path / "zero3.json").write_text(json.dumps(engine))
    config = yaml.safe_load((EXAMPLES / "zero3.yaml").read_text())
    config["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "zero3.json"), "zero3_init_flag": True}
    del config["mixed_precision"]
    (tmp_path / "zero3.yaml").write_text(yaml.safe_dump(config))
    trained_and_resumed(tmp_path / "zero3.yaml", alone, tmp_path, DS_ACCELERATOR="cpu")


def test_balora_train_with_zero_2(alone, tmp_path):
    pytest.importorskip("deepspeed")
    values, run = alone
    command = accelerate(EXAMPLES / "zero2.yaml", "-m", "balora.cli", *train(values, tmp_path / "run"))
    status, text = finished(command, DS_ACCELERATOR="cpu")
    assert status == 0, text
    assert_same_run(tmp_path / "run", run)


@pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.13"), reason="torch 2.11 reads no optimizer of several CPU processes"
)
def test_a_killed_process_ends_the_run_with_an_error_and_a_checkpoint_to_go_on_from(alone, tmp_path):
    values, run = alone
    words = json.dumps([train(values, tmp_path / "run")], default=str)
    began = time.monotonic()
    command = accelerate(EXAMPLES / "ddp.yaml", ROOT / "tests" / "launched.py", words)
    status, text = finished(command, KILL_AT="5")
    assert status != 0
    assert "Signal 9" in text
    assert time.monotonic() - began < 180  # mostly the start
    assert not (tmp_path / "run" / "lora").exists()
    # torchrun would take --r for one of its own options
    resume = ["train", tmp_path / "run" / "recipe.yaml", "--resume_from_checkpoint", "true"]
    status, text = finished([*TORCHRUN, "-m", "balora.cli", *resume])
    assert status == 0, text
    assert text.count(f"resume: from {tmp_path / 'run' / 'checkpoint-3'}") == 1
    assert_same_run(tmp_path / "run", run)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_configuration_files_are_what_accelerate_takes(name):
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    config = config_args.load_config_from_file(str(EXAMPLES / f"{name}.yaml"))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    assert config.distributed_type == kind
    assert config.num_processes == 2
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
