"""Every kind of head: values and every gradient against the reference in float64; the linear map; bad input."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from balora import BALoraConfig, LinearHead, batch, reference, rows, spectral, streaming
from balora import functional as F
from balora.head import Linear

from .conftest import ALL_TERMS, assert_terms_within_budget, assert_within_budget, here, only, problem, there

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ("hidden", "weight", "bias", "lora_a", "lora_b")
N, D, V, R = 23, 12, 61, 3

KINDS = {
    "plain": dict(),
    "bias": dict(bias=True),
    "scale": dict(scale=0.125),
    "scale below 0": dict(scale=-0.7, bias=True),
    "softcap": dict(softcap=2.5),
    "lora": dict(lora=True),
    "everything": dict(bias=True, scale=1.7, softcap=2.5, lora=True),
}
VARIANTS = {
    "2025": ALL_TERMS,
    "nlg_2024": replace(
        BALoraConfig.preset("nlg_2024"), lambda_consistency=0.7, lambda_diversity=0.3, lambda_svd=0.9, svd_variance=0.02
    ),
    "nlu_2024": replace(BALoraConfig.preset("nlu_2024"), lambda_consistency=0.7, lambda_diversity=0.3, lambda_svd=0.9),
    "nlu_2025": replace(BALoraConfig.preset("nlu_2025"), lambda_consistency=0.7, lambda_diversity=0.3, lambda_svd=0.9),
}


def tensors(kind, dtype, seed=1, vocab=V, n=N):
    """(inputs by name, head's other arguments, teacher_hidden, labels) of a random problem."""
    hidden, teacher, weight, labels = problem(n, D, vocab, dtype=dtype, scale=2.0, ignored=n // 6, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    options = KINDS[kind]
    inputs = dict(hidden=hidden, weight=weight)
    if options.get("bias"):
        inputs["bias"] = draw(vocab)
    if options.get("lora"):
        inputs |= dict(lora_a=draw(R, D) / D**0.5, lora_b=draw(vocab, R) * 0.5)
    return inputs, {k: v for k, v in options.items() if k in ("softcap", "scale")}, teacher, labels


def evaluate(inputs, other, teacher, labels, config, impl, wide=False, trained=NAMES, teacher_head=None, **kwargs):
    """(output, gradients by name) of the objective."""
    to = (lambda t: t.double()) if wide else (lambda t: t)
    leaves = {name: to(t).detach().clone().requires_grad_(name in trained) for name, t in inputs.items()}
    used = dict(zip(leaves, there(impl, *leaves.values()), strict=True))
    lora = (used["lora_a"], used["lora_b"], 0.5) if "lora_a" in leaves else None
    head = LinearHead(used["weight"], bias=used.get("bias"), lora=lora, **other)
    if teacher_head is not None:
        bias = None if teacher_head.bias is None else to(teacher_head.bias)
        weight, bias = there(impl, to(teacher_head.weight), bias)
        teacher_head = LinearHead(weight, bias=bias, softcap=teacher_head.softcap, scale=teacher_head.scale)
    teacher, labels = there(impl, to(teacher), labels)
    out = F.linear_objective(
        used["hidden"], teacher, head, labels, config, teacher_head=teacher_head, impl=impl, **kwargs
    )
    out.loss.backward()
    return here(out, inputs["hidden"]), {name: leaf.grad for name, leaf in leaves.items() if name in trained}


def check(problem_, config, dtype, by="streaming", **kwargs):
    found, grads = evaluate(*problem_, config, by, **kwargs)
    plain, plain_grads = evaluate(*problem_, config, "reference", **kwargs)
    exact, exact_grads = evaluate(*problem_, config, "reference", wide=True, **kwargs)
    inputs, other = problem_[:2]
    capped = by == "triton" and "softcap" in other and not {"bias", "lora_a"} & set(inputs)  # a float16 Gram matrix
    svd_type = torch.float16 if capped and dtype.itemsize == 2 else None
    assert_terms_within_budget(found, plain, exact, dtype, by, svd_type)
    for name, grad in grads.items():
        assert grad.dtype == dtype, name
        assert_within_budget(grad, plain_grads[name], exact_grads[name], dtype, f"gradient by {name}", by)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_head_trained_or_frozen(kind, dtype):
    everything = tensors(kind, dtype)
    check(everything, ALL_TERMS, dtype)
    check(everything, ALL_TERMS, dtype, trained=("hidden",))
    check(everything, only("svd"), dtype, trained=("hidden", "weight"))
    extra = [name for name in everything[0] if name not in ("hidden", "weight")]
    if extra:
        check(everything, only("consistency"), dtype, trained=extra, normalizer=7.0)
        check(everything, only("svd"), dtype, trained=extra)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["plain", "everything"])
@pytest.mark.parametrize("vocab", [V, 7])
def test_the_variants_of_both_papers(kind, variant, dtype, vocab):
    check(tensors(kind, dtype, vocab=vocab), VARIANTS[variant], dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(kind, variant):
    inputs, other, teacher, labels = tensors(kind, torch.float64, vocab=9, n=6)
    names = list(inputs)

    # the teacher shares the head, yet sends it no gradient: a frozen one of the same numbers for the differences
    frozen = LinearHead(torch.randn(9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))

    def loss(*values):
        by_name = dict(zip(names, values, strict=True))
        lora = (by_name["lora_a"], by_name["lora_b"], 0.5) if "lora_a" in by_name else None
        head = LinearHead(by_name["weight"], bias=by_name.get("bias"), lora=lora, **other)
        config = replace(VARIANTS[variant], svd_rank=2)
        return F.linear_objective(by_name["hidden"], teacher, head, labels, config, frozen, impl="streaming").loss

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in inputs.values()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", ["lora", "everything", "softcap"])
def test_a_teacher_with_another_head(kind, softcap, dtype):
    everything = tensors(kind, dtype)
    own = LinearHead(tensors("plain", dtype, seed=3)[0]["weight"], softcap=softcap, scale=0.5)
    check(everything, ALL_TERMS, dtype, teacher_head=own)
    check(everything, VARIANTS["nlu_2024"], dtype, teacher_head=own)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "classes"), [(16, 768, 3), (16, 64, 2), (40, 20, 5)])
@pytest.mark.parametrize("variant", ["nlu_2025", "nlu_2024"])
def test_a_trained_classifier(variant, n, d, classes, dtype):
    """Fewer classes than hidden units: the Gram matrix of the weight is singular."""
    hidden, teacher, weight, labels = problem(n, d, classes, dtype=dtype)
    bias = torch.randn(classes, generator=torch.Generator().manual_seed(4)).to(dtype)
    check((dict(hidden=hidden, weight=weight, bias=bias), {}, teacher, labels), VARIANTS[variant], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", [{}, {"softcap": 30.0}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize(
    "config", [only("svd", svd_rank=20, svd_variance=0.02), only("svd", svd_norm="nuclear")], ids=str
)
def test_more_singular_values_than_hidden_units(config, other, dtype):
    hidden, teacher, weight, labels = problem(40, 4, 61, dtype=dtype, scale=2.0)
    inputs = dict(hidden=hidden, weight=weight)
    found, grads = evaluate(inputs, other, teacher, labels, config, "streaming")
    exact, exact_grads = evaluate(inputs, other, teacher, labels, config, "reference", wide=True)
    assert found.svd.item() == pytest.approx(exact.svd.item(), rel=1e-5)
    if not other:  # with a cap all 40 σ are there, the least of them below what half precision tells apart
        assert (grads["hidden"].double() - exact_grads["hidden"]).norm() < 1e-2 * exact_grads["hidden"].norm()


def test_a_vocabulary_masked_by_the_bias():
    for kind in ("bias", "everything"):
        for dtype in (torch.float32, torch.bfloat16):
            inputs, other, teacher, labels = tensors(kind, dtype)
            other.pop("softcap", None)  # which would make a finite number of it
            masked = [c for c in (5, 17, 40) if c not in labels.tolist()]
            inputs["bias"][masked] = -torch.inf
            config = replace(ALL_TERMS, lambda_svd=0.0)
            check((inputs, other, teacher, labels), config, dtype, trained=("hidden", "weight"))


def test_an_adapter_that_starts_at_zero_has_the_teachers_bits():
    inputs, other, _, labels = tensors("lora", torch.float32)
    inputs["lora_b"].zero_()
    own = LinearHead(inputs["weight"])
    out, _ = evaluate(inputs, other, inputs["hidden"], labels, only("consistency"), "streaming", teacher_head=own)
    assert out.consistency.item() == 0
    check(tensors("lora", torch.float32), ALL_TERMS, torch.float32, teacher_head=own)
    out, _ = evaluate(inputs, other, inputs["hidden"], labels, only("svd"), "streaming")  # G is singular
    exact, _ = evaluate(inputs, other, inputs["hidden"], labels, only("svd"), "reference", wide=True)
    assert out.svd.item() == pytest.approx(exact.svd.item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_tiles_and_blocks_do_not_change_the_result(monkeypatch, kind):
    everything = tensors(kind, torch.bfloat16)
    for config in (ALL_TERMS, VARIANTS["nlu_2024"]):
        whole, grads = evaluate(*everything, config, "streaming")
        monkeypatch.setattr(streaming, "_CHUNK_BYTES", 5 * V * 8)
        monkeypatch.setattr(streaming, "_BLOCK_BYTES", 2 * V * 4)
        monkeypatch.setattr(Linear, "_TILE_BYTES", 7 * D * 4)
        monkeypatch.setattr(batch, "_TILE_BYTES", 9 * N * 4)
        monkeypatch.setattr(spectral, "_ROW_BYTES", 10 * D * 8)
        parts, part_grads = evaluate(*everything, config, "streaming")
        assert parts.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
        for name, grad in grads.items():
            difference = (part_grads[name].double() - grad.double()).abs().max()
            assert difference <= 2**-7 * grad.double().abs().max(), name
        check(everything, config, torch.bfloat16)
        monkeypatch.undo()


def test_a_softcap_keeps_a_small_difference_accurate():
    """cap·tanh(a) − cap·tanh(b) by the identity, where subtracting the two would leave three digits."""
    inputs, _, _, labels = tensors("plain", torch.float32)
    teacher = inputs["hidden"] * (1 + 1e-4 * torch.randn(N, D, generator=torch.Generator().manual_seed(2)))
    found, _ = evaluate(inputs, dict(softcap=2.5), teacher, labels, only("consistency"), "streaming")
    plain, _ = evaluate(inputs, dict(softcap=2.5), teacher, labels, only("consistency"), "reference")
    exact, _ = evaluate(inputs, dict(softcap=2.5), teacher, labels, only("consistency"), "reference", wide=True)
    assert exact.consistency.item() < 1e-7
    assert found.consistency.item() == pytest.approx(exact.consistency.item(), rel=1e-3)
    assert plain.consistency.item() != pytest.approx(exact.consistency.item(), rel=0.1)


def test_the_identity_of_tanh_differences():
    g = torch.Generator().manual_seed(0)
    a = 20 * torch.randn(4, 50, generator=g)
    for size, tolerance in ((1e-5, 1e-6), (1e-2, 1e-6), (1.0, 1e-5), (300.0, 1e-5)):
        delta = size * torch.randn(4, 50, generator=g)
        exact = 30 * (torch.tanh((a.double() + delta.double()) / 30) - torch.tanh(a.double() / 30))
        z, d, slope = a.clone(), delta.clone(), torch.empty(4, 50)
        rows.softcap(z, d, 30.0, slope, torch.empty(rows.BUFFERS, 4, 50))
        assert (d - exact).norm() < tolerance * exact.norm()
        torch.testing.assert_close(z, 30 * torch.tanh(a / 30))
        torch.testing.assert_close(slope, 1 - torch.tanh(a / 30) ** 2, rtol=1e-4, atol=1e-7)


def test_normalized_squares_of_zero_logits():
    inputs, other, teacher, labels = tensors("plain", torch.float64)
    inputs["hidden"] = 0 * inputs["hidden"]
    check((inputs, other, teacher, labels), only("consistency", consistency="normalized_mse"), torch.float64)


@pytest.mark.parametrize("size", [1.0, 30.0, 300.0])
def test_the_entropy_of_the_whole_vocabulary(size):
    full = only("diversity", diversity="full")
    hidden, teacher, weight, labels = problem(9, 8, 300, scale=size)
    beside_kl = replace(full, lambda_consistency=0.5, temperature=2.0)
    check((dict(hidden=hidden, weight=weight), {}, teacher, labels), beside_kl, torch.float64)
    narrow = dict(hidden=hidden.float(), weight=weight.float()), {}, teacher.float(), labels
    found, grads = evaluate(*narrow, full, "streaming")
    plain, plain_grads = evaluate(*narrow, full, "reference")
    exact, exact_grads = evaluate(*narrow, full, "reference", wide=True)
    assert_within_budget(found.diversity, plain.diversity, exact.diversity, torch.float32)
    assert_within_budget(grads["hidden"], plain_grads["hidden"], exact_grads["hidden"], torch.float32)


def test_the_gram_matrix_in_inference_mode():
    with torch.inference_mode():
        head = LinearHead(torch.randn(20, 4))
        before = head.gram.gram
        head.weight.mul_(2)
        torch.testing.assert_close(head.gram.gram, 4 * before)


def test_a_softcap_far_beyond_its_cap():
    inputs, _, teacher, labels = tensors("plain", torch.float32)
    inputs["weight"] = inputs["weight"] * 1e3
    check((inputs, dict(softcap=30.0), teacher, labels), only("consistency"), torch.float32, trained=("hidden",))


def test_two_runs_have_the_same_bits():
    for kind in KINDS:
        for config in VARIANTS.values():
            first, grads = evaluate(*tensors(kind, torch.float32), config, "streaming")
            again, grads_again = evaluate(*tensors(kind, torch.float32), config, "streaming")
            assert torch.equal(first.loss, again.loss)
            assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


@pytest.mark.parametrize("impl", ["streaming", "reference"])
def test_no_valid_token_leaves_every_tensor_connected(impl):
    inputs, other, teacher, labels = tensors("everything", torch.float32)
    out, grads = evaluate(inputs, other, teacher, torch.full_like(labels, -100), VARIANTS["nlu_2024"], impl)
    assert out.loss.item() == 0
    assert set(grads) == set(NAMES)
    assert all(grad is not None and not grad.any() for grad in grads.values())


@pytest.mark.parametrize("impl", ["streaming", "reference"])
def test_one_row_has_a_covariance_of_zero(impl):
    inputs, other, teacher, labels = tensors("plain", torch.float64, n=1)
    out, grads = evaluate(inputs, other, teacher, labels, only("diversity", diversity="covariance"), impl)
    _, ce_grads = evaluate(inputs, other, teacher, labels, only("none"), impl)
    assert out.diversity.item() == 0
    torch.testing.assert_close(grads["hidden"], ce_grads["hidden"])


@pytest.mark.parametrize("impl", ["streaming", "reference"])
def test_a_regression_head_has_squared_errors(impl):
    hidden, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.5], [2.0]])
    head = LinearHead(torch.tensor([[2.0]]), bias=torch.tensor([1.0]))  # z = 3, 5; the teacher's 4, 5
    config = BALoraConfig.preset("nlu_2025")
    hidden.requires_grad_()
    out = F.linear_objective(hidden, teacher, head, torch.tensor([3.5, 4.0]), config, impl=impl)
    out.loss.backward()
    assert out.ce.item() == pytest.approx((0.25 + 1) / 2)
    assert out.consistency.item() == pytest.approx(0.5)
    assert out.diversity is out.svd is None
    assert out.loss.item() == pytest.approx(0.625 + 1e-4 * 0.5)
    assert hidden.grad.flatten().tolist() == pytest.approx([2 * (-0.5 - 1e-4), 2.0], rel=1e-5)
    alone = F.linear_objective(hidden, None, head, torch.tensor([3.5, 4.0]), replace(config, lambda_consistency=0.0))
    assert alone.loss.item() == pytest.approx(0.625)
    assert alone.consistency is None
    with pytest.raises(TypeError, match="labels: expected whole numbers"):
        F.linear_objective(hidden, teacher, head, torch.tensor([3.5, 4.0]), BALoraConfig(), impl=impl)
    config = BALoraConfig.preset("nlu_2024")
    labels = torch.tensor([3.5, 4.0])
    out = F.linear_objective(hidden, teacher, head, labels, config, normalizer=4.0, impl=impl)
    z, z_teacher = torch.tensor([3.0, 5.0]), torch.tensor([4.0, 5.0])
    by_hand = (z / z.norm() - z_teacher / z_teacher.norm()).square().sum()
    assert out.consistency.item() == pytest.approx(2 / 4 * by_hand.item(), rel=1e-4)
    same = F.regression_objective(z, z_teacher, labels, config, normalizer=4.0)
    assert out.loss.item() == pytest.approx(same.loss.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", "everything"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_gradients_the_value_is_the_same(kind, variant):
    inputs, other, teacher, labels = tensors(kind, torch.float32)
    with_grad, _ = evaluate(inputs, other, teacher, labels, VARIANTS[variant], "streaming")
    lora = (inputs["lora_a"], inputs["lora_b"], 0.5) if "lora_a" in inputs else None
    head = LinearHead(inputs["weight"].requires_grad_(), bias=inputs.get("bias"), lora=lora, **other)
    with torch.no_grad():
        without = F.linear_objective(inputs["hidden"], teacher, head, labels, VARIANTS[variant])
    assert not without.loss.requires_grad
    assert without.loss.item() == pytest.approx(with_grad.loss.item(), rel=1e-6)


def test_the_linear_part_is_one_map():
    inputs, _, _, _ = tensors("everything", torch.float64)
    lora = (inputs["lora_a"], inputs["lora_b"], 0.5)
    head = LinearHead(inputs["weight"], bias=inputs["bias"], scale=1.7, lora=lora)
    linear = Linear(head, torch.float64)
    out = torch.empty(N, V, dtype=torch.float64)
    x = linear.columns(inputs["hidden"])
    linear.forward(inputs["hidden"], x, out)
    want = reference.logits(inputs["hidden"], inputs["weight"], inputs["bias"], None, 1.7, lora)
    torch.testing.assert_close(out, want)
    assert x.shape == (N, R + 1)
    whole = torch.cat([inputs["weight"], linear.extra], 1)
    torch.testing.assert_close(head.gram.gram, whole.T @ whole)
    wide = torch.cat([inputs["hidden"], torch.ones(N, 1, dtype=torch.float64)], 1)
    m = linear.lift(torch.eye(wide.shape[1] + R, dtype=torch.float64))
    torch.testing.assert_close(wide @ m, torch.cat([inputs["hidden"], x], 1))
    seen = torch.cat([inputs["hidden"], x], 1) @ head.gram.factor  # as many columns as [H | 1]
    assert seen.shape == wide.shape
    torch.testing.assert_close(torch.linalg.svdvals(seen), torch.linalg.svdvals(want / 1.7)[: seen.shape[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_gram_matrix_outlives_a_weight_that_is_gathered_into_other_memory(monkeypatch, dtype):
    """As FSDP and ZeRO-3 do in every step: same numbers, same version, elsewhere. Other numbers are seen."""
    computed = []
    exact = spectral.gram
    monkeypatch.setattr(spectral, "gram", lambda rows: computed.append(1) or exact(rows))
    weight = torch.nn.Parameter(torch.randn(50, 8, dtype=dtype), requires_grad=False)
    head = F.LinearHead(weight)
    first = head.gram
    kept = weight.data
    weight.data = kept.clone()
    assert head.gram is first
    assert head.replaced(torch.nn.Parameter(kept.clone(), requires_grad=False)).gram.gram is first.gram
    assert len(computed) == 1
    swapped = kept.clone()
    swapped[[3, 4]] = kept[[4, 3]]  # the same numbers in other rows
    swapped[3, 0], swapped[3, 1] = kept[4, 1], kept[4, 0]
    weight.data = swapped
    torch.testing.assert_close(head.gram.gram, swapped.to(first.gram.dtype).T @ swapped.to(first.gram.dtype))
    assert len(computed) == 2


def test_the_gram_matrix_is_kept_until_a_tensor_changes():
    lora = (torch.randn(2, 4), torch.zeros(20, 2), 1.0)
    head = LinearHead(torch.randn(20, 4), bias=torch.randn(20), lora=lora)
    before = head.gram
    of_weight = head._weight_gram.gram
    assert head.gram is before
    lora[1].add_(1)  # an adapter that is trained does not cost the weight's part again
    assert head.gram is not before
    assert head._weight_gram.gram is of_weight
    head.weight.mul_(2)
    torch.testing.assert_close(head.gram.gram[:4, :4], 4 * before.gram[:4, :4])


W = torch.ones(5, 3)
BAD = {
    "weight shape": (dict(weight=torch.zeros(3)), ValueError, "weight: expected the shape"),
    "empty weight": (dict(weight=torch.zeros(3, 0)), ValueError, "weight: expected the shape"),
    "weight type": (dict(weight=torch.ones(2, 2).int()), TypeError, "weight: expected a floating-point tensor"),
    "bias shape": (dict(bias=torch.ones(4)), ValueError, r"bias: expected the shape \[5\], found .*\[4\]"),
    "bias type": (dict(bias=3.0), TypeError, "bias: expected a floating-point tensor, found 3.0"),
    "bias float64": (dict(bias=torch.ones(5).double()), TypeError, "bias: the weight is torch.float32"),
    "bias device": (
        dict(bias=torch.ones(5, device="meta")),
        ValueError,
        "bias: expected weight's device cpu, found meta",
    ),
    "softcap zero": (dict(softcap=0.0), ValueError, "softcap: expected a number above 0 or None, found 0.0"),
    "softcap text": (dict(softcap="30"), TypeError, "softcap: expected a number, found '30' of type str"),
    "scale": (dict(scale=float("nan")), ValueError, "scale: expected a finite number, found nan"),
    "lora": (dict(lora=(W, W)), TypeError, r"lora: expected \(A, B, scaling\), found \(Tensor, Tensor\)$"),
    "lora A": (
        dict(lora=(torch.ones(2, 4), torch.ones(5, 2), 1.0)),
        ValueError,
        r"lora: A: expected the shape \[2, 3\]",
    ),
    "lora A type": (dict(lora=(None, torch.ones(5, 2), 1.0)), TypeError, "lora: A: expected a floating-point tensor"),
    "lora B": (
        dict(lora=(torch.ones(2, 3), torch.ones(5, 3), 1.0)),
        ValueError,
        r"lora: B: expected the shape \[5, 2\]",
    ),
    "lora scaling": (
        dict(lora=(torch.ones(2, 3), torch.ones(5, 2), None)),
        TypeError,
        "lora: scaling: expected a number, found None",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        LinearHead(**{"weight": W, **changes})


@pytest.mark.parametrize("vocab", [1, 9])
def test_gradients_share_no_memory(vocab):
    """As results of an operator must not, which torch.compile wants."""
    inputs, other, teacher, labels = tensors("everything", torch.float64, vocab=vocab, n=6)
    head = LinearHead(inputs["weight"], inputs["bias"], lora=(inputs["lora_a"], inputs["lora_b"], 0.5), **other)
    labels = labels.clamp_min(0)
    _, found = streaming.objective(
        inputs["hidden"], teacher, head, None, labels, None, only("consistency"), (True,) * 5
    )
    assert len({t.untyped_storage().data_ptr() for t in found}) == 5


def test_a_copy_and_one_from_a_file_are_heads_of_their_own():
    """Under torch.compile an operator finds a head by its key."""
    head, other = LinearHead(torch.randn(9, 4), softcap=3.0), LinearHead(torch.randn(9, 4))
    assert head.gram.gram.shape == (4, 4)  # what was computed is not copied
    content = pickle.dumps(head)
    copies = copy.deepcopy(head), pickle.loads(content)
    assert len({one.key for one in (head, other, *copies)}) == 4
    weight = head.weight
    del head
    for one in copies:
        assert torch.equal(one.weight, weight)
        assert LinearHead.known(one.key, list(one.tensors)) is one
        assert one.softcap == 3
        torch.testing.assert_close(one.gram.gram, weight.double().T @ weight.double())


def test_what_is_known_of_a_trained_head_is_not_kept():
    """A change through .data is counted nowhere."""
    head = LinearHead(torch.randn(9, 4, requires_grad=True))
    before = head.gram.gram
    head.weight.data *= 2
    torch.testing.assert_close(head.gram.gram, 4 * before)
    assert head._weight_gram is None
    assert head._gram is None
    head = LinearHead(torch.randn(9, 4))
    before = head.gram.gram
    head.weight.requires_grad_()  # trained from now on
    head.weight.data *= 2
    torch.testing.assert_close(head.gram.gram, 4 * before)
