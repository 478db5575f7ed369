"""Training under Hugging Face's Trainer: what is logged, gradient accumulation, a run that is killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

import balora
from balora import BALoraConfig, cli
from balora.trainer import BALoraCallback, BALoraTrainer

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


_FOR_TRAINER = "compute_metrics", "compute_loss_func", "eval_dataset", "data_collator"


def fit(folder, config=CONFIG, callbacks=(), rows=None, **options):
    for_trainer = {k: options.pop(k) for k in _FOR_TRAINER if k in options}
    model = balora.get_pissa_model(tiny_llama(), r=4)
    balora.attach(model, config)
    defaults = dict(max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=2, save_strategy="no")
    defaults |= dict(disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True)
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    rows = examples() if rows is None else rows
    trainer = BALoraTrainer(model, arguments, train_dataset=rows, callbacks=list(callbacks), **for_trainer)
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


def test_of_equal_rows_every_term_adds_up_over_micro_batches(tmp_path):
    """The SVD term of a micro-batch has the weight of its tokens: of equal rows the whole has the same singular values
    but for a factor, and every split is the same objective."""
    config = replace(CONFIG, lambda_svd=5.0, focus_schedule="constant", svd_rank=3)
    rows = examples(1) * 16
    recorders = [Recorder(), Recorder()]
    whole = fit(tmp_path, config, recorders[:1], rows=rows)
    options = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    parts = fit(tmp_path, config, recorders[1:], rows=rows, **options)
    start, whole, parts = adapters_at_start(), adapters(whole), adapters(parts)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-4, msg=name)
        assert (whole[name] - start[name]).abs().max() > 0.01
    for a, b in zip(*(r.logs for r in recorders), strict=True):
        for name in ("ce", "consistency", "diversity", "svd"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_bare_loop_ends_where_the_trainer_ends(tmp_path, accelerated):
    """With num_items_in_batch, in micro-batches; plain gradient descent shows every factor of the loss."""
    micro_batches = []

    def collate(rows):
        micro_batches.append(default_data_collator(rows))
        return micro_batches[-1]

    options = dict(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.05)
    options |= dict(optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, data_collator=collate)
    expected = adapters(fit(tmp_path, **options))

    model = balora.attach(balora.get_pissa_model(tiny_llama(), r=4), CONFIG).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    if accelerated:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(3):
        balora.set_progress(model, step, 3)
        pair = micro_batches[2 * step : 2 * step + 2]
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in pair)
        for batch in pair:
            if not accelerated:
                model(**batch, num_items_in_batch=tokens).loss.backward()
                continue
            with accelerator.accumulate(model):
                accelerator.backward(2 * model(**batch, num_items_in_batch=tokens).loss)
                optimizer.step()
                optimizer.zero_grad()
        if not accelerated:
            optimizer.step()
            optimizer.zero_grad()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.detach(), expected[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs of one process and of two, each launch with all of its runs."""
    folder = tmp_path_factory.mktemp("processes")
    script = Path(__file__).with_name("two_processes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = []
    for processes, size, how in ((2, 2, ["average", "alone"]), (1, 4, ["average"])):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(script), str(folder / str(processes)), str(size), *how]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize("how", ["average", "alone"])
def test_two_processes_log_what_one_does(runs, how):
    """Without averaging each process divides by its own number of tokens: its rows have other weights than in one."""
    logs = {n: json.loads((runs / n / how / "log.json").read_text())[:-1] for n in "12" if (runs / n / how).is_dir()}
    assert len(logs["2"]) == 2
    for log in logs["2"]:
        assert log["loss"] == pytest.approx(log["ce"] + 0.5 * log["consistency"] + 0.3 * log["diversity"], rel=1e-5)
        assert log["consistency"] > 1e-4
    if how == "average":
        for one, two in zip(logs["1"], logs["2"], strict=True):
            for name in ("loss", "ce", "consistency", "diversity"):
                assert two[name] == pytest.approx(one[name], rel=1e-5), name
        one, two = (load_file(runs / n / how / "adapters") for n in "12")
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4, msg=name)


def test_processes_with_other_factors_are_refused(monkeypatch):
    model = balora.attach(balora.get_pissa_model(tiny_llama(), r=4), CONFIG)
    args = types.SimpleNamespace(world_size=2, device=torch.device("cpu"), deepspeed_plugin=None)
    layer = next(m for m in model.modules() if hasattr(m, "lora_offset_A"))
    other = layer.lora_offset_A.default.clone()

    def all_reduce(sums, op):
        """With a process that has the other A₀ in that layer."""
        change = other.view(torch.int32).sum(dtype=torch.int64) - layer.lora_offset_A.default.view(torch.int32).sum()
        half = len(sums) // 2
        sums[0], sums[half] = max(sums[0], sums[0] + change), max(sums[half], sums[half] - change)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    start = lambda: BALoraCallback().on_train_begin(args, TrainerState(max_steps=1), None, model=model)  # noqa: E731
    start()
    for factor in (1 + 2**-20, 1 - 2**-20):  # above this process's bits, and below
        other.copy_(layer.lora_offset_A.default)[0, 0] *= factor
        with pytest.raises(ValueError, match="expected the same PiSSA factors in all processes, found others in 1 of"):
            start()


def test_fsdp_version_1_is_refused():
    """Accelerate's default: it would flatten the weights that an attached model reads."""
    model = balora.attach(balora.get_pissa_model(tiny_llama(), r=4), CONFIG)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        with pytest.raises(ValueError, match="^fsdp_version: expected 2, found 1, which flattens"):
            BALoraCallback().on_train_begin(None, TrainerState(), None, model=wrapped)
    finally:
        torch.distributed.destroy_process_group()


# base, options of get_pissa_model, a weight that is trained too, whether Accelerate's policy for bf16 goes
POLICIES = {
    "bfloat16 base": (torch.bfloat16, {}, None, True),
    "float32 base": (torch.float32, {}, None, False),
    "float16 base": (torch.float16, {}, None, False),
    "trained head": (torch.bfloat16, dict(modules_to_save=["lm_head"]), None, False),
    "trained layer": (torch.bfloat16, {}, "q_proj.base_layer", False),
    "residual form": (torch.bfloat16, dict(form="residual"), None, False),
}


@pytest.mark.parametrize("case", POLICIES)
def test_what_fsdp2_is_given(case, tmp_path, monkeypatch):
    """Frozen factors that it shards, and adapters that it gathers in float32 where the base is in bfloat16."""
    dtype, options, trained, replaced = POLICIES[case]
    model = balora.attach(balora.get_pissa_model(tiny_llama(dtype=dtype), r=4, **options), CONFIG)
    for name, p in model.named_parameters():
        if trained and trained in name:
            p.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compared = []

    def check_alike(model, device):
        compared.append(sum("lora_offset_" in name for name, _ in model.named_buffers()))

    monkeypatch.setattr("balora.trainer.check_alike", check_alike)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    begin = Trainer.__init__
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)  # what Accelerate makes of --bf16
    plugin = types.SimpleNamespace(fsdp_version=2, mixed_precision_policy=policy)

    def with_plugin(self, *args, **kwargs):
        AcceleratorState._shared_state.pop("fsdp_plugin", None)
        begin(self, *args, **kwargs)
        monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)

    monkeypatch.setattr(Trainer, "__init__", with_plugin)
    BALoraTrainer(model, arguments, train_dataset=examples())
    offset = 0 if "form" in options else 28
    assert compared == [offset]  # of all processes, as long as they are whole
    assert plugin.mixed_precision_policy == (MixedPrecisionPolicy(None, torch.float32) if replaced else policy)
    factors = {name: p.requires_grad for name, p in model.named_parameters() if "lora_offset_" in name}
    assert len(factors) == offset
    assert not any(factors.values())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    # another trainer with the same plugin finds the policy as it was
    wide = balora.attach(balora.get_pissa_model(tiny_llama(), r=4), CONFIG)
    BALoraTrainer(wide, arguments, train_dataset=examples())
    assert plugin.mixed_precision_policy == policy


def test_evaluation_metrics_early_stopping_and_the_best_model(tmp_path):
    """A run that gets worse is stopped, and ends with its best adapters, which are what is exported."""
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions.shape)
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": float(right[prediction.label_ids[:, 1:] != -100].mean())}

    options = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, learning_rate=0.3)
    options |= dict(load_best_model_at_end=True, metric_for_best_model="eval_loss", max_steps=50)
    trainer = fit(
        tmp_path,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        compute_metrics=compute_metrics,
        eval_dataset=examples(6, seed=1),
        **options,
    )
    assert set(seen) == {(6, 12, 97)}
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert all("eval_accuracy" in log for log in trainer.state.log_history if "eval_loss" in log)
    best = 1 + losses.index(min(losses))
    assert len(losses) == best + 2 < 50
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    balora.export_lora(trainer.model, tmp_path / "lora")
    alone = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(alone(tokens).logits, trainer.model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["label smoothing", "a loss of the user's own"])
def test_labels_that_are_taken_away_raise(tmp_path, how):
    options = dict(label_smoothing_factor=0.1) if how == "label smoothing" else {}
    more = {} if options else dict(compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.loss)
    with pytest.raises(ValueError, match="labels: a model attached to BA-LoRA needs labels in training, found None"):
        fit(tmp_path, **options, **more)


def test_a_forward_that_was_replaced_is_told(tmp_path):
    model = balora.attach(balora.get_pissa_model(tiny_llama(), r=4), CONFIG)
    base = model.get_base_model()
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True, save_strategy="no")
    trainer = BALoraTrainer(model, arguments, train_dataset=examples())
    base.forward = types.MethodType(type(base).forward, base)
    with pytest.raises(ValueError, match="model: the forward that balora.attach set was not called"):
        trainer.train()


def test_adapters_that_nothing_calls_are_told(tmp_path):
    model = balora.get_pissa_model(tiny_llama(), r=4)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    layer.forward = layer.get_base_layer().forward
    balora.attach(model, CONFIG)
    arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, disable_tqdm=True, save_strategy="no")
    with pytest.warns(
        UserWarning, match=r"2 trained tensors got no gradient, .*layers.1.mlp.up_proj.lora_A.* first"
    ) as w:
        BALoraTrainer(model, arguments, train_dataset=examples()).train()
    assert sum("got no gradient" in str(one.message) for one in w) == 1


@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_adapters_in_half_precision_are_told(tmp_path, when):
    model = balora.get_pissa_model(tiny_llama(), r=4)
    expected = r"its adapters are in torch\.bfloat16, where an update below half a step of an entry is lost"
    if when == "before attach":
        with pytest.warns(UserWarning, match=expected):
            balora.attach(model.bfloat16(), CONFIG)
        return
    balora.attach(model, CONFIG).bfloat16()
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True, save_strategy="no")
    with pytest.warns(UserWarning, match=expected):
        BALoraTrainer(model, arguments, train_dataset=examples()).train()


def test_a_module_that_is_trained_in_half_precision_is_told():
    model = balora.get_pissa_model(tiny_llama(dtype=torch.bfloat16), r=4, modules_to_save=["lm_head"])
    expected = r"lm_head\.modules_to_save\.default\.weight is trained in torch\.bfloat16, where an update below half"
    with pytest.warns(UserWarning, match=expected):
        balora.attach(model, CONFIG)


def test_a_second_run_begins_with_empty_sums(tmp_path):
    """What an earlier run added since its last log, or in a step that it did not finish, is in none of the next's."""
    model = balora.attach(balora.get_pissa_model(tiny_llama(), r=4), CONFIG)
    options = dict(use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=0.0, seed=0)
    arguments = TrainingArguments(str(tmp_path), max_steps=3, logging_steps=2, **options)
    trainer = BALoraTrainer(model, arguments, train_dataset=examples())
    ours = next(c for c in trainer.callback_handler.callbacks if isinstance(c, BALoraCallback))
    found = []
    for _ in range(2):
        trainer.train()
        ours.on_substep_end(arguments, trainer.state, trainer.control, model=model)  # it was stopped within a step
        found.append([log["ce"] for log in trainer.state.log_history if "ce" in log])
    assert len(found[0]) == 1
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_adapters_in_float32_on_a_half_precision_base_are_not_told(recwarn):
    balora.attach(balora.get_pissa_model(tiny_llama(dtype=torch.bfloat16), r=4), CONFIG)
    assert not [w for w in recwarn if "half a step" in str(w.message)]


def test_adapters_that_are_not_finite_are_not_exported(tmp_path):
    model = balora.get_pissa_model(tiny_llama(), r=4)
    model.get_base_model().model.layers[1].mlp.up_proj.lora_B.default.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"peft_model: expected finite adapters, found .* at .*layers.1.mlp.up_proj"):
        balora.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_evaluation_is_plain_cross_entropy_with_logits(tmp_path):
    trainer = fit(tmp_path)
    found = trainer.evaluate(examples(6, seed=1))["eval_loss"]
    balora.detach(trainer.model)
    assert found == pytest.approx(trainer.evaluate(examples(6, seed=1))["eval_loss"], rel=1e-6)


def adapters_at_start():
    return {n: p.detach() for n, p in balora.get_pissa_model(tiny_llama(), r=4).named_parameters() if p.requires_grad}


def command(model, data, out, *more):
    options = dict(model=model, data=data, output_dir=out, r=4, lora_dropout=0.1, max_steps=100, save_steps=20)
    options |= dict(logging_steps=5, learning_rate=1e-3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "balora.cli", "train", *flags, "--disable_tqdm", "true", "--use_cpu", *more]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(tmp_path, capsys):
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
        if seen == 6:  # step 30, between the checkpoints 20 and 40
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    text, _ = other.communicate()
    assert other.returncode == 0, text
    assert not (killed / "lora").exists()
    # and the power failed while the next checkpoint was written
    (killed / "checkpoint-90").mkdir()
    (killed / "checkpoint-90" / "adapter_model.safetensors").write_bytes(b"half")

    assert cli.main(command(model, data, killed)[3:]) == 2
    refused = capsys.readouterr().err
    assert "output_dir:" in refused
    assert "--resume_from_checkpoint true" in refused

    resumed = start(killed, "--resume_from_checkpoint", "true")
    text, _ = resumed.communicate()
    assert resumed.returncode == 0, text
    assert "checkpoint-90 is incomplete" in text
    assert f"resume: from {killed / 'checkpoint-'}" in text
    assert_same_bits(weights(killed / "checkpoint-100"), weights(whole / "checkpoint-100"))
    assert_same_bits(weights(killed / "lora"), weights(whole / "lora"))
