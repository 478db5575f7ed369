"""attach: the loss of the attached forward is the plain objective, and nothing stays behind."""

import copy
import importlib
import inspect
import warnings
from dataclasses import replace

import peft
import pytest
import torch
import torch.nn.functional as nnF
from transformers import DynamicCache

import balora
from balora import BALoraConfig, LinearHead
from balora import functional as F

from .conftest import batch, tiny_llama, train_a_little

CONFIG = BALoraConfig(
    lambda_consistency=0.5,
    lambda_diversity=0.3,
    lambda_svd=0.4,
    entropy_top_k=5,
    svd_rank=3,
    consistency_schedule="constant",
    focus_schedule="constant",
)


def attached(config=CONFIG, steps=3, **options):
    """An attached model that has left its starting point."""
    model = balora.get_pissa_model(tiny_llama(**options), r=4)
    train_a_little(model, steps)
    return balora.attach(model, config).train()


def plain_objective(model, inputs, config=CONFIG, normalizer=None):
    """The same loss by hand: two decoder passes, shifted labels, the reference."""
    base = model.get_base_model()
    decoder = base.get_decoder()
    tokens = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad(), balora.teacher(model):
        teacher_hidden = decoder(**tokens).last_hidden_state[:, :-1]
    hidden = decoder(**tokens).last_hidden_state[:, :-1]
    head = LinearHead(base.get_output_embeddings().weight)
    labels = inputs["labels"][:, 1:]
    return F.linear_objective(hidden, teacher_hidden, head, labels, config, normalizer=normalizer, impl="reference")


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("normalizer", [None, 50, torch.tensor(50)])
def test_loss_and_gradients_are_the_plain_objective(tied, normalizer):
    model = attached(tied=tied)
    inputs = batch()
    extra = {} if normalizer is None else {"num_items_in_batch": normalizer}
    model(**inputs, **extra).loss.backward()
    found, found_grad = model.balora_last, gradients(model)
    model.zero_grad()
    exact = plain_objective(model, inputs, normalizer=normalizer)
    exact.loss.backward()
    for name, a, b in zip(exact._fields, found, exact, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-6, msg=name)
    assert found_grad.keys() == gradients(model).keys()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(found_grad[name], grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = attached()
    model(**batch()).loss.backward()
    exact = gradients(model)
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**batch()).loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, exact[name], msg=name)


def test_the_teacher_runs_first_without_gradients_and_neither_pass_fills_a_cache():
    model = attached()
    calls = []

    def record(module, args, kwargs):
        calls.append((torch.is_grad_enabled(), kwargs["use_cache"]))

    model.get_base_model().get_decoder().register_forward_pre_hook(record, with_kwargs=True)
    model(**batch())
    assert calls == [(False, False), (True, False)]


def test_cross_entropy_alone_is_the_models_own_loss():
    model = attached(BALoraConfig(lambda_consistency=0, lambda_diversity=0, lambda_svd=0))
    inputs = batch()
    ours = model(**inputs)
    assert ours.logits is None
    assert model.balora_last.consistency is None
    model.eval()
    theirs = model(**inputs)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert theirs.logits.shape == (3, 12, 97)


def test_consistency_is_exactly_zero_at_step_0():
    for dropout in (0.0, 0.5):
        model = balora.get_pissa_model(tiny_llama(dtype=torch.bfloat16), r=4, lora_dropout=dropout)
        balora.attach(model, CONFIG).train()
        model(**batch())
        assert model.balora_last.consistency.item() == 0.0


def test_eval_mode_is_the_model_itself_and_generate_works():
    model = attached()
    inputs = batch()
    found = model.eval()(**inputs)
    tokens = model.generate(input_ids=inputs["input_ids"][:1], max_new_tokens=4, do_sample=False)
    balora.detach(model)
    exact = model.eval()(**inputs)
    assert torch.equal(found.logits, exact.logits)
    assert torch.equal(found.loss, exact.loss)
    assert torch.equal(tokens, model.generate(input_ids=inputs["input_ids"][:1], max_new_tokens=4, do_sample=False))


def test_training_without_labels_raises_but_not_without_gradients():
    model = attached()
    inputs = batch()
    del inputs["labels"]
    with pytest.raises(ValueError, match="labels: a model attached to BA-LoRA needs labels in training, found None"):
        model(**inputs)
    with torch.no_grad():
        assert model(**inputs).logits is not None


def test_shift_labels_are_used_as_they_are():
    model = attached()
    inputs = batch()
    shifted = nnF.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    exact = model(**inputs).loss
    del inputs["labels"]
    torch.testing.assert_close(model(**inputs, shift_labels=shifted).loss, exact)


def test_positional_arguments_and_tuples():
    model = attached()
    inputs = batch()
    base = model.get_base_model()
    exact = model(**inputs).loss
    torch.testing.assert_close(base(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).loss, exact)
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], exact)


def test_a_batch_without_a_valid_token_is_a_connected_zero():
    model = attached()
    inputs = batch()
    inputs["labels"][:] = -100
    for count in (None, torch.tensor(0)):
        loss = model(**inputs, num_items_in_batch=count).loss
        loss.backward()
        assert loss.item() == 0
        assert all(not g.any() for g in gradients(model).values())


def test_what_is_kept_does_not_hold_the_graph():
    model = attached()
    model(**batch())
    assert not any(t.requires_grad for t in model.balora_last)


def test_schedules_follow_set_progress():
    config = BALoraConfig(lambda_consistency=1.0, lambda_diversity=1.0, lambda_svd=1.0)
    model = attached(config)
    with pytest.warns(UserWarning, match="until balora.set_progress"):
        model(**batch())
    assert model._balora.lambdas == (1.0, 1.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balora.set_progress(model, 1, 100)
        model(**batch())
    assert model.balora_last.diversity is None
    assert model.balora_last.svd is None
    balora.set_progress(model, 100, 100)
    model(**batch())
    assert model._balora.lambdas == pytest.approx((0.1, 1.0, 1.0))
    last = model.balora_last
    total = last.ce + 0.1 * last.consistency + last.diversity + last.svd
    assert last.loss.item() == pytest.approx(total.item(), rel=1e-5)


def test_detach_leaves_nothing():
    model = balora.get_pissa_model(tiny_llama(), r=4)
    base = model.get_base_model()
    before = set(base.__dict__), inspect.signature(base.forward)
    balora.attach(model, CONFIG)
    assert inspect.signature(base.forward) == before[1]
    balora.detach(model)
    assert (set(base.__dict__), inspect.signature(base.forward)) == before
    balora.attach(model, CONFIG)


def test_a_forward_that_someone_else_set_is_called_and_comes_back():
    model = balora.get_pissa_model(tiny_llama(), r=4)
    base = model.get_base_model()
    calls = []
    own = base.forward

    def logged(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    base.forward = logged
    balora.attach(model, CONFIG)
    model.eval()(**batch())
    assert calls
    balora.detach(model)
    assert base.forward is logged


def test_a_deep_copy_is_attached_to_itself():
    model = attached()
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        if p.requires_grad:
            p.data.zero_()
    a, b = model(**batch()).loss, twin(**batch()).loss
    assert a.item() != b.item()
    assert twin.get_base_model()._balora.heads.student.weight is twin.get_base_model().get_output_embeddings().weight


def test_ordinary_lora_can_be_attached():
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    balora.attach(model, CONFIG).train()
    model(**batch()).loss.backward()
    assert model.balora_last.consistency.item() == 0.0


def bad_models():
    lora = dict(target_modules=["q_proj"])
    yield "not peft", tiny_llama(), TypeError, "peft_model: expected a peft.PeftModel, found LlamaForCausalLM"
    rewritten = peft.get_peft_model(tiny_llama(), peft.LoraConfig(init_lora_weights="pissa", **lora))
    yield "rewrites the base", rewritten, ValueError, "init_lora_weights='pissa' changes the base weights"
    trained = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**lora))
    trained.get_base_model().lm_head.weight.requires_grad_()
    yield "head without peft", trained, ValueError, "peft_model: .*lm_head.weight is trained and no adapter"
    with_bias = tiny_llama(attention_bias=True)
    biases = peft.get_peft_model(with_bias, peft.LoraConfig(bias="all", **lora))
    yield "trained biases", biases, ValueError, "peft_model: .*bias is trained and no adapter"
    prompts = peft.get_peft_model(tiny_llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    yield "prompt tuning", prompts, ValueError, "peft_model: expected LoRA adapters, found .*PROMPT_TUNING"
    body = peft.get_peft_model(tiny_llama().model, peft.LoraConfig(**lora))
    yield "no head", body, ValueError, "LlamaModel has no output embedding; expected a causal language model"


BAD = {case[0]: case[1:] for case in bad_models()}


@pytest.mark.parametrize("case", BAD)
def test_a_model_that_does_not_fit_is_refused_and_not_half_patched(case):
    model, error, message = BAD[case]
    before = {id(m): set(m.__dict__) for m in model.modules()}
    with pytest.raises(error, match=message):
        balora.attach(model, CONFIG)
    assert {id(m): set(m.__dict__) for m in model.modules()} == before


def test_the_2024_objective_trains():
    model = balora.attach(balora.get_pissa_model(tiny_llama(), r=4), balora.BALoraConfig.preset("nlg_2024"))
    train_a_little(model)
    last = model.balora_last
    assert last.consistency > 0
    assert -5 < last.diversity < 0  # −log 97 at the most even
    assert -1 <= last.svd < 0


def test_misuse_is_named():
    model = balora.get_pissa_model(tiny_llama(), r=4)
    with pytest.raises(TypeError, match="config: expected a BALoraConfig, found dict"):
        balora.attach(model, {})
    with pytest.raises(ValueError, match="config: task='nlu' expects a sequence classifier, found LlamaForCausalLM"):
        balora.attach(model, balora.BALoraConfig.preset("nlu_2025"))
    for call in (lambda: balora.detach(model), lambda: balora.set_progress(model, 0, 1)):
        with pytest.raises(ValueError, match="it is not attached; call balora.attach"):
            call()
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match="peft_model: nothing in it is trained"):
        balora.attach(model, CONFIG)
    with pytest.raises(ValueError, match="attached already"):
        balora.attach(model, CONFIG)
    with pytest.raises(ValueError, match="step: expected at least 0, found -1"):
        balora.set_progress(model, -1, 10)
    with pytest.raises(ValueError, match="step: expected at most max_steps, which is 3, found 5"):
        balora.set_progress(model, 5, 3)
    with pytest.raises(TypeError, match="max_steps: expected a whole number, found '10'"):
        balora.set_progress(model, 1, "10")
    with pytest.raises(ValueError, match="ignore_index: expected -100, found 0"):
        model.train()(**batch(), ignore_index=0)
    with pytest.raises(ValueError, match="labels: expected -100 or 0 to 96 .*, found 97"):
        model.train()(**{**batch(), "labels": torch.full((3, 12), 97)})


@pytest.mark.parametrize("attached", [False, True])
def test_data_parallel_is_refused(monkeypatch, attached):
    """On two devices torch.nn.DataParallel begins with copies of the module; here the copies share their tensors."""
    shared = lambda tensors, devices, detach=False: [tensors for _ in devices]  # noqa: E731
    module = importlib.import_module("torch.nn.parallel.replicate")  # the package has a function of that name
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", shared)
    model = balora.get_pissa_model(tiny_llama(), r=4)
    if attached:
        balora.attach(model, BALoraConfig())
        with pytest.raises(ValueError, match="model: torch.nn.DataParallel does not work with an attached model"):
            module.replicate(model, [0, 1])
        balora.detach(model)
    assert len(module.replicate(model, [0, 1])) == 2


def test_a_loss_made_around_the_forward_is_told():
    model = balora.attach(balora.get_pissa_model(tiny_llama(), r=4), BALoraConfig())
    copied = copy.deepcopy(model)
    inputs = batch()
    message = "LlamaForCausalLM: its decoder was called in training around forward"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=message)
        for each in (model, copied):
            each.train()
            each(**inputs).loss.backward()
            with torch.no_grad():
                each.get_base_model().model(inputs["input_ids"])
            each.eval()
            each.get_base_model().model(inputs["input_ids"])
    for each in (model, copied):
        each.train()
        with pytest.warns(UserWarning, match=message):
            each.get_base_model().model(inputs["input_ids"])
        balora.detach(each)
        assert not each.get_base_model().model._forward_pre_hooks


def test_a_cache_is_not_shared_with_the_teacher():
    """Its pass would add keys and values, which the student would then see."""
    model = attached()
    ids = torch.arange(10)[None]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.get_base_model().model(input_ids=ids[:, :4], past_key_values=cache)
    inputs = dict(input_ids=ids[:, 4:], labels=ids[:, 4:], past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values: expected none in training with lambda_consistency=.*Cache"):
        model(**inputs)
    assert cache.get_seq_length() == 4
    balora.detach(model)
    balora.attach(model, replace(CONFIG, lambda_consistency=0.0)).train()
    model(**inputs).loss.backward()
