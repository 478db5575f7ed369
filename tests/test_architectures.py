"""attach on every architecture: the loss is the plain objective of the model's own logits, however it is used."""

import contextlib
import warnings

import peft
import pytest
import torch
import torch.nn.functional as nnF
import transformers

import balora
from balora import BALoraConfig, LinearHead, causal_lm, spectral
from balora import functional as F

from .architectures import ARCHITECTURES, VOCAB, block_layers, tiny
from .conftest import batch
from .test_modeling import CONFIG


def lora(name="llama", dtype=torch.float64, targets=(), base=None, **options):
    """A model with random LoRA adapters, so that student and teacher differ."""
    base = tiny(name, dtype) if base is None else base
    config = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=[*block_layers(name), *targets], init_lora_weights=False, **options
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(tied|tie_word_embeddings|fan_in_fan_out)")
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    for parameter_name, parameter in model.named_parameters():
        if "modules_to_save" in parameter_name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def attach(model, config=CONFIG):
    """Attached and in training; a warning, as that of the logits path, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return balora.attach(model, config).train()


def plain(model, inputs, config=CONFIG, normalizer=None, context=contextlib.nullcontext):
    """The reference of the objective on the model's own logits, of student and teacher; and the student's output."""
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = nnF.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    forwarded = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels", "num_items_in_batch")}
    forwarded["use_cache"] = False  # with a cache transformers lets packed rows see each other
    with context():
        with torch.no_grad(), balora.teacher(model):
            teacher = model(**forwarded).logits
        student = model(**forwarded)
    wide = torch.promote_types(student.logits.dtype, torch.float32)
    head = LinearHead(torch.eye(VOCAB, dtype=wide))
    logits, teacher = student.logits.to(wide), teacher.to(wide)
    return F.linear_objective(logits, teacher, head, labels, config, normalizer=normalizer, impl="reference"), student


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_plain(model, inputs, config=CONFIG, tolerance=1e-9, context=contextlib.nullcontext):
    """The attached loss, its terms and every gradient are those of the plain objective."""
    model.zero_grad()
    with context():
        out = model(**inputs)
    assert out.logits is None
    out.loss.backward()
    found, found_gradients = model.balora_last, gradients(model)
    balora.detach(model)
    model.zero_grad()
    exact, student = plain(model, inputs, config, inputs.get("num_items_in_batch"), context)
    loss = exact.loss
    if getattr(student, "aux_loss", None) is not None:
        loss = loss + model.get_base_model().router_aux_loss_coef * student.aux_loss
        torch.testing.assert_close(out.aux_loss, student.aux_loss)
    loss.backward()
    assert found.consistency > 1e-3
    close = dict(rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.loss, loss.to(out.loss.dtype), **close)
    for name, a, b in zip(exact._fields, found, exact, strict=True):
        torch.testing.assert_close(a, b.detach(), msg=lambda m, n=name: f"{n}: {m}", **close)
    assert found_gradients.keys() == gradients(model).keys()
    assert found_gradients
    for name, exact_gradient in gradients(model).items():
        scale = exact_gradient.abs().max().item()
        torch.testing.assert_close(
            found_gradients[name],
            exact_gradient,
            rtol=tolerance,
            atol=tolerance * max(scale, 1e-3),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_is_the_plain_objective(name):
    model = attach(lora(name))
    assert model._balora.heads is not None
    inputs = batch()
    inputs["num_items_in_batch"] = torch.tensor(40)
    assert_plain(model, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_what_a_frozen_head_keeps(monkeypatch, dtype):
    """On a device that is float32, of which autocast would make products in half precision."""
    monkeypatch.setattr(spectral, "accumulation_dtype", lambda tensor: torch.float32)
    model = attach(lora("phi", torch.float32))
    bias = model.get_output_embeddings().bias
    bias.data += 30  # whose squares leave the range of float16
    with torch.autocast("cpu", dtype):
        model(**batch())
    found = model._balora.heads.student.gram.gram
    whole = torch.cat([model.get_output_embeddings().weight, bias[:, None]], 1).double()
    torch.testing.assert_close(found.double(), whole.T @ whole, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_head_is_known_in_every_type(name, dtype):
    model = attach(lora(name, dtype))
    assert model._balora.heads is not None
    loss = model(**batch()).loss
    loss.backward()
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(model).values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
def test_gradient_checkpointing(name, reentrant):
    model = attach(lora(name))
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_plain(model, batch())


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
def test_autocast(name):
    """The hidden states are the same bits; the plain objective has the logits rounded to bfloat16 beside."""
    model = attach(lora(name, torch.float32))
    context = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    assert_plain(model, batch(), tolerance=0.05, context=context)


def test_autocast_of_a_model_whose_last_norm_gives_float32(monkeypatch):
    """As LayerNorm does on a device. A head in bfloat16 rounds that; float32 products would take ten times as long."""
    model = attach(lora("phi", torch.bfloat16))
    model.get_base_model().model.final_layernorm.register_forward_hook(lambda module, args, output: output.float())
    seen = []
    objective = causal_lm.linear_objective
    monkeypatch.setattr(
        causal_lm, "linear_objective", lambda h, t, *a, **k: seen.extend((h, t)) or objective(h, t, *a, **k)
    )
    context = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    assert_plain(model, batch(), tolerance=0.05, context=context)
    assert {t.dtype for t in seen} == {torch.bfloat16}
    other = LinearHead(torch.zeros(3, 32, dtype=torch.float16))  # of which autocast's type would make float32 products
    with context():
        assert causal_lm._as_the_head_takes(seen[0].float(), other).dtype == torch.float32


def test_a_compiled_model():
    """Its decoder is compiled, as the teacher's and as the student's, and not again when λ moves."""
    model = attach(lora("gemma2", base=tiny("gemma2", torch.float64, num_hidden_layers=1)))
    inputs = batch()
    compiled = []

    def backend(graph, examples):
        compiled.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend)
    for step in range(4):
        balora.set_progress(model, step, 10)
        model.zero_grad()
        exact = model(**inputs)
        exact.loss.backward()
        exact_gradients = gradients(model)
        model.zero_grad()
        found = fast(**inputs)
        found.loss.backward()
        torch.testing.assert_close(found.loss, exact.loss, rtol=1e-9, atol=1e-9)
        for parameter, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, exact_gradients[parameter], rtol=1e-8, atol=1e-10, msg=parameter)
        if step == 0:
            once = len(compiled)
    assert once > 1
    assert len(compiled) == once


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generate_is_the_models_own(name):
    model = attach(lora(name)).eval()
    tokens = batch()["input_ids"][:1]
    found = model.generate(input_ids=tokens, max_new_tokens=5, do_sample=False)
    balora.detach(model)
    assert torch.equal(found, model.generate(input_ids=tokens, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "granite"])
def test_a_head_that_is_trained(name):
    """The teacher has the pre-trained head; the copy gets its gradient."""
    model = attach(lora(name, modules_to_save=["lm_head"]))
    assert model._balora.heads.teacher is not None
    assert_plain(model, batch())
    assert any("modules_to_save" in n for n in gradients(model))


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi", "cohere"])
def test_an_adapter_on_the_head(name):
    model = attach(lora(name, targets=["lm_head"]))
    assert model._balora.heads.student.lora is not None
    assert_plain(model, batch())


@pytest.mark.parametrize("kind", ["embedding", "layer norm"])
def test_other_modules_that_are_trained(kind):
    model = attach(lora(modules_to_save=["embed_tokens"] if kind == "embedding" else ["norm"]))
    assert_plain(model, batch())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi", "mixtral"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(name, side):
    model = attach(lora(name))
    inputs = batch()
    if side == "left":
        inputs = {key: value.flip(1) for key, value in inputs.items()}
    assert (inputs["attention_mask"] == 0).any()
    assert_plain(model, inputs)


def packed(rows):
    """One row of several, as a collator without padding makes it: positions restart, first tokens are not scored."""
    ids = torch.cat(rows)[None]
    labels = torch.cat([nnF.pad(row[1:], (1, 0), value=-100) for row in rows])[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    return dict(input_ids=ids, labels=labels, position_ids=positions)


@pytest.mark.parametrize("name", ["llama", "qwen3", "granite"])
def test_packed_rows(name):
    rows = [torch.arange(3, 10), torch.arange(20, 25), torch.arange(40, 49)]
    model = attach(lora(name))
    model(**packed(rows))
    last = model.balora_last
    apart = dict.fromkeys(("ce", "consistency", "diversity"), 0.0)
    for row in rows:
        model(input_ids=row[None], labels=row[None], num_items_in_batch=last.n_valid)
        apart = {term: total + getattr(model.balora_last, term) for term, total in apart.items()}
    for term, total in apart.items():
        torch.testing.assert_close(getattr(last, term), total, rtol=1e-9, atol=1e-9, msg=term)
    assert_plain(model, packed(rows))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_shift_labels(name):
    model = attach(lora(name))
    inputs = batch()
    exact = model(**inputs).loss
    inputs["shift_labels"] = nnF.pad(inputs.pop("labels"), (0, 1), value=-100)[:, 1:]
    assert torch.equal(model(**inputs).loss, exact)
    assert_plain(model, inputs)


class TestMixtureOfExperts:
    def test_the_auxiliary_loss_is_added_as_the_model_adds_it(self):
        model = lora("mixtral")
        inputs = batch()
        base = model.get_base_model()
        base.config.output_router_logits = True
        with_aux = model(**inputs)  # the model's own forward
        config = BALoraConfig(lambda_consistency=0, lambda_diversity=0, lambda_svd=0)
        attach(model, config)
        found = model(**inputs)
        torch.testing.assert_close(found.loss.float(), with_aux.loss)  # transformers' loss is float32
        torch.testing.assert_close(found.aux_loss, with_aux.aux_loss)
        assert found.loss > model.balora_last.loss + 0.01
        assert len(found.router_logits) == 2
        without = model(**inputs, output_router_logits=False)
        torch.testing.assert_close(without.loss, model.balora_last.loss)

    def test_with_every_term(self):
        model = attach(lora("mixtral"))
        assert_plain(model, {**batch(), "output_router_logits": True})

    def test_a_weight_that_is_not_told_is_refused(self):
        model = lora("mixtral")
        base = model.get_base_model()
        base.router_aux_loss_coef = None
        object.__setattr__(base.config, "router_aux_loss_coef", None)
        attach(model)
        with pytest.raises(ValueError, match="output_router_logits: MixtralForCausalLM does not tell the weight"):
            model(**batch(), output_router_logits=True)


@pytest.mark.parametrize("options", [dict(use_dora=True), dict(use_rslora=True), dict(lora_dropout=0.0)], ids=str)
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_lora_and_dora(name, options):
    assert_plain(attach(lora(name, **options)), batch())


def test_dropout_of_the_adapters_is_the_students_alone():
    model = attach(lora(lora_dropout=0.5))
    inputs = batch()
    torch.manual_seed(3)
    model(**inputs)
    found = model.balora_last
    balora.detach(model)
    torch.manual_seed(3)
    exact, _ = plain(model, inputs)
    for name, a, b in zip(exact._fields, found, exact, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-9, msg=name)


def with_hook(name, change=lambda z: 2 * z.tanh()):
    model = tiny(name, torch.float64)
    model.lm_head.register_forward_hook(lambda module, args, output: change(output))
    return model


def with_an_idle_scale():
    model = tiny("llama", torch.float64)
    model.config.logits_scaling = 8.0
    return lora(base=model)


def with_two_layers():
    model = tiny("llama", torch.float64)
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 8).double(), torch.nn.Linear(8, VOCAB).double())
    return lora(base=model)


def with_two_adapters():
    model = lora(targets=["lm_head"])
    model.add_adapter("other", peft.LoraConfig(target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "other"])
    return model


def with_a_router():
    model = with_hook("mixtral")
    model.config.output_router_logits = True
    return lora("mixtral", base=model)


def with_a_hook_on_the_adapter():
    """Only the student's head is odd."""
    model = lora(targets=["lm_head"])
    model.get_base_model().lm_head.lora_B.default.register_forward_hook(lambda module, args, output: output.tanh())
    return model


def with_a_hook_on_the_pre_trained_head():
    """Only the teacher's head is odd."""
    model = lora(modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head
    head.original_module.register_forward_hook(lambda module, args, output: 2 * output.tanh())
    return model


# What is odd about the head, and what the warning says.
ODD = {
    "a hook": (lambda: lora(base=with_hook("llama")), "its logits are not those of a linear head"),
    "a little": (lambda: lora(base=with_hook("llama", lambda z: 1.001 * z)), "its logits are not those of a linear"),
    "a scale that does nothing": (with_an_idle_scale, "its logits are not those of a linear head"),
    "the adapter": (with_a_hook_on_the_adapter, "its logits are not those of a linear head"),
    "the pre-trained head": (with_a_hook_on_the_pre_trained_head, "its logits are not those of a linear head"),
    "two layers": (with_two_layers, "its head is no plain linear layer but Sequential"),
    "DoRA on the head": (lambda: lora(targets=["lm_head"], use_dora=True), "its head has a DoRA adapter"),
    "a biased adapter": (lambda: lora(targets=["lm_head"], lora_bias=True), "its head has a DoRA adapter, or one with"),
    "two adapters": (with_two_adapters, "its head has the adapters default, other at once"),
    "experts": (with_a_router, "its logits are not those of a linear head"),
}


@pytest.mark.parametrize("case", ODD)
def test_another_head_takes_the_logits_and_says_so(case):
    make, message = ODD[case]
    model = make()
    with pytest.warns(UserWarning, match=f"CausalLM: {message}.*computed from the model's logits"):
        balora.attach(model, CONFIG)
    assert model.train()._balora.heads is None
    inputs = batch()
    inputs["num_items_in_batch"] = torch.tensor(40)
    assert_plain(model, inputs)


def test_dropout_on_the_head_takes_the_logits():
    model = lora(targets=["lm_head"], lora_dropout=0.5)
    with pytest.warns(UserWarning, match=r"its head has an adapter with dropout \(0.5\)"):
        balora.attach(model, CONFIG).train()
    torch.manual_seed(3)
    model(**batch())
    found = model.balora_last
    balora.detach(model)
    torch.manual_seed(3)
    exact, _ = plain(model, batch())
    torch.testing.assert_close(found.ce, exact.ce.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.consistency, exact.consistency.detach(), rtol=1e-9, atol=1e-9)


def test_the_gram_matrix_of_a_frozen_head_is_computed_once(monkeypatch):
    calls = []
    original = balora.head.spectral.gram
    monkeypatch.setattr(balora.head.spectral, "gram", lambda tensors: calls.append(tensors) or original(tensors))
    for model in (lora(), lora(targets=["lm_head"])):
        attach(model)
        weight = model._balora.heads.student.weight
        for _ in range(3):
            model(**batch()).loss.backward()
        of_weight = [
            tensors for tensors in calls if isinstance(tensors, list) and tensors[0].data_ptr() == weight.data_ptr()
        ]
        assert len(of_weight) == 1


def test_a_trained_head_that_is_written_behind_torchs_back():
    """An optimizer may write through ``.data``, which torch does not count: nothing of a trained head is kept."""
    model = attach(lora(modules_to_save=["lm_head"]))
    model(**batch())
    (head,) = (p for n, p in model.named_parameters() if "modules_to_save" in n)
    head.data.mul_(torch.linspace(0.1, 3, 32))
    assert_plain(model, batch())


def test_a_decoder_that_its_model_does_not_name():
    """Llama 4's text model: ``base_model`` gives the model itself."""
    shape = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2)
    torch.manual_seed(0)
    base = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**shape, max_position_embeddings=64)).eval()
    assert base.base_model is base
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = attach(peft.get_peft_model(base, config))
    assert model._balora.heads is not None
    assert_plain(model, batch(), tolerance=1e-4)


def test_an_adapter_that_is_switched_off_or_added_on_the_head_is_seen():
    model = attach(lora(targets=["lm_head"]))
    model(**batch())
    model.base_model.disable_adapter_layers()
    model(**batch())
    assert model.balora_last.consistency.abs() < 1e-15
    torch.testing.assert_close(model.balora_last.ce.float(), model.eval()(**batch()).loss)
    model.train().base_model.enable_adapter_layers()
    model.add_adapter("other", peft.LoraConfig(target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="its head has the adapters .*, which was not so when it was attached"):
        model(**batch())


def test_another_adapter_on_the_head_of_a_pissa_model():
    """It has no A₀ and B₀."""
    base = tiny("llama", torch.float64)
    model = attach(balora.get_pissa_model(base, r=2, lora_alpha=2, target_modules=["q_proj", "lm_head"]))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    model.set_adapter("other")
    assert_plain(model, batch(), tolerance=1e-6)


@pytest.mark.parametrize("form", ["offset", "residual"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pissa_adapters_of_both_forms(name, form):
    model = pissa(name, form)
    model.train()
    inputs = batch()
    model(**inputs)
    assert model.balora_last.consistency == 0  # the same bits
    move(model)
    assert_plain(model, inputs)


@pytest.mark.parametrize("form", ["offset", "residual"])
@pytest.mark.parametrize("name", ["granite", "phi"])
def test_a_pissa_adapter_on_the_head(name, form):
    model = pissa(name, form, target_modules=["q_proj", "lm_head"])
    inputs = batch()
    model(**inputs)
    assert model.balora_last.consistency.abs() < 1e-25
    move(model)
    assert_plain(model, inputs)


def pissa(name, form, **options):
    return attach(balora.get_pissa_model(tiny(name, torch.float64), r=4, lora_alpha=2, form=form, **options))


def move(model):
    """Away from the start."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype)
