"""The principal parts of weights: grouping, the factors of each weight, exact and randomized, on real weights too."""

import pytest
import torch
from safetensors.torch import load_file

from balora import principal


def weights(count, m, n, dtype=torch.float32, seed=0):
    """Random matrices with a decaying spectrum on a flat one."""
    g = torch.Generator().manual_seed(seed)
    k = min(m, n)
    decay = torch.arange(1, k + 1) ** -1.0
    low = (torch.randn(count, m, k, generator=g) * decay) @ torch.randn(count, k, n, generator=g)
    return list(((low + torch.randn(count, m, n, generator=g)) / max(m, n) ** 0.5).to(dtype))


def record(monkeypatch):
    """The (shape, rank, n_iter) of every call of the randomized SVD."""
    calls = []
    original = principal.randomized_svd

    def recorded(a, rank, oversample, n_iter):
        calls.append((tuple(a.shape), rank, n_iter))
        return original(a, rank, oversample, n_iter)

    monkeypatch.setattr(principal, "randomized_svd", recorded)
    return calls


def excess(w, b0, a0, s=1.0):
    """How far ‖W − s·B₀A₀‖_F is above the least that the rank allows, relative to it."""
    w = w.double()
    least = torch.linalg.svdvals(w)[len(a0) :].norm()
    return ((w - s * b0.double() @ a0.double()).norm() / least - 1).item()


def test_batches_have_one_shape_type_and_rank_and_keep_the_order():
    tall, square, half = torch.zeros(6, 4), torch.zeros(5, 5), torch.zeros(5, 5).half()
    stored = [tall, square, half, tall, square, tall, tall]
    ranks = [2, 2, 2, 2, 2, 3, 2]
    assert principal.batches(stored, ranks, 2**20) == [[0, 3, 6], [1, 4], [2], [5]]
    assert principal.batches(stored, ranks, 2 * 6 * 4 * 4) == [[0, 3], [6], [1], [4], [2], [5]]  # 5·5·4 bytes: one
    assert principal.batches(stored, ranks, 1) == [[0], [3], [6], [1], [4], [2], [5]]
    # half precision counts as the float32 of its decomposition, float64 as itself
    assert len(principal.batches([half] * 4, [1] * 4, 2 * 25 * 4)) == 2
    assert len(principal.batches([square.double()] * 4, [1] * 4, 2 * 25 * 8)) == 2
    assert principal.batches([], [], 1) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("m", "n"), [(40, 24), (200, 180)], ids=["exact", "randomized"])
def test_each_weight_gets_its_own_factors(m, n, dtype, monkeypatch):
    calls = record(monkeypatch)
    ws, scalings = weights(3, m, n, dtype), [0.5, 1.0, 3.0]
    found = principal.factors(ws, 6, scalings)
    assert calls == ([] if m == 40 else [((3, m, n), 6, 10)])
    for w, s, (b0, a0) in zip(ws, scalings, found, strict=True):
        assert (b0.shape, a0.shape) == ((m, 6), (6, n))
        assert b0.dtype == a0.dtype == dtype
        for t in (b0, a0):
            assert t.is_contiguous()
            assert t.untyped_storage().nbytes() == t.nbytes  # not a piece of the batch
        assert -1e-6 < excess(w, b0, a0, s) < 1e-3
        sigma = torch.linalg.svdvals(w.double())[:6]
        rounding = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-4)  # the σ of a sketch converge fast
        for gram in (b0.double().T @ b0.double(), a0.double() @ a0.double().T):
            torch.testing.assert_close(s * gram, sigma.diag(), rtol=rounding, atol=rounding * sigma[0].item())


def test_the_sketch_is_taken_where_it_is_narrow_or_asked_for(monkeypatch):
    calls = record(monkeypatch)
    for m, n, r, n_iter, expected in [
        (112, 200, 8, None, 10),  # a sketch of 28, a quarter of 112
        (111, 200, 8, None, None),
        (40, 40, 40, None, None),
        (40, 40, 40, 3, 3),
        (112, 200, 8, 1, 1),
    ]:
        calls.clear()
        principal.factors(weights(1, m, n), r, [1.0], n_iter)
        assert calls == ([] if expected is None else [((1, m, n), r, expected)])


def test_more_iterations_are_nearer_to_the_least_error():
    w = weights(1, 300, 300)
    errors = [excess(w[0], *principal.factors(w, 16, [1.0], n_iter)[0]) for n_iter in (1, 3, 10)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3 > 1e-4 > errors[2]


@pytest.mark.parametrize(("m", "n", "r"), [(40, 24, 4), (300, 300, 16)], ids=["exact", "randomized"])
def test_the_same_bits_every_time_and_the_same_product_in_other_batches(m, n, r):
    ws = weights(5, m, n)
    once, again = (principal.factors(ws, r, [1.0] * 5) for _ in range(2))
    alone = [principal.factors([w], r, [1.0])[0] for w in ws]
    for (b0, a0), (b1, a1), (b2, a2) in zip(once, again, alone, strict=True):
        assert torch.equal(b0, b1)
        assert torch.equal(a0, a1)
        torch.testing.assert_close(b2 @ a2, b0 @ a0, rtol=1e-4, atol=1e-5)


def test_a_single_weight_is_not_copied():
    w = torch.ones(3, 4)
    assert principal._stacked([w], w.device).data_ptr() == w.data_ptr()
    stack = principal._stacked([w, 2 * w.T.contiguous().T], w.device)
    assert torch.equal(stack, torch.stack([w, 2 * w]))


def test_weights_that_require_a_gradient_give_factors_that_do_not():
    w = torch.nn.Parameter(weights(1, 120, 120)[0])
    for n_iter in (None, 2):
        assert not any(t.requires_grad for t in principal.factors([w], 3, [1.0], n_iter)[0])


@pytest.mark.parametrize("r", [8, 64])
def test_real_weights(stories15m, r):
    """Within 1e-3 of the least error, and of peft's 16 iterations not worse; the leading directions are there."""
    checkpoint = load_file(stories15m / "model.safetensors")
    for name in ("q_proj", "o_proj", "gate_proj", "down_proj"):
        ws = [w.float() for key, w in checkpoint.items() if name in key]
        found, exact = (principal.factors(ws, r, [1.0] * len(ws), n_iter) for n_iter in (10, None))
        ours, peers = [], []
        torch.manual_seed(0)
        for w, (b0, a0) in zip(ws, found, strict=True):
            ours.append(excess(w, b0, a0))
            u, s, v = torch.svd_lowrank(w, q=r, niter=16)
            peers.append(excess(w, u * s, v.T))
            leading = torch.linalg.svd(w)[0][:, : r // 2]
            cosines = torch.linalg.svdvals(leading.T @ torch.linalg.qr(b0).Q)
            assert (1 - cosines**2).clamp_min(0).sqrt().max() < 0.05
        assert max(ours) < 1e-3
        assert sum(ours) <= sum(peers)
        if r == 64:  # a full decomposition
            assert max(excess(w, *pair) for w, pair in zip(ws, exact, strict=True)) < 1e-6


def test_weights_without_decay():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(700, 500, generator=g) / 25
    assert excess(w, *principal.factors([w], 32, [1.0], 10)[0]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("m", "n"), [(40, 24), (24, 40), (24, 24)])
def test_errors_are_those_of_the_singular_values(m, n, dtype, monkeypatch):
    monkeypatch.setattr(principal, "_ROWS", 7)  # W is read in parts
    w = weights(1, m, n, dtype)[0]
    b0, a0 = principal.factors([w], 5, [0.5])[0]
    b0 = 1.1 * b0  # away from the least
    error, least = principal.errors(w, b0, a0, 0.5)
    w = w.double()
    assert error == pytest.approx(((w - 0.5 * b0.double() @ a0.double()).norm() / w.norm()).item(), rel=1e-12)
    assert least == pytest.approx((torch.linalg.svdvals(w)[5:].norm() / w.norm()).item(), rel=1e-12)
    assert error > 1.01 * least


def test_errors_of_weights_that_a_rank_can_hold():
    g = torch.Generator().manual_seed(0)
    b0, a0 = torch.randn(30, 3, generator=g).double(), torch.randn(3, 20, generator=g).double()
    error, least = principal.errors(2 * b0 @ a0, b0, a0, 2.0)
    assert error < 1e-15
    assert least < 1e-7
    assert principal.errors(torch.zeros(4, 3), torch.zeros(4, 1), torch.zeros(1, 3), 1.0) == (0, 0)
    error, least = principal.errors(torch.eye(4), torch.zeros(4, 4), torch.zeros(4, 4), 1.0)
    assert (error, least) == (1, 0)
