"""The losses on logits, other heads and the randomized SVD on a CUDA device: what the CPU tests promise."""

import pytest
import torch

from balora import functional as F

from .. import test_head, test_losses, test_randomized_svd
from ..conftest import ALL_TERMS, assert_within_budget

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", test_losses.LOSSES)
def test_a_loss_on_logits(name, dtype):
    loss = test_losses.LOSSES[name]
    z, teacher = test_losses.logits(40, 1001, dtype)
    found, grad = test_losses.evaluate(loss, z.cuda(), teacher.cuda(), impl="streaming")
    exact, exact_grad = test_losses.evaluate(loss, z.double(), teacher.double(), impl="reference")
    plain, plain_grad = test_losses.evaluate(loss, z.cuda(), teacher.cuda(), impl="reference")
    assert grad.is_cuda
    if "svd" in name:  # float32 Gram matrices
        assert found.item() == pytest.approx(exact.item(), rel=1e-4)
        assert (grad.cpu().double() - exact_grad).norm() < 1e-2 * exact_grad.norm()
    else:
        assert_within_budget(found.detach().cpu(), plain.detach().cpu(), exact.detach(), torch.float32, "value")
        assert_within_budget(grad.cpu(), plain_grad.cpu(), exact_grad, dtype, "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", test_head.KINDS)
def test_a_head(kind, dtype):
    inputs, other, teacher, labels = test_head.tensors(kind, dtype)
    device = {name: t.cuda() for name, t in inputs.items()}, other, teacher.cuda(), labels.cuda()
    found, grads = test_head.evaluate(*device, ALL_TERMS, "streaming")
    _, plain = test_head.evaluate(*device, ALL_TERMS, "reference")
    exact, exact_grads = test_head.evaluate(inputs, other, teacher, labels, ALL_TERMS, "reference", wide=True)
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=5e-3 if dtype == torch.bfloat16 else 1e-4)
    for name, grad in grads.items():
        size = exact_grads[name].abs().max()
        error = (grad.cpu().double() - exact_grads[name]).abs().max()
        plain_error = (plain[name].cpu().double() - exact_grads[name]).abs().max()
        assert error <= 2 * (plain_error + max(torch.finfo(dtype).eps, 1e-5) * size), name


@pytest.mark.parametrize("case", test_randomized_svd.CASES)
def test_leading_triplets(case):
    a, rank, _ = test_randomized_svd.CASES[case]
    a = a.float() if a.abs().max() < 1e30 and not 0 < a.abs().max() < 1e-30 else a
    u, s, vh = F.randomized_svd(a.cuda(), rank, n_iter=4)
    exact = torch.linalg.svdvals(a.double())[: len(s)]
    assert (s.cpu() - exact).abs().max() <= 1e-5 * exact.max()
    test_randomized_svd.assert_orthonormal(u.cpu(), vh.cpu())
