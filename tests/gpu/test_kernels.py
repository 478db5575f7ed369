"""The Triton kernels on a CUDA device, beyond what their interpreter shows: real sizes, graphs, bits, memory.

The tests of tests/test_fused.py, test_fused_svd.py and test_kernels.py run on the device too where there is one: see
`make gpu`.
"""

from dataclasses import replace

import pytest
import torch

from balora import BALoraConfig, LinearHead, fused, reference
from balora import functional as F

from .. import test_kl_accuracy
from ..conftest import ALL_TERMS, problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TOKEN_TERMS = replace(ALL_TERMS, lambda_svd=0.0)


def big(n, d, vocab, dtype=torch.bfloat16):
    g = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, device="cuda")  # noqa: E731
    hidden = draw(n, d)
    weight = (3 * draw(vocab, d) / d**0.5).to(dtype)
    labels = torch.randint(vocab, (n,), generator=g, device="cuda")
    labels[::7] = -100
    return hidden.to(dtype), (hidden + 0.1 * draw(n, d)).to(dtype), weight, labels


def evaluate(hidden, teacher, weight, labels, config, impl="triton"):
    hidden = hidden.clone().requires_grad_()
    out = F.linear_objective(hidden, teacher, LinearHead(weight), labels, config, impl=impl)
    out.loss.backward()
    return out, hidden.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(300, 512, 32000), (200, 256, 32001), (40, 256, 50257), (16, 256, 131072)])
def test_the_objective_against_float64(shape, dtype):
    inputs = big(*shape, dtype)
    found, grad = evaluate(*inputs, TOKEN_TERMS)
    exact, exact_grad = evaluate(*(x.double() for x in inputs[:3]), inputs[3], TOKEN_TERMS, "reference")
    _, plain_grad = evaluate(*inputs, TOKEN_TERMS, "reference")
    close = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    for name in ("loss", "ce", "consistency", "diversity"):
        assert getattr(found, name).item() == pytest.approx(getattr(exact, name).item(), rel=close), name
    error, allowed = ((x.double() - exact_grad).abs().max() for x in (grad, plain_grad))
    assert error <= 2 * (allowed + torch.finfo(dtype).eps * exact_grad.abs().max())


def test_the_svd_term():
    """Of random hidden states, whose flat spectrum is the worst case, and of ones whose spectrum falls."""
    hidden, _, weight, labels = big(300, 512, 32000)
    config = replace(ALL_TERMS, lambda_consistency=0.0, lambda_diversity=0.0, svd_rank=10)
    for falls, close in ((0.0, 1e-2), (2.0, 1e-3)):
        h = (hidden.float() * torch.logspace(0, -falls, 512, device="cuda")).bfloat16()
        found, grad = evaluate(h, None, weight, labels, config)
        exact, exact_grad = evaluate(h.double(), None, weight.double(), labels, config, "reference")
        assert found.svd.item() == pytest.approx(exact.svd.item(), rel=close)
        if (
            falls
        ):  # of a flat spectrum the directions are not determined: 8 iterations leave much of the gradient's error
            assert (grad.double() - exact_grad).norm() < 0.02 * exact_grad.norm()


def test_the_same_bits_on_every_run_and_for_every_chunk(monkeypatch):
    inputs = big(1500, 512, 32000)
    found, grad = evaluate(*inputs, ALL_TERMS)
    again, grad_again = evaluate(*inputs, ALL_TERMS)
    assert torch.equal(found.loss, again.loss)
    assert torch.equal(grad, grad_again)
    z = torch.randn(64, 50257, device="cuda", dtype=torch.bfloat16)
    teacher = z + 0.1 * torch.randn_like(z)
    for loss in (lambda x, t: F.consistency_loss(x, t, normalizer=64), lambda x, t: F.diversity_loss(x, normalizer=64)):
        whole = z.clone().requires_grad_()
        loss(whole, teacher).backward()
        for part in (slice(0, 1), slice(5, 40)):
            rows = z[part].clone().requires_grad_()
            loss(rows, teacher[part]).backward()
            assert torch.equal(rows.grad, whole.grad[part])


def test_offsets_beyond_two_to_the_31():
    n, vocab = 17_000, 131_072
    z = torch.empty(n, vocab, device="cuda", dtype=torch.bfloat16)
    teacher = torch.empty_like(z)
    for part in z.split(1000):
        part.normal_()
    for part in teacher.split(1000):
        part.normal_()
    z.requires_grad_()
    (F.consistency_loss(z, teacher) + F.diversity_loss(z)).backward()
    last = z.detach()[-3:].double().requires_grad_()
    exact = reference.consistency(last, teacher[-3:].double(), 2.0) + reference.diversity(last, 20)
    (exact / n).backward()
    assert (z.grad[-3:].double() - last.grad).norm() < 0.01 * last.grad.norm()


@pytest.mark.parametrize("distance", test_kl_accuracy.DISTANCES)
def test_kl_of_bfloat16_inputs_within_two_percent(distance):
    hidden, teacher, weight, labels = (x.cuda() for x in test_kl_accuracy.at_distance(distance))
    h = hidden.double().requires_grad_()
    z, z_teacher = h @ weight.double().T, teacher.double() @ weight.double().T
    exact = reference.consistency(z, z_teacher, 2.0) / len(labels)
    exact.backward()
    huge = replace(test_kl_accuracy.ONLY_KL, lambda_consistency=1e12)
    terms, gradients = fused.objective(
        hidden, teacher, LinearHead(weight), None, labels, None, huge, test_kl_accuracy.HIDDEN
    )
    value = terms.consistency.item() / len(labels) / exact.item() - 1
    error = test_kl_accuracy.relative(gradients.hidden.double() / 1e12 / len(labels), h.grad)
    rounded = (hidden @ weight.T).double().requires_grad_()
    peer = reference.consistency(rounded, (teacher @ weight.T).double(), 2.0) / len(labels)
    peer.backward()
    of_logits = test_kl_accuracy.relative(rounded.grad @ weight.double(), h.grad)
    print(
        f"KL {exact.item():.1e}: error of the value {abs(value):.1e}, of the gradient {error:.1e}; "
        f"with bfloat16 logits {abs(peer.item() / exact.item() - 1):.1e}, {of_logits:.1e}"
    )
    assert abs(value) < 0.02
    assert error < 0.02


@pytest.mark.parametrize("shape", [(8192, 1024, 32000), (4096, 512, 131072)])
def test_memory_beyond_inputs_and_gradients(shape):
    hidden, teacher, weight, labels = big(*shape)
    head = LinearHead(weight)
    hidden.requires_grad_()

    def step():
        loss = F.linear_objective(hidden, teacher, head, labels, ALL_TERMS).loss
        return torch.autograd.grad(loss, hidden)[0]

    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grad = step()
    peak = torch.cuda.max_memory_allocated() - before - 2 * grad.numel() * grad.element_size()
    assert peak <= 600 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", [TOKEN_TERMS, ALL_TERMS], ids=["without SVD", "all"])
def test_a_captured_graph_replays_on_new_data(config, dtype):
    hidden, teacher, weight, labels = problem(50, 100, 3001, dtype=dtype, ignored=9)
    inputs = [x.cuda() for x in (hidden, teacher, labels)]
    head = LinearHead(weight.cuda())
    inputs[0].requires_grad_()

    def step():
        out = F.linear_objective(inputs[0], inputs[1], head, inputs[2], config, impl="triton")
        return out, torch.autograd.grad(out.loss, inputs[0])[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grad = step()
    other = problem(50, 100, 3001, dtype=dtype, ignored=20, seed=3)
    with torch.no_grad():
        for tensor, new in zip(inputs, (other[0], other[1], other[3]), strict=True):
            tensor.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    expected, expected_grad = step()
    assert out.n_valid == expected.n_valid == 30
    # In half precision other row counts have other products, and the gradient by the logits is rounded.
    near, close = (1e-5, 1e-4) if dtype == torch.float32 else (1e-4, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(out.loss, expected.loss, rtol=near, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=close, atol=close * expected_grad.abs().max().item())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
def test_the_second_device_while_the_first_is_the_current_one():
    inputs = [x.to("cuda:1") for x in problem(50, 100, 3001, dtype=torch.bfloat16, ignored=9)]
    found, grad = evaluate(*inputs, ALL_TERMS)
    expected, expected_grad = evaluate(*(x.to("cuda:0") for x in inputs), ALL_TERMS)
    torch.testing.assert_close(found.loss.to("cuda:0"), expected.loss)
    torch.testing.assert_close(grad.to("cuda:0"), expected_grad)
    assert torch.cuda.current_device() == 0


def test_losses_on_logits_never_wait_for_the_device():
    z = torch.randn(64, 3001, device="cuda", requires_grad=True)
    teacher, valid = torch.randn(64, 3001, device="cuda"), torch.rand(64, device="cuda") < 0.7
    for _ in range(2):  # compiled first
        loss = F.consistency_loss(z, teacher, valid=valid) + F.diversity_loss(z, valid=valid)
        loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = F.consistency_loss(z, teacher, valid=valid) + F.diversity_loss(z, valid=valid)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("config", [TOKEN_TERMS, ALL_TERMS], ids=["without SVD", "all"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile(mode, config):
    hidden, teacher, weight, labels = (x.cuda() for x in problem(50, 64, 3001, dtype=torch.float32, ignored=9))
    head = LinearHead(weight)
    compiled = torch.compile(
        lambda h: F.linear_objective(h, teacher, head, labels, config, impl="triton").loss,
        fullgraph=True,
        mode=mode,
    )
    expected, expected_grad = evaluate(hidden, teacher, weight, labels, config)
    for _ in range(3):
        h = hidden.clone().requires_grad_()
        loss = compiled(h)
        loss.backward()
        torch.testing.assert_close(loss, expected.loss)
        torch.testing.assert_close(h.grad, expected_grad, rtol=1e-4, atol=1e-7)


def test_auto_takes_the_kernels():
    from balora import dispatch

    assert dispatch.choose("linear_objective", device=torch.device("cuda")) == "triton"
    z = torch.randn(4, 50, device="cuda")
    assert torch.equal(F.diversity_loss(z), F.diversity_loss(z, impl="triton"))
    assert F.diversity_loss(z.double()).dtype == torch.float64  # for which there is no kernel


def test_tf32_leaves_the_svd_term_alone():
    """Of products in TF32 its value moves by a thousandth, but half of the gradient is noise."""
    hidden, teacher, weight, labels = problem(300, 256, 3001, dtype=torch.float32)
    hidden = hidden * torch.logspace(0, -1, 256)  # singular values over a decade
    config = BALoraConfig(lambda_consistency=0.0, lambda_diversity=0.0, lambda_svd=1000.0)
    inputs = [x.cuda() for x in (hidden, teacher, weight, labels)]
    _, exact = evaluate(*inputs, config)
    torch.set_float32_matmul_precision("high")
    try:
        _, grad = evaluate(*inputs, config)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (grad - exact).norm() < 0.02 * exact.norm()
