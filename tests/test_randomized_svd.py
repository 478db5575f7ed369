"""The batched randomized SVD against a full decomposition in float64."""

import pytest
import torch

from balora import functional as F
from balora import spectral


def matrix(m, n, spectrum, dtype=torch.float64, seed=0):
    """A matrix with these singular values."""
    g = torch.Generator().manual_seed(seed)
    k = len(spectrum)
    u = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64)).Q
    return ((u * spectrum) @ v.T).to(dtype)


def decay(k, power):
    return torch.arange(1, k + 1, dtype=torch.float64) ** -power


def assert_orthonormal(u, vh):
    eye = torch.eye(u.shape[-1], dtype=u.dtype)
    tolerance = 200 * torch.finfo(u.dtype).eps
    assert (u.mT @ u - eye).abs().max() < tolerance
    assert (vh @ vh.mT - eye).abs().max() < tolerance


CASES = {
    "decaying": (matrix(120, 80, decay(80, 2.0)), 10, 1e-8),
    "wide": (matrix(80, 120, decay(80, 2.0)), 10, 1e-8),
    "clustered": (matrix(90, 70, torch.tensor([5.0] * 4 + [1.0] * 4 + [1e-3] * 40).double()), 8, 1e-9),
    "rank-deficient": (matrix(90, 70, decay(5, 1.0)), 12, 1e-12),
    "zero": (torch.zeros(9, 7, dtype=torch.float64), 3, 0.0),
    "ones": (torch.ones(40, 30, dtype=torch.float64), 30, 1e-12),
    "rank above what there is": (matrix(20, 12, decay(12, 1.0)), 99, 1e-12),
    "one column": (matrix(20, 1, decay(1, 1.0)), 5, 1e-12),
    "one row": (matrix(1, 20, decay(1, 1.0)), 5, 1e-12),
    "huge": (1e200 * matrix(40, 30, decay(30, 3.0)), 5, 1e-8),
    "tiny": (1e-200 * matrix(40, 30, decay(30, 3.0)), 5, 1e-8),
    "ill-conditioned": (matrix(300, 60, torch.logspace(0, -14, 60, dtype=torch.float64)), 60, 1e-12),
}


@pytest.mark.parametrize("case", CASES)
def test_singular_values_vectors_and_orthonormality(case):
    a, rank, tolerance = CASES[case]
    u, s, vh = F.randomized_svd(a, rank)
    k = min(rank, *a.shape)
    assert (u.shape, s.shape, vh.shape) == ((a.shape[0], k), (k,), (k, a.shape[1]))
    exact = torch.linalg.svdvals(a)[:k]
    size = exact.max()
    assert (s - exact).abs().max() <= tolerance * size
    assert (s[:-1] >= s[1:]).all()
    assert_orthonormal(u, vh)
    # each triplet is one of A's: A v = σ u, to the accuracy of the subspace
    assert (a @ vh.mT - u * s).abs().max() <= max(1e-5 * size, 1e-300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_types(dtype):
    a = matrix(150, 90, decay(90, 1.0)).to(dtype)
    u, s, vh = F.randomized_svd(a, 10, n_iter=4)
    assert u.dtype == s.dtype == vh.dtype == torch.float32
    exact = torch.linalg.svdvals(a.double())[:10]
    assert (s - exact).abs().max() < 1e-6 * exact[0]
    assert_orthonormal(u, vh)
    deficient = matrix(5000, 60, decay(3, 1.0)).to(dtype)
    u, _, vh = F.randomized_svd(deficient if dtype == torch.float32 else 0 * deficient, 40)
    assert_orthonormal(u, vh)


def test_entries_at_the_ends_of_float32():
    a = matrix(120, 80, decay(80, 2.0), torch.float32)
    _, s, _ = F.randomized_svd(a, 5)
    for size in (1e37, 1e-35):
        u, scaled, vh = F.randomized_svd(a / a.abs().max() * size, 5)
        torch.testing.assert_close(scaled / size, s / a.abs().max(), rtol=1e-4, atol=0)
        assert_orthonormal(u, vh)


def test_the_gradient_inside_autocast():
    a = matrix(20, 12, decay(12, 1.0), torch.float32).requires_grad_()
    (outside,) = torch.autograd.grad(F.randomized_svd(a, 3)[1].sum(), a)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = torch.autograd.grad(F.randomized_svd(a, 3)[1].sum(), a)
    assert torch.equal(inside, outside)


def test_the_subspace_of_a_decaying_spectrum():
    a = matrix(200, 150, decay(150, 1.0))
    u, _, vh = F.randomized_svd(a, 10, n_iter=6)
    exact_u, _, exact_vh = torch.linalg.svd(a)
    for found, exact in ((u, exact_u[:, :10]), (vh.mT, exact_vh[:10].mT)):
        sines = (1 - torch.linalg.svdvals(found.mT @ exact) ** 2).clamp_min(0).sqrt()
        assert sines.max() < 1e-3  # (σ_21/σ_10)^13 is 7e-5


def test_more_iterations_are_more_accurate_than_few_and_than_svd_lowrank_at_the_same_cost():
    a = matrix(300, 200, decay(200, 0.5))
    exact = torch.linalg.svdvals(a)[:10]
    error = [((F.randomized_svd(a, 10, n_iter=i)[1] - exact) / exact).abs().max() for i in (0, 1, 2, 4, 8)]
    assert sorted(error, reverse=True) == error
    torch.manual_seed(0)
    peer = torch.svd_lowrank(a, q=20, niter=2)[1][:10]
    assert error[2] < 2 * ((peer - exact) / exact).abs().max()


def test_a_batch_is_its_matrices_and_the_same_bits_every_time():
    a = torch.stack([matrix(30, 20, decay(20, p), seed=i) for i, p in enumerate((0.2, 1.0, 3.0, 1.0, 2.0, 0.5))])
    a[3] = 0
    u, s, vh = F.randomized_svd(a.view(2, 3, 30, 20), 4, seed=7)
    assert (u.shape, s.shape, vh.shape) == ((2, 3, 30, 4), (2, 3, 4), (2, 3, 4, 20))
    for i in range(6):
        alone = F.randomized_svd(a[i], 4, seed=7)
        torch.testing.assert_close(alone[1], s.view(6, 4)[i])
        torch.testing.assert_close((alone[0] * alone[1]) @ alone[2], ((u * s[..., None, :]) @ vh).view(6, 30, 20)[i])
    again = F.randomized_svd(a.view(2, 3, 30, 20), 4, seed=7)
    assert all(torch.equal(x, y) for x, y in zip((u, s, vh), again, strict=True))
    other = F.randomized_svd(a.view(2, 3, 30, 20), 4, seed=8)
    assert not torch.equal(other[1], s)
    empty = F.randomized_svd(a[:0], 4)
    assert [t.shape for t in empty] == [(0, 30, 4), (0, 4), (0, 4, 20)]


def test_nan_stays_in_its_matrix():
    a = torch.stack([matrix(9, 7, decay(7, 1.0)), matrix(9, 7, decay(7, 1.0)), matrix(9, 7, decay(7, 1.0))])
    a[0, 2, 3], a[2, 0, 0] = torch.nan, torch.inf
    for t in F.randomized_svd(a, 3):
        assert t[0].isnan().all()
        assert t[2].isnan().all()
        assert t[1].isfinite().all()


def test_a_product_that_overflows_is_nan():
    a = torch.stack([torch.full((3, 3), 3e38), matrix(3, 3, decay(3, 1.0), torch.float32)])
    for t in F.randomized_svd(a, 2):
        assert t[0].isnan().all()
        assert t[1].isfinite().all()


def test_the_gradient_of_the_singular_values():
    a = matrix(9, 7, torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5]).double()).requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.5]).double()
    assert torch.autograd.gradcheck(lambda x: (F.randomized_svd(x, 3)[1] * weights).sum(), a)
    (F.randomized_svd(a, 3, impl="reference")[1] * weights).sum().backward()
    exact, a.grad = a.grad, None
    u, s, vh = F.randomized_svd(a, 3)
    (s * weights).sum().backward()
    torch.testing.assert_close(a.grad, exact)
    assert not u.requires_grad
    assert not vh.requires_grad
    zero = torch.zeros(2, 4, 3, requires_grad=True)
    F.randomized_svd(zero, 2)[1].sum().backward()
    assert not zero.grad.any()
    narrow = a.detach().bfloat16().requires_grad_()
    F.randomized_svd(narrow, 3)[1].sum().backward()
    assert narrow.grad.dtype == torch.bfloat16


def test_real_weights(stories15m):
    from safetensors.torch import load_file

    weights = load_file(stories15m / "model.safetensors")
    stack = torch.stack([w for name, w in weights.items() if "q_proj" in name])  # [6, 288, 288]
    _, s, _ = F.randomized_svd(stack, 16, n_iter=8)
    exact = torch.linalg.svdvals(stack.double())[:, :16]
    assert ((s - exact) / exact).abs().max() < 1e-2  # a flat tail: σ_27/σ_16 is about 0.85


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=str)
def test_orthonormal_rows_of_dependent_ones(dtype, tolerance):
    y = torch.randn(1, 1, 400, generator=torch.Generator().manual_seed(0), dtype=dtype).expand(2, 30, 400).clone()
    y[1] = 0
    q = spectral.orthonormal(y, torch.Generator().manual_seed(1))
    assert (q @ q.mT - torch.eye(30)).abs().max() < tolerance
    long = torch.ones(1, 40, 60000, dtype=dtype)
    q = spectral.orthonormal(long, torch.Generator().manual_seed(1))
    assert (q @ q.mT - torch.eye(40)).abs().max() < tolerance
    square = torch.ones(3, 40, 40, dtype=dtype)
    q = spectral.orthonormal(square, torch.Generator().manual_seed(1))
    assert (q @ q.mT - torch.eye(40)).abs().max() < tolerance
    assert spectral.orthonormal(y[:0], torch.Generator()).shape == (0, 30, 400)


BAD = {
    "type": (dict(a=[1.0]), TypeError, "a: expected a floating-point tensor"),
    "shape": (dict(a=torch.ones(3)), ValueError, r"a: expected the shape \[..., m, n\]"),
    "empty": (dict(a=torch.ones(3, 0)), ValueError, r"a: expected the shape \[..., m, n\]"),
    "rank": (dict(rank=0), ValueError, "rank: expected at least 1, found 0"),
    "rank type": (dict(rank=0.5), TypeError, "rank: expected a whole number, found 0.5"),
    "oversample": (dict(oversample=-1), ValueError, "oversample: expected at least 0, found -1"),
    "seed size": (dict(seed=2**63), ValueError, r"seed: expected a number below 2\*\*63"),
    "8 bits": (dict(a=torch.ones(3, 3).to(torch.float8_e5m2)), TypeError, "a: expected a floating-point tensor"),
    "n_iter": (dict(n_iter=1.0), TypeError, "n_iter: expected a whole number, found 1.0"),
    "seed": (dict(seed=None), TypeError, "seed: expected a whole number"),
    "impl": (dict(impl="streaming"), ValueError, "impl: expected 'auto' or 'cuda' or 'torch' or 'reference' for rand"),
    "cuda": (dict(impl="cuda"), ValueError, "impl: 'cuda' cannot run here: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        F.randomized_svd(**{"a": torch.ones(3, 3), "rank": 2, **changes})
