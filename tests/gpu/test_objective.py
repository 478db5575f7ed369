"""What the CPU tests promise, on a CUDA device. `make gpu` runs them; without a device they are skipped."""

from dataclasses import replace

import pytest
import torch

import balora

from ..conftest import ALL_TERMS, assert_within_budget, batch, problem, run, tiny_llama, train_a_little

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 64, 1001), (300, 640, 5003)])
def test_streaming_within_the_budget(shape, dtype):
    hidden, teacher, weight, labels = problem(*shape, dtype=dtype, ignored=5)
    device = [x.cuda() for x in (hidden, teacher, weight, labels)]
    found, grad = run(*device, ALL_TERMS, "streaming")
    plain, plain_grad = run(*device, ALL_TERMS, "reference")
    exact, exact_grad = run(hidden.double(), teacher.double(), weight.double(), labels, ALL_TERMS, "reference")
    for name in ("loss", "ce", "consistency", "diversity"):
        rounded = dtype == torch.bfloat16 and name in ("loss", "consistency")  # the difference logits are
        kind = dtype if rounded else torch.float32
        assert_within_budget(*(getattr(x, name).cpu() for x in (found, plain, exact)), kind, name)
    assert found.svd.item() == pytest.approx(exact.svd.item(), rel=1e-4)  # a float32 Gram matrix: see spectral
    if shape[1] <= 512:
        assert_within_budget(grad.cpu(), plain_grad.cpu(), exact_grad, dtype, "gradient")
        return
    # Above, of an iteration on a flat spectrum.
    assert (grad.cpu().double() - exact_grad).norm() < 1e-2 * exact_grad.norm()
    config = replace(ALL_TERMS, lambda_svd=0.0)
    gradients = [run(*device, config, impl)[1].cpu() for impl in ("streaming", "reference")]
    exact_grad = run(hidden.double(), teacher.double(), weight.double(), labels, config, "reference")[1]
    assert_within_budget(*gradients, exact_grad, dtype, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_at_step_0_and_an_exact_teacher(dtype):
    inputs = {k: v.cuda() for k, v in batch().items()}
    base = tiny_llama(dtype=dtype).cuda()
    with torch.no_grad():
        before = base(**inputs).logits
    model = balora.get_pissa_model(base, r=4, lora_dropout=0.2)
    model.train()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    balora.attach(model, ALL_TERMS)
    model.eval()
    train_a_little(model, device="cuda")
    with torch.no_grad(), balora.teacher(model):
        assert torch.equal(model(**inputs).logits, before)
    assert model.balora_last.consistency > 0
