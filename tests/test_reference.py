"""The equations on numbers worked by hand."""

import math

import pytest
import torch

from balora import reference

LN2, LN3 = math.log(2), math.log(3)


def test_cross_entropy_is_minus_the_log_probability_of_the_label():
    z = torch.tensor([[0.0, LN3], [LN2, 0.0]], dtype=torch.float64)  # probabilities (1/4, 3/4), (2/3, 1/3)
    assert reference.cross_entropy(z, torch.tensor([0, 0])).item() == pytest.approx(math.log(4) + math.log(3 / 2))


def test_consistency_is_teacher_first_and_times_the_squared_temperature():
    z = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 2 * LN3]], dtype=torch.float64)  # at T = 2: (1/4, 3/4) against (1/2, 1/2)
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert reference.consistency(z, teacher, 2.0).item() == pytest.approx(4 * by_hand)
    swapped = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert reference.consistency(teacher, z, 2.0).item() == pytest.approx(4 * swapped)


def test_diversity_is_the_negative_entropy_of_the_k_largest_alone():
    z = torch.tensor([[5.0, 5.0 + LN3, -1.0, 2.0]], dtype=torch.float64)  # the two largest: (1/4, 3/4)
    by_hand = 0.25 * math.log(0.25) + 0.75 * math.log(0.75)
    assert reference.diversity(z, 2).item() == pytest.approx(by_hand)
    assert reference.diversity(z, 1).item() == 0.0
    assert reference.diversity(torch.zeros(1, 4, dtype=torch.float64), 99).item() == pytest.approx(-math.log(4))


def test_diversity_breaks_ties_to_the_lower_index():
    z = torch.tensor([[1.0, 3.0, 1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    reference.diversity(z, 2).backward()
    assert (z.grad != 0).tolist() == [[True, True, False, False]]


def test_svd_is_the_negative_share_of_the_leading_singular_values():
    z = torch.diag(torch.tensor([3.0, 4.0, 12.0], dtype=torch.float64))  # ‖Z‖_F = 13
    assert reference.svd(z, 2).item() == pytest.approx(-16 / 13)
    assert reference.svd(z, 99).item() == pytest.approx(-19 / 13)


def test_svd_of_zero_logits_is_zero_with_a_zero_gradient():
    z = torch.zeros(3, 4, requires_grad=True)
    value = reference.svd(z, 2)
    value.backward()
    assert value.item() == 0
    assert not z.grad.any()
