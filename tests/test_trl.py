"""TRL's SFTTrainer with BALoraMixin trains the attached objective, and without it is noticed."""

import copy
import warnings

import peft
import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from transformers import TrainerCallback

import balora
from balora import BALoraConfig
from balora.trainer import BALoraCallback, BALoraMixin, BALoraTrainer

from .conftest import tiny_llama, tiny_tokenizer, train_a_little

trl = pytest.importorskip("trl")
SFTConfig, SFTTrainer = trl.SFTConfig, trl.SFTTrainer

CONFIG = BALoraConfig(lambda_consistency=0.5, lambda_diversity=0.3, lambda_svd=0.2, focus_warmup=0.0, focus_ramp=0.0)


class MySFTTrainer(BALoraMixin, SFTTrainer):
    pass


def attached(**options):
    return balora.attach(balora.get_pissa_model(tiny_llama(vocab_size=257), r=4, **options), CONFIG)


def rows(n=16):
    return Dataset.from_list(
        [dict(prompt=f"{i} + {i} is", completion=f" {2 * i}, of course"[: 5 + i]) for i in range(n)]
    )


def arguments(folder, **options):
    defaults = dict(max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, save_strategy="no")
    defaults |= dict(use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, report_to="none", bf16=False)
    defaults |= dict(gradient_checkpointing=False, loss_type="nll", remove_unused_columns=False)
    return SFTConfig(str(folder), **{**defaults, **options})


def sft(folder, trainer=MySFTTrainer, model=None, data=None, callbacks=(), **options):
    return trainer(
        attached() if model is None else model,
        arguments(folder, **options),
        train_dataset=rows() if data is None else data,
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )


def adapters(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


class Consistency(TrainerCallback):
    """Keeps the KL to the pre-trained model of every step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(model.balora_last.consistency.item())


@pytest.mark.parametrize(
    "options", [{}, dict(gradient_accumulation_steps=3), dict(gradient_checkpointing=True)], ids=str
)
def test_it_trains_what_balora_trainer_trains(tmp_path, options):
    trainer = sft(tmp_path, **options)
    own = BALoraTrainer(
        attached(), arguments(tmp_path, **options), trainer.data_collator, train_dataset=trainer.train_dataset
    )
    for each in (trainer, own):
        each.train()
    found, expected = adapters(trainer), adapters(own)
    start = {n: p.detach() for n, p in attached().named_parameters() if p.requires_grad}
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
        assert not torch.equal(found[name], start[name]), name
    assert trainer.model.balora_last.consistency > 0
    terms = ("loss", "ce", "consistency", "diversity", "svd", "lambda_consistency", "lambda_svd")
    for log, other in zip(trainer.state.log_history[:-1], own.state.log_history[:-1], strict=True):
        assert [log[name] for name in terms] == [other[name] for name in terms]
        assert "mean_token_accuracy" not in log


@pytest.mark.parametrize("options", [dict(padding_free=True), dict(packing=True, max_length=40)], ids=str)
def test_rows_without_padding_are_the_same_objective(tmp_path, options):
    """All rows in one micro-batch: the same tokens, the SVD term's among them."""
    logs = []
    for each in ({}, options):
        trainer = sft(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=16,
            max_length=each.get("max_length"),
            **{name: value for name, value in each.items() if name != "max_length"},
        )
        if each:
            assert len(trainer.data_collator([trainer.train_dataset[i] for i in range(2)])["input_ids"]) == 1
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for name in ("loss", "ce", "diversity", "svd", "grad_norm"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-5), name
    assert logs[1]["consistency"] == logs[0]["consistency"] == 0


def test_masks_of_assistants_are_in_the_labels(tmp_path):
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<eos>"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    chat = [dict(role="user", content="two and two?"), dict(role="assistant", content="four")]
    tokenizer = tiny_tokenizer(template)
    trainer = MySFTTrainer(
        attached(),
        arguments(tmp_path, assistant_only_loss=True, max_steps=1),
        train_dataset=Dataset.from_list([dict(messages=chat)] * 4),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.model.balora_last.n_valid == 4 * len(tokenizer("four<eos>")["input_ids"])


@pytest.mark.parametrize("quantized", [False, True])
def test_student_and_teacher_start_as_the_same_bits(tmp_path, quantized):
    """With SFTConfig's own bf16 autocast and checkpointing, and where TRL rounds the adapters of a 4-bit model."""
    model = attached(lora_dropout=0.1)
    model.get_base_model().is_loaded_in_4bit = quantized
    recorder = Consistency()
    trainer = sft(tmp_path, model=model, callbacks=[recorder], bf16=True, gradient_checkpointing=True)
    trainer.train()
    assert recorder.steps[0] == 0
    assert all(step > 0 for step in recorder.steps[1:])
    assert {p.dtype for p in adapters(trainer).values()} == {torch.float32}


def test_evaluation_is_its_own(tmp_path):
    trainer = sft(tmp_path, max_steps=1, per_device_eval_batch_size=16)
    trainer.train()
    metrics = trainer.evaluate(trainer.train_dataset)
    assert 0 <= trainer.state.log_history[-1]["eval_mean_token_accuracy"] <= 1
    batch = trainer.data_collator(list(trainer.train_dataset))
    balora.detach(trainer.model)
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).loss
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


# Before, SFTTrainer took the model's loss, but its metrics needed logits, which an attached model does not return.
own_loss = pytest.mark.skipif(Version(trl.__version__) < Version("1.8"), reason="this trl has no loss of its own")


@own_loss
@pytest.mark.parametrize("stale", [False, True])
def test_without_the_mixin_the_callback_raises_before_the_weights_change(tmp_path, stale):
    model = attached()
    if stale:  # the terms of an earlier run are there
        train_a_little(model, steps=1)
    before = copy.deepcopy(model.state_dict())
    trainer = sft(tmp_path, SFTTrainer, model, callbacks=[BALoraCallback()], loss_type=SFTConfig.loss_type)
    with (
        pytest.warns(UserWarning, match="its decoder was called"),
        pytest.raises(ValueError, match="model: the forward that balora.attach set was not called.*BALoraMixin"),
    ):
        trainer.train()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@own_loss
def test_without_mixin_and_callback_a_warning_is_shown(tmp_path):
    with pytest.warns(UserWarning, match="its decoder was called in training around forward.*BALoraMixin"):
        sft(tmp_path, SFTTrainer, max_steps=1, loss_type=SFTConfig.loss_type).train()


def test_with_the_mixin_no_warning_is_shown(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LlamaForCausalLM")
        trainer = sft(tmp_path, max_steps=1)
        trainer.train()
        trainer.evaluate(trainer.train_dataset)


def test_what_does_not_fit_raises(tmp_path):
    with pytest.raises(ValueError, match="loss_type: expected 'nll' .*, found 'dft'"):
        sft(tmp_path, loss_type="dft")
    with pytest.raises(ValueError, match="PeftModel"):
        MySFTTrainer(
            attached(),
            arguments(tmp_path),
            train_dataset=rows(),
            processing_class=tiny_tokenizer(),
            peft_config=peft.LoraConfig(),
        )
    with pytest.raises(ValueError, match="labels: a model attached to BA-LoRA needs labels in training, found None"):
        sft(tmp_path, label_smoothing_factor=0.1).train()
    with pytest.raises(ValueError, match="peft_model: it is not attached"):
        sft(tmp_path, model=balora.get_pissa_model(tiny_llama(vocab_size=257), r=4)).train()
