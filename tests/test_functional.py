"""linear_objective: normalizers, the scale of the backward, autocast, and input that does not fit."""

import pytest
import torch

from balora import LinearHead
from balora import functional as F

from .conftest import ALL_TERMS, only, problem, run, there


@pytest.mark.parametrize("impl", ["streaming", "reference"])
def test_no_valid_token_gives_a_connected_zero(impl):
    hidden, teacher, weight, labels = problem(4, 8, 20)
    out, grad = run(hidden, teacher, weight, torch.full_like(labels, -100), ALL_TERMS, impl)
    assert out.loss.item() == 0
    assert out.n_valid.item() == 0
    assert not grad.any()


def test_non_contiguous_and_batched_inputs():
    hidden, teacher, weight, labels = problem(24, 8, 30, ignored=7)
    flat, flat_grad = run(hidden, teacher, weight, labels, ALL_TERMS, "streaming")
    hidden = hidden.view(4, 6, 8).transpose(0, 1).contiguous().transpose(0, 1)
    wide_weight = torch.randn(30, 16, dtype=torch.float64)
    wide_weight[:, ::2] = weight
    out, grad = run(hidden, teacher.view(4, 6, 8), wide_weight[:, ::2], labels.view(4, 6), ALL_TERMS, "streaming")
    assert out.loss.item() == pytest.approx(flat.loss.item(), rel=1e-12)
    torch.testing.assert_close(grad.reshape(24, 8), flat_grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("impl", ["streaming", "reference", "triton"])
def test_labels_of_32_bits(impl):
    inputs = problem(12, 8, 30, dtype=torch.float32, ignored=2)
    expected, _ = run(*there(impl, *inputs), ALL_TERMS, impl)
    found, _ = run(*there(impl, *inputs[:3], inputs[3].int()), ALL_TERMS, impl)
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("impl", ["streaming", "reference"])
def test_the_terms_add_up_to_the_loss_and_normalizers_add_up_over_micro_batches(impl):
    hidden, teacher, weight, labels = problem(30, 8, 40, ignored=6)
    config = only("consistency", lambda_diversity=0.3)
    whole, grad = run(hidden, teacher, weight, labels, config, impl)
    n = whole.n_valid
    parts = [run(hidden[i], teacher[i], weight, labels[i], config, impl, n) for i in (slice(0, 11), slice(11, 30))]
    assert sum(p[0].loss for p in parts).item() == pytest.approx(whole.loss.item(), rel=1e-9)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), grad)
    out, _ = run(hidden, teacher, weight, labels, ALL_TERMS, impl, normalizer=100)
    total = out.ce + 0.7 * out.consistency + 0.3 * out.diversity + 0.9 * out.svd
    assert out.loss.item() == pytest.approx(total.item(), rel=1e-12)
    mean, _ = run(hidden, teacher, weight, labels, ALL_TERMS, impl)
    assert out.svd.item() == pytest.approx(mean.svd.item() * 24 / 100, rel=1e-6)


@pytest.mark.parametrize("at_a_time", [20, 2**22])
def test_the_gradient_is_scaled_in_the_backward(monkeypatch, at_a_time):
    monkeypatch.setattr(F, "_SCALED_AT_A_TIME", at_a_time)
    hidden, teacher, weight, labels = problem(9, 8, 30)
    hidden.requires_grad_()
    out = F.linear_objective(hidden, teacher, LinearHead(weight), labels, ALL_TERMS, impl="streaming")
    (once,) = torch.autograd.grad(out.loss, hidden, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * out.loss, hidden)
    torch.testing.assert_close(thrice, 3 * once)
    assert not out.ce.requires_grad


def test_a_bf16_gradient_is_scaled_by_the_very_number():
    hidden, teacher, weight, labels = problem(64, 16, 30, dtype=torch.bfloat16)
    hidden.requires_grad_()
    out = F.linear_objective(hidden, teacher, LinearHead(weight), labels, ALL_TERMS, impl="streaming")
    (once,) = torch.autograd.grad(out.loss, hidden, retain_graph=True)
    (third,) = torch.autograd.grad(out.loss / 3, hidden)
    assert (third.double() / once.double()).nanmean().item() == pytest.approx(1 / 3, rel=3e-4)


@pytest.mark.parametrize("impl", ["streaming", "reference"])
def test_a_normalizer_of_any_kind_gives_one_number(impl):
    inputs = problem(9, 8, 30, dtype=torch.float32)
    want, _ = run(*inputs, ALL_TERMS, impl, normalizer=7)
    for normalizer in (torch.tensor([7.0]), torch.tensor([[7]]), torch.tensor(7.0).double()):
        out, _ = run(*inputs, ALL_TERMS, impl, normalizer=normalizer)
        assert out.loss.shape == out.ce.shape == ()
        assert out.loss.dtype == torch.float32
        assert torch.equal(out.loss, want.loss)


def test_a_float16_gradient_survives_a_loss_scale():
    hidden, teacher, weight, labels = problem(16, 8, 30, dtype=torch.float16)
    hidden.requires_grad_()
    out = F.linear_objective(hidden, teacher, LinearHead(weight), labels, ALL_TERMS, normalizer=1e7, impl="streaming")
    (grad,) = torch.autograd.grad(out.loss * 2.0**16, hidden)
    _, exact = run(hidden.detach().double(), teacher.double(), weight.double(), labels, ALL_TERMS, "reference", 1e7)
    torch.testing.assert_close(grad.double(), exact * 2.0**16, rtol=2e-3, atol=1e-6)


def test_no_gradient_when_nobody_asks_and_none_to_the_teacher():
    hidden, teacher, weight, labels = problem(9, 8, 30)
    out = F.linear_objective(hidden, teacher.requires_grad_(), LinearHead(weight), labels, ALL_TERMS)
    assert not out.loss.requires_grad


@pytest.mark.parametrize("impl", ["streaming", "reference"])
def test_autocast_does_not_round_the_logits(impl):
    hidden, teacher, weight, labels = problem(30, 16, 50, dtype=torch.float32)
    outside, grad = run(hidden, teacher, weight, labels, ALL_TERMS, impl)
    with torch.autocast("cpu", torch.bfloat16):
        inside, grad_inside = run(hidden, teacher, weight, labels, ALL_TERMS, impl)
    assert torch.equal(outside.loss, inside.loss)
    if impl == "streaming":  # the reference's backward is autograd's, which here runs under autocast too
        assert torch.equal(grad, grad_inside)


def test_the_gram_matrix_is_kept_until_the_weight_changes():
    head = LinearHead(torch.randn(20, 4))
    assert head.gram is head.gram
    before = head.gram
    head.weight.mul_(2)
    torch.testing.assert_close(head.gram.gram, 4 * before.gram)


BAD = {
    "hidden shape": (dict(hidden=torch.zeros(4, 7)), ValueError, r"hidden: expected the shape \[N, 8\].*\[4, 7\]"),
    "hidden type": (dict(hidden=torch.zeros(4, 8, dtype=torch.int64)), TypeError, "hidden: expected a floating-point"),
    "hidden float64": (dict(hidden=torch.zeros(4, 8).double()), TypeError, "hidden: the head is torch.float32"),
    "hidden not a tensor": (dict(hidden=[1.0]), TypeError, "hidden: expected a floating-point tensor, found .1.0"),
    "hidden device": (
        dict(hidden=torch.zeros(4, 8, device="meta")),
        ValueError,
        "hidden: expected the head's device cpu",
    ),
    "teacher shape": (
        dict(teacher_hidden=torch.zeros(3, 8)),
        ValueError,
        r"teacher_hidden: expected the shape \[4, 8\]",
    ),
    "teacher type": (
        dict(teacher_hidden=torch.zeros(4, 8).half()),
        TypeError,
        "teacher_hidden: expected hidden's type",
    ),
    "teacher device": (dict(teacher_hidden=torch.zeros(4, 8, device="meta")), ValueError, "teacher_hidden: .*device"),
    "no teacher": (dict(teacher_hidden=None), ValueError, "teacher_hidden: lambda_consistency is 0.7"),
    "labels type": (dict(labels=torch.zeros(4)), TypeError, "labels: expected whole numbers"),
    "labels shape": (
        dict(labels=torch.zeros(2, 2).long()),
        ValueError,
        r"labels: expected hidden's leading shape \[4\]",
    ),
    "labels device": (
        dict(labels=torch.zeros(4, device="meta").long()),
        ValueError,
        "labels: expected hidden's device",
    ),
    "labels too large": (dict(labels=torch.tensor([0, 1, 20, 3])), ValueError, "labels: expected -100 or 0 to 19 .*20"),
    "labels negative": (dict(labels=torch.tensor([0, -1, 2, 3])), ValueError, "labels: expected -100 or 0 to 19 .*-1"),
    "head": (dict(head=torch.zeros(20, 8)), TypeError, "head: expected a LinearHead, found Tensor"),
    "teacher head": (dict(teacher_head=3), TypeError, "teacher_head: expected a LinearHead, found int"),
    "teacher vocabulary": (
        dict(teacher_head=LinearHead(torch.zeros(21, 8))),
        ValueError,
        "teacher_head: expected head's vocabulary of 20, found 21",
    ),
    "teacher width": (
        dict(teacher_head=LinearHead(torch.zeros(20, 9))),
        ValueError,
        r"teacher_hidden: expected the shape \[4, 9\]",
    ),
    "teacher head float64": (
        dict(teacher_head=LinearHead(torch.zeros(20, 8).double())),
        TypeError,
        "teacher_head: the head is torch.float32, found torch.float64",
    ),
    "teacher head device": (
        dict(teacher_head=LinearHead(torch.zeros(20, 8, device="meta"))),
        ValueError,
        "teacher_head: expected head's device cpu, found meta",
    ),
    "config": (dict(config={}), TypeError, "config: expected a BALoraConfig, found dict"),
    "impl": (dict(impl="cuda"), ValueError, "impl: expected 'auto' or 'triton' or 'streaming' or 'reference' .*'cuda'"),
    "impl that cannot run": (dict(impl="triton"), ValueError, "impl: 'triton' cannot run here: "),
    "normalizer zero": (dict(normalizer=0), ValueError, "normalizer: expected a finite number above 0, found 0"),
    "normalizer type": (dict(normalizer="3"), TypeError, "normalizer: expected a number"),
    "normalizer shape": (dict(normalizer=torch.ones(2)), ValueError, "normalizer: expected one number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    changes, error, message = BAD[case]
    arguments = dict(
        hidden=torch.zeros(4, 8),
        teacher_hidden=torch.zeros(4, 8),
        head=LinearHead(torch.zeros(20, 8)),
        labels=torch.zeros(4, dtype=torch.int64),
        config=ALL_TERMS,
    )
    with pytest.raises(error, match=message):
        F.linear_objective(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("weight", "error"),
    [(torch.zeros(3), ValueError), (torch.zeros(3, 0), ValueError), (torch.ones(2, 2).int(), TypeError)],
)
def test_a_bad_head_is_refused(weight, error):
    with pytest.raises(error, match="weight: expected"):
        LinearHead(weight)
