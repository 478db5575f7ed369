"""PiSSA set-up on a CUDA device, and through one: what the CPU tests promise."""

import pytest
import torch

import balora
from balora import principal

from .. import test_adapters, test_pissa, test_principal
from ..conftest import batch, tiny_llama, train_a_little

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def spy(monkeypatch):
    """The device of every stack that is decomposed."""
    devices = []
    original = principal._stacked

    def spied(weights, device):
        devices.append(torch.device(device).type)
        return original(weights, device)

    monkeypatch.setattr(principal, "_stacked", spied)
    return devices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n_iter", [None, 12])
def test_a_model_on_the_cpu_goes_through_the_device(dtype, n_iter, monkeypatch):
    devices = spy(monkeypatch)
    through, stayed = (
        balora.get_pissa_model(tiny_llama(dtype=dtype), r=4, lora_alpha=8, n_iter=n_iter, device=device)
        for device in (None, "cpu")
    )
    assert devices == ["cuda"] * 4 + ["cpu"] * 4
    assert all(t.device.type == "cpu" for t in through.state_dict().values())
    tolerance = max(1e-5, 4 * torch.finfo(dtype).eps) if n_iter is None else 1e-2
    for a, b in zip(test_pissa.offsets(through).values(), test_pissa.offsets(stayed).values(), strict=True):
        found, expected = (m.lora_offset_B.default.double() @ m.lora_offset_A.default.double() for m in (a, b))
        assert (found - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("n_iter", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_on_the_device(dtype, n_iter, monkeypatch):
    devices = spy(monkeypatch)
    base = tiny_llama(dtype=dtype).cuda()
    inputs = {name: t.cuda() for name, t in batch().items() if name != "labels"}
    with torch.no_grad():
        before = base(**inputs).logits
        model = balora.get_pissa_model(base, r=4, lora_alpha=8, n_iter=n_iter)
        assert torch.equal(model(**inputs).logits, before)
    assert set(devices) == {"cuda"}
    assert all(t.is_cuda for t in model.state_dict().values())
    train_a_little(model, device="cuda")
    with torch.no_grad(), balora.teacher(model):
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("form", ["offset", "residual"])
def test_autocast_shows_no_change_at_step_0_and_every_change_after(form):
    base = tiny_llama(dtype=torch.bfloat16).cuda()
    inputs = {name: t.cuda() for name, t in batch().items() if name != "labels"}
    model = balora.get_pissa_model(base, r=4, lora_alpha=8, form=form)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        start = model(**inputs).logits
        with balora.teacher(model):
            assert torch.equal(model(**inputs).logits, start)
    for distance in (1e-6, 1e-4, 1e-2, 1.0):
        test_adapters.assert_rounded_relative_to_the_change(torch.bfloat16, distance, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "n"), [(300, 400), (1024, 1024)])
def test_the_error_is_near_the_least(m, n, dtype):
    ws = test_principal.weights(3, m, n, dtype)
    for w, (b0, a0) in zip(ws, principal.factors(ws, 32, [1.0, 2.0, 0.5]), strict=True):
        assert b0.device.type == a0.device.type == "cpu"
        s = (b0.double() * (w.double() @ a0.double().T)).sum() / (b0.double() @ a0.double()).square().sum()
        assert -1e-6 < test_principal.excess(w, b0, a0, s) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_residual_form_on_the_device(dtype, tmp_path):
    base = tiny_llama(dtype=dtype).cuda()
    inputs = {name: t.cuda() for name, t in batch().items() if name != "labels"}
    with torch.no_grad():
        before = base(**inputs).logits
        model = balora.get_pissa_model(base, r=4, lora_alpha=8, form="residual")
        start = model(**inputs).logits
        assert (start - before).abs().max() <= 64 * torch.finfo(dtype).eps * before.abs().max()
        with balora.teacher(model):
            assert torch.equal(model(**inputs).logits, start)
    assert all(t.is_cuda for t in model.state_dict().values())
    train_a_little(model, device="cuda")
    model.save_pretrained(tmp_path)
    with torch.no_grad(), balora.teacher(model):
        assert torch.equal(model(**inputs).logits, start)
    again = balora.get_pissa_model(tiny_llama(dtype=dtype).cuda(), r=4, lora_alpha=8, form="residual", n_iter=1)
    again.load_adapter(tmp_path, "default")
    with torch.no_grad():
        trained = model.eval()(**inputs).logits
        error = (again.eval()(**inputs).logits - trained).abs().max()
    assert error <= 64 * torch.finfo(dtype).eps * trained.abs().max()


def test_errors_are_measured_on_the_device():
    w = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    b0, a0 = principal.factors([w], 8, [1.0], device=torch.device("cpu"))[0]
    found = principal.errors(w, b0, a0, 1.0)
    assert found == pytest.approx(principal.errors(w, b0, a0, 1.0, torch.device("cpu")), rel=1e-9)
    assert found == principal.errors(w.cuda(), b0.cuda(), a0.cuda(), 1.0)
