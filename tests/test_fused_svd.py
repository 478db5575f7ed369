"""The SVD term under a soft cap with the Triton kernels, in their interpreter: the path of half precision."""

from dataclasses import replace

import pytest
import torch

from balora import LinearHead, fused, reference

from . import test_head
from .conftest import ALL_TERMS, only, problem, there

pytest.importorskip("triton")
tiles = pytest.importorskip("balora_kernels.tiles")
rows = pytest.importorskip("balora_kernels.rows")

DTYPES = [torch.bfloat16, torch.float16]


def _spectrum(kind, n, vocab, dtype):
    """A soft-capped problem whose logits have such singular values."""
    hidden, teacher, weight, labels = problem(n, 64, vocab, scale=2.0, ignored=2)
    if kind == "one dominates":  # σ_2 and σ_10 are 5 % and 4 % of σ_1
        hidden = hidden[:1] + 0.3 * hidden
    elif kind == "decaying":
        hidden *= torch.logspace(0.7, -2, 64, dtype=torch.float64)
    elif kind == "rank 3":
        hidden = hidden[:3].repeat(-(-n // 3), 1)[:n]
    elif kind == "zero":
        hidden = 0 * hidden
    inputs = dict(hidden=hidden.to(dtype), weight=weight.to(dtype))
    return inputs, dict(softcap=4.0, scale=-0.7), teacher.to(dtype), labels


def _svd_gradient(everything, config):
    """(value, gradient by the hidden states) of the soft-capped SVD term alone, the latter not rounded."""
    inputs, other, _, labels = everything
    hidden, weight, labels = there("triton", inputs["hidden"], inputs["weight"], labels)
    kept = (labels >= 0).nonzero().squeeze(-1)
    arguments = hidden, None, LinearHead(weight, **other), None, labels, kept, config, (True,) + (False,) * 4
    run_ = fused._Run(*arguments, None, torch.float32, masked=False)
    run_.grad_hidden = run_.grad_hidden.double()
    return run_.batch_terms().svd.item(), run_.grad_hidden.cpu() / (config.lambda_svd * len(kept))


def _exact_svd_gradient(everything, rank):
    inputs, other, _, labels = everything
    leaf = inputs["hidden"].double().requires_grad_()
    value = reference.svd(reference.logits(leaf[labels >= 0], inputs["weight"].double(), **other), rank)
    return value.item(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.no_cover
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 150), (150, 40)])
@pytest.mark.parametrize("kind", ["random", "one dominates", "decaying", "rank 3"])
def test_the_svd_term_under_a_soft_cap(kind, shape, dtype):
    """On tensor cores: Z Zᵀ from float16, dH and dW from a rounded gradient; σ of 0 count for nothing."""
    everything = _spectrum(kind, *shape, dtype)
    rank = 3 if kind == "rank 3" else 10
    config = only("svd", svd_rank=rank, lambda_svd=10.0)
    value, grad = _svd_gradient(everything, replace(config, svd_rank=10))
    exact, exact_grad = _exact_svd_gradient(everything, rank)
    assert value == pytest.approx(exact, rel=1e-5)
    assert (grad - exact_grad).norm() <= 2 * torch.finfo(dtype).eps * exact_grad.norm()


@pytest.mark.no_cover
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["one dominates", "zero"])
def test_all_terms_under_a_soft_cap(kind, dtype):
    everything = _spectrum(kind, 12, 70, dtype)
    for config in (only("svd", lambda_svd=10.0, svd_rank=4), ALL_TERMS):
        test_head.check(everything, config, dtype, by="triton", trained=("hidden", "weight"))


@pytest.mark.parametrize("change", [dict(svd_norm="nuclear"), dict(svd_variance=0.02), dict(svd_rank=0.3)], ids=str)
def test_other_svd_terms_under_a_soft_cap(change):
    everything = _spectrum("decaying", 8, 70, torch.float16)
    config = only("svd", **{"svd_rank": 3, **change})
    test_head.check(everything, config, torch.float16, by="triton", trained=("hidden", "weight"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(20, 300), (300, 20)])
def test_tiles_of_a_soft_capped_svd_term(monkeypatch, shape, dtype):
    """Several of them, the last one narrower, G·W in slices, and a gradient that float16 would flush to 0."""
    everything = _spectrum("decaying", *shape, dtype)
    config = only("svd", svd_rank=5, lambda_svd=1e-6)
    value, grad = _svd_gradient(everything, config)
    calls = []
    cap = rows.cap
    monkeypatch.setattr(rows, "cap", lambda *arguments: calls.append(arguments) or cap(*arguments))
    monkeypatch.setattr(fused, "CHUNK_BYTES", 20 * 6 * 128)
    monkeypatch.setattr(tiles, "vocabulary_slices", lambda rows, d, vocab: 1 if vocab % 2 else 2)
    parts, part_grad = _svd_gradient(everything, config)
    assert len(calls) == 2 * 3
    assert parts == pytest.approx(value, rel=1e-6)
    assert (part_grad - grad).norm() < 0.3 * torch.finfo(dtype).eps * grad.norm()
    _, exact_grad = _exact_svd_gradient(everything, 5)
    assert (grad - exact_grad).norm() < torch.finfo(dtype).eps * exact_grad.norm()


@pytest.mark.no_cover
def test_what_stays_in_float32_under_a_soft_cap(monkeypatch):
    """Other terms of the whole batch, heads with further columns, and float32 inputs."""
    monkeypatch.setattr(rows, "cap", None)
    for kind, dtype, config in (
        ("softcap", torch.bfloat16, replace(ALL_TERMS, diversity="covariance")),
        ("softcap", torch.bfloat16, replace(ALL_TERMS, consistency="normalized_mse")),
        ("everything", torch.bfloat16, ALL_TERMS),
        ("softcap", torch.float32, ALL_TERMS),
    ):
        everything = test_head.tensors(kind, dtype, n=7, vocab=31)
        assert test_head.evaluate(*everything, config, "triton")[0].svd < 0
    with pytest.raises(TypeError):
        test_head.evaluate(*test_head.tensors("softcap", torch.bfloat16, n=7, vocab=31), ALL_TERMS, "triton")
