"""The streamed objective against the reference in float64: values, every gradient, numerics, awkward shapes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balora import LinearHead, reference, rows, streaming
from balora import functional as F
from balora.head import Linear

from .conftest import ALL_TERMS, assert_terms_within_budget, assert_within_budget, only, problem, run, there

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


TERMS = ["none", "consistency", "diversity", "svd"]


def check(inputs, config, dtype, normalizer=None, impl="streaming"):
    """The loss, its terms and its gradient are within the error budget."""
    hidden, teacher, weight, labels = inputs
    found, grad = run(hidden, teacher, weight, labels, config, impl, normalizer)
    plain, plain_grad = run(hidden, teacher, weight, labels, config, "reference", normalizer)
    wide = [None if x is None else x.double() for x in (hidden, teacher, weight)]
    exact, exact_grad = run(*wide, labels, config, "reference", normalizer)
    assert_terms_within_budget(found, plain, exact, dtype, impl)
    assert_within_budget(grad, plain_grad, exact_grad, dtype, "gradient", impl)
    assert grad.dtype == hidden.dtype
    return found, grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("term", [*TERMS, "all"])
def test_value_and_gradient_within_the_budget(term, dtype):
    config = ALL_TERMS if term == "all" else only(term)
    check(problem(37, 16, 101, dtype=dtype, ignored=5), config, dtype)


@pytest.mark.parametrize("distance", [1e-4, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_consistency_from_close_to_far(distance, temperature):
    inputs = problem(20, 16, 300, dtype=torch.float32, distance=distance, scale=3.0)
    check(inputs, replace(only("consistency"), temperature=temperature), torch.float32)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("distance", [4.0, 10.0, 40.0])
def test_a_far_teacher_costs_no_more_digits_than_plain_torch(distance, temperature):
    """The rounding of one problem is chance: medians of 31, in units of the last place."""
    config = only("consistency", temperature=temperature)
    errors = []
    for seed in range(31):
        inputs = problem(5, 16, 300, dtype=torch.float32, distance=distance, scale=3.0, seed=seed)
        exact, exact_grad = run(*(x.double() for x in inputs[:3]), inputs[3], config, "reference")
        for impl in ("streaming", "reference"):
            found, grad = run(*inputs, config, impl)
            value = (found.consistency.double() / exact.consistency - 1).abs()
            errors += [value, (grad.double() - exact_grad).abs().max() / exact_grad.abs().max()]
    own, plain = (torch.stack(errors).view(-1, 2, 2) / torch.finfo(torch.float32).eps).median(0).values
    assert (own <= 2 * (plain + 1)).all(), (own, plain)


@pytest.fixture(params=[True, False], ids=["bf16 hardware", "no bf16 hardware"])
def hardware(request, monkeypatch):
    """A CPU that multiplies bfloat16, and one whose products are in float32, whichever is here."""
    monkeypatch.setattr(streaming, "multiplies_bfloat16", lambda _: request.param)
    return request.param


@pytest.mark.parametrize("term", [*TERMS, "all"])
def test_bfloat16_with_and_without_hardware(hardware, monkeypatch, term):
    products = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **out: products.append(b.dtype) or mm(a, b, **out))
    config = ALL_TERMS if term == "all" else only(term)
    check(problem(37, 16, 101, dtype=torch.bfloat16, ignored=5), config, torch.bfloat16)
    assert hardware or torch.bfloat16 not in products
    assert products


@pytest.mark.parametrize("distance", [1e-3, 3e-2, 0.3, 3.0])
def test_bf16_consistency_within_two_percent_at_every_distance(hardware, distance):
    hidden, teacher, weight, labels = problem(64, 256, 4000, dtype=torch.bfloat16, distance=distance, scale=3.0)
    if distance < 2**-7:  # a bf16 teacher so close is mostly the same number: move few entries by one rounding step
        moved = torch.rand(hidden.shape, generator=torch.Generator().manual_seed(1)) < 0.01
        teacher = torch.where(moved, hidden * (1 + 2**-7), hidden)
    config = replace(only("consistency"), temperature=2.0)
    with_term, _ = run(hidden, teacher, weight, labels, config, "streaming")
    _, ce_grad = run(hidden.double(), None, weight.double(), labels, only("none"), "reference")
    exact, exact_grad = run(hidden.double(), teacher.double(), weight.double(), labels, config, "reference")
    assert with_term.consistency.item() == pytest.approx(exact.consistency.item(), rel=0.02)
    kl_grad = exact_grad - ce_grad

    def summed_grad(weight_of_kl):
        only_kl = replace(config, lambda_consistency=weight_of_kl)
        needed = (True, False, False, False, False)
        _, gradients = streaming.objective(hidden, teacher, LinearHead(weight), None, labels, None, only_kl, needed)
        return gradients.hidden.double()

    alone = (summed_grad(1e6) - summed_grad(0.0)) / 1e6
    assert (alone / len(labels) - kl_grad).norm() < 0.02 * kl_grad.norm()


@pytest.mark.parametrize("term", [*TERMS, "all"])
def test_gradcheck(term):
    hidden, teacher, weight, labels = problem(5, 4, 9, ignored=1)
    head = LinearHead(weight)
    config = replace(ALL_TERMS if term == "all" else only(term), svd_rank=2)

    def loss(h):
        return F.linear_objective(h, teacher, head, labels, config, impl="streaming").loss

    assert torch.autograd.gradcheck(loss, hidden.requires_grad_())


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    d=st.integers(1, 9),
    vocab=st.integers(1, 70),
    top_k=st.integers(1, 80),
    rank=st.integers(1, 12),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    distance=st.sampled_from([0.0, 1e-3, 1.0, 20.0]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(n, d, vocab, top_k, rank, temperature, distance, seed):
    config = replace(ALL_TERMS, entropy_top_k=top_k, svd_rank=rank, temperature=temperature)
    hidden, teacher, weight, labels = problem(n, d, vocab, seed=seed, distance=distance, ignored=n // 3)
    found, grad = run(hidden, teacher, weight, labels, config, "streaming")
    exact, exact_grad = run(hidden, teacher, weight, labels, config, "reference")
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=1e-7, abs=1e-9)
    # the sum of all singular values of a rank-deficient batch has no gradient: compare where it has one
    if rank < min(n - n // 3, d, vocab) or min(n - n // 3, vocab) <= d:
        torch.testing.assert_close(grad, exact_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_bytes", [1, 3 * 101 * 8 * 2, 10**9])
def test_chunks_do_not_change_the_result(monkeypatch, chunk_bytes):
    inputs = problem(37, 16, 101)
    exact, exact_grad = run(*inputs, ALL_TERMS, "reference")
    monkeypatch.setattr(streaming, "_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(streaming, "_BLOCK_BYTES", 2 * 101 * 8)
    found, grad = run(*inputs, ALL_TERMS, "streaming")
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=1e-12)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tile_bytes", [1, 1000, 10**9])
def test_tiles_of_a_half_precision_head(monkeypatch, tile_bytes):
    monkeypatch.setattr(Linear, "_TILE_BYTES", tile_bytes)
    check(problem(9, 16, 101, dtype=torch.bfloat16), ALL_TERMS, torch.bfloat16)


def test_same_bits_on_two_runs():
    inputs = problem(50, 16, 3001, dtype=torch.float32)
    first, grad = run(*inputs, ALL_TERMS, "streaming")
    second, grad_again = run(*inputs, ALL_TERMS, "streaming")
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(grad, grad_again)


def test_teacher_equal_to_student_gives_exactly_zero():
    hidden, _, weight, labels = problem(20, 16, 301, dtype=torch.float32)
    found, grad = run(hidden, hidden, weight, labels, only("consistency"), "streaming")
    _, other = run(hidden, hidden, weight, labels, only("consistency", lambda_consistency=1e6), "streaming")
    assert found.consistency.item() == 0.0
    assert torch.equal(grad, other)


def test_the_inputs_are_left_as_they_were():
    for dtype in DTYPES:
        inputs = problem(9, 16, 50, dtype=dtype, ignored=2)
        before = [x.clone() for x in inputs]
        run(*inputs, ALL_TERMS, "streaming")
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("vocab", [1, 2**16 + 3])
def test_smallest_and_large_vocabulary(vocab):
    check(problem(3, 8, vocab, dtype=torch.float32), replace(ALL_TERMS, svd_rank=1), torch.float32)


def test_all_logits_equal_and_ties_across_the_kth_place():
    hidden, teacher, weight, labels = problem(6, 8, 40)
    weight[:] = weight[0]  # every logit of a row is the same number
    config = replace(ALL_TERMS, svd_rank=1)
    found, grad = run(hidden, teacher, weight, labels, config, "streaming")
    exact, exact_grad = run(hidden, teacher, weight, labels, config, "reference")
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=1e-12)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-9, atol=1e-12)
    z = torch.tensor([[2.0, 1.0, 3.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    assert [sorted(r) for r in rows._top_k(z, 3)[1].tolist()] == [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert [sorted(r) for r in rows._top_k(z, 2)[1].tolist()] == [[0, 2], [0, 1], [0, 1]]


def test_huge_logits():
    hidden, teacher, weight, labels = problem(12, 8, 50, dtype=torch.float32, distance=2.0)
    check((hidden * 1e2, teacher * 1e2, weight * 1e2, labels), ALL_TERMS, torch.float32)


def test_the_precision_of_other_products_is_left_as_it_was(monkeypatch):
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("this torch has no precision of products on the CPU to set")
    seen, tiles = [], Linear.tiles

    def spy(self, at=slice(None)):
        seen.append(settings.fp32_precision)
        return tiles(self, at)

    monkeypatch.setattr(Linear, "tiles", spy)
    for before in ("ieee", "tf32", "ieee"):
        torch.backends.fp32_precision = before
        settings.fp32_precision = "none"  # follows
        inherited = settings.fp32_precision
        try:
            inputs = problem(5, 8, 20, dtype=torch.bfloat16)
            run(*inputs, ALL_TERMS, "streaming")
            assert "bf16" in seen
            assert settings.fp32_precision == inherited
            seen.clear()
            run(*(x.float() if x.is_floating_point() else x for x in inputs), ALL_TERMS, "streaming")
            assert set(seen) == {inherited}
            monkeypatch.setattr(torch, "mm", lambda *a, **k: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(*inputs, ALL_TERMS, "streaming")
            monkeypatch.undo()
            monkeypatch.setattr(Linear, "tiles", spy)
            torch.backends.fp32_precision = "ieee"
            settings_now = settings.fp32_precision
            settings.fp32_precision = "none"
            assert settings_now == settings.fp32_precision  # it still follows
        finally:
            torch.backends.fp32_precision = "none"
            settings.fp32_precision = "none"


def test_adapters_in_float32_are_not_rounded(monkeypatch):
    """A product that could run in bfloat16 is one of bfloat16 numbers: the hidden states and the weight, no other."""
    rounded = []
    product = torch.mm
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("this torch has no precision of products on the CPU to set")

    def spy(a, b, **kwargs):
        if settings.fp32_precision == "bf16":
            rounded.extend(x for x in (a, b))
        return product(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", spy)
    hidden, teacher, weight, labels = problem(6, 8, 20, dtype=torch.bfloat16)
    a, b = torch.randn(2, 8), torch.randn(20, 2)
    head = LinearHead(weight, bias=torch.randn(20), lora=(a, b, 0.5))
    F.linear_objective(hidden.requires_grad_(), teacher, head, labels, ALL_TERMS, impl="streaming").loss.backward()
    assert rounded
    wide = LinearHead(weight.float() * 1.001)  # a wide weight under narrow hidden states
    F.linear_objective(hidden, teacher, wide, labels, ALL_TERMS, impl="streaming").loss.backward()
    assert all(torch.equal(x, x.bfloat16().float()) for x in rounded)


def test_two_one_hot_rows_far_apart():
    hidden = torch.tensor([[200.0, 0.0], [1.0, 0.0]])
    teacher = torch.tensor([[0.0, 200.0], [1.0, 1e-4]])  # one row far, one near, in one chunk
    check((hidden, teacher, torch.eye(2), torch.tensor([0, 1])), only("consistency"), torch.float32)


def test_a_rare_token_that_moves_far_keeps_the_small_kl_accurate():
    weight = torch.cat([torch.eye(3), torch.tensor([[0.0, 0.0, 1.0]])])
    hidden, teacher = torch.tensor([[1.0, 0.5, -30.0]]), torch.tensor([[1.0, 0.5, -22.0]])
    config = only("consistency", temperature=1.0)
    found, _ = run(hidden, teacher, weight, torch.tensor([0]), config, "streaming")
    exact, _ = run(hidden.double(), teacher.double(), weight.double(), torch.tensor([0]), config, "reference")
    assert exact.consistency.item() < 1e-8
    assert found.consistency.item() == pytest.approx(exact.consistency.item(), rel=1e-5)


@pytest.mark.parametrize("distance", [1e-3, 1e-1, 1.0, 10.0])
@pytest.mark.parametrize("outliers", [0, 1, 3])
def test_kl_in_float32_from_near_to_far_with_rare_tokens_that_move_far(distance, outliers):
    """Value and gradient of the KL alone, where subtracting rounded probabilities or log-sum-exps would show. The value
    is a sum of numbers 1/distance as large: of 200 draws none was more than 2.5e-5 off at 1e-3, 9e-7 from 1e-1 on."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(8, 300, generator=g)
    delta = distance * torch.randn(8, 300, generator=g)
    z[:, :outliers] -= 25
    delta[:, :outliers] += torch.tensor([9.0, 3.0, -30.0])[:outliers]
    wide = z.double().requires_grad_()
    exact = reference.consistency(wide, wide.detach() + delta.double(), 1.0)
    exact.backward()
    shifted = z - z.amax(-1, keepdim=True)
    terms = rows.block(
        shifted,
        delta.clone(),
        None,
        lambda_consistency=1.0,
        lambda_diversity=0.0,
        temperature=1.0,
        top_k=None,
        work=torch.empty(rows.BUFFERS, 8, 300),
        need_grad=True,
    )
    kl, grad = terms.kl, shifted
    assert kl.sum().item() == pytest.approx(exact.item(), rel=max(5e-8 / distance, 2e-6))
    assert (grad - wide.grad).norm() <= 3e-6 * wide.grad.norm()


@pytest.mark.parametrize("offset", [-20.0, 3.0, 20.0])
def test_an_offset_of_the_difference_logits_costs_a_small_kl_nothing(offset):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(8, 300, generator=g)
    delta = (1e-3 * torch.randn(8, 300, generator=g) + offset).double().float()
    wide = z.double().requires_grad_()
    exact = reference.consistency(wide, wide.detach() + delta.double(), 1.0)
    exact.backward()
    settings = dict(lambda_consistency=1.0, lambda_diversity=0.0, temperature=1.0, top_k=None, need_grad=True)
    terms = rows.block(z, delta.clone(), None, work=torch.empty(rows.BUFFERS, 8, 300), **settings)
    assert terms.kl.sum().item() == pytest.approx(exact.item(), rel=1e-3)
    assert (z - wide.grad).norm() <= 1e-3 * wide.grad.norm()


def test_columns_of_minus_infinity():
    """A masked vocabulary: −inf in student and teacher, the columns contribute nothing."""
    hidden, teacher, weight, labels = problem(7, 8, 40, dtype=torch.float32)
    z, delta = hidden @ weight.T, (teacher - hidden) @ weight.T
    masked = [c for c in range(3, 40) if c not in labels.tolist()]  # few are left: the top K reaches into them
    z[:, masked] = -torch.inf
    kept = [c for c in range(40) if c not in masked]
    wide = z[:, kept].double().requires_grad_()
    where = torch.tensor([kept.index(y) for y in labels.tolist()])
    loss = reference.cross_entropy(wide, where) + 0.3 * reference.diversity(wide, 15)
    loss = loss + 0.7 * reference.consistency(wide, wide.detach() + delta[:, kept].double(), 2.0)
    loss.backward()
    terms = rows.block(
        z,
        delta / 2,
        labels,
        lambda_consistency=0.7,
        lambda_diversity=0.3,
        temperature=2.0,
        top_k=15,
        work=torch.empty(rows.BUFFERS, 7, 40),
        need_grad=True,
    )
    ce, kl, entropy = (t.sum() for t in terms)
    assert (ce + 0.7 * 4 * kl + 0.3 * entropy).item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(z[:, kept].double(), wide.grad, rtol=1e-4, atol=1e-6)
    assert not z[:, masked].any()


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("where", ["hidden", "teacher", "weight"])
@pytest.mark.parametrize("d", [8, 600])
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("streaming", torch.float32), ("triton", torch.float32), ("triton", torch.bfloat16), ("triton", torch.float16)],
    ids=str,
)
def test_nan_in_nan_out(term, where, d, impl, dtype):
    if impl == "triton" and d > 8 and term != "svd":
        pytest.skip("the same kernels as for d = 8")
    inputs = dict(zip(("hidden", "teacher", "weight", "labels"), problem(6, d, 40, dtype=dtype), strict=True))
    inputs[where][2, 3] = torch.nan
    found, grad = run(*there(impl, *inputs.values()), only(term), impl)
    reached = where != "teacher" or term == "consistency"
    assert found.loss.isnan().item() is reached
    assert grad.isnan().any().item() is reached


@pytest.mark.parametrize("masked", [False, True])
def test_a_teacher_of_its_own_far_away(monkeypatch, masked):
    """Rows in blocks and chunks, some of them left out: the far ones ask for the teacher's logits again."""
    monkeypatch.setattr(streaming, "_CHUNK_BYTES", 7 * 101 * 8)
    hidden, teacher, weight, labels = problem(20, 16, 101, dtype=torch.float32, ignored=3)
    teacher[::3] *= 3e3
    bias, cap = torch.linspace(-1, 1, 101), 5e3
    if masked:
        bias[5], cap = -torch.inf, None
    config = replace(only("consistency"), temperature=1.0)

    def objective(impl, dtype):
        h, t, w, v, b = (x.to(dtype) for x in (hidden, teacher, weight, weight.flip(0), bias))
        h.requires_grad_()
        own = LinearHead(v, b, cap)
        out = F.linear_objective(h, t, LinearHead(w), labels, config, teacher_head=own, impl=impl)
        return out.consistency, torch.autograd.grad(out.loss, h)[0]

    found, plain = (objective(impl, torch.float32) for impl in ("streaming", "reference"))
    exact = objective("reference", torch.float64)
    for name, *three in zip(("value", "gradient"), found, plain, exact, strict=True):
        assert_within_budget(*three, torch.float32, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile_bytes", [1000, 10**9])
def test_a_teacher_with_a_head_of_its_own(monkeypatch, dtype, tile_bytes):
    monkeypatch.setattr(Linear, "_TILE_BYTES", tile_bytes)
    monkeypatch.setattr(streaming, "_CHUNK_BYTES", 7 * 101 * 8)
    hidden, _, weight, labels = problem(20, 16, 101, dtype=dtype, ignored=3)
    teacher, _, teacher_weight, _ = problem(20, 24, 101, dtype=dtype, seed=1)

    def objective(impl, wide=False):
        h, t, w, v = (x.double() if wide else x for x in (hidden, teacher, weight, teacher_weight))
        h = h.clone().requires_grad_()
        out = F.linear_objective(h, t, LinearHead(w), labels, ALL_TERMS, teacher_head=LinearHead(v), impl=impl)
        out.loss.backward()
        return out, h.grad

    (found, grad), (plain, plain_grad), (exact, exact_grad) = (
        objective("streaming"),
        objective("reference"),
        objective("reference", wide=True),
    )
    assert_within_budget(found.loss, plain.loss, exact.loss, torch.promote_types(dtype, torch.float32), "loss")
    assert_within_budget(grad, plain_grad, exact_grad, dtype, "gradient")
    same = F.linear_objective(hidden, hidden, LinearHead(weight), labels, ALL_TERMS, impl="streaming")
    other = F.linear_objective(hidden, hidden, LinearHead(weight), labels, ALL_TERMS, LinearHead(weight.clone()))
    assert other.loss.item() == pytest.approx(same.loss.item(), rel=1e-5)


def test_zero_hidden_states():
    hidden, teacher, weight, labels = problem(4, 8, 20)
    check((hidden * 0, teacher * 0, weight, labels), ALL_TERMS, torch.float64)
