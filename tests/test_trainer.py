"""Training under Hugging Face's Trainer: what is logged, gradient accumulation, a run that is killed and resumed."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

import balora
from balora import BALoraConfig
from balora.trainer import BALoraTrainer

from .conftest import tiny_checkpoint, tiny_llama

CONFIG = BALoraConfig(lambda_consistency=0.5, lambda_diversity=0.3, lambda_svd=0.2, focus_warmup=0.5, focus_ramp=0.0)


def examples(n=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 97, (12,), generator=g).tolist() for _ in range(n)]
    return [dict(input_ids=ids, labels=[-100] * (1 + i % 6) + ids[1 + i % 6 :]) for i, ids in enumerate(rows)]


class Recorder(TrainerCallback):
    """Stands for a reporter: keeps what it is given."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def fit(folder, config=CONFIG, callbacks=(), **options):
    model = balora.get_pissa_model(tiny_llama(), r=4)
    balora.attach(model, config)
    defaults = dict(max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=2, save_strategy="no")
    defaults |= dict(disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True)
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    trainer = BALoraTrainer(model, arguments, train_dataset=examples(), callbacks=list(callbacks))
    trainer.train()
    return trainer


def adapters(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_every_term_and_lambda_reaches_the_reporters(tmp_path):
    recorder = Recorder()
    trainer = fit(tmp_path, callbacks=[recorder], max_grad_norm=0.0, logging_steps=1)
    steps = [log for log in recorder.logs if "loss" in log]
    assert len(steps) == 8
    for step, log in enumerate(steps):
        weights = CONFIG.lambdas(step, 8)
        names = ("consistency", "diversity", "svd")
        assert [log[f"lambda_{n}"] for n in names] == pytest.approx(weights)
        assert ("diversity" in log) is ("svd" in log) is (step >= 4)
        total = log["ce"] + sum(w * log.get(n, 0.0) for w, n in zip(weights, names, strict=True))
        assert float(log["loss"]) == pytest.approx(total, rel=1e-4)
    assert trainer.state.log_history[0]["ce"] == steps[0]["ce"]


@pytest.mark.parametrize("normalized", [True, False])
def test_logged_terms_are_means_over_micro_batches_and_steps(tmp_path, monkeypatch, normalized):
    if not normalized:  # as a Trainer that does not pass num_items_in_batch
        monkeypatch.setattr(BALoraTrainer, "_get_num_items_in_batch", lambda *args, **kwargs: None)
    config = replace(CONFIG, consistency_schedule="constant", focus_schedule="constant")
    recorder = Recorder()
    options = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, logging_steps=4)
    fit(tmp_path, config, [recorder], **options)
    for log in recorder.logs[:2]:
        total = log["ce"] + 0.5 * log["consistency"] + 0.3 * log["diversity"] + 0.2 * log["svd"]
        assert float(log["loss"]) == pytest.approx(total, rel=1e-4)


def test_four_micro_batches_of_one_are_one_batch_of_four(tmp_path):
    config = replace(CONFIG, lambda_svd=0.0)  # the SVD term belongs to the micro-batch
    whole = adapters(fit(tmp_path, config))
    parts = adapters(fit(tmp_path, config, per_device_train_batch_size=1, gradient_accumulation_steps=4))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-4, msg=name)


def test_evaluation_is_plain_cross_entropy_with_logits(tmp_path):
    trainer = fit(tmp_path)
    found = trainer.evaluate(examples(6, seed=1))["eval_loss"]
    balora.detach(trainer.model)
    assert found == pytest.approx(trainer.evaluate(examples(6, seed=1))["eval_loss"], rel=1e-6)


def command(model, data, out, *more):
    options = dict(model=model, data=data, output_dir=out, r=4, lora_dropout=0.1, max_steps=200, save_steps=40)
    options |= dict(logging_steps=10, learning_rate=1e-3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "balora.cli", "train", *flags, "--disable_tqdm", "true", "--use_cpu", *more]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(tmp_path):
    model = tiny_checkpoint(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "\n".join(json.dumps({"question": f"What is {i} + {i}?", "answer": f"{2 * i}."}) for i in range(30))
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}

    def start(out, *more):
        return subprocess.Popen(
            command(model, data, out, *more),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    other = start(whole)
    process = start(killed)
    seen = 0
    for line in process.stdout:
        seen += "'loss'" in line
        if seen == 6:  # step 60, between the checkpoints 40 and 80
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    text, _ = other.communicate()
    assert other.returncode == 0, text
    assert not (killed / "lora").exists()
    # and the power failed while the next checkpoint was written
    (killed / "checkpoint-190").mkdir()
    (killed / "checkpoint-190" / "adapter_model.safetensors").write_bytes(b"half")

    refused = start(killed)
    text, _ = refused.communicate()
    assert refused.returncode == 2
    assert "output_dir:" in text
    assert "--resume_from_checkpoint true" in text

    resumed = start(killed, "--resume_from_checkpoint", "true")
    text, _ = resumed.communicate()
    assert resumed.returncode == 0, text
    assert "checkpoint-190 is incomplete" in text
    assert f"resume: from {killed / 'checkpoint-'}" in text
    assert_same_bits(weights(killed / "checkpoint-200"), weights(whole / "checkpoint-200"))
    assert_same_bits(weights(killed / "lora"), weights(whole / "lora"))
