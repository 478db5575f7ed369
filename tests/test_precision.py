"""Products of float32 operands where torch is told that ten bits of them are enough (TF32)."""

import contextlib

import pytest
import torch

from balora import functional as F
from balora import spectral
from balora.config import BALoraConfig
from balora.precision import float32_products

MATMUL = torch.backends.cuda.matmul


def settings():
    """All that torch says about it; None where it refuses to say."""
    found = [MATMUL.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    for ask in (lambda: MATMUL.allow_tf32, torch.get_float32_matmul_precision):
        with contextlib.suppress(RuntimeError):
            found.append(ask())
            continue
        found.append(None)
    return found


def uses_tf32():
    return MATMUL.fp32_precision == "tf32"


def by_allow_tf32():
    MATMUL.allow_tf32 = True


def by_generic():
    torch.backends.fp32_precision = "tf32"


def by_matmul():
    MATMUL.fp32_precision = "tf32"


WAYS = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": by_allow_tf32,
    "backends": by_generic,
    "matmul": by_matmul,
}


@pytest.fixture(params=WAYS)
def way(request):
    WAYS[request.param]()
    yield request.param
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    MATMUL.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_tf32_is_off_for_a_while_and_then_as_before(way):
    before = settings()
    assert uses_tf32() == (way != "nothing")
    for _ in range(2):
        with float32_products():
            assert not uses_tf32()
            inside = settings()
            with float32_products():
                assert settings() == inside
        assert settings() == before
    with pytest.raises(ZeroDivisionError), float32_products():
        raise ZeroDivisionError
    assert settings() == before


@pytest.mark.parametrize("way", ["backends"], indirect=True)
def test_where_singular_values_come_from_no_product_is_in_tf32(way, monkeypatch):
    """Which the products with the vocabulary are, as the user wants them."""
    seen = []

    def spy(name, function):
        def call(*args, **kwargs):
            seen.append((name, uses_tf32()))
            return function(*args, **kwargs)

        return call

    for name in ("_eigh", "_factor", "orthonormal"):
        monkeypatch.setattr(spectral, name, spy(name, getattr(spectral, name)))
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", spy("logits", multiply))
    hidden = torch.randn(7, 12, requires_grad=True)
    head = F.LinearHead(torch.randn(30, 12))
    F.linear_objective(hidden, torch.randn(7, 12), head, torch.arange(7), BALoraConfig(lambda_svd=0.1)).loss.backward()
    F.svd_loss(torch.randn(6, 9, requires_grad=True), 2).backward()
    F.randomized_svd(torch.randn(6, 9), 2)
    assert set(seen) == {("_eigh", False), ("_factor", False), ("orthonormal", False), ("logits", True)}
    assert uses_tf32()


@pytest.mark.parametrize("way", ["nothing", "backends"], indirect=True)
def test_losses_that_torch_compile_traces(way):
    z = torch.randn(6, 9, requires_grad=True)
    torch._dynamo.reset()
    found = torch.compile(F.covariance_loss, fullgraph=True, backend="aot_eager")(z)
    torch.testing.assert_close(found, F.covariance_loss(z))
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (found, F.covariance_loss(z))))

    def values(a):
        return F.randomized_svd(a, 2, impl="reference")[1]

    torch.testing.assert_close(torch.compile(values, fullgraph=True, backend="aot_eager")(z), values(z))
