"""PiSSA as an offset: same bits at the start, an exact teacher, only A and B trained, a LoRA that stands alone."""

import contextlib
import gc
import re

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import balora
from balora import pissa, principal
from balora.adapters import FROZEN, OffsetVariant
from balora.pissa import principal_errors

from .conftest import batch, tiny_llama, train_a_little
from .test_principal import record

MODES = ["float32", "bfloat16", "autocast", "float64"]


def make(mode="float32", r=4, base=None, **options):
    """(a PiSSA model, the logits of the base model before it was wrapped, a context to call it in)."""
    dtype = torch.float32 if mode == "autocast" else getattr(torch, mode)
    context = (lambda: torch.autocast("cpu", torch.bfloat16)) if mode == "autocast" else contextlib.nullcontext
    base = tiny_llama(dtype=dtype) if base is None else base.to(dtype)
    with context():
        before = logits(base)
    return balora.get_pissa_model(base, r=r, lora_alpha=2 * r, **options), before, context


def logits(model):
    inputs = batch()
    del inputs["labels"]
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_at_step_0(mode, dropout):
    model, before, context = make(mode, lora_dropout=dropout)
    model.train()
    with context():
        assert torch.equal(logits(model), before)
        with balora.teacher(model):
            assert torch.equal(logits(model), before)


@pytest.mark.parametrize("mode", MODES)
def test_the_teacher_is_exact_after_training(mode):
    model, before, context = make(mode, lora_dropout=0.1)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    with context():
        train_a_little(model)
    with context():  # a new block: autocast keeps its rounded copies of the weights within one
        assert not torch.equal(logits(model), before)
        with balora.teacher(model):
            assert torch.equal(logits(model), before)
    for name, p in model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), name


def test_the_adapters_start_at_the_principal_part():
    model, *_ = make("float64")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    u, s, vh = torch.linalg.svd(layer.base_layer.weight)
    principal = u[:, :4] @ torch.diag(s[:4]) @ vh[:4]
    b, a = layer.lora_B.default.weight, layer.lora_A.default.weight
    torch.testing.assert_close(b @ a * layer.scaling["default"], principal, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a @ a.T * 2, torch.diag(s[:4]), rtol=1e-5, atol=1e-6)


def offsets(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_offset_A")}


def assert_principal(layer, rank, tolerance=1e-5):
    """s·B₀A₀ is the principal part of the layer's own weight, and A and B start there."""
    w = layer.base_layer.weight.double()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    b0, a0 = layer.lora_offset_B.default, layer.lora_offset_A.default
    assert b0.dtype == a0.dtype == layer.base_layer.weight.dtype
    assert (b0.shape, a0.shape) == ((len(w), rank), (rank, w.shape[1]))
    found = layer.scaling["default"] * b0.double() @ a0.double()
    assert (found - (u[:, :rank] * s[:rank]) @ vh[:rank]).norm() < tolerance * w.norm()
    assert torch.equal(layer.lora_A.default.weight.to(a0.dtype), a0)
    assert torch.equal(layer.lora_B.default.weight.to(b0.dtype), b0)


def test_every_layer_gets_its_own_factors_whatever_its_rank_type_and_scaling():
    base = tiny_llama()
    base.model.layers[1].mlp.to(torch.bfloat16)
    base.model.layers[1].self_attn.q_proj.to(torch.float64)
    ranks, alphas = {"q_proj": 2, "layers.0.mlp.down_proj": 7}, {"o_proj": 3}
    model = balora.get_pissa_model(base, r=4, lora_alpha=8, rank_pattern=ranks, alpha_pattern=alphas)
    assert len(offsets(model)) == 14
    for name, layer in offsets(model).items():
        rank = 2 if "q_proj" in name else 7 if "0.mlp.down_proj" in name else 4
        assert_principal(layer, rank, 1e-2 if layer.base_layer.weight.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    ("batch_bytes", "expected"),
    [
        (2**20, [(4, 32, 32), (4, 16, 32), (4, 48, 32), (2, 32, 48)]),
        (3 * 32 * 32 * 4, [(3, 32, 32), (1, 32, 32), (4, 16, 32), (2, 48, 32), (2, 48, 32), (2, 32, 48)]),
        (1, [(1, 32, 32)] * 4 + [(1, 16, 32)] * 4 + [(1, 48, 32)] * 4 + [(1, 32, 48)] * 2),
    ],
    ids=["at once", "in parts", "one by one"],
)
def test_layers_of_one_shape_go_together_within_batch_bytes(batch_bytes, expected, monkeypatch):
    calls = record(monkeypatch)
    done = []
    monkeypatch.setattr(pissa.tqdm, "update", lambda bar, n: done.append((bar.total, n)))
    model, before, _ = make("float32", batch_bytes=batch_bytes, n_iter=8)
    assert [shape for shape, *_ in calls] == expected
    assert done == [(14, shape[0]) for shape in expected]
    for layer in offsets(model).values():
        assert_principal(layer, 4, 1e-4)
    assert torch.equal(logits(model), before)


def test_the_decomposition_that_is_asked_for(monkeypatch):
    calls = record(monkeypatch)
    make()
    assert not calls  # these matrices are small
    make(n_iter=3, rank_pattern={"up_proj": 2})
    assert {(rank, n_iter) for _, rank, n_iter in calls} == {(4, 3), (2, 3)}
    assert sum(shape[0] for shape, *_ in calls) == 14


def test_the_same_call_gives_the_same_bits():
    first, second = (make("bfloat16", n_iter=4, device="cpu")[0] for _ in range(2))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_name_their_layer(value):
    base = tiny_llama(dtype=torch.bfloat16)
    names = [n for n, _ in base.named_modules()]
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(ValueError, match=r"model: expected finite weights, found .* at .*layers\.1\.mlp\.up_proj"):
        balora.get_pissa_model(base, r=2)
    assert [n for n, _ in base.named_modules()] == names


def test_a_decomposition_that_fails_leaves_the_model_as_it_was(monkeypatch):
    base = tiny_llama()
    before, names = logits(base), [n for n, _ in base.named_modules()]
    original, calls = principal.factors, []

    def fails_at_last(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no memory")
        return original(*arguments)

    monkeypatch.setattr(principal, "factors", fails_at_last)
    with pytest.raises(torch.OutOfMemoryError):
        balora.get_pissa_model(base, r=2)
    assert [n for n, _ in base.named_modules()] == names
    assert torch.equal(logits(base), before)
    assert all(p.requires_grad for p in base.parameters())


def test_the_forward_is_the_equation():
    model, *_ = make("float64")
    train_a_little(model)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    x = torch.randn(5, 32, dtype=torch.float64)
    change = layer.lora_B.default.weight @ layer.lora_A.default.weight
    change = change - layer.lora_offset_B.default @ layer.lora_offset_A.default
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + 2 * change).T)


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_nothing_but_a_and_b_is_trainable_at_any_time(tmp_path):
    model, *_ = make()
    expected = {n for n, _ in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}
    assert trainable(model) == expected
    assert len(expected) == 2 * 2 * 7
    with balora.teacher(model):
        assert trainable(model) == expected
    assert trainable(model) == expected
    balora.attach(model, balora.BALoraConfig())
    train_a_little(model)
    assert trainable(model) == expected
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    model.set_adapter("default")
    assert trainable(model) == expected
    balora.detach(model)
    assert trainable(model) == expected


def test_teacher_restores_every_flag_also_after_an_error():
    model, *_ = make(lora_dropout=0.5)
    model.train()
    model.base_model.model.model.layers[0].eval()  # a user's choice
    before = [m.training for m in model.modules()]
    with contextlib.suppress(RuntimeError), balora.teacher(model):
        assert not any(m.training for m in model.modules())
        raise RuntimeError
    assert [m.training for m in model.modules()] == before
    assert not any(getattr(m, "_disable_adapters", False) for m in model.modules())


def test_teacher_leaves_adapters_off_that_the_user_has_switched_off():
    model, before, _ = make()
    train_a_little(model)
    model.base_model.disable_adapter_layers()
    with balora.teacher(model):
        pass
    assert torch.equal(logits(model), before)


def test_teacher_refuses_merged_weights_and_merging_is_the_trained_model():
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
        with balora.teacher(model):
            torch.testing.assert_close(logits(model), before)
    torch.testing.assert_close(logits(model.merge_and_unload()), trained)


def test_an_adapter_that_is_saved_and_loaded_is_the_same_bits(tmp_path):
    model, before, _ = make("bfloat16")
    train_a_little(model)
    model.save_pretrained(tmp_path)
    # other frozen factors, as another machine's SVD would give: those of the checkpoint win
    again = balora.get_pissa_model(tiny_llama(dtype=torch.bfloat16), r=4, lora_alpha=8)
    for module in again.modules():
        if hasattr(module, "lora_offset_A"):
            module.lora_offset_A.default.mul_(1.5)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    with balora.teacher(again):
        assert torch.equal(logits(again), before)


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "float64"])
def test_the_exported_lora_loads_with_peft_alone(mode, tmp_path):
    model, before, _ = make(mode)
    train_a_little(model, steps=20)
    trained = logits(model)
    balora.export_lora(model, tmp_path / "lora")
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    alone = peft.PeftModel.from_pretrained(tiny_llama(dtype=trained.dtype), tmp_path / "lora")
    assert not any(
        isinstance(v, OffsetVariant) for m in alone.modules() for v in getattr(m, "lora_variant", {}).values()
    )
    eps = torch.finfo(trained.dtype).eps
    change = (trained - before).abs().max()
    assert change > 50 * eps * trained.abs().max()
    assert (logits(alone) - trained).abs().max() <= 8 * eps * trained.abs().max()


def test_the_export_survives_being_loaded_in_half_precision(tmp_path):
    """s·BA and s·B₀A₀ rounded to bfloat16 apart would not cancel; the balanced factors have nothing to cancel."""
    model, before, _ = make("float32")
    train_a_little(model, steps=2, lr=1e-4)
    trained = logits(model)
    balora.export_lora(model, tmp_path)
    alone = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    for name, p in alone.named_parameters():
        if "lora_" in name:
            p.data = p.data.bfloat16().float()
    assert (logits(alone) - trained).norm() < 0.01 * (trained - before).norm()


def test_an_export_of_another_adapter_is_refused(tmp_path):
    model, *_ = make()
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="peft_model: expected 'default', .* to be the active adapter; found .'other'"):
        balora.export_lora(model, tmp_path)


def test_no_wider_copy_of_the_frozen_factors_is_kept_for_the_backward():
    model, *_ = make("bfloat16")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    kept = []
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    trained = {p.data_ptr() for p in layer.parameters()}
    factors = [t for t in kept if sorted(t.shape) == [4, 32] and t.data_ptr() not in trained]
    assert {t.data_ptr() for t in factors} == {
        layer.lora_offset_A.default.data_ptr(),
        layer.lora_offset_B.default.data_ptr(),
    }


@pytest.mark.parametrize("mode", ["float64", "autocast"])
def test_the_gradient_by_the_input_is_that_of_the_equation(mode):
    model, _, context = make("float64" if mode == "float64" else "float32")
    train_a_little(model)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    change = layer.lora_B.default.weight @ layer.lora_A.default.weight
    change = change - layer.lora_offset_B.default @ layer.lora_offset_A.default
    x = torch.randn(5, 32, dtype=layer.base_layer.weight.dtype, requires_grad=True)
    out = torch.randn(5, 32, dtype=x.dtype)
    context = contextlib.nullcontext if mode == "float64" else (lambda: torch.autocast("cpu", torch.bfloat16))
    with context():
        y = layer(x)
    y.backward(out.to(y.dtype))
    exact = out @ (layer.base_layer.weight + 2 * change)
    tolerance = 1e-10 if mode == "float64" else 0.02
    assert (x.grad - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize(
    "options",
    [
        dict(use_rslora=True),
        dict(rank_pattern={"q_proj": 2, "v_proj": 7}, alpha_pattern={"q_proj": 3, "up_proj": 5}),
        dict(r=16, target_modules=["k_proj", "down_proj"]),  # k_proj has 16 rows: narrower than 2r
    ],
    ids=["rslora", "patterns", "narrow"],
)
def test_the_export_keeps_every_scaling(options, tmp_path):
    model = balora.get_pissa_model(tiny_llama(dtype=torch.float64), **{"r": 4, "lora_alpha": 5, **options})
    train_a_little(model)
    balora.export_lora(model, tmp_path)
    alone = peft.PeftModel.from_pretrained(tiny_llama(dtype=torch.float64), tmp_path)
    torch.testing.assert_close(logits(alone), logits(model), rtol=1e-6, atol=1e-6)


def test_the_real_llama(stories15m, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(stories15m)
    model, before, _ = make("bfloat16", r=16, base=base)
    model.train()
    assert torch.equal(logits(model), before)
    balora.attach(model, balora.BALoraConfig(focus_schedule="constant"))
    train_a_little(model, lr=1e-3)
    assert model.balora_last.consistency > 0
    balora.detach(model)
    model.eval()
    with balora.teacher(model):
        assert torch.equal(logits(model), before)
    balora.export_lora(model, tmp_path)
    alone = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories15m), tmp_path)
    trained = logits(model)
    assert (trained - before).abs().max() > 0.5
    assert (logits(alone) - trained).abs().max() <= 8 * torch.finfo(torch.bfloat16).eps * trained.abs().max()


def test_what_peft_does_anyway_may_be_said():
    config = balora.get_pissa_model(tiny_llama(), r=2, bias="none", inference_mode=False).peft_config["default"]
    assert (config.bias, config.inference_mode) == ("none", False)
    with pytest.raises(ValueError, match="lora_config: bias cannot be used here"):
        balora.get_pissa_model(tiny_llama(), r=2, bias="all")


BAD = {
    "r zero": (dict(r=0), ValueError, "r: expected at least 1, found 0"),
    "r float": (dict(r=4.0), TypeError, "r: expected a whole number, found 4.0"),
    "r too large": (dict(r=17), ValueError, "r: expected at most 16, the smaller side of .*k_proj, found 17"),
    "alpha": (dict(r=2, lora_alpha=-1), ValueError, "lora_alpha: expected a finite number above 0, found -1"),
    "batch_bytes": (dict(r=2, batch_bytes=0), ValueError, "batch_bytes: expected at least 1, found 0"),
    "batch_bytes type": (
        dict(r=2, batch_bytes=1e9),
        TypeError,
        "batch_bytes: expected a whole number, found 1000000000.0",
    ),
    "n_iter": (dict(r=2, n_iter=0), ValueError, "n_iter: expected at least 1, found 0"),
    "n_iter type": (dict(r=2, n_iter=True), TypeError, "n_iter: expected a whole number, found True"),
    "device": (dict(r=2, device="here"), ValueError, "device: expected a device that torch has here, found 'here'"),
    "no such device": (dict(r=2, device="cuda:99"), ValueError, "device: expected a device that torch has here"),
    "device type": (dict(r=2, device=1.5), ValueError, "device: expected a device that torch has here, found 1.5"),
    "meta": (dict(r=2, device="meta"), ValueError, "device: expected a device with memory, found 'meta'"),
    "form": (dict(r=2, form="dense"), ValueError, "form: expected 'offset' or 'residual', found 'dense'"),
    "option": (dict(r=2, use_dora=True), ValueError, "lora_config: use_dora cannot be used here"),
    "no such layer": (dict(r=2, target_modules=["query"]), ValueError, "query"),
    "target type": (
        dict(r=2, target_modules=7),
        TypeError,
        "target_modules: expected a string or a list of strings, found 7",
    ),
    "target types": (
        dict(r=2, target_modules=["q_proj", 7]),
        TypeError,
        "target_modules: expected a string or a list of strings",
    ),
    "pattern": (
        dict(r=2, target_modules=".*(q_proj"),
        ValueError,
        r"target_modules: expected a regular expression, found '.\*\(q_proj'; missing \)",
    ),
    "excluded pattern": (
        dict(r=2, target_modules=["q_proj"], exclude_modules="*"),
        ValueError,
        "exclude_modules: expected a regular expression",
    ),
    "half way": (dict(r=2, target_modules=["q_proj", "input_layernorm"]), ValueError, "RMSNorm"),
    "rank of a pattern": (dict(r=2, rank_pattern={"up_proj": 0}), ValueError, "r.*positive"),
    "alpha of a pattern": (
        dict(r=2, alpha_pattern={"q_proj": 0}),
        ValueError,
        "alpha_pattern: expected a scaling above 0",
    ),
    "not linear": (
        dict(r=2, target_modules=["embed_tokens"]),
        ValueError,
        "target_modules: expected linear layers.*Embedding",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_leaves_the_model_as_it_was(case):
    options, error, message = BAD[case]
    base = tiny_llama()
    before, names = logits(base), [n for n, _ in base.named_modules()]
    with pytest.raises(error, match=message):
        balora.get_pissa_model(base, **options)
    gc.collect()
    assert torch.equal(logits(base), before)
    assert [n for n, _ in base.named_modules()] == names
    assert all(p.requires_grad for p in base.parameters())
    balora.get_pissa_model(base, r=2)


def test_a_model_that_has_adapters_or_no_known_layer_is_refused():
    model, *_ = make()
    with pytest.raises(ValueError, match="model: expected a model without adapters"):
        balora.get_pissa_model(model, r=2)
    with pytest.raises(ValueError, match=r"target_modules: None stands for the linear layers.*name its layers, of 0"):
        balora.get_pissa_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), r=2)
    with pytest.raises(TypeError, match="peft_model: expected a peft.PeftModel, found LlamaForCausalLM"):
        balora.export_lora(tiny_llama(), "nowhere")


def test_meta_weights_are_refused():
    with torch.device("meta"):
        base = tiny_llama()
    with pytest.raises(ValueError, match="found the meta device"):
        balora.get_pissa_model(base, r=2)


@pytest.mark.parametrize("form", ["offset", "residual"])
def test_principal_errors_are_those_of_the_pretrained_weights(form):
    base = tiny_llama(dtype=torch.float64)
    weights = {n: p.detach().clone() for n, p in base.named_parameters()}
    options = dict(rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3}, n_iter=1)
    model = balora.get_pissa_model(base, r=4, form=form, **options)
    train_a_little(model)
    found = principal_errors(model, all_layers=True)
    assert len(found.layers) == found.of == 14
    for layer in found.layers:
        w = weights[layer.name.removeprefix("base_model.model.") + ".weight"]
        pissa_layer = model.get_submodule(layer.name)
        a0, b0 = (pissa_layer.get_submodule(name).default for name in FROZEN[form])
        assert (layer.shape, layer.rank) == (tuple(w.shape), 2 if "q_proj" in layer.name else 4)
        error = (w - pissa_layer.scaling["default"] * b0 @ a0).norm() / w.norm()
        assert layer.error == pytest.approx(error.item(), rel=1e-9)
        least = torch.linalg.svdvals(w)[layer.rank :].norm() / w.norm()
        assert layer.least == pytest.approx(least.item(), rel=1e-9)
    first = principal_errors(model)
    assert [x.name.removeprefix("base_model.model.model.layers.0.") for x in first.layers] == [
        *(f"self_attn.{x}_proj" for x in "qko"),  # v_proj is like k_proj, up_proj like gate_proj
        *("mlp.gate_proj", "mlp.down_proj"),
    ]
    assert all(x in found.layers for x in first.layers)
    held = [(1 - x.error**2) ** 0.5 for x in first.layers]
    assert first.summary == (
        f"PiSSA: the adapters hold {min(held):.0%} to {max(held):.0%} of ‖W‖; error at most "
        f"{max(x.error / x.least for x in first.layers):.4f} × the least of rank r (5 of 14 layers measured)"
    )


def test_principal_errors_of_a_full_rank_and_of_models_without():
    model = balora.get_pissa_model(tiny_llama(), r=16, target_modules=["k_proj"])
    summary = principal_errors(model, device="cpu").summary
    assert re.fullmatch(
        r"PiSSA: the adapters hold 100% to 100% of ‖W‖; error at most \d.\de-0[6-8] of ‖W‖ \(1 of 2 layers measured\)",
        summary,
    )
    model.merge_adapter()
    with pytest.raises(ValueError, match="peft_model: the adapters are merged"):
        principal_errors(model)
    with pytest.raises(ValueError, match="peft_model: expected PiSSA adapters of get_pissa_model, found none"):
        principal_errors(tiny_llama())
