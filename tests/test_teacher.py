"""The pre-trained model inside of any peft model, exactly: LoRA, rsLoRA, DoRA, several adapters, modules_to_save."""

import contextlib

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import balora
from balora.pretrained import evaluating

from .architectures import tiny
from .conftest import batch, tiny_llama, train_a_little
from .test_pissa import logits

TARGETS = ["q_proj", "up_proj", "down_proj"]
KINDS = {
    "LoRA": dict(lora_dropout=0.2),
    "rsLoRA": dict(use_rslora=True),
    "DoRA": dict(use_dora=True),
    "DoRA with dropout": dict(use_dora=True, lora_dropout=0.2),
    "head and embedding": dict(target_modules=[*TARGETS, "lm_head", "embed_tokens"]),
    "modules_to_save": dict(modules_to_save=["lm_head", "norm", "embed_tokens"]),
    "biases of the adapters": dict(lora_bias=True),
    "experts": dict(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_the_pretrained_model(kind, dtype):
    base = tiny("mixtral", dtype) if kind == "experts" else tiny_llama(dtype=dtype)
    before = logits(base)
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **KINDS[kind]}))
    train_a_little(model)
    flags = [(p.requires_grad, n) for n, p in model.named_parameters()]
    training = [m.training for m in model.modules()]
    assert not torch.equal(logits(model), before)
    with balora.teacher(model):
        assert torch.equal(logits(model), before)
    assert [(p.requires_grad, n) for n, p in model.named_parameters()] == flags
    assert [m.training for m in model.modules()] == training
    model.eval()
    after = logits(model)
    with contextlib.suppress(RuntimeError), balora.teacher(model), balora.teacher(model):
        raise RuntimeError
    assert torch.equal(logits(model), after)


def test_several_adapters_on_one_model():
    base = tiny_llama()
    before = logits(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=TARGETS))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj", "q_proj"], modules_to_save=["lm_head"]))
    model.add_adapter("third", peft.LoraConfig(r=2, target_modules=["o_proj", "q_proj"], use_dora=True))
    seen = []
    for adapter in ("default", "second", "third"):
        model.set_adapter(adapter)
        # peft 0.18 trains the original module with an adapter that has none of its own
        model.base_model.model.lm_head.original_module.requires_grad_(False)
        train_a_little(model)
        model.eval()
        trained = logits(model)
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        with balora.teacher(model):
            assert torch.equal(logits(model), before)
        assert torch.equal(logits(model), trained)
        assert model.active_adapters == [adapter]
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
        assert not any(torch.equal(trained, x) for x in [before, *seen])
        seen.append(trained)
    model.base_model.set_adapter(["default", "third"])
    both = logits(model)
    with balora.teacher(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), both)


@pytest.mark.parametrize("form", ["offset", "residual"])
def test_a_pissa_adapter_beside_an_ordinary_one(form):
    model = balora.get_pissa_model(tiny_llama(), r=4, target_modules=TARGETS, form=form)
    start = logits(model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj", "q_proj"], init_lora_weights=False))
    for active in ("second", "default", ["default", "second"]):
        model.base_model.set_adapter(active)
        with balora.teacher(model):
            assert torch.equal(logits(model), start)
    assert not torch.equal(logits(model), start)


def test_a_classifier_is_trained_in_full_and_its_teacher_has_the_first_one():
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=3, pad_token_id=0))
    inputs = batch()
    del inputs["labels"]
    run = lambda model: model(**inputs).logits.detach()  # noqa: E731
    before = run(base)
    model = balora.get_pissa_model(base, r=4, task_type="SEQ_CLS")
    assert any(p.requires_grad and ".score." in n for n, p in model.named_parameters())
    assert torch.equal(run(model), before)
    model(**inputs, labels=torch.tensor([0, 1, 2])).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert not torch.equal(run(model), before)
    with balora.teacher(model):
        assert torch.equal(run(model), before)


def test_a_scripted_module_follows():
    """Whose flags lie outside of Python."""
    scripted = torch.jit.script(torch.nn.Dropout(0.5))
    model = torch.nn.Sequential(scripted, torch.nn.Dropout(0.5)).train()
    x = torch.ones(1000)
    with evaluating(model):
        assert torch.equal(model(x), x)
    assert model[0].training
    assert model[1].training
    assert (model[0](x) == 0).any()
