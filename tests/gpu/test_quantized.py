"""4-bit bases on a CUDA device: what the CPU tests promise, at widths that the CPU computes wrongly too."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import balora
from balora import four_bit
from balora.adapters import ADAPTER, frozen, pretrained_weight

from .. import test_quantized as cpu
from ..conftest import ALL_TERMS, tiny_checkpoint, train_a_little
from ..test_quantized import ALPHA, R, layers, norm

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def logits(model):
    inputs = {name: t.cuda() for name, t in cpu.batch().items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def full(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "model"
    return tiny_checkpoint(folder, dtype=request.param, initializer_range=0.2, hidden_size=96, intermediate_size=160)


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_offset_form(full, double_quant):
    model = balora.get_pissa_model(cpu.in_4_bits(full, double_quant), r=R, lora_alpha=ALPHA)
    assert all(p.is_cuda for p in model.parameters())
    with model.disable_adapter():
        before = logits(model)
    assert torch.equal(logits(model), before)
    expected = logits(cpu.on_dense(model, full).cuda())
    assert norm(before - expected) < (1e-3 if before.dtype == torch.float32 else 3e-2) * norm(expected)
    for layer in layers(model).values():
        weight, (a0, b0) = pretrained_weight(layer), frozen(layer)
        least = torch.linalg.svdvals(weight.double())[R:].norm()
        found = norm(weight.double() - ALPHA / R * b0.double() @ a0.double())
        assert found < (1.001 if a0.dtype == torch.float32 else 1.01) * least
    balora.attach(model, ALL_TERMS)
    train_a_little(model, device="cuda")
    assert not torch.equal(logits(model), before)
    with balora.teacher(model):
        assert torch.equal(logits(model), before)


def test_the_residual_form(full, tmp_path):
    folder = tmp_path / "nf4"
    balora.quantize(full, folder, r=R, lora_alpha=ALPHA)
    model = balora.load_quantized(folder)
    original = AutoModelForCausalLM.from_pretrained(full, dtype="auto").cuda()
    for name, layer in layers(model).items():
        weight = original.get_submodule(name.removeprefix("base_model.model.")).weight.detach()
        lost = norm(weight.double() - pretrained_weight(layer))
        assert lost < norm(weight.double() - four_bit.nf4(weight).double())
    start = logits(model)
    with balora.teacher(model):
        assert torch.equal(logits(model), start)
    balora.attach(model, ALL_TERMS)
    train_a_little(model, device="cuda")
    trained = logits(model)
    with balora.teacher(model):
        assert torch.equal(logits(model), start)
    model.save_pretrained(tmp_path / "saved")
    again = balora.load_quantized(folder)
    again.load_adapter(tmp_path / "saved", ADAPTER)
    assert torch.equal(logits(again), trained)


def test_a_base_that_was_quantized_on_the_cpu_is_the_same_on_the_device(full):
    weights = {name: p.detach() for name, p in AutoModelForCausalLM.from_pretrained(full).named_parameters()}
    for name, m in cpu.in_4_bits(full).named_modules():
        if four_bit.is_4bit(m):
            weight = weights[f"{name}.weight"]
            assert norm(four_bit.dequantized(m).cpu() - four_bit.nf4(weight)) < 1e-2 * norm(weight)
