"""attach on encoder-decoders: the plain objective of the decoder's tokens, from the model's own logits."""

import contextlib
import copy
import warnings
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput

import balora
from balora import LinearHead, spectral
from balora import functional as F

from .other_architectures import ENCODER_DECODERS, VOCAB, tiny_encoder_decoder
from .test_modeling import CONFIG


def batch(rows=3, length=7, seed=0):
    """A padded input, and the labels of a shorter padded answer."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=g)
    ids[0, -2:] = 0
    labels = torch.randint(3, VOCAB, (rows, length - 2), generator=g)
    labels[1, -2:] = -100
    return dict(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)


def lora(name="t5", dtype=torch.float64, base=None, targets=(), **options):
    """(a model with random adapters, the model that it was before)."""
    base = tiny_encoder_decoder(name, dtype) if base is None else base
    before = copy.deepcopy(base)
    config = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=[*ENCODER_DECODERS[name][2], *targets], init_lora_weights=False, **options
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(tied|tie_word_embeddings)")
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    for parameter_name, parameter in model.named_parameters():
        if "modules_to_save" in parameter_name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, before


def attach(model, config=CONFIG):
    """Attached and in training; a warning, as that of the logits path, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return balora.attach(model, config).train()


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def plain(model, before, inputs, config=CONFIG, context=contextlib.nullcontext):
    """The reference of the objective on the model's own logits; the teacher is a second model. Labels go in as well:
    the model makes the decoder's inputs of them."""
    normalizer = inputs.get("num_items_in_batch")
    inputs = {k: v for k, v in inputs.items() if k != "num_items_in_batch"}
    with context():
        with torch.no_grad():
            z_teacher = before.eval()(**inputs).logits
        student = model(**inputs)
    wide = torch.promote_types(student.logits.dtype, torch.float32)
    head = LinearHead(torch.eye(VOCAB, dtype=wide))
    z, z_teacher = student.logits.to(wide), z_teacher.to(wide)
    return F.linear_objective(
        z, z_teacher, head, inputs["labels"], config, normalizer=normalizer, impl="reference"
    ), student


def assert_plain(model, before, inputs, config=CONFIG, tolerance=1e-9, context=contextlib.nullcontext):
    """The attached loss, its terms and every gradient are those of the plain objective."""
    model.zero_grad()
    with context():
        out = model(**inputs)
    assert out.logits is None
    out.loss.backward()
    found, found_gradients = model.balora_last, gradients(model)
    balora.detach(model)
    model.zero_grad()
    exact, student = plain(model, before, inputs, config, context)
    exact.loss.backward()
    for name, a, b in zip(exact._fields, found, exact, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=tolerance, atol=tolerance, msg=name, check_dtype=False)
    assert torch.equal(out.encoder_last_hidden_state, student.encoder_last_hidden_state)
    assert found_gradients.keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=100 * tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_loss_and_gradients_are_the_plain_objective(name):
    """By the head, whatever the model does between its decoder and the head, and adds to its logits."""
    model, before = lora(name)
    attach(model)
    assert model._balora.heads is not None
    assert_plain(model, before, batch())


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("normalizer", [30, torch.tensor(30)])
def test_normalizer(name, normalizer):
    model, before = lora(name)
    assert_plain(attach(model), before, batch() | {"num_items_in_batch": normalizer})


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_what_the_decoder_reads_may_be_given(name):
    model, before = lora(name)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, 5), generator=g)
    mask = torch.ones_like(ids)
    mask[2, -2:] = 0
    inputs = batch() | dict(decoder_input_ids=ids, decoder_attention_mask=mask)
    assert_plain(attach(model), before, inputs)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_embeddings_may_be_given(name):
    model, before = lora(name)
    g = torch.Generator().manual_seed(1)
    inputs = batch()
    inputs["inputs_embeds"] = torch.randn(*inputs.pop("input_ids").shape, 32, generator=g, dtype=torch.float64)
    assert_plain(attach(model), before, inputs)


def test_an_encoder_output_is_not_the_teachers():
    model, _ = lora()
    attach(model)
    inputs = batch()
    encoded = BaseModelOutput(torch.randn(3, 7, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="encoder_outputs: expected None in training.*lambda_consistency=0"):
        model(**inputs, encoder_outputs=encoded)
    balora.detach(model)
    config = replace(CONFIG, lambda_consistency=0.0)
    attach(model, config)
    model(**inputs, encoder_outputs=encoded).loss.backward()
    exact = model.eval()(**inputs, encoder_outputs=encoded).loss
    torch.testing.assert_close(model.balora_last.ce, exact.detach())


def test_student_and_teacher_each_encode_once_and_fill_no_cache():
    model, _ = lora()
    attach(model)
    calls = []
    for part in ("encoder", "decoder"):

        def record(module, args, kwargs, part=part):
            calls.append((part, torch.is_grad_enabled(), kwargs.get("use_cache")))

        getattr(model.get_base_model(), part).register_forward_pre_hook(record, with_kwargs=True)
    model(**batch())
    teacher, student = (
        [("encoder", False, None), ("decoder", False, False)],
        [("encoder", True, None), ("decoder", True, False)],
    )
    assert calls == teacher + student
    head = model.get_base_model().get_output_embeddings()
    assert not head._forward_pre_hooks


def test_the_head_makes_the_logits_of_one_token():
    model, _ = lora("bart")
    attach(model)
    seen = []
    model.get_base_model().lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    model(**batch())
    assert seen == [1, 1]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_gradient_checkpointing(name, reentrant):
    model, before = lora(name)
    attach(model).enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_plain(model, before, batch())


@pytest.mark.parametrize("name", ["t5", "t5-v1.1", "bart"])
def test_autocast(name):
    model, before = lora(name, torch.float32)
    context = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    assert_plain(attach(model), before, batch(), tolerance=0.05, context=context)


@pytest.mark.parametrize("name", ["t5-v1.1", "bart"])
def test_a_head_that_is_trained(name):
    model, before = lora(name, modules_to_save=["lm_head"])
    attach(model)
    assert model._balora.heads.teacher is not None
    assert_plain(model, before, batch())
    assert any("modules_to_save" in n for n in gradients(model))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_adapter_on_the_head(name):
    model, before = lora(name, targets=["lm_head"])
    attach(model)
    assert model._balora.heads.student.lora is not None
    assert_plain(model, before, batch())


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_head_that_is_no_linear_map(name):
    """The logits path: the same objective."""
    base = tiny_encoder_decoder(name, torch.float64)
    model, before = lora(name, base=base, targets=["lm_head"], lora_dropout=0.0)
    model.get_base_model().lm_head.lora_dropout["default"] = torch.nn.Dropout(1e-30)
    with pytest.warns(UserWarning, match="adapter with dropout.*computed from the model's logits"):
        balora.attach(model, CONFIG)
    assert model._balora.heads is None
    assert_plain(model.train(), before, batch())


@pytest.mark.parametrize("form", ["offset", "residual"])
@pytest.mark.parametrize("name", ["t5", "mt5", "bart"])
def test_student_and_teacher_start_as_the_same_bits(name, form):
    model = balora.get_pissa_model(tiny_encoder_decoder(name, torch.bfloat16), r=4, form=form)
    attach(model)(**batch())
    assert model.balora_last.consistency.item() == 0.0


def test_layers_that_stay_in_float32(tmp_path):
    """T5's wo, which transformers keeps in float32 when it loads the model in float16."""
    tiny_encoder_decoder("t5-v1.1").save_pretrained(tmp_path)
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    wo = base.get_submodule("decoder.block.0.layer.2.DenseReluDense.wo").weight
    assert (wo.dtype, base.lm_head.weight.dtype) == (torch.float32, torch.float16)
    model = balora.get_pissa_model(base, r=4)
    attach(model)
    model(**batch()).loss.backward()
    assert model.balora_last.consistency.item() == 0.0
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(".wo." in n for n in trained)
    assert gradients(model).keys() == trained
    assert all(g.isfinite().all() for g in gradients(model).values())


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_evaluation_is_the_models_own(name):
    model, _ = lora(name)
    attach(model).eval()
    inputs = batch()
    found = model(**inputs)
    share = model(**inputs, num_items_in_batch=torch.tensor(26)).loss  # 13 are scored
    tokens = model.generate(input_ids=inputs["input_ids"], max_new_tokens=4, do_sample=False)
    balora.detach(model)
    exact = model(**inputs)
    assert torch.equal(found.logits, exact.logits)
    assert torch.equal(found.loss, exact.loss)
    torch.testing.assert_close(share, exact.loss / 2)
    again = model.generate(input_ids=inputs["input_ids"], max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, again)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_cross_entropy_alone_is_the_models_own_loss(name):
    model, _ = lora(name)
    attach(model, replace(CONFIG, lambda_consistency=0, lambda_diversity=0, lambda_svd=0))
    found = model(**batch()).loss
    torch.testing.assert_close(found, model.eval()(**batch()).loss)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_default_targets(name):
    model = balora.get_pissa_model(tiny_encoder_decoder(name), r=4)
    config = model.peft_config["default"]
    assert config.task_type == "SEQ_2_SEQ_LM"
    assert config.target_modules == set(ENCODER_DECODERS[name][2])
    attach(model)(**batch()).loss.backward()
    assert gradients(model).keys() == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("form", ["offset", "residual"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_export(name, form, tmp_path):
    base = tiny_encoder_decoder(name, torch.float64)
    before = copy.deepcopy(base)
    model = attach(balora.get_pissa_model(base, r=4, form=form))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    assert model.balora_last.consistency > 0
    balora.export_lora(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(before, tmp_path, autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(loaded(**batch()).logits, model.eval()(**batch()).logits)


def test_outputs_and_misuse():
    model, _ = lora("bart")
    attach(model)
    inputs = batch()
    out = model(**inputs, output_hidden_states=True)
    assert next(iter(out.keys())) == "loss"
    assert len(out.decoder_hidden_states) == 3
    assert torch.equal(model(**inputs, return_dict=False)[0], out.loss)
    assert not any(t.requires_grad for t in model.balora_last)
    with pytest.raises(ValueError, match="output_router_logits: .* leave it off"):
        model(**inputs, output_router_logits=True)
    with pytest.raises(ValueError, match="labels: expected hidden's leading shape .3, 7., found"):
        model(**inputs, decoder_input_ids=inputs["input_ids"])
    del inputs["labels"]
    with pytest.raises(ValueError, match="labels: a model attached to BA-LoRA needs labels in training, found None"):
        model(**inputs)
    base = tiny_encoder_decoder("m2m100")
    base.config.decoder_start_token_id = None
    model, _ = lora("m2m100", base=base)
    with pytest.raises(ValueError, match="decoder_input_ids: M2M100ForConditionalGeneration has no decoder_start"):
        attach(model)(**batch())


def test_a_batch_without_a_valid_token_is_a_connected_zero():
    model, _ = lora()
    attach(model)
    inputs = batch()
    inputs["labels"][:] = -100
    loss = model(**inputs, num_items_in_batch=torch.tensor(0)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not g.any() for g in gradients(model).values())


def test_detach_leaves_nothing():
    model, _ = lora()
    base = model.get_base_model()
    before = set(base.__dict__)
    balora.attach(model, CONFIG)
    assert base.accepts_loss_kwargs
    balora.detach(model)
    assert set(base.__dict__) == before


class Rows(torch.utils.data.Dataset):
    """Eight rows, whose labels have different lengths."""

    def __init__(self):
        self.inputs = batch(rows=8)
        for row in range(8):
            self.inputs["labels"][row, 1 + row // 2 :] = -100

    def __len__(self):
        return 8

    def __getitem__(self, at):
        return {name: tensor[at] for name, tensor in self.inputs.items()}


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_accumulated_gradients_are_those_of_one_batch(name, tmp_path):
    config = replace(CONFIG, lambda_svd=0.0)
    found = []
    for size, steps in ((4, 1), (1, 4)):
        model, _ = lora(name, torch.float32)
        attach(model, config)
        arguments = transformers.Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            learning_rate=0.01,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            predict_with_generate=True,
            generation_max_length=4,
        )

        class Seq2Seq(balora.trainer.BALoraMixin, transformers.Seq2SeqTrainer):
            def _get_train_sampler(self, *_):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        trainer = Seq2Seq(model=model, args=arguments, train_dataset=Rows())
        trainer.train()
        found.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
        generated = trainer.predict(Rows()).predictions
        assert generated.shape[0] == 8
    together, apart = found
    for n, p in together.items():
        torch.testing.assert_close(p, apart[n], rtol=1e-4, atol=1e-6, msg=n)


def test_the_head_of_a_model_with_a_logits_bias_is_decomposed_once(monkeypatch):
    computed = []
    exact = spectral.head_gram
    monkeypatch.setattr(spectral, "head_gram", lambda *a: computed.append(1) or exact(*a))
    model = attach(lora("bart")[0])
    for _ in range(3):
        model(**batch()).loss.backward()
    assert len(computed) == 1


def test_a_model_that_reads_sounds_is_refused():
    config = transformers.WhisperConfig(
        vocab_size=97,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    model = balora.get_pissa_model(transformers.WhisperForConditionalGeneration(config), r=4)
    with pytest.raises(ValueError, match="peft_model: expected a model that reads text, .* reads input_features"):
        balora.attach(model, balora.BALoraConfig())
