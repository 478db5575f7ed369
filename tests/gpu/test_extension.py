"""The compiled extension on a CUDA device: the kernels, and ATen where a sketch is too wide for them."""

import pytest
import torch

from balora import dispatch
from balora import functional as F

from ..test_randomized_svd import CASES, assert_orthonormal, decay, matrix

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def ops():
    """The operators."""
    if reasons := dispatch.why_not("cuda", torch.device("cuda")):
        pytest.skip("; ".join(reasons))
    return torch.ops.balora


def assert_svd_of(a, found, rank, tolerance=1e-5):
    """found is U, S, Vh and ‖A‖² of each matrix of a [..., m, n], which are on the CPU in the type they had."""
    u, s, vh, squares = (t.cpu() for t in found)
    exact = torch.linalg.svdvals(a.double())
    k = min(rank, *a.shape[-2:])
    assert (u.shape, s.shape) == ((*a.shape[:-1], k), (*a.shape[:-2], k))
    assert (vh.shape, squares.shape) == ((*a.shape[:-2], k, a.shape[-1]), a.shape[:-2])
    size = exact[..., :1]
    assert ((s - exact[..., :k]).abs() <= tolerance * size).all()
    assert_orthonormal(u, vh)
    assert ((a.to(s.dtype) @ vh.mT - u * s[..., None, :]).abs() <= 2 * tolerance * size[..., None]).all()
    torch.testing.assert_close(squares, exact.square().sum(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("view", ["plain", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("huge", "tiny")])
def test_randomized_svd(ops, case, dtype, view):
    a, rank, _ = CASES[case]
    a = a.to(dtype)
    there = a.cuda()
    if view == "transposed":
        there = there.T.contiguous().T
    elif view == "strided":
        there = torch.stack([there, torch.full_like(there, torch.nan)], dim=-1)[..., 0]
    assert_svd_of(a, ops.randomized_svd(there, rank, 10, 4, 0), rank)


@pytest.mark.parametrize("case", ["huge", "tiny"])
def test_entries_at_the_ends(ops, case):
    a, rank, _ = CASES[case]
    found = ops.randomized_svd(a.cuda(), rank, 10, 4, 0)[1].cpu()
    torch.testing.assert_close(found, torch.linalg.svdvals(a)[:rank], rtol=1e-6, atol=0)
    a = matrix(120, 80, decay(80, 2.0), torch.float32).cuda()
    size = (1e37 if case == "huge" else 1e-35) / a.abs().max()
    s, scaled = (ops.randomized_svd(x, 5, 10, 2, 0)[1] for x in (a, a * size))
    torch.testing.assert_close(scaled / size, s, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 64, 131, 300])
def test_batches_the_same_bits_every_time(ops, batch, dtype):
    one = torch.stack([matrix(70, 50, decay(50, 2 + i % 3), seed=i) for i in range(batch)]).to(dtype)
    found = ops.randomized_svd(one.cuda(), 6, 10, 4, 3)
    assert_svd_of(one, found, 6)
    again = ops.randomized_svd(one.cuda(), 6, 10, 4, 3)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    assert not torch.equal(
        ops.randomized_svd(one.cuda(), 6, 10, 0, 4)[1], ops.randomized_svd(one.cuda(), 6, 10, 0, 3)[1]
    )


@pytest.mark.parametrize("rank", [20, 64, 65, 128])
@pytest.mark.parametrize(("m", "n"), [(400, 300), (300, 1500)])
def test_wider_sketches(ops, m, n, rank):
    a = torch.stack([matrix(m, n, decay(300, 2.0), seed=i) for i in range(3)]).float()
    assert_svd_of(a, ops.randomized_svd(a.cuda(), rank, 10, 2, 0), rank)
    assert_svd_of(a, ops.randomized_svd(a.cuda(), rank, 0, 6, 0), rank, 1e-3)


# Panels of 16 and of 48 columns (the latter are PiSSA's at rank 16); of bf16 with 16 and 300 rows, one reading.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(300, 700), (700, 300), (520, 1500)])
@pytest.mark.parametrize(("rank", "oversample"), [(5, 11), (10, 23), (16, 20), (20, 28)])
def test_widths_between(ops, rank, oversample, m, n, dtype):
    a = torch.stack([matrix(m, n, decay(300, 2.0), seed=i) for i in range(3)]).to(dtype)
    assert_svd_of(a, ops.randomized_svd(a.cuda(), rank, oversample, 4, 0), rank)


def test_a_batch_taken_in_parts(ops):
    """Of 1,000 matrices: the workspace of 2,000 would be above 512 MB."""
    a = torch.randn(2_000, 128, 128, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    a *= torch.arange(1, 129, device="cuda") ** -1.0
    u, s, vh, squares = ops.randomized_svd(a, 54, 10, 4, 0)
    torch.testing.assert_close(squares, a.double().square().sum((1, 2)), rtol=1e-6, atol=0)
    for i in (0, 999, 1_000, 1_999):
        assert_svd_of(a[i].cpu(), (u[i], s[i], vh[i], squares[i]), 54, 1e-3)
        torch.testing.assert_close(s[i], ops.randomized_svd(a[i], 54, 10, 4, 0)[1], rtol=1e-4, atol=1e-5)


def test_a_side_stream(ops):
    a = torch.randn(3, 300, 400, device="cuda").bfloat16()
    expected = ops.randomized_svd(a, 8, 8, 2, 0)
    updated = ops.low_rank_update(a, *expected[:3], expected[3].float())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(a)
        torch.cuda._sleep(100_000_000)  # another stream would read zeros
        late.copy_(a)
        found = ops.randomized_svd(late, 8, 8, 2, 0)
        again = ops.low_rank_update(late, *found[:3], found[3].float())
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip((*found, again), (*expected, updated), strict=True))


# Many tiles and slices, whole and in part; rows that do not begin on 16 bytes; of bf16 with 20 columns and 129 to 512
# rows, one reading an iteration.
@pytest.mark.parametrize("oversample", [10, 54])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 2048, 32000), (3, 512, 2048), (5, 300, 1999), (5, 300, 2000), (1, 5000, 130), (1, 3, 70000)], ids=str
)
def test_large_matrices(ops, shape, dtype, oversample):
    a = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    a = (a * torch.arange(1, shape[2] + 1, device="cuda") ** -0.7).to(dtype)
    u, s, vh, squares = ops.randomized_svd(a, 10, oversample, 8, 0)  # of 4 iterations the sketch leaves 1e-4
    exact_squares = a.double().square().sum((1, 2))
    torch.testing.assert_close(squares, exact_squares, rtol=1e-6, atol=0)
    assert_orthonormal(u.cpu(), vh.cpu())
    wide = a.double()
    gram = wide @ wide.mT if shape[1] < shape[2] else wide.mT @ wide
    exact = torch.linalg.eigvalsh(gram).flip(-1)[:, : s.shape[1]].clamp_min(0).sqrt()
    torch.manual_seed(0)  # at the same cost
    peer = torch.svd_lowrank(a.float(), q=min(10 + oversample, *shape[1:]), niter=8)[1][:, : s.shape[1]]
    allowed = 2 * (peer - exact).abs().amax(1, keepdim=True) + 1e-5 * exact[:, :1]
    assert ((s - exact).abs() <= allowed).all()


def test_ten_thousand_matrices(ops):
    a = torch.randn(10_000, 12, 9, device="cuda")
    s = ops.randomized_svd(a, 9, 0, 0, 0)[1]
    assert (s - torch.linalg.svdvals(a.double())).abs().max() < 1e-4


def test_more_than_two_to_the_31_entries(ops):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    a = torch.zeros(70_000, 32_000, dtype=torch.bfloat16, device="cuda")
    a[-1, -1] = 3.0
    a[-2, 5] = 2.0
    u, s, vh, squares = ops.randomized_svd(a, 2, 10, 1, 0)
    torch.testing.assert_close(s.cpu(), torch.tensor([3.0, 2.0]))
    assert u[-1, 0].abs() > 0.999
    assert vh[0, -1].abs() > 0.999
    assert squares.item() == 13.0
    out = ops.low_rank_update(a, u, s, vh, torch.ones((), device="cuda"))
    assert out[-1, -1].item() == pytest.approx(6.0, rel=1e-2)


def test_nothing_waits_for_the_device(ops):
    a = torch.randn(8, 300, 200, device="cuda")
    z = torch.randn(600, 900, device="cuda", requires_grad=True)
    ops.randomized_svd(a, 100, 10, 2, 0)  # loads the libraries
    F.svd_loss(z, impl="cuda").backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, rank in ((a, 16), (a.bfloat16(), 16), (a.mT, 16), (a, 100), (a.double(), 16)):
            u, s, vh, squares = ops.randomized_svd(x, rank, 10, 2, 0)
            ops.low_rank_update(x, u, s, vh, squares.to(s.dtype))
        F.svd_loss(z, impl="cuda").backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph(ops):
    a = torch.randn(5, 90, 70, device="cuda")
    expected = ops.randomized_svd(a, 8, 10, 2, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.randomized_svd(a, 8, 10, 2, 0)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_nan_stays_in_its_matrix(ops):
    for rank in (3, 80):
        a = torch.stack([matrix(100, 90, decay(90, 1.0), torch.float32)] * 3).cuda()
        a[0, 2, 3], a[2, 0, 0] = torch.nan, torch.inf
        for t in ops.randomized_svd(a, rank, 10, 2, 0)[:3]:
            assert t[0].isnan().all()
            assert t[2].isnan().all()
            assert t[1].isfinite().all()
    assert [t.shape for t in ops.randomized_svd(a[:0], 4, 10, 2, 0)] == [(0, 100, 4), (0, 4), (0, 4, 90), (0,)]


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize(("shape", "k"), [((), 3), ((3,), 64), ((2, 3), 100), ((0,), 2)])
def test_low_rank_update(ops, dtype, shape, k):
    wide = torch.promote_types(dtype, torch.float32)
    g = torch.Generator().manual_seed(0)
    sizes = ((130, 70), (130, k), (k,), (k, 70), ())
    z, *factors = (torch.randn((*shape, *last), generator=g, dtype=wide).cuda() for last in sizes)
    z = z.to(dtype)
    u, weights, vh, multiple = factors
    exact = multiple[..., None, None].double() * z.double() + (u * weights[..., None, :]).double() @ vh.double()
    for view in (z, z.mT.contiguous().mT):
        found = ops.low_rank_update(view, u, weights, vh, multiple)
        assert found.dtype == dtype
        assert found.is_contiguous()
        tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance * k**0.5)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_auto_takes_it_with_the_gradient_of_the_reference(ops, dtype):
    a = torch.stack([matrix(90, 70, decay(70, 2.0), seed=i) for i in range(3)]).to(dtype).cuda().requires_grad_()
    assert dispatch.choose("randomized_svd", device=a.device) == "cuda"
    weights = torch.tensor([1.0, -2.0, 0.5], device="cuda", dtype=torch.float64)
    (F.randomized_svd(a, 3)[1] * weights).sum().backward()
    wide = a.detach().double().requires_grad_()
    (F.randomized_svd(wide, 3, impl="reference")[1] * weights).sum().backward()
    assert a.grad.dtype == dtype
    assert (a.grad - wide.grad).norm() <= max(1e-3, torch.finfo(dtype).eps) * wide.grad.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 512), (913, 4000), (1000, 7)], ids=str)
def test_svd_loss(ops, shape, dtype):
    z = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    z = (z * torch.arange(1, shape[1] + 1, device="cuda") ** -0.7).to(dtype)
    valid = torch.arange(shape[0], device="cuda") % 4 > 0
    for chosen in (None, valid):
        leaf, wide = z.clone().requires_grad_(), z.double().requires_grad_()
        value = F.svd_loss(leaf, 5, valid=chosen, impl="cuda")
        exact = F.svd_loss(wide, 5, valid=chosen, impl="reference")
        value.backward()
        exact.backward()
        assert value.item() == pytest.approx(exact.item(), rel=1e-5)
        assert leaf.grad.dtype == dtype
        rounded = (wide.grad.to(dtype) - wide.grad).norm()
        assert (leaf.grad - wide.grad).norm() <= 2 * rounded + 1e-3 * wide.grad.norm()


def test_what_torch_checks_of_an_operator(ops):
    a = torch.randn(3, 12, 9, device="cuda")
    torch.library.opcheck(ops.randomized_svd.default, (a, 3, 2, 2, 0))
    u, s, vh, _ = ops.randomized_svd(a, 3, 2, 2, 0)
    torch.library.opcheck(ops.low_rank_update.default, (a, u, s, vh, torch.ones_like(s[..., 0])))
