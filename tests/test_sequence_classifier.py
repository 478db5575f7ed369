"""attach on sequence classifiers: the loss is the plain objective of the class logits; the teacher's head."""

import copy
import warnings
from dataclasses import replace

import peft
import pytest
import torch
import transformers

import balora
from balora import BALoraConfig, reference
from balora.config import rank_of
from balora.functional import logits_objective, regression_objective
from balora.pretrained import head_modules

from .other_architectures import CLASSIFIERS, VOCAB, tiny_classifier

CONFIG = replace(
    BALoraConfig.preset("nlu_2025"), lambda_consistency=0.7, lambda_diversity=0.3, lambda_svd=0.9, svd_rank=2
)
MSE = replace(CONFIG, consistency="normalized_mse", lambda_diversity=0.0, lambda_svd=0.0)


def batch(rows=5, length=8, seed=0, labels=3):
    """Token ids with a padded tail, and a class each; with ``labels=1`` a number each."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=g)
    ids[:, -3] = 2  # BART's classifier reads the state of the last end-of-text token
    ids[:, -2:] = 0
    found = torch.randint(labels, (rows,), generator=g)
    if labels == 1:
        found = torch.randn(rows, generator=g, dtype=torch.float64)
    return dict(input_ids=ids, attention_mask=(ids != 0).long(), labels=found)


def lora(name="bert", dtype=torch.float64, modules_to_save=None, **changes):
    """(a classifier with random adapters and a head that has left its start, the model that it was before)."""
    base = tiny_classifier(name, dtype, **changes)
    before = copy.deepcopy(base)
    _, _, head, layers = CLASSIFIERS[name]
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        lora_alpha=2,
        target_modules=list(layers),
        init_lora_weights=False,
        modules_to_save=list(head) if modules_to_save is None else modules_to_save,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    for parameter_name, parameter in model.named_parameters():
        if "modules_to_save" in parameter_name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, before


def attach(model, config=CONFIG):
    """Attached and in training; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return balora.attach(model, config).train()


def plain_teacher(model, before, head):
    """The model that it was before, with a copy of the head in training if ``head`` is "current"."""
    found = copy.deepcopy(before).eval()
    if head == "current":
        for name in head_modules(before):
            trained = getattr(model.get_base_model(), name).modules_to_save["default"]
            getattr(found, name).load_state_dict(trained.state_dict())
    return found


def plain(model, before, inputs, config):
    """The terms of the reference on the model's own logits, the teacher a second model; and their weighted sum."""
    labels, normalizer = inputs["labels"], inputs.get("num_items_in_batch")
    tokens = {k: v for k, v in inputs.items() if k not in ("labels", "num_items_in_batch")}
    z = model(**tokens).logits
    with torch.no_grad():
        z_teacher = plain_teacher(model, before, config.teacher_head)(**tokens).logits
    terms = {"diversity": None, "svd": None}
    if z.shape[1] == 1:
        n, norm = len(z), len(z) if normalizer is None else normalizer
        terms["ce"] = reference.squared_error(z[:, 0], labels) / norm
        consistency = reference.squared_error(z[:, 0], z_teacher[:, 0]) / norm
    else:
        z, z_teacher, labels = (t[labels != -100] for t in (z, z_teacher, labels))
        n, norm = len(z), max(len(z), 1) if normalizer is None else normalizer
        terms["ce"] = reference.cross_entropy(z, labels) / norm
        consistency = reference.consistency(z, z_teacher, config.temperature) / norm
        terms["diversity"] = n / norm * reference.covariance(z)
        terms["svd"] = n / norm * reference.svd(z, rank_of(config.svd_rank, min(z.shape)), "nuclear")
    if config.consistency == "normalized_mse":
        consistency = n / norm * reference.normalized_mse(z, z_teacher)
    terms["consistency"] = consistency
    loss = terms["ce"]
    for name in ("consistency", "diversity", "svd"):
        weight = getattr(config, f"lambda_{name}")
        if weight == 0:
            terms[name] = None
        if terms[name] is not None:
            loss = loss + weight * terms[name]
    return loss, terms


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_plain(model, before, inputs, config=CONFIG, tolerance=1e-9):
    """The attached loss, its terms and every gradient are those of the plain objective."""
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    found, found_gradients = model.balora_last, gradients(model)
    balora.detach(model)
    model.zero_grad()
    loss, terms = plain(model, before, inputs, config)
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.loss, loss.detach(), rtol=tolerance, atol=tolerance)
    for name, exact in terms.items():
        if exact is None:
            assert getattr(found, name) is None, name
        else:
            torch.testing.assert_close(getattr(found, name), exact.detach(), rtol=tolerance, atol=tolerance, msg=name)
    assert found_gradients.keys() == gradients(model).keys()
    for name, exact in gradients(model).items():
        torch.testing.assert_close(found_gradients[name], exact, rtol=100 * tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_loss_and_gradients_are_the_plain_objective(name):
    model, before = lora(name)
    assert_plain(attach(model), before, batch())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_trained_tensor_gets_a_gradient(name):
    model = attach(balora.get_pissa_model(tiny_classifier(name), r=4))
    model(**batch()).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in n for n in trained)
    assert {n for n, g in gradients(model).items() if g.any()} >= {n for n in trained if "modules_to_save" in n}
    assert gradients(model).keys() == trained


@pytest.mark.parametrize("name", ["roberta", "deberta-v2", "llama"])
@pytest.mark.parametrize("normalizer", [8, torch.tensor(8)])
def test_normalizer(name, normalizer):
    model, before = lora(name)
    assert_plain(attach(model), before, batch() | {"num_items_in_batch": normalizer})


@pytest.mark.parametrize("name", ["roberta", "deberta-v2", "gpt2", "t5"])
def test_the_teacher_may_have_the_initial_head(name):
    model, before = lora(name)
    config = replace(CONFIG, teacher_head="initial")
    assert_plain(attach(model, config), before, batch(), config)


def test_the_2024_consistency():
    model, before = lora()
    config = replace(CONFIG, consistency="normalized_mse")
    assert_plain(attach(model, config), before, batch(), config)


@pytest.mark.parametrize("name", ["bert", "qwen2"])
def test_one_row(name):
    """Its covariances are a zero that is connected, its share of the singular values is 1."""
    model, before = lora(name)
    model = attach(model)
    inputs = batch(rows=1)
    model(**inputs)
    assert model.balora_last.diversity.item() == 0
    assert model.balora_last.svd.item() == pytest.approx(-1)
    assert_plain(model, before, inputs)


def test_rows_that_are_left_out():
    model, before = lora()
    inputs = batch()
    inputs["labels"][[0, 3]] = -100
    assert_plain(attach(model), before, inputs)


def test_a_batch_of_none_is_a_connected_zero():
    model, _ = lora()
    attach(model)
    inputs = batch()
    inputs["labels"][:] = -100
    for count in (None, torch.tensor(0)):
        loss = model(**inputs, num_items_in_batch=count).loss
        loss.backward()
        assert loss.item() == 0
        assert all(not g.any() for g in gradients(model).values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "deberta-v2", "qwen2"])
def test_gradient_checkpointing(name, reentrant):
    model, before = lora(name)
    attach(model).enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_plain(model, before, batch())


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_autocast(name):
    """Logits in bfloat16: the objective of them is computed in float32, outside of autocast."""
    model, before = lora(name, torch.float32)
    attach(model)
    inputs = batch()
    tokens = {k: v for k, v in inputs.items() if k != "labels"}
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs)
        with torch.no_grad():
            z_teacher = plain_teacher(model, before, "current")(**tokens).logits
    assert out.logits.dtype == torch.bfloat16
    exact = logits_objective(out.logits.double(), z_teacher.double(), inputs["labels"], CONFIG)
    for name_, a, b in zip(exact._fields, model.balora_last, exact, strict=True):
        torch.testing.assert_close(a.double(), b.detach().double(), rtol=1e-5, atol=1e-6, msg=name_)
    out.loss.backward()
    found = gradients(model)
    assert all(g.isfinite().all() for g in found.values())
    # Up to torch 2.10 autocast kept the copy of the head's weight that the teacher's pass had made without a gradient.
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}


class TestRegression:
    @pytest.mark.parametrize("name", ["bert", "deberta-v2", "modernbert", "llama", "bart"])
    @pytest.mark.parametrize("normalizer", [None, 8])
    @pytest.mark.parametrize("kind", ["kl", "normalized_mse"])
    def test_loss_and_gradients(self, name, normalizer, kind):
        config = replace(MSE, consistency=kind)
        model, before = lora(name, num_labels=1)
        extra = {} if normalizer is None else {"num_items_in_batch": normalizer}
        assert_plain(attach(model, config), before, batch(labels=1) | extra, config)

    def test_diversity_and_svd_are_left_out_and_it_is_said_once(self):
        model, _ = lora(num_labels=1)
        with pytest.warns(UserWarning, match="diversity and SVD terms are not defined") as said:
            balora.attach(model, CONFIG)
        assert len(said) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.train()(**batch(labels=1)).loss.backward()
        last = model.balora_last
        assert last.diversity is None
        assert last.svd is None
        assert last.consistency > 0
        assert model._balora.lambdas == (CONFIG.lambda_consistency, 0, 0)

    def test_labels_of_whole_numbers_and_of_two_dimensions(self):
        model, _ = lora(num_labels=1)
        attach(model, MSE)
        inputs = batch() | {"labels": torch.tensor([0, 1, 2, 3, 4])}
        exact = model(**inputs).loss
        assert model(**inputs | {"labels": inputs["labels"].double()[:, None]}).loss == exact
        assert exact.item() == pytest.approx(model.balora_last.ce.item() + 0.7 * model.balora_last.consistency.item())

    def test_misuse_is_named(self):
        z, y = torch.randn(4), torch.randn(4)
        for arguments, error, message in (
            ((z, z, y, {}), TypeError, "config: expected a BALoraConfig, found dict"),
            ((z.long(), z, y, MSE), TypeError, "predictions: expected a floating-point tensor, found a torch.int64"),
            ((z.reshape(2, 2), z, y, MSE), ValueError, r"predictions: expected the shape \[M\] or \[M, 1\]"),
            ((z, None, y, MSE), ValueError, "teacher_predictions: lambda_consistency is 0.7"),
            ((z, z[:3], y, MSE), ValueError, r"teacher_predictions: expected the shape \[4\]"),
            ((z, z, y[:3], MSE), ValueError, r"labels: expected a tensor of shape \[4\], found .* \[3\]"),
            ((z, z, y, MSE, -1), ValueError, "normalizer: expected"),
        ):
            with pytest.raises(error, match=message):
                regression_objective(*arguments)


@pytest.mark.parametrize("form", ["offset", "residual"])
@pytest.mark.parametrize("name", ["roberta", "deberta-v2", "qwen2", "t5"])
def test_student_and_teacher_start_as_the_same_bits(name, form):
    model = balora.get_pissa_model(tiny_classifier(name, torch.bfloat16), r=4, form=form)
    with pytest.warns(UserWarning, match=r"modules_to_save.* is trained in torch\.bfloat16"):
        balora.attach(model, CONFIG).train()
    model(**batch())
    assert model.balora_last.consistency.item() == 0.0


def test_a_head_alone_does_not_leave_the_current_teacher_but_the_initial_one():
    for head, leaves in (("current", False), ("initial", True)):
        model = attach(balora.get_pissa_model(tiny_classifier("roberta"), r=4), replace(CONFIG, teacher_head=head))
        for n, p in model.named_parameters():
            if "modules_to_save" in n:
                p.data += 0.1
        model(**batch())
        assert (model.balora_last.consistency.item() > 0) is leaves


def test_the_models_dropout_is_the_students():
    model = attach(balora.get_pissa_model(tiny_classifier("bert", hidden_dropout_prob=0.3), r=4))
    model(**batch())
    assert model.balora_last.consistency.item() > 0
    assert model.training
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("form", ["offset", "residual"])
def test_teacher_is_the_pre_trained_body(form):
    base = tiny_classifier("deberta-v2", torch.float64)
    before = copy.deepcopy(base)
    model = balora.get_pissa_model(base, r=4, form=form)
    attach(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    model.eval()
    tokens = {k: v for k, v in batch().items() if k != "labels"}
    initial, current = (plain_teacher(model, before, head)(**tokens).logits for head in ("initial", "current"))
    assert not torch.allclose(initial, current)
    with balora.teacher(model):
        torch.testing.assert_close(model(**tokens).logits, initial)
    with balora.teacher(model, head="current"):
        torch.testing.assert_close(model(**tokens).logits, current)
    with (
        pytest.raises(ValueError, match="head: expected 'initial' or 'current', found 'old'"),
        balora.teacher(model, head="old"),
    ):
        pass


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_evaluation_is_the_models_own(name):
    model, _ = lora(name)
    attach(model)
    inputs = batch()
    found = model.eval()(**inputs)
    share = model(**inputs, num_items_in_batch=torch.tensor(10)).loss
    balora.detach(model)
    exact = model.eval()(**inputs)
    assert torch.equal(found.logits, exact.logits)
    assert torch.equal(found.loss, exact.loss)
    torch.testing.assert_close(share, exact.loss / 2)


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "gpt2"])
def test_outputs(name):
    """Logits are there in training too; tuples; positional arguments; the loss comes first."""
    model, _ = lora(name)
    attach(model)
    inputs = batch()
    out = model(**inputs)
    assert next(iter(out.keys())) == "loss"
    assert out.logits.shape == (5, 3)
    loss, logits = model(**inputs, return_dict=False)[:2]
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)
    assert torch.equal(
        model.get_base_model()(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["labels"]
        ).loss,
        out.loss,
    )
    assert not any(t.requires_grad for t in model.balora_last)
    del inputs["labels"]
    with pytest.raises(ValueError, match="labels: a model attached to BA-LoRA needs labels in training, found None"):
        model(**inputs)
    with torch.no_grad():
        assert model(**inputs).logits is not None


def test_detach_leaves_nothing():
    model, _ = lora()
    base = model.get_base_model()
    before = set(base.__dict__)
    balora.attach(model, CONFIG)
    set_here = {"_balora", "balora_last", "forward", "accepts_loss_kwargs", "_replicate_for_data_parallel"}
    assert base.__dict__.keys() - before == set_here
    balora.detach(model)
    assert set(base.__dict__) == before


def test_a_deep_copy_is_attached_to_itself():
    model, before = lora("deberta-v2")
    twin = copy.deepcopy(attach(model))
    for p in model.parameters():
        p.data.zero_()
    assert_plain(twin, before, batch())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_adapters_are_in_the_body_and_the_head_is_trained_in_full(name):
    _, _, head, layers = CLASSIFIERS[name]
    model = balora.get_pissa_model(tiny_classifier(name), r=4)
    config = model.peft_config["default"]
    assert config.target_modules == set(layers)
    assert sorted(config.modules_to_save) == sorted({*head, "classifier", "score"})  # peft names both in any model
    wrapped = {n for n, m in model.get_base_model().named_modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)}
    assert wrapped == set(head)
    for part in head:
        assert not any("lora_" in n for n, _ in getattr(model.get_base_model(), part).named_parameters())


def test_modules_to_save_are_beside_the_head():
    model = balora.get_pissa_model(tiny_classifier("roberta"), r=4, modules_to_save=["LayerNorm", "classifier"])
    assert sorted(model.peft_config["default"].modules_to_save) == ["LayerNorm", "classifier", "score"]
    own = balora.get_pissa_model(
        tiny_classifier("roberta"), r=4, task_type="FEATURE_EXTRACTION", modules_to_save=["LayerNorm"]
    )
    assert own.peft_config["default"].modules_to_save == ["LayerNorm"]
    with pytest.warns(UserWarning, match="RobertaForSequenceClassification: classifier, a part of its head, is not"):
        balora.attach(own, CONFIG)


def test_a_part_of_the_head_that_stays_random_is_named():
    """What peft does by itself: it knows of DeBERTa's classifier and not of its pooler."""
    model, _ = lora("deberta-v2", modules_to_save=[])
    with pytest.warns(UserWarning, match="pooler, a part of its head, is not trained.*modules_to_save") as said:
        balora.attach(model, CONFIG)
    assert len(said) == 1


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_that_peft_has_made(dora):
    base = tiny_classifier("roberta")
    model = peft.get_peft_model(
        base, peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], use_dora=dora)
    )
    attach(model)
    model(**batch()).loss.backward()
    assert model.balora_last.consistency.item() == pytest.approx(0, abs=1e-6)  # DoRA scales by ‖W‖/‖W‖
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("form", ["offset", "residual"])
@pytest.mark.parametrize("name", ["roberta", "deberta-v2", "llama"])
def test_export(name, form, tmp_path):
    """A plain LoRA with the head, which peft alone puts on the unchanged model."""
    base = tiny_classifier(name, torch.float64)
    before = copy.deepcopy(base)
    model = attach(balora.get_pissa_model(base, r=4, form=form))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    balora.export_lora(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(before, tmp_path, autocast_adapter_dtype=False, is_trainable=True).eval()
    torch.testing.assert_close(loaded(**batch()).logits, model.eval()(**batch()).logits)
    attach(loaded)(**batch()).loss.backward()  # and it can be trained on
    assert loaded.balora_last.consistency > 0


def test_what_the_objective_is_not_defined_for():
    cases = (
        (dict(problem_type="multi_label_classification"), "peft_model: expected .* found 'multi_label_classification'"),
        (dict(problem_type="regression"), "expected num_labels=1 with problem_type='regression', found 3"),
        (dict(problem_type="single_label_classification", num_labels=1), "expected num_labels of at least 2"),
    )
    for changes, message in cases:
        model, _ = lora(num_labels=changes.get("num_labels", 3))
        vars(model.get_base_model().config).update(changes)
        with pytest.raises(ValueError, match=message):
            balora.attach(model, CONFIG)
        assert "_balora" not in model.get_base_model().__dict__
    model, _ = lora()
    with pytest.raises(ValueError, match="BertForSequenceClassification has no output embedding.*task='nlu'"):
        balora.attach(model, BALoraConfig())
    attach(model)
    with pytest.raises(TypeError, match="labels: expected whole numbers"):
        model(**batch() | {"labels": torch.zeros(5, 3)})
    with pytest.raises(ValueError, match="labels: expected -100 or 0 to 2"):
        model(**batch() | {"labels": torch.full((5,), 3)})
    with pytest.raises(ValueError, match="teacher_head: expected 'current' with task='nlg'.*found 'initial'"):
        BALoraConfig(teacher_head="initial")


class Rows(torch.utils.data.Dataset):
    """Eight rows."""

    def __init__(self, labels=3):
        self.inputs = batch(rows=8, labels=labels)

    def __len__(self):
        return 8

    def __getitem__(self, at):
        return {name: tensor[at] for name, tensor in self.inputs.items()}


class InOrder(balora.trainer.BALoraTrainer):
    """Draws the rows as they come."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("labels", [3, 1])
@pytest.mark.parametrize("name", ["bert", "deberta-v2"])
def test_accumulated_gradients_are_those_of_one_batch(name, labels, tmp_path):
    """Under the Trainer, with models whose forward takes any argument (BERT) and not (DeBERTa)."""
    config = replace(CONFIG, lambda_diversity=0.0, lambda_svd=0.0)
    found = []
    for size, steps in ((4, 1), (1, 4)):
        model, _ = lora(name, torch.float32, num_labels=labels)
        attach(model, config)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            learning_rate=0.01,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = InOrder(model=model, args=arguments, train_dataset=Rows(labels))
        trainer.train()
        metrics = trainer.evaluate(Rows(labels))
        logged = [
            {k: v for k, v in log.items() if k in ("loss", "ce", "consistency")}
            for log in trainer.state.log_history
            if "loss" in log
        ]
        found.append((logged, metrics["eval_loss"], {n: p.detach() for n, p in model.named_parameters()}))
    (logged, loss, parameters), (logged_apart, loss_apart, parameters_apart) = found
    for together, apart in zip(logged, logged_apart, strict=True):
        assert together.keys() == {"loss", "ce", "consistency"}
        assert together == pytest.approx(apart, rel=1e-3)
    assert loss == pytest.approx(loss_apart, rel=1e-4)
    for n, p in parameters.items():
        torch.testing.assert_close(p, parameters_apart[n], rtol=1e-4, atol=1e-6, msg=n)


def test_the_terms_of_the_whole_batch_are_weighted_by_its_share():
    model, _ = lora()
    attach(model)
    model(**batch())
    alone = model.balora_last
    model(**batch(), num_items_in_batch=20)
    for name in ("ce", "consistency", "diversity", "svd"):
        torch.testing.assert_close(getattr(model.balora_last, name), getattr(alone, name) / 4, msg=name)


def test_a_decoder_without_a_padding_token_says_so():
    model, _ = lora("llama", pad_token_id=None)
    attach(model)
    with pytest.raises(ValueError, match="no padding token is defined"):
        model(**batch())
    model(**batch(rows=1)).loss.backward()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_a_decoder_pads_on_either_side(name):
    model, before = lora(name)
    attach(model)
    right = batch()
    left = {k: v if k == "labels" else v.roll(2, 1) for k, v in right.items()}
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp_min(0)
    torch.testing.assert_close(model(**left).loss, model(**right).loss)
    assert_plain(model, before, left)


def test_schedules_and_a_cache_that_is_not_filled():
    model, _ = lora("llama")
    attach(model, replace(CONFIG, consistency_schedule="cosine"))
    balora.set_progress(model, 10, 10)
    calls = []
    model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs.get("use_cache")), with_kwargs=True
    )
    model(**batch())
    assert model._balora.lambdas[0] == pytest.approx(0.07)
    assert calls == [False, False]


def test_distributed_data_parallel_sees_the_forward(tmp_path):
    model, _ = lora()
    inputs = batch()
    attach(model)
    exact = model(**inputs).loss
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        loss = wrapped(**inputs).loss
        loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(loss, exact)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
