"""The losses on logits: values and gradients against the reference in float64, awkward logits, memory, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balora import batch, dispatch, losses, reference, rows, spectral, streaming
from balora import functional as F

from .conftest import assert_within_budget, there

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOSSES = {
    "consistency": lambda z, t, **k: F.consistency_loss(z, t, **k),
    "consistency at T = 1": lambda z, t, **k: F.consistency_loss(z, t, temperature=1.0, **k),
    "consistency at T = 0.7": lambda z, t, **k: F.consistency_loss(z, t, temperature=0.7, **k),
    "diversity": lambda z, t, **k: F.diversity_loss(z, top_k=5, **k),
    "svd": lambda z, t, **k: F.svd_loss(z, rank=3, **k),
    "svd nuclear": lambda z, t, **k: F.svd_loss(z, rank=0.3, norm="nuclear", **k),
}


def logits(n, vocab, dtype=torch.float64, distance=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(n, vocab, generator=g, dtype=torch.float64)
    return z.to(dtype), (z + distance * torch.randn(n, vocab, generator=g, dtype=torch.float64)).to(dtype)


def evaluate(loss, z, teacher, **kwargs):
    leaf = z.detach().clone().requires_grad_()
    used, teacher, kwargs["valid"] = there(kwargs.get("impl"), leaf, teacher, kwargs.get("valid"))
    if kwargs["valid"] is None:
        del kwargs["valid"]
    value = loss(used, teacher, **kwargs)
    value.backward()
    return value.to(z.device), leaf.grad


def check(loss, z, teacher, dtype, by="streaming", **kwargs):
    found, grad = evaluate(loss, z, teacher, impl=by, **kwargs)
    plain, plain_grad = evaluate(loss, z, teacher, impl="reference", **kwargs)
    exact, exact_grad = evaluate(loss, z.double(), teacher.double(), impl="reference", **kwargs)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert grad.dtype == dtype
    assert_within_budget(found.detach(), plain.detach(), exact.detach(), found.dtype, "value", by)
    assert_within_budget(grad, plain_grad, exact_grad, dtype, "gradient", by)
    return found, grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(17, 101), (40, 9)])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_within_the_budget(name, shape, dtype):
    z, teacher = logits(*shape, dtype)
    check(LOSSES[name], z, teacher, dtype)
    valid = torch.rand(shape[0], generator=torch.Generator().manual_seed(1)) < 0.6
    _, grad = check(LOSSES[name], z, teacher, dtype, valid=valid)
    assert not grad[~valid].any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (1, 6)])
def test_gradcheck(name, shape):
    z, teacher = logits(*shape)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, teacher, impl="streaming"), z.requires_grad_())


@pytest.mark.parametrize("shape", [(17, 101), (40, 9), (2, 2), (6, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_covariance(monkeypatch, shape, dtype):
    z, _ = logits(*shape, dtype)

    def run(impl, z):
        monkeypatch.setenv("BALORA_IMPL", impl)
        return evaluate(lambda x, _: F.covariance_loss(x), z, None)

    (found, grad), (plain, plain_grad), (exact, exact_grad) = (
        run("streaming", z),
        run("reference", z),
        run("reference", z.double()),
    )
    assert_within_budget(found.detach(), plain.detach(), exact.detach(), found.dtype, "value")
    assert_within_budget(grad, plain_grad, exact_grad, dtype, "gradient")
    if dtype == torch.float64:
        monkeypatch.setenv("BALORA_IMPL", "streaming")
        assert torch.autograd.gradcheck(F.covariance_loss, z[:5].requires_grad_())


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    vocab=st.integers(1, 40),
    k=st.integers(1, 50),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 3.3]),
    distance=st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(n, vocab, k, temperature, distance, seed):
    z, teacher = logits(n, vocab, distance=distance, seed=seed)
    for loss in (
        lambda x, t, impl: F.consistency_loss(x, t, temperature, impl=impl),
        lambda x, t, impl: F.diversity_loss(x, k, impl=impl),
        lambda x, t, impl: F.svd_loss(x, k, impl=impl),
    ):
        found, grad = evaluate(loss, z, teacher, impl="streaming")
        exact, exact_grad = evaluate(loss, z, teacher, impl="reference")
        assert found.item() == pytest.approx(exact.item(), rel=1e-8, abs=1e-10)
        torch.testing.assert_close(grad, exact_grad, rtol=1e-6, atol=1e-8)


def test_blocks_and_tiles_do_not_change_the_result(monkeypatch):
    z, teacher = logits(17, 101, torch.float32)
    whole = [evaluate(loss, z, teacher) for loss in LOSSES.values()]
    monkeypatch.setattr(streaming, "_BLOCK_BYTES", 3 * 101 * 4)
    monkeypatch.setattr(batch, "_TILE_BYTES", 7 * 17 * 4)
    for (value, grad), loss in zip(whole, LOSSES.values(), strict=True):
        again, grad_again = evaluate(loss, z, teacher)
        assert again.item() == pytest.approx(value.item(), rel=1e-6)
        torch.testing.assert_close(grad, grad_again, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_batches_strides_normalizers_and_scales(name):
    z, teacher = logits(24, 30)
    value, grad = evaluate(LOSSES[name], z, teacher)
    wide = torch.randn(24, 60, dtype=torch.float64)
    wide[:, ::2] = z
    batched = wide[:, ::2].view(4, 6, 30)
    again, grad_again = evaluate(LOSSES[name], batched, teacher.view(4, 6, 30))
    assert again.item() == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(grad_again.view(24, 30), grad)
    leaf = z.clone().requires_grad_()
    (-3 * LOSSES[name](leaf, teacher)).backward()
    torch.testing.assert_close(leaf.grad, -3 * grad)
    valid = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    everything, _ = evaluate(LOSSES[name], batched, teacher.view(4, 6, 30), valid=torch.ones(24, dtype=torch.bool))
    assert torch.equal(everything, again)
    masked, _ = evaluate(LOSSES[name], batched, teacher.view(4, 6, 30), valid=valid)
    flat, _ = evaluate(LOSSES[name], z, teacher, valid=valid.flatten())
    assert masked.item() == pytest.approx(flat.item(), rel=1e-12)
    if "svd" not in name:
        halves, _ = evaluate(LOSSES[name], z, teacher, normalizer=48)
        assert halves.item() == pytest.approx(value.item() / 2, rel=1e-12)


@pytest.mark.parametrize("impl", ["streaming", "reference", "triton"])
@pytest.mark.parametrize("name", LOSSES)
def test_no_valid_row_gives_a_connected_zero(name, impl):
    if impl == "triton" and "svd" in name:
        pytest.skip("no such kernel")
    z, teacher = logits(5, 7, torch.float32)
    value, grad = evaluate(LOSSES[name], z, teacher, valid=torch.zeros(5, dtype=torch.bool), impl=impl)
    assert value.item() == 0
    assert not grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_nan_in_nan_out(name):
    z, teacher = logits(6, 30, torch.float32)
    z[2, 3] = torch.nan
    value, grad = evaluate(LOSSES[name], z, teacher)
    assert value.isnan()
    assert grad.isnan().any()


@pytest.mark.parametrize("impl", ["streaming", "reference", "triton"])
def test_masked_columns(impl):
    """−inf in both, in the teacher alone, and in the student alone."""
    z, teacher = logits(6, 30, torch.float32 if impl == "triton" else torch.float64)
    both = [3, 7, 29]
    z[:, both] = teacher[:, both] = -torch.inf
    teacher[:, [1, 2]] = -torch.inf
    value, grad = evaluate(F.consistency_loss, z, teacher, impl=impl)
    kept = [c for c in range(30) if c not in both]
    log_p, log_q = (teacher[:, kept] / 2).log_softmax(-1), (z[:, kept] / 2).log_softmax(-1)
    by_hand = 4 * torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum() / 6
    assert value.item() == pytest.approx(by_hand.item(), rel=1e-6 if impl == "triton" else 1e-10)
    torch.testing.assert_close(grad[:, kept], 2 * (log_q.exp() - log_p.exp()) / 6)
    assert not grad[:, both].any()
    teacher[:, 3] = 1.0
    assert not F.consistency_loss(*there(impl, z, teacher), impl=impl).isfinite()


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("by", ["streaming", "triton"])
def test_logits_of_1e4_beside_ordinary_ones(who, temperature, by):
    """What is far from a large logit keeps its digits: probabilities are shared by those that have the same one."""
    z, teacher = logits(6, 37, torch.float32)
    huge = 1e4 * logits(6, 37, torch.float32, seed=5)[0].sign()
    student, teacher = (huge if who in (name, "both") else t for name, t in (("student", z), ("teacher", teacher)))
    teacher = teacher + 0.5 * z if who == "both" else teacher
    check(F.consistency_loss, student, teacher, torch.float32, by, temperature=temperature)


@pytest.mark.parametrize("impl", ["streaming", "reference", "triton"])
def test_an_entry_that_the_student_alone_masks(impl):
    """The KL is infinite, and its gradient is not."""
    z, teacher = torch.tensor([[1.0, 2.0, -torch.inf]]), torch.tensor([[1.0, 2.0, 0.0]])
    value, grad = evaluate(F.consistency_loss, z, teacher, impl=impl)
    assert value.item() == torch.inf
    torch.testing.assert_close(grad, 2 * ((z / 2).softmax(-1) - (teacher / 2).softmax(-1)))
    teacher[0, 2] = -1e5  # a probability of 0
    assert evaluate(F.consistency_loss, z, teacher, impl=impl)[0].item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_the_reference_of_what_is_not_finite(what):
    z = torch.randn(2, 5, 4)
    z[1, 2, 3] = what
    for norm in ("fro", "nuclear"):
        value, grad = evaluate(lambda z, _, **k: F.svd_loss(z, 2, **k), z[1], None, impl="reference", norm=norm)
        assert value.isnan()
        assert grad.isnan().all()
    for found, alone in zip(
        F.randomized_svd(z, 2, impl="reference"), F.randomized_svd(z[0], 2, impl="reference"), strict=True
    ):
        torch.testing.assert_close(found[0], alone)
        assert found[1].isnan().all()


@pytest.mark.parametrize("impl", ["streaming", "reference", "triton"])
def test_awkward_logits(impl):
    equal = torch.zeros(3, 50)
    value, grad = evaluate(lambda z, _, impl: F.diversity_loss(z, 7, impl=impl), equal, None, impl=impl)
    assert value.item() == pytest.approx(-torch.tensor(7.0).log().item())
    assert grad.abs().max() < 1e-7  # equal probabilities are where the entropy is largest
    huge = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1e4, 1e4]])
    value, grad = evaluate(F.consistency_loss, huge, huge.flip(0), impl=impl)
    exact, exact_grad = evaluate(F.consistency_loss, huge.double(), huge.flip(0).double(), impl="reference")
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-7)
    one_hot = torch.tensor([[200.0, 0.0], [0.0, 200.0]])
    value, grad = evaluate(
        lambda z, t, impl: F.consistency_loss(z, t, 1.0, impl=impl), one_hot, one_hot.flip(0), impl=impl
    )
    assert value.item() == pytest.approx(200.0)
    assert grad.flatten().tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5])
    if impl != "triton":
        zero, grad = evaluate(lambda z, _: F.svd_loss(z, 2, impl=impl), torch.zeros(4, 3), None)
        assert zero.item() == 0
        assert not grad.any()
    single = F.consistency_loss(*there(impl, torch.randn(4, 1), torch.randn(4, 1)), impl=impl)
    assert abs(single.item()) < 1e-9  # the kernels: their c is on a grid of 2⁻¹⁰


@pytest.mark.parametrize("offset", [2.5e3, 1e4, -1e4])
def test_logits_that_lie_far_apart_as_a_whole(offset):
    z, teacher = logits(4, 50, torch.float64)
    value, grad = evaluate(F.consistency_loss, z + offset, teacher - offset, impl="streaming")
    exact, exact_grad = evaluate(F.consistency_loss, z, teacher, impl="reference")
    assert value.item() == pytest.approx(exact.item(), rel=1e-8)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-6, atol=1e-10)


def test_masked_entries_in_the_entropy_of_a_row():
    z = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    z[:, 4:17] = -torch.inf
    z[1, 0] = 5e4
    exact = z.double().requires_grad_()
    value = reference.entropy(exact)
    value.backward()
    settings = dict(lambda_consistency=0.0, lambda_diversity=1.0, temperature=2.0, top_k=None, need_grad=True)
    labels = torch.zeros(3, dtype=torch.int64)
    terms = rows.block(z, None, labels, work=torch.empty(rows.BUFFERS, 3, 20), **settings)
    z += torch.nn.functional.one_hot(labels, 20) - exact.detach().softmax(-1)  # without the part of CE
    assert terms.negative_entropy.sum().item() == pytest.approx(value.item(), rel=1e-6)
    torch.testing.assert_close(z, exact.grad.float(), rtol=1e-4, atol=1e-6)


def test_a_covariance_over_tiles_of_rows(monkeypatch):
    """A mean far above the spread, which a sum of squares would swallow."""
    z = logits(90, 7)[0] + 1e6
    exact, exact_grad = evaluate(lambda x, _: reference.covariance(x), z, None)
    monkeypatch.setattr(batch, "_TILE_BYTES", 10 * 7 * 8)
    found, grad = evaluate(lambda x, _: F.covariance_loss(x), z, None)
    assert found.item() == pytest.approx(exact.item(), rel=1e-8)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(5, 1), (1, 5), (5, 3), (3, 5)])
def test_a_nan_in_a_covariance(shape):
    z = torch.randn(shape)
    z[0, 0] = torch.nan
    assert F.covariance_loss(z).isnan()


def test_covariance_takes_the_implementation_that_the_environment_names(monkeypatch):
    monkeypatch.setenv("BALORA_IMPL", "reference")
    monkeypatch.setattr(reference, "covariance", lambda z: z.sum() * 0 + 42)
    assert F.covariance_loss(torch.randn(4, 3)).item() == 42


@pytest.mark.parametrize("normalizer", [torch.tensor([8.0]), torch.tensor([[8]]), torch.tensor(8.0).double(), 8])
@pytest.mark.parametrize("impl", ["streaming", "reference"])
def test_a_normalizer_of_any_kind_gives_one_number(normalizer, impl):
    z, teacher = logits(4, 9, torch.float32)
    for loss in (
        F.consistency_loss(z, teacher, normalizer=normalizer, impl=impl),
        F.diversity_loss(z, normalizer=normalizer, impl=impl),
    ):
        assert loss.shape == ()
        assert loss.dtype == torch.float32


def test_a_large_vocabulary():
    z, teacher = logits(3, 2**16 + 5, torch.float32)
    for name in ("consistency", "diversity", "svd"):
        check(LOSSES[name], z, teacher, torch.float32)


@pytest.mark.parametrize("shape", [(600, 700), (700, 600)])
@pytest.mark.parametrize(("decay", "tolerance"), [(0.0, 3e-6), (0.5, 1e-7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_above_512_rows_and_columns_the_svd_loss_iterates(monkeypatch, shape, decay, tolerance, dtype):
    monkeypatch.setattr(batch, "_TILE_BYTES", 100 * 600 * 4)
    g = torch.Generator().manual_seed(0)
    z = torch.randn(*shape, generator=g, dtype=torch.float64)  # without decay a flat spectrum, the worst case
    z = (z * torch.arange(1, shape[1] + 1).double() ** -decay).to(dtype)
    loss = lambda x, _, impl: F.svd_loss(x, impl=impl)  # noqa: E731
    found, grad = evaluate(loss, z, None, impl="streaming")
    exact, exact_grad = evaluate(loss, z.double(), None, impl="reference")
    assert found.item() == pytest.approx(exact.item(), rel=max(tolerance, 3e-7))
    assert (grad - exact_grad).norm() < (1e-2 if decay == 0 else 1e-4) * exact_grad.norm()
    z[3, 4] = torch.nan
    found, grad = evaluate(loss, z, None, impl="streaming")
    assert found.isnan()
    assert grad.isnan().any()


@pytest.mark.parametrize("distance", [1e-4, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_a_common_offset_does_not_cost_the_small_kl_its_digits(distance, offset):
    g = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(8, 400, generator=g)
    teacher = z.double() + offset + distance * torch.randn(8, 400, generator=g, dtype=torch.float64)
    teacher = teacher.float()  # the rounding of the logits that it gets is not the loss's own
    found, grad = evaluate(F.consistency_loss, z, teacher, impl="streaming")
    exact, exact_grad = evaluate(F.consistency_loss, z.double(), teacher.double(), impl="reference")
    # At a distance of 1e-4 (KL 5e-9) a difference itself has an eps/1e-4 of rounding.
    tolerance = 1e-3 if distance == 1e-4 else 2e-5
    assert found.item() == pytest.approx(exact.item(), rel=tolerance)
    assert (grad - exact_grad).norm() <= tolerance * exact_grad.norm()


def test_two_runs_have_the_same_bits():
    z, teacher = logits(50, 3001, torch.bfloat16)
    for loss in LOSSES.values():
        (value, grad), (again, grad_again) = evaluate(loss, z, teacher), evaluate(loss, z, teacher)
        assert torch.equal(value, again)
        assert torch.equal(grad, grad_again)


def test_the_teacher_gets_no_gradient_and_the_inputs_stay():
    z, teacher = logits(5, 9, torch.float32)
    teacher.requires_grad_()
    before = z.clone(), teacher.detach().clone()
    assert not F.consistency_loss(z, teacher).requires_grad
    evaluate(F.consistency_loss, z, teacher)
    assert teacher.grad is None
    assert torch.equal(z, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_round(name):
    z, teacher = logits(9, 40, torch.float32)
    outside, grad = evaluate(LOSSES[name], z, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        inside, grad_inside = evaluate(LOSSES[name], z, teacher)  # the backward too
    assert torch.equal(inside, outside)
    assert torch.equal(grad_inside, grad)


def sketched(z, valid=None, rank=3):
    """The SVD loss as impl="cuda" computes it, by the operators' implementation for the CPU."""
    kept = None if valid is None else valid.nonzero().squeeze(1)
    return losses._SketchedSVD.apply(z, kept, min(rank, len(z) if kept is None else len(kept), z.shape[1]))


@pytest.mark.skipif(isinstance(dispatch.extension(), str), reason=str(dispatch.extension()))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(17, 101), (40, 9), (150, 90), (70, 333)])
def test_the_svd_loss_of_a_sketch(shape, dtype):
    z, _ = logits(*shape)
    z = (z * torch.arange(1, shape[1] + 1) ** -0.5).to(dtype)
    # Times 3: the gradient that comes from above counts.
    whole = lambda z, _, **k: 3 * F.svd_loss(z, 3, impl="reference", valid=k.get("valid"))  # noqa: E731
    sketch = lambda z, _, **k: 3 * sketched(z, k.get("valid"))  # noqa: E731
    for chosen in (None, torch.arange(shape[0]) % 3 > 0):
        found, grad = evaluate(sketch, z, z, valid=chosen)
        plain, plain_grad = evaluate(whole, z, z, valid=chosen)
        exact, exact_grad = evaluate(whole, z.double(), z, valid=chosen)
        assert grad.dtype == dtype
        assert_within_budget(found.detach(), plain.detach(), exact.detach(), torch.float32, "value")
        size = exact_grad.abs().max()
        # Directions converge like the square root of the values.
        allowed = 2 * ((plain_grad.double() - exact_grad).abs().max() + max(torch.finfo(dtype).eps, 1e-4) * size)
        assert (grad.double() - exact_grad).abs().max() <= allowed
        if chosen is not None:
            assert not grad[~chosen].any()


@pytest.mark.skipif(isinstance(dispatch.extension(), str), reason=str(dispatch.extension()))
def test_awkward_logits_of_a_sketch():
    for z, rank in ((torch.zeros(4, 3), 2), (torch.outer(torch.arange(5.0), torch.ones(4)), 3), (torch.ones(1, 6), 1)):
        found, grad = evaluate(lambda z, _, rank=rank: sketched(z, rank=rank), z, z, valid=None)
        exact = F.svd_loss(z.double(), rank, impl="reference")
        assert found.item() == pytest.approx(exact.item(), abs=1e-6)
        assert grad.abs().max() < 1e-6  # of rank 1, or 0: the ratio is constant
    for size in (1e18, 1e-17):  # the sum of squares leaves float32, or its square does
        z, _ = logits(20, 30, torch.float32)
        found, grad = evaluate(lambda z, _: sketched(z), size * z, z, valid=None)
        same, expected = evaluate(lambda z, _: sketched(z), z, z, valid=None)
        torch.testing.assert_close(found, same)
        torch.testing.assert_close(size * grad, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    none, grad = evaluate(lambda z, _, **k: sketched(z, k["valid"]), Z, Z, valid=torch.zeros(4, dtype=torch.bool))
    assert none == 0
    assert not grad.any()
    broken = Z.clone()
    broken[1, 2] = torch.nan
    found, grad = evaluate(lambda z, _: sketched(z), broken, broken, valid=None)
    assert found.isnan()
    assert grad.isnan().all()


def test_what_the_sketch_cannot_do(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not", lambda *_: [])
    for z, rank, norm, reason in (
        (Z, 2, "nuclear", "its norm is 'fro' and its arithmetic float32, asked for are 'nuclear' and torch.float32"),
        (Z.double(), 2, "fro", "its norm is 'fro' and its arithmetic float32, asked for are 'fro' and torch.float64"),
        (torch.zeros(60, 60), 55, "fro", "55 singular values are asked for, its sketch is good for 54"),
    ):
        with pytest.raises(ValueError, match=f"impl: 'cuda' cannot run here: {reason}"):
            F.svd_loss(z, rank, norm, impl="cuda")
        F.svd_loss(z, rank, norm)


Z = torch.zeros(4, 6)
BAD = {
    "not a tensor": (lambda: F.diversity_loss([1.0]), TypeError, "logits: expected a floating-point tensor"),
    "whole numbers": (lambda: F.svd_loss(Z.int()), TypeError, "logits: expected a floating-point tensor"),
    "one dimension": (lambda: F.diversity_loss(Z[0]), ValueError, r"logits: expected the shape \[N, V\]"),
    "no vocabulary": (lambda: F.covariance_loss(Z[:, :0]), ValueError, r"logits: expected the shape \[N, V\]"),
    "teacher shape": (
        lambda: F.consistency_loss(Z, Z[:3]),
        ValueError,
        r"teacher_logits: .*\[4, 6\], found .*\[3, 6\]",
    ),
    "teacher type": (lambda: F.consistency_loss(Z, None), TypeError, "teacher_logits: expected a floating-point"),
    "teacher device": (lambda: F.consistency_loss(Z, Z.to("meta")), ValueError, "teacher_logits: expected the device"),
    "teacher float64": (lambda: F.consistency_loss(Z, Z.double()), TypeError, "teacher_logits: student_logits is"),
    "temperature": (lambda: F.consistency_loss(Z, Z, 0), ValueError, "temperature: expected a finite number above 0"),
    "temperature type": (lambda: F.consistency_loss(Z, Z, "2"), TypeError, "temperature: expected a number"),
    "valid type": (lambda: F.diversity_loss(Z, valid=torch.ones(4)), TypeError, "valid: expected a boolean tensor"),
    "valid shape": (
        lambda: F.diversity_loss(Z, valid=torch.ones(3, dtype=torch.bool)),
        ValueError,
        r"valid: expected the leading shape of logits, \[4\]",
    ),
    "valid device": (
        lambda: F.diversity_loss(Z, valid=torch.ones(4, dtype=torch.bool, device="meta")),
        ValueError,
        "valid: expected the device of logits",
    ),
    "normalizer": (lambda: F.diversity_loss(Z, normalizer=-1), ValueError, "normalizer: expected a finite number"),
    "top_k": (lambda: F.diversity_loss(Z, 0), ValueError, "top_k: expected at least 1, found 0"),
    "top_k type": (lambda: F.diversity_loss(Z, 2.0), TypeError, "top_k: expected a whole number"),
    "rank": (lambda: F.svd_loss(Z, 0), ValueError, "rank: expected at least 1, found 0"),
    "rank fraction": (lambda: F.svd_loss(Z, 1.5), ValueError, "rank: expected a whole number, or a fraction"),
    "norm": (lambda: F.svd_loss(Z, norm="l2"), ValueError, "norm: expected 'fro' or 'nuclear', found 'l2'"),
    "impl": (lambda: F.svd_loss(Z, impl="triton"), ValueError, "impl: expected .* for svd_loss, found 'triton'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_the_terms_of_a_classifiers_batch_are_in_float64_on_a_device_too(monkeypatch):
    """Its Gram matrix is small, and in float32 it would lose what is left of a confident classifier's gradient."""
    monkeypatch.setattr(spectral, "accumulation_dtype", lambda tensor: torch.float32)  # a device's
    g = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(32, 1, generator=g) @ torch.tensor([[1.0, -1.0]]) + 1e-3 * torch.randn(32, 2, generator=g)
    check(lambda z, _, **k: F.svd_loss(z, 1, "nuclear", **k), z, z, torch.float32)
    teacher = torch.randn(32, 3, generator=g)
    near = teacher + 1e-4 * torch.randn(32, 3, generator=g)
    found = (
        batch.Batch((32, 3), near, lambda_consistency=1.0).solve(lambda r, c: (near[r, c], teacher[r, c])).consistency
    )
    exact = reference.normalized_mse(near.double(), teacher.double())
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)
