"""The residual form: W_res = W − s·B₀A₀ in place of W, the teacher on the frozen factors, checkpoints, the export."""

import contextlib
import copy
import gc

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import balora
from balora import adapters, pissa, principal
from balora.adapters import checkpoint_form

from .architectures import ARCHITECTURES, tiny
from .conftest import batch, tiny_llama, train_a_little
from .test_pissa import MODES, logits, trainable


def make(mode="float32", base=None, form="residual", **options):
    """(a PiSSA model, the logits of the base model before it was wrapped, a context to call it in)."""
    dtype = torch.float32 if mode == "autocast" else getattr(torch, mode)
    context = (lambda: torch.autocast("cpu", torch.bfloat16)) if mode == "autocast" else contextlib.nullcontext
    base = tiny_llama(dtype=dtype) if base is None else base.to(dtype)
    with context():
        before = logits(base)
    return balora.get_pissa_model(base, **{"r": 4, "lora_alpha": 8, "form": form, **options}), before, context


def residuals(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_initial_A")}


def base_weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


def near(found, expected, roundings=1.0):
    """Within this many roundings of the largest value."""
    eps = torch.finfo(expected.dtype).eps
    return (found - expected).abs().max() <= roundings * eps * expected.abs().max()


def in_teacher(model):
    with balora.teacher(model):
        return logits(model)


@pytest.mark.parametrize("mode", MODES)
def test_student_and_teacher_are_the_same_bits_at_step_0_and_the_pretrained_model_up_to_rounding(mode):
    model, before, context = make(mode)
    model.train()
    with context():
        start = logits(model)
        assert torch.equal(in_teacher(model), start)
    assert near(start, before, 4)
    assert len(residuals(model)) == 14


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name, tmp_path):
    dtype = torch.float32 if name == "mixtral" else torch.float64  # its experts have no float64 arithmetic
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-3 if name == "mixtral" else 1e-7)  # noqa: E731
    base = tiny(name, dtype)
    before = logits(base)
    model = balora.get_pissa_model(base, r=4, lora_alpha=8, form="residual")
    start = logits(model)
    close(start, before)
    assert torch.equal(in_teacher(model), start)
    train_a_little(model)
    model.eval()
    trained = logits(model)
    assert (trained - before).abs().max() > 0.01
    assert torch.equal(in_teacher(model), start)
    model.merge_adapter()
    close(logits(model), trained)
    model.unmerge_adapter()
    close(logits(model), trained)
    model.save_pretrained(tmp_path / "checkpoint")
    again = balora.get_pissa_model(tiny(name, dtype), r=4, lora_alpha=8, form="residual")
    again.load_adapter(tmp_path / "checkpoint", "default")
    assert torch.equal(logits(again.eval()), trained)
    balora.export_lora(model, tmp_path / "lora")
    alone = peft.PeftModel.from_pretrained(tiny(name, dtype), tmp_path / "lora").eval()
    close(logits(alone), trained)


@pytest.mark.parametrize("mode", MODES)
def test_the_teacher_is_exact_after_training(mode):
    model, _, context = make(mode)
    weights = base_weights(model)
    with context():
        start = logits(model)
        train_a_little(model)
    with context():  # a new block: autocast keeps its rounded copies of the weights within one
        assert not torch.equal(logits(model), start)
        assert torch.equal(in_teacher(model), start)
        with balora.teacher(model), balora.teacher(model):
            assert torch.equal(logits(model), start)
        assert not torch.equal(logits(model), start)
    for name, weight in base_weights(model).items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "float16"])
def test_w_res_is_one_rounding_of_w_without_the_rounded_factors(mode):
    base = tiny_llama(dtype=getattr(torch, mode))
    weights = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = balora.get_pissa_model(base, r=4, lora_alpha=8, form="residual", alpha_pattern={"up_proj": 3})
    for name, layer in residuals(model).items():
        w = weights[name.removeprefix("base_model.model.") + ".weight"]
        b0, a0 = layer.lora_initial_B.default, layer.lora_initial_A.default
        assert a0.dtype == b0.dtype == layer.base_layer.weight.dtype == w.dtype
        s = 3 / 4 if "up_proj" in name else 2
        assert torch.equal(layer.base_layer.weight, (w.double() - s * b0.double() @ a0.double()).to(w.dtype))
        assert torch.equal(layer.lora_A.default.weight, a0.float())
        assert torch.equal(layer.lora_B.default.weight, b0.float())


def test_the_forward_is_the_equation_and_so_are_its_gradients():
    model, *_ = make("float64", use_rslora=True)
    train_a_little(model)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    out = torch.randn(5, 32, dtype=torch.float64)
    trained = layer.base_layer.weight + 4 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    initial = layer.base_layer.weight + 4 * layer.lora_initial_B.default @ layer.lora_initial_A.default
    for weight, context in [(trained, contextlib.nullcontext()), (initial, balora.teacher(model))]:
        with context:
            y = layer(x)
        torch.testing.assert_close(y, x @ weight.T)
        (gradient,) = torch.autograd.grad(y, x, out)
        torch.testing.assert_close(gradient, out @ weight)


def test_nothing_but_a_and_b_is_trainable_at_any_time(tmp_path):
    model, *_ = make()
    expected = {n for n, _ in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}
    assert trainable(model) == expected
    assert len(expected) == 2 * 2 * 7
    with balora.teacher(model):
        assert trainable(model) == expected
    balora.attach(model, balora.BALoraConfig(focus_schedule="constant", consistency_schedule="constant"))
    train_a_little(model, steps=1)
    assert model.balora_last.consistency == 0
    train_a_little(model)
    assert model.balora_last.consistency > 0
    assert trainable(model) == expected
    balora.detach(model)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    model.set_adapter("default")
    assert trainable(model) == expected


def test_teacher_restores_every_flag_also_after_an_error():
    model, *_ = make()
    model.train()
    model.base_model.model.model.layers[0].eval()  # a user's choice
    flags = lambda: [  # noqa: E731
        (m.training, *(getattr(m, x, None) for x in ("_disable_adapters", "_active_adapter", "initial_selected")))
        for m in model.modules()
    ]
    before = flags()
    with contextlib.suppress(RuntimeError), balora.teacher(model):
        assert flags() != before
        raise RuntimeError
    assert flags() == before


@pytest.mark.parametrize("state", ["adapters off", "another adapter", "another scale"])
def test_the_teacher_does_not_depend_on_what_is_active(state):
    model, *_ = make()
    start = logits(model)
    train_a_little(model)
    if state == "adapters off":
        model.base_model.disable_adapter_layers()
    elif state == "another adapter":
        model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
        model.set_adapter("other")
    else:
        for layer in residuals(model).values():
            layer.set_scale("default", 0.5)
    now = logits(model)
    assert torch.equal(in_teacher(model), start)
    assert torch.equal(logits(model), now)


def test_merged_weights_are_the_trained_model_and_have_no_teacher():
    model, before, _ = make("float64")
    train_a_little(model)
    trained = logits(model)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(logits(model), trained)
        with pytest.raises(ValueError, match="model: the adapters are merged"), balora.teacher(model):
            pass
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), trained)
        torch.testing.assert_close(in_teacher(model), before)
    torch.testing.assert_close(logits(model.merge_and_unload()), trained)


REFUSED = {
    "dropout": (dict(lora_dropout=0.1), r"lora_dropout: expected 0 with form='residual', found 0.1"),
    "tied head": (
        dict(target_modules=["q_proj", "lm_head"]),
        r"form: 'residual' changes the weight of .*lm_head, which is shared by .*embed_tokens.* and .*lm_head",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_form_cannot_do_is_refused(case):
    options, message = REFUSED[case]
    base = tiny_llama(tied=True)
    weights = base_weights(base)
    with pytest.raises(ValueError, match=message):
        balora.get_pissa_model(base, r=4, form="residual", **options)
    assert base_weights(base).keys() == weights.keys()
    assert all(torch.equal(w, weights[n]) for n, w in base_weights(base).items())


@pytest.mark.parametrize("where", ["decomposing", "subtracting", "between"])
def test_an_error_on_the_way_gives_every_weight_back(where, monkeypatch):
    base = tiny_llama(dtype=torch.bfloat16)
    weights, modules = base_weights(base), {n: id(m) for n, m in base.named_modules()}
    module, name = (principal, "factors") if where == "decomposing" else (adapters, "_plus")
    if where == "between":
        module, name = pissa, "subtract"
    original, calls = getattr(module, name), []

    def fails(*arguments):
        calls.append(1)
        if where == "between" or len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, name, fails)
    with pytest.raises(KeyboardInterrupt):
        balora.get_pissa_model(base, r=4, form="residual")
    gc.collect()
    assert {n: id(m) for n, m in base.named_modules()} == modules
    assert all(torch.equal(w, weights[n]) for n, w in base_weights(base).items())
    assert all(p.requires_grad for p in base.parameters())
    monkeypatch.undo()
    balora.get_pissa_model(base, r=4, form="residual")


@pytest.mark.parametrize("mode", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("factors", ["equal", "other"])
def test_w_res_follows_the_factors_that_are_loaded(mode, factors, tmp_path):
    model, *_ = make(mode)
    start = logits(model)
    train_a_little(model)
    model.save_pretrained(tmp_path)
    assert checkpoint_form(tmp_path) == "residual"
    # other frozen factors, as another machine's SVD would give
    again, *_ = make(mode, **({} if factors == "equal" else {"n_iter": 1}))
    own = base_weights(again)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert any(not torch.equal(w, own[n]) for n, w in base_weights(again).items()) == (factors == "other")
    own = base_weights(again)
    again.load_adapter(tmp_path, "default", is_trainable=True)  # now the factors are equal
    assert all(torch.equal(w, own[n]) for n, w in base_weights(again).items())
    for name, layer in residuals(model).items():
        other = again.get_submodule(name)
        assert torch.equal(other.lora_initial_A.default, layer.lora_initial_A.default)
        assert near(other.base_layer.weight, layer.base_layer.weight, 0 if factors == "equal" else 1.5)
    assert near(in_teacher(again), start, 0 if factors == "equal" else 4)
    assert near(logits(again), logits(model), 0 if factors == "equal" else 4)


def test_a_state_dict_with_the_base_weights_is_taken_as_it_is():
    model, *_ = make()
    train_a_little(model)
    again, *_ = make(n_iter=1)
    again.load_state_dict(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert torch.equal(in_teacher(again), in_teacher(model))


def test_a_copy_of_the_model_loads_for_itself(tmp_path):
    model, *_ = make("float64", n_iter=1)
    start, weights = logits(model), base_weights(model)
    other, *_ = make("float64")
    other.save_pretrained(tmp_path)
    twin = copy.deepcopy(model)
    twin.load_adapter(tmp_path, "default")
    assert torch.equal(in_teacher(model), start)
    assert all(torch.equal(w, weights[n]) for n, w in base_weights(model).items())
    for name, weight in base_weights(other).items():
        torch.testing.assert_close(base_weights(twin)[name], weight)


@pytest.mark.parametrize("form", ["offset", "residual"])
def test_checkpoints_of_another_kind_are_recognized_and_refused(form, tmp_path):
    other = {"offset": "residual", "residual": "offset"}[form]
    model, *_ = make(form=form)
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    make(form=other)[0].save_pretrained(tmp_path / other)
    assert checkpoint_form(tmp_path / other) == other
    peft.get_peft_model(tiny_llama(), model.peft_config["default"]).save_pretrained(tmp_path / "lora")
    assert checkpoint_form(tmp_path / "lora") is None
    with pytest.raises(ValueError, match=f"expected PiSSA adapters of the {form} form, .*found the {other} form at"):
        model.load_adapter(tmp_path / other, "default")
    with pytest.raises(
        ValueError, match=f"expected PiSSA adapters of the {form} form, found an ordinary LoRA at .*q_proj"
    ):
        model.load_adapter(tmp_path / "lora", "default")
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="adapter_name: expected 'default', the one PiSSA"):
        model.load_adapter(tmp_path / "own", "again")
    with pytest.raises(FileNotFoundError, match="expected adapter_model.safetensors"):
        checkpoint_form(tmp_path)


def test_an_ordinary_adapter_loads_beside(tmp_path):
    model, *_ = make()
    start = logits(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "other")
    assert torch.equal(logits(model), start)


@pytest.mark.parametrize("mode", ["bfloat16", "float32", "float64"])
def test_the_export_is_the_trained_model_within_half_a_unit_of_w_res(mode, tmp_path):
    base = tiny_llama(dtype=getattr(torch, mode))
    weights = {n: p.detach().clone() for n, p in base.named_parameters()}
    model, before, _ = make(mode, base=base)
    train_a_little(model, steps=20)
    trained = logits(model)
    balora.export_lora(model, tmp_path)
    assert checkpoint_form(tmp_path) is None
    alone = peft.PeftModel.from_pretrained(tiny_llama(dtype=getattr(torch, mode)), tmp_path)
    eps = torch.finfo(trained.dtype).eps
    for name, layer in residuals(model).items():
        w = weights[name.removeprefix("base_model.model.") + ".weight"].double()
        exported = w + alone.get_submodule(name).get_delta_weight("default").double()
        found = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
        rounding = layer.base_layer.weight.double().abs() * eps / 2  # half a unit in the last place, or less
        slack = 16 * torch.finfo(layer.lora_A.default.weight.dtype).eps * found.abs().max()
        assert ((exported - found).abs() <= rounding + slack).all(), name
    assert (trained - before).abs().max() > 50 * eps * trained.abs().max()
    assert near(logits(alone), trained, 8)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {k: v[0] for k, v in batch(rows=1, seed=i).items()}


def run(model, folder, resume=None, **options):
    arguments = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, report_to=[], use_cpu=True, learning_rate=1e-2, seed=1, **options
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize("form", ["offset", "residual"])
def test_a_trainer_goes_on_where_it_stopped(form, tmp_path):
    whole = run(make(form=form)[0], tmp_path)
    for n_iter, exact in [(None, True), (1, False)]:  # the same SVD again, and another one
        model, *_ = make(form=form, n_iter=n_iter)
        run(model, tmp_path / "again", resume=str(tmp_path / "checkpoint-2"))
        for name, tensor in whole.state_dict().items():
            found = model.state_dict()[name]
            assert torch.equal(found, tensor) if exact else (found - tensor).abs().max() < 1e-3, name


def real_llama(stories15m):
    return AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.bfloat16)


@pytest.mark.parametrize("r", [16, 64, 128])
def test_the_real_llama_is_nearer_than_with_pefts_own_pissa(stories15m, r):
    """‖W_res + s·BA − W‖/‖W‖ before training: peft rounds its factors after it has computed W_res."""
    weights = {n: p.double() for n, p in real_llama(stories15m).named_parameters()}
    model = balora.get_pissa_model(real_llama(stories15m), r=r, lora_alpha=r, form="residual")
    targets = model.peft_config["default"].target_modules
    config = peft.LoraConfig(r=r, lora_alpha=r, init_lora_weights="pissa", target_modules=targets)
    peers = peft.get_peft_model(real_llama(stories15m), config, autocast_adapter_dtype=False)
    errors = []
    for name, layer in residuals(model).items():
        w = weights[name.removeprefix("base_model.model.") + ".weight"]
        both = []
        for x in (layer, peers.get_submodule(name)):
            found = x.base_layer.weight.double() + x.lora_B.default.weight.double() @ x.lora_A.default.weight.double()
            both.append(((found - w).norm() / w.norm()).item())
        errors.append(both)
    ours, theirs = map(max, zip(*errors, strict=True))
    print(f"\nr {r}: largest ‖W_res + s·BA − W‖/‖W‖: {ours:.2e}, peft's own PiSSA {theirs:.2e}")
    assert ours < 2**-9  # half a unit in the last place of W_res
    assert all(a < b for a, b in errors)


def test_the_real_llama_trains_and_is_exported(stories15m, tmp_path):
    model = balora.get_pissa_model(real_llama(stories15m), r=16, lora_alpha=16, form="residual")
    start = logits(model)
    assert torch.equal(in_teacher(model), start)
    train_a_little(model, lr=1e-3)
    model.eval()
    assert torch.equal(in_teacher(model), start)
    balora.export_lora(model, tmp_path)
    alone = peft.PeftModel.from_pretrained(real_llama(stories15m), tmp_path).eval()
    assert (logits(model) - start).abs().max() > 0.5
    assert near(logits(alone), logits(model), 8)
