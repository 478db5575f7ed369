"""The [d, d] form of the SVD term against singular values of the materialized logits."""

import pytest
import torch

from balora import reference, spectral
from balora.head import Linear, LinearHead


def exact(hidden, weight, rank):
    hidden = hidden.double().requires_grad_()
    z = hidden @ weight.double().T
    value = -torch.linalg.svdvals(z)[:rank].sum() / torch.linalg.matrix_norm(z)
    value.backward()
    return value.detach(), hidden.grad


def svd_ratio(hidden, head, rank, vocab):
    """(value, gradient by hidden) of the SVD term in the [d, d] form."""
    count = min(len(hidden), vocab)
    term = spectral.svd_term(spectral.gram([hidden]), head, min(rank, count), count)
    return term.value, hidden.double() @ spectral.gradient_matrix(term, head).double()


def draw(n, d, vocab, decay, seed=0):
    """Hidden states whose spectrum falls like i^(−decay)."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g) * torch.arange(1, d + 1).float() ** -decay
    return hidden, torch.randn(vocab, d, generator=g)


@pytest.mark.parametrize(("n", "d", "vocab"), [(50, 24, 300), (5, 24, 300), (50, 24, 7), (1, 24, 300), (40, 1, 9)])
@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_small_hidden_sizes_are_exact(n, d, vocab, decay):
    hidden, weight = draw(n, d, vocab, decay)
    rank = min(3, n, d, vocab)
    value, grad = svd_ratio(hidden, spectral.head_gram(weight), rank, vocab)
    want, want_grad = exact(hidden, weight, rank)
    assert value.item() == pytest.approx(want.item(), rel=1e-7)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("decay", "tolerance"), [(0.0, 1e-8), (0.5, 1e-9), (1.0, 1e-9)])
def test_krylov_above_512(decay, tolerance):
    hidden, weight = draw(700, 640, 900, decay)
    value, grad = svd_ratio(hidden, spectral.head_gram(weight), 10, 900)
    want, want_grad = exact(hidden, weight, 10)
    assert value.item() == pytest.approx(want.item(), rel=tolerance)
    assert value.item() >= want.item() - 1e-9  # a Ritz value never exceeds the singular value
    assert torch.equal(value, svd_ratio(hidden, spectral.head_gram(weight), 10, 900)[0])
    assert (grad - want_grad).norm() / want_grad.norm() < 1e-4


def test_rank_above_what_the_batch_has_is_clamped_and_rank_deficient_batches_have_a_finite_gradient():
    hidden, weight = draw(6, 16, 40, 0.0)
    hidden[3:] = hidden[:3]  # rank 3
    value, grad = svd_ratio(hidden, spectral.head_gram(weight), 99, 40)
    assert value.item() == pytest.approx(exact(hidden, weight, 99)[0].item(), rel=1e-6)
    torch.testing.assert_close(grad, exact(hidden, weight, 3)[1], rtol=1e-5, atol=1e-9)


def test_float32_keeps_what_float32_can_see(monkeypatch):
    """On a GPU the Gram matrices are float32: a σ two hundred times below the first one still counts."""
    monkeypatch.setattr(spectral, "accumulation_dtype", lambda tensor: torch.float32)
    hidden, weight = draw(900, 600, 800, 0.0)
    u, _, vh = torch.linalg.svd(hidden @ torch.linalg.qr(weight).R.T, full_matrices=False)
    sigma = torch.full((600,), 1e-4)
    sigma[:10] = 0.005
    sigma[0] = 1.0
    hidden = (u * sigma) @ torch.linalg.solve(torch.linalg.qr(weight).R.T, vh, left=False)
    value, grad = svd_ratio(hidden, spectral.head_gram(weight), 10, 800)
    want, want_grad = exact(hidden, weight, 10)
    assert want.item() == pytest.approx(-1.045, abs=1e-3)
    assert value.item() == pytest.approx(want.item(), rel=1e-3)
    assert (grad - want_grad).norm() < 0.02 * want_grad.norm()


def test_float32_noise_is_not_summed(monkeypatch):
    monkeypatch.setattr(spectral, "accumulation_dtype", lambda tensor: torch.float32)
    hidden, weight = draw(40, 64, 300, 0.0)
    hidden[3:] = hidden[:1]  # rank 3: what float32 sees beyond it would add about 1e-3
    value, _ = svd_ratio(hidden, spectral.head_gram(weight), 30, 300)
    assert value.item() == pytest.approx(exact(hidden, weight, 3)[0].item(), rel=2e-5)


def test_a_repeated_or_zero_column_of_the_head():
    hidden, weight = draw(20, 8, 30, 0.0)
    weight[:, 3] = weight[:, 2]
    weight[:, 5] = 0
    value, _ = svd_ratio(hidden, spectral.head_gram(weight), 4, 30)
    assert value.item() == pytest.approx(exact(hidden, weight, 4)[0].item(), rel=1e-7)


def test_real_logits(stories15m):
    from safetensors.torch import load_file

    weight = load_file(stories15m / "model.safetensors")["model.embed_tokens.weight"]
    hidden = weight[torch.randint(32000, (400,), generator=torch.Generator().manual_seed(0))].float() * 5
    value, _ = svd_ratio(hidden, spectral.head_gram(weight), 10, 32000)
    assert value.item() == pytest.approx(exact(hidden, weight, 10)[0].item(), rel=1e-7)


@pytest.mark.parametrize(("norm", "variance"), [("fro", 0.0), ("fro", 0.3), ("nuclear", 0.0), ("nuclear", 0.3)])
@pytest.mark.parametrize("d", [12, 530])
def test_the_term_and_both_gradients_of_every_variant(monkeypatch, norm, variance, d):
    monkeypatch.setattr(spectral, "_STEPS", 6)  # d 530 then iterates, with 6 · 13 columns
    g = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, d + 1).double() ** -1.5
    hidden = (torch.randn(560, d, generator=g, dtype=torch.float64) * spectrum).requires_grad_()
    weight = torch.randn(570, d, generator=g, dtype=torch.float64).requires_grad_()
    want = reference.svd(hidden @ weight.T, 3, norm, variance)
    want.backward()
    head = spectral.head_gram(weight)
    term = spectral.svd_term(
        spectral.gram([hidden.detach()]), head, 3, 560, norm=norm, variance=variance, need_weight_grad=True
    )
    assert term.value.item() == pytest.approx(want.item(), rel=1e-9)
    torch.testing.assert_close(
        hidden.detach() @ spectral.gradient_matrix(term, head), hidden.grad, rtol=1e-5, atol=1e-9
    )
    torch.testing.assert_close(weight.detach() @ term.k_weight, weight.grad, rtol=1e-5, atol=1e-9)


def test_an_iteration_in_float32_costs_no_digit_that_float32_has():
    hidden, weight = draw(700, 640, 900, 0.7)
    s, head = spectral.gram([hidden]), spectral.head_gram(weight)
    narrow, wide = (spectral.svd_term(s, head, 10, 700, iterate=t) for t in (torch.float32, torch.float64))
    assert narrow.value.item() == pytest.approx(wide.value.item(), rel=1e-9)
    k = spectral.gradient_matrix(wide, head)
    assert (spectral.gradient_matrix(narrow, head) - k).norm() < 1e-5 * k.norm()
    assert narrow.value.dtype == torch.float64


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("change", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_with_pissa_adapters_needs_no_eigendecomposition(monkeypatch, dtype, change, bias):
    """W and its principal directions B are dependent until B has moved far; in float32, which devices have, always."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(90, 20, generator=g, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    b0, a0 = u[:, :4] * s[:4].sqrt(), s[:4].sqrt()[:, None] * vh[:4]
    a, b = (t * (1 + change * torch.randn(t.shape, generator=g, dtype=torch.float64)) for t in (a0, b0))
    lora = torch.cat([a - a0, a0]).to(dtype), torch.cat([b, b - b0], 1).to(dtype), 1.0
    shift = torch.randn(90, 1, generator=g, dtype=torch.float64)
    head = LinearHead(weight.to(dtype), bias=shift[:, 0].to(dtype) if bias else None, lora=lora)
    linear = Linear(head, dtype)
    known = weight.T.to(dtype) @ weight.to(dtype)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    found = spectral.head_gram(head.weight, linear.extra, known, linear.lift)
    whole = weight + b @ a - b0 @ a0
    whole = torch.cat([whole, shift], 1) if bias else whole
    hidden = torch.randn(30, 20, generator=g, dtype=torch.float64)
    x = torch.cat([hidden.to(dtype), linear.columns(hidden.to(dtype))], 1) @ found.factor
    exact = torch.linalg.svdvals((torch.cat([hidden, torch.ones(30, 1)], 1) if bias else hidden) @ whole.T)
    allowed = 1e-5 if dtype == torch.float32 else 1e-12
    exact = exact[: x.shape[1]]
    torch.testing.assert_close(torch.linalg.svdvals(x.double()), exact, rtol=allowed, atol=allowed * exact[0].item())


def test_a_singular_head_gets_a_factor():
    weight = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for extra in (torch.zeros(40, 2).double(), weight[:, :2].clone(), 1e-9 * weight[:, :1]):
        head = spectral.head_gram(weight, extra)
        torch.testing.assert_close(head.factor @ head.factor.T, head.gram, rtol=1e-10, atol=1e-10)
    head = spectral.head_gram(torch.zeros(5, 3))
    assert not head.factor.any()
    # W + B A without its last two columns: of what is 0 nothing is seen.
    a = torch.cat([torch.zeros(2, 4), -torch.eye(2)], 1).double()
    head = spectral.head_gram(weight, weight[:, 4:], None, lambda y: y[:6] + a.T @ y[6:])
    assert head.factor.shape == (8, 6)
    x = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.linalg.svdvals(torch.cat([x, x @ a.T], 1) @ head.factor)
    torch.testing.assert_close(
        found, torch.linalg.svdvals(x[:, :4] @ weight[:, :4].T)[:6].where(torch.arange(6) < 4, 0.0)
    )
    assert spectral.head_gram(torch.full((5, 3), torch.nan)).factor.isnan().all()
