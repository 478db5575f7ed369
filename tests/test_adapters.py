"""A layer of the offset form by itself: its equation and gradients in every type, what it keeps, copies, its end."""

import copy
import gc
import math
import weakref

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import balora
from balora.adapters import FROZEN, factors, form_of, pretrained_weight

from .conftest import tiny_llama
from .test_pissa import logits


def one_layer(dtype=torch.float32, **options):
    """An adapted layer whose A and B have left their start, and an input for it."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False)).to(dtype)
    model = balora.get_pissa_model(base, r=4, lora_alpha=6, target_modules=["0"], **options)
    layer = model.base_model.model[0]
    for factor in (layer.lora_A.default.weight, layer.lora_B.default.weight):
        factor.data += 0.1 * torch.randn_like(factor)
    return layer, torch.randn(2, 5, 24).to(dtype)


def written_out(layer, x):
    """W x + s·(B(A x) − B₀(A₀ x)) in float64, and its gradients by x, A and B."""
    x, a, b = (
        t.detach().double().requires_grad_() for t in (x, layer.lora_A.default.weight, layer.lora_B.default.weight)
    )
    a0, b0 = (getattr(layer, name).default.double() for name in FROZEN["offset"])
    out = x @ layer.base_layer.weight.double().T + 1.5 * (x @ a.T @ b.T - x @ a0.T @ b0.T)
    return out, torch.autograd.grad(out.sin().sum(), (x, a, b))


@pytest.mark.parametrize("shape", [(2, 5, 24), (5, 24), (24,), (0, 24)])
def test_a_layer_and_its_gradients_are_the_equation(shape):
    layer, x = one_layer(torch.float64)
    x = x.flatten()[: math.prod(shape)].reshape(shape).requires_grad_()
    expected, by = written_out(layer, x)
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    factors = layer.lora_A.default.weight, layer.lora_B.default.weight
    for grad, exact in zip(torch.autograd.grad(found.sin().sum(), (x, *factors)), by, strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-12, atol=1e-12)


def test_dropout_is_one_mask_for_both_pairs_of_factors():
    layer, x = one_layer(torch.float64, lora_dropout=0.5)
    layer.train()
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(x, 0.5)
    assert 0.2 < (dropped == 0).double().mean() < 0.8
    expected = layer.base_layer(x) + written_out(layer, dropped)[0] - layer.base_layer(dropped)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    a = layer.lora_A.default.weight
    (grad,) = torch.autograd.grad(found.sum(), a)
    by_hand = 1.5 * layer.lora_B.default.weight.sum(0)[:, None] * dropped.sum((0, 1))
    torch.testing.assert_close(grad, by_hand, rtol=1e-12, atol=1e-12)
    layer.eval()
    torch.testing.assert_close(layer(x), written_out(layer, x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["offset", "residual"])
def test_factors_that_were_rounded_are_merged_and_exported_as_they_compute(tmp_path, form):
    """In the offset form A₀ and B₀ then too: the model is the pre-trained one until A and B change."""
    model = balora.get_pissa_model(tiny_llama(), r=4, lora_alpha=8, form=form)
    before = logits(model)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.bfloat16()
    if form == "offset":
        torch.testing.assert_close(logits(model), before)
    layer = next(m for m in model.modules() if form_of(m))
    start = pretrained_weight(layer)
    left, right = factors(layer)
    model.merge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight.double(), start + left @ right, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    if form == "residual":
        return
    balora.export_lora(model, tmp_path / "lora")
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")), before)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_in_other_types_is_as_near_as_its_modules(dtype, autocast):
    """A and B as peft's own modules, which autocast rounds, are the yardstick."""
    layer, x = one_layer(dtype)
    expected, exact = written_out(layer, x)
    a, b = layer.lora_A.default, layer.lora_B.default
    a0, b0 = (getattr(layer, name).default for name in FROZEN["offset"])

    def modules(x):
        wide = x.to(a.weight.dtype)
        initial = torch.nn.functional.linear(torch.nn.functional.linear(wide, a0.to(wide)), b0.to(wide))
        return (layer.base_layer(x) + (b(a(wide)) - initial) * 1.5).to(x.dtype)

    def errors(forward):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = forward(leaf)
        grads = torch.autograd.grad(out.double().sin().sum(), (leaf, a.weight, b.weight))
        pairs = zip((out, *grads), (expected, *exact), strict=True)
        return [((f.double() - e).abs().max() / e.abs().max()).item() for f, e in pairs], [g.dtype for g in grads]

    found, types = errors(layer)
    yardstick, _ = errors(modules)
    assert types == [dtype, torch.float32, torch.float32]
    eps = torch.finfo(torch.bfloat16 if autocast else dtype).eps
    assert all(f <= 2 * (y + eps) for f, y in zip(found, yardstick, strict=True)), (found, yardstick)


def assert_rounded_relative_to_the_change(dtype, distance, device="cpu"):
    """What a layer adds under autocast, and its gradients, where A and B are that far from their start."""
    layer, x = one_layer(dtype)
    for name, factor in zip(FROZEN["offset"], (layer.lora_A, layer.lora_B), strict=True):
        start = getattr(layer, name).default.float()
        factor.default.weight.data = start + distance * torch.randn_like(start)
    outside, layer = torch.randn(2, 5, 40).to(device, dtype), layer.to(device)
    x = x.to(device).requires_grad_()

    variant, nothing = layer.lora_variant["default"], torch.zeros_like(outside)
    with torch.autocast(device, dtype):
        found = variant.forward(layer, active_adapter="default", x=x, result=nothing)
    factors = layer.lora_A.default.weight, layer.lora_B.default.weight
    by = torch.autograd.grad(found, (x, *factors), outside)
    a0, b0 = (getattr(layer, name).default.double() for name in FROZEN["offset"])
    leaves = [t.detach().double().requires_grad_() for t in (x, *factors)]
    exact = 1.5 * (leaves[0] @ leaves[1].T @ leaves[2].T - leaves[0] @ a0.T @ b0.T)
    exact_by = torch.autograd.grad(exact, leaves, outside.double())
    # float16 has fewer digits below 6e-5
    allowed = 0.01 if dtype == torch.bfloat16 or distance >= 1e-2 else 0.05
    for f, e in zip((found, *by), (exact, *exact_by), strict=True):
        assert (f - e).norm() < allowed * e.norm()


@pytest.mark.parametrize("distance", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_layer_adds_is_rounded_relative_to_its_change(dtype, distance):
    """However little of A and B has changed: also below half a step of the type that they are rounded to."""
    assert_rounded_relative_to_the_change(dtype, distance)


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_adapters_in_a_type_of_their_own_start_as_nothing(base, adapters):
    """As an engine or a user rounds them: A₀ and B₀ are rounded with them."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False)).to(base)
    layer = balora.get_pissa_model(layer, r=4, lora_alpha=6, target_modules=["0"]).base_model.model[0]
    layer.lora_A.to(adapters)
    layer.lora_B.to(adapters)
    x, nothing = torch.randn(5, 24).to(base), torch.zeros(5, 40, dtype=base)
    for type_ in (None, torch.bfloat16):
        with torch.autocast("cpu", type_, enabled=type_ is not None):
            added = layer.lora_variant["default"].forward(layer, active_adapter="default", x=x, result=nothing)
        assert not added.any()


@pytest.mark.parametrize("form", ["offset", "residual"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_compiles_as_a_whole(form, autocast):
    layer, x = one_layer(torch.bfloat16 if autocast else torch.float32, form=form)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    leaves = x.requires_grad_(), layer.lora_A.default.weight, layer.lora_B.default.weight
    found = []
    for call in (layer, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = call(x)
        found.append([out, *torch.autograd.grad(out.float().sin().sum(), leaves)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("form", ["offset", "residual"])
def test_factors_that_are_gathered_for_their_own_forward_are_used_in_it_alone(form):
    layer, x = one_layer(torch.bfloat16, form=form)
    calls = []
    for factor in (layer.lora_A.default, layer.lora_B.default):
        factor.__class__ = type("FSDPLinear", (torch.nn.Linear,), {})  # as fully_shard marks what it wraps
        factor.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert calls == [layer.lora_A.default, layer.lora_B.default]


@pytest.mark.parametrize("initial", [1.0, 0.5])
def test_the_residual_form_under_autocast_is_its_equation(initial):
    """W_res x + s·B(A x) and its gradients, also with another s than W_res was made with."""
    layer, x = one_layer(torch.bfloat16, form="residual")
    layer.set_scale("default", initial)  # times alpha / r
    factors = layer.lora_A.default.weight, layer.lora_B.default.weight
    x = x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    leaves = [t.detach().double().requires_grad_() for t in (x, *factors)]
    exact = leaves[0] @ layer.base_layer.weight.double().T + 1.5 * initial * (leaves[0] @ leaves[1].T @ leaves[2].T)
    outside = torch.randn(out.shape).bfloat16()
    by = torch.autograd.grad(out, (x, *factors), outside)
    for found, wanted in zip((out, *by), (exact, *torch.autograd.grad(exact, leaves, outside.double())), strict=True):
        assert (found - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("form", ["offset", "residual"])
def test_the_student_follows_its_first_steps_in_half_precision(form, stories15m):
    """With A and B rounded by themselves the KL would be a quarter less than it is; the layers' outputs are rounded."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.bfloat16)
    model = balora.get_pissa_model(base, r=64, lora_alpha=64, form=form)
    model = balora.attach(model, balora.BALoraConfig()).train()
    ids = torch.randint(3, 32000, (2, 64))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids)
    found = model.balora_last.consistency.item()
    model.float()
    model(input_ids=ids, labels=ids)
    assert found == pytest.approx(model.balora_last.consistency.item(), rel=0.1)


def test_layers_keep_the_input_that_they_share_and_no_rounded_factors():
    base = tiny_llama(dtype=torch.bfloat16)
    model = balora.get_pissa_model(base, r=4, lora_alpha=8).train()
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(2, 6, 32, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        outputs = [projection(x) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert all(o.dtype == torch.bfloat16 for o in outputs)
    inputs = {t.data_ptr() for t in kept if t.shape == x.shape and t.dtype == torch.bfloat16}
    assert inputs == {x.data_ptr()}
    assert not [t for t in kept if t.shape == x.shape and t.dtype == torch.float32]
    parameters = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
    factors = [t for t in kept if t.dim() == 2 and 4 in t.shape]
    assert factors
    assert all(t.data_ptr() in parameters for t in factors)


def test_an_ordinary_adapter_beside_it_still_gets_its_own_type():
    model = balora.get_pissa_model(tiny_llama(dtype=torch.bfloat16), r=4, lora_alpha=8)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for active in ("other", "default", "other"):
        model.set_adapter(active)
        assert logits(model).dtype == torch.bfloat16


def test_a_model_is_freed_without_the_collector():
    model = balora.get_pissa_model(tiny_llama(), r=4, lora_alpha=8)
    weight = weakref.ref(model.base_model.model.model.layers[0].mlp.up_proj)
    gc.collect()
    gc.disable()
    try:
        model.base_model.model.model.layers[0].mlp.up_proj = torch.nn.Identity()
        assert weight() is None
    finally:
        gc.enable()


def test_a_forward_without_data():
    layer, x = one_layer()
    assert layer.to("meta")(x.to("meta")).shape == (2, 5, 40)


def test_a_copied_model_is_on_its_own():
    model = balora.get_pissa_model(tiny_llama(dtype=torch.bfloat16), r=4, lora_alpha=8)
    before = logits(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(1)
    assert torch.equal(logits(other), before)
    assert not torch.equal(logits(model), before)
