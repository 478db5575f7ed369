"""KL of bfloat16 inputs from 1e-6 to 10 against float64: difference logits, next to what logits in bfloat16 give."""

from dataclasses import replace

import pytest
import torch

from balora import BALoraConfig, LinearHead, reference, streaming
from balora import functional as F

ONLY_KL = BALoraConfig(lambda_consistency=1.0, lambda_diversity=0.0, lambda_svd=0.0)
HIDDEN = (True, False, False, False, False)


def relative(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def at_distance(distance, n=64, d=512, vocab=8000):
    """(hidden, teacher, weight, labels) in bfloat16, logits of size 4."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=g).bfloat16()
    weight = (4 * torch.randn(vocab, d, generator=g) / d**0.5).bfloat16()
    labels = torch.randint(vocab, (n,), generator=g)
    if distance >= 2**-7:
        return hidden, (hidden + distance * torch.randn(n, d, generator=g)).bfloat16(), weight, labels
    # closer than the spacing of bfloat16: a few entries move by one step of it
    moved = torch.rand(n, d, generator=g) < (distance / 2**-8) ** 2
    return hidden, torch.where(moved, hidden * (1 + 2**-7), hidden), weight, labels


DISTANCES = [1.7e-4, 1e-3, 1e-2, 0.06, 0.4, 1.1]  # KL from 1e-6 to 10


@pytest.mark.parametrize("distance", DISTANCES)
def test_value_and_gradient_within_two_percent(distance):
    hidden, teacher, weight, labels = at_distance(distance)
    h = hidden.double().requires_grad_()
    z, z_teacher = h @ weight.double().T, teacher.double() @ weight.double().T
    exact = reference.consistency(z, z_teacher, 2.0) / len(labels)
    exact.backward()
    kl = exact.item()

    found = F.linear_objective(hidden, teacher, LinearHead(weight), labels, ONLY_KL, impl="streaming")
    assert found.consistency.item() == pytest.approx(kl, rel=0.02)
    # The gradient of KL alone: with a weight that CE cannot be seen beside.
    huge = replace(ONLY_KL, lambda_consistency=1e12)
    _, gradients = streaming.objective(hidden, teacher, LinearHead(weight), None, labels, None, huge, HIDDEN)
    error = relative(gradients.hidden.double() / 1e12 / len(labels), h.grad)
    assert error < 0.02

    # What logits rounded to bfloat16 give, everything after them in float64.
    rounded = (hidden @ weight.T).double().requires_grad_()
    value = reference.consistency(rounded, (teacher @ weight.T).double(), 2.0) / len(labels)
    value.backward()
    of_logits = relative(rounded.grad @ weight.double(), h.grad)
    print(
        f"KL {kl:.1e}, relative error with difference logits: value {abs(found.consistency.item() / kl - 1):.1e}, "
        f"gradient {error:.1e}; with bfloat16 logits: value {abs(value.item() / kl - 1):.1e}, gradient {of_logits:.1e}"
    )
    if kl < 1e-2:
        assert of_logits > 5 * error


def test_the_distances_span_the_range():
    kls = []
    for distance in (DISTANCES[0], DISTANCES[-1]):
        hidden, teacher, weight, _ = (x.double() for x in at_distance(distance))
        kls.append(reference.consistency(hidden @ weight.T, teacher @ weight.T, 2.0).item() / len(hidden))
    assert kls[0] < 1.5e-6
    assert kls[1] > 8
