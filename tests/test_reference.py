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


def test_logits_of_every_head():
    h, w = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[1.0, 0.0], [0.0, 3.0]]).double()  # H Wᵀ = (1, 6)
    bias = torch.tensor([0.5, -1.0]).double()
    lora = (torch.tensor([[1.0, 1.0]]).double(), torch.tensor([[2.0], [0.0]]).double(), 0.5)  # adds (3, 0)
    assert reference.logits(h, w).tolist() == [[1.0, 6.0]]
    assert reference.logits(h, w, bias, scale=2.0).tolist() == [[3.0, 10.0]]
    assert reference.logits(h, w, lora=lora).tolist() == [[4.0, 6.0]]
    capped = reference.logits(h, w, bias, softcap=2.0, scale=2.0)
    assert capped[0].tolist() == pytest.approx([2 * math.tanh(1.5), 2 * math.tanh(5)])
    assert reference.logits(h.half(), w.half()).dtype == torch.float32


def test_entropy_of_the_whole_row():
    z = torch.tensor([[0.0, LN3], [-torch.inf, 4.0]], dtype=torch.float64)  # (1/4, 3/4) and (0, 1)
    assert reference.entropy(z).item() == pytest.approx(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    z = torch.randn(3, 7, dtype=torch.float64)
    assert reference.entropy(z).item() == pytest.approx(reference.diversity(z, 7).item())


def test_consistency_leaves_out_what_the_teacher_masks():
    z = torch.tensor([[0.0, 0.0, LN2]], dtype=torch.float64)  # (1/4, 1/4, 1/2)
    teacher = torch.tensor([[0.0, LN3, -torch.inf]], dtype=torch.float64)  # (1/4, 3/4, 0)
    assert reference.consistency(z, teacher, 1.0).item() == pytest.approx(0.75 * LN3)


def test_normalized_mse_is_the_squared_distance_of_the_directions_of_the_whole_batch():
    z = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)  # norm 5
    teacher = torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert reference.normalized_mse(z, teacher).item() == pytest.approx(0.6**2 + 0.2**2)
    assert reference.normalized_mse(7 * z, z).item() == pytest.approx(0.0)
    assert reference.normalized_mse(0 * z, teacher).item() == pytest.approx(1.0)


def test_covariance_sums_the_pairs_of_classes():
    z = torch.tensor([[1.0, 2.0, 0.0], [3.0, 6.0, 0.0]], dtype=torch.float64, requires_grad=True)
    # centred (∓1, ∓2, 0), M − 1 = 1: Cov_12 = 4, both ways, over C = 3
    assert reference.covariance(z).item() == pytest.approx(2 * 4**2 / 3)
    single = reference.covariance(z[:1])
    single.backward()
    assert single.item() == 0
    assert not z.grad.any()


def test_svd_by_the_nuclear_norm_and_with_the_variance():
    z = torch.diag(torch.tensor([3.0, 5.0, 12.0], dtype=torch.float64))
    assert reference.svd(z, 2, "nuclear").item() == pytest.approx(-17 / 20)
    assert reference.svd(z, 2, "nuclear", 0.1).item() == pytest.approx(-17 / 20 - 0.1 * 3.5**2)
    assert reference.svd(z, 1, "nuclear", 0.1).item() == pytest.approx(-12 / 20)


def test_squared_error_and_randomized_svd():
    assert reference.squared_error(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.5])).item() == 4.25
    u, s, vh = reference.randomized_svd(torch.diag(torch.tensor([1.0, 5.0, 3.0])), 2)
    assert s.tolist() == [5.0, 3.0]
    assert (u.shape, vh.shape) == ((3, 2), (2, 3))
