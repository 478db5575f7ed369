"""logits_objective: the same objective as linear_objective's reference, from the logits themselves."""

from dataclasses import replace

import pytest
import torch

from balora import BALoraConfig, LinearHead
from balora import functional as F

from .conftest import ALL_TERMS, assert_terms_within_budget, assert_within_budget, problem

CONFIGS = {
    "all": ALL_TERMS,
    "2024": replace(
        BALoraConfig.preset("nlg_2024"),
        lambda_consistency=0.7,
        lambda_diversity=0.3,
        lambda_svd=0.9,
        svd_variance=0.5,
    ),
    "normalized squares, covariance": replace(ALL_TERMS, consistency="normalized_mse", diversity="covariance"),
    "no teacher": replace(ALL_TERMS, lambda_consistency=0.0),
    "cross-entropy": replace(ALL_TERMS, lambda_consistency=0.0, lambda_diversity=0.0, lambda_svd=0.0),
}


def by_logits(hidden, teacher, weight, labels, config, dtype=torch.float64, **options):
    """(output, gradient by the logits), of logits in that type."""
    z = (hidden @ weight.T).to(dtype).requires_grad_()
    z_teacher = None if config.lambda_consistency == 0 else (teacher @ weight.T).to(dtype)
    out = F.logits_objective(z, z_teacher, labels, config, **options)
    out.loss.backward()
    return out, z.grad


def exactly(hidden, teacher, weight, labels, config, dtype=torch.float64, arithmetic=torch.float64, **options):
    """The reference of the objective on those logits: the head is the identity."""
    z = (hidden @ weight.T).to(dtype).to(arithmetic).requires_grad_()
    z_teacher = (teacher @ weight.T).to(dtype).to(arithmetic)
    head = LinearHead(torch.eye(len(weight), dtype=arithmetic))
    out = F.linear_objective(z, z_teacher, head, labels, config, impl="reference", **options)
    out.loss.backward()
    return out, z.grad


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalizer", [None, 40.0])
def test_values_and_gradients_within_the_budget(config, dtype, normalizer):
    inputs = problem(17, 24, 61, ignored=5)  # of full rank: the nuclear norm has a gradient
    found, gradient = by_logits(*inputs, config, dtype, normalizer=normalizer)
    exact, exact_gradient = exactly(*inputs, config, dtype, normalizer=normalizer)
    arithmetic = torch.promote_types(dtype, torch.float32)
    plain, plain_gradient = exactly(*inputs, config, dtype, arithmetic, normalizer=normalizer)
    assert_terms_within_budget(found, plain, exact, arithmetic)
    assert gradient.dtype == dtype
    # The gradient of each term is rounded to the type of the logits before they are added.
    assert_within_budget(gradient, plain_gradient.to(dtype), exact_gradient, dtype, "gradient")


def test_batches_of_rows_and_autocast():
    hidden, teacher, weight, labels = problem(12, 8, 61, dtype=torch.float32, ignored=3)
    z, z_teacher = hidden @ weight.T, teacher @ weight.T
    exact = F.logits_objective(z, z_teacher, labels, ALL_TERMS)
    with torch.autocast("cpu", torch.bfloat16):
        found = F.logits_objective(
            z.view(3, 4, -1), z_teacher.view(3, 4, -1), labels.view(3, 4).to(torch.int32), ALL_TERMS
        )
    for name, a, b in zip(exact._fields, found, exact, strict=True):
        assert torch.equal(a, b), name
    assert not any(t.requires_grad for t in found)


def test_without_a_valid_row_it_is_a_connected_zero():
    z = torch.randn(4, 9).requires_grad_()
    for config in CONFIGS.values():
        out = F.logits_objective(z, z.detach(), torch.full((4,), -100), config, normalizer=7)
        out.loss.backward()
        assert out.loss == 0
        assert out.n_valid == 0
        assert not z.grad.any()


BAD = {
    "config": (dict(config={}), TypeError, "config: expected a BALoraConfig, found dict"),
    "logits": (dict(logits=torch.zeros(4)), ValueError, r"logits: expected the shape \[N, V\]"),
    "teacher": (dict(teacher_logits=torch.zeros(4, 8)), ValueError, r"teacher_logits: expected the shape of logits"),
    "no teacher": (dict(teacher_logits=None), ValueError, "teacher_logits: lambda_consistency is 0.7"),
    "labels": (dict(labels=torch.zeros(5).long()), ValueError, r"labels: expected the shape \[4\]"),
    "label type": (dict(labels=torch.zeros(4)), TypeError, "labels: expected whole numbers"),
    "label": (dict(labels=torch.tensor([0, 1, 9, -100])), ValueError, "labels: expected -100 or 0 to 8 .*, found 9"),
    "normalizer": (dict(normalizer=0), ValueError, "normalizer: expected a finite number above 0, found 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    changes, error, message = BAD[case]
    good = dict(logits=torch.randn(4, 9), teacher_logits=torch.randn(4, 9), labels=torch.arange(4), config=ALL_TERMS)
    with pytest.raises(error, match=message):
        F.logits_objective(**{**good, **changes})
