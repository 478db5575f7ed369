"""The pieces of the Triton kernels, in their interpreter: elementary functions, the top K, the merge, the choices of
sizes; and all of them through the compiler, for three generations of GPUs."""

import os
import subprocess
import sys

import pytest
import torch

from .test_imports import ROOT

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
rows = pytest.importorskip("balora_kernels.rows")
from balora_kernels import eigh, numerics, tiles  # noqa: E402

from balora import reference, spectral  # noqa: E402

log1p, tanh, times_less, weighted_growth = numerics.log1p, numerics.tanh, numerics.times_less, numerics.weighted_growth
pytestmark = pytest.mark.no_cover  # it would take half as long again
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _elementary(x_ptr, out_ptr, n, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    if WHICH == "growth":
        found = weighted_growth(3.0, 3.0 * tl.exp2(x), x)
    elif WHICH == "log1p":
        found = log1p(x)
    elif WHICH == "tanh":
        found = tanh(x)
    else:
        found = times_less(x, 1.25, 3.75)
    tl.store(out_ptr + at, found, mask=at < n)


SIZES = torch.cat([torch.logspace(-30, 1, 200), torch.linspace(0.05, 0.15, 300)])


@pytest.mark.parametrize("name", ["growth", "log1p", "tanh", "times_less"])
def test_elementary_functions_keep_their_relative_accuracy(name):
    x = {"log1p": torch.cat([SIZES, -SIZES[SIZES < 0.99]]), "times_less": 3 + torch.cat([SIZES, -SIZES])}
    x = x.get(name, torch.cat([SIZES, -SIZES])).to(DEVICE)
    wide = x.double()
    exact = {
        "growth": 3 * torch.expm1(wide * torch.log(torch.tensor(2.0, dtype=torch.float64))),
        "log1p": wide.log1p(),
        "tanh": wide.tanh(),
        "times_less": wide * 1.25 - 3.75,
    }[name]
    found = torch.empty_like(x)
    _elementary[(1,)](x, found, len(x), WHICH=name, BLOCK=1024)
    error = ((found.double() - exact) / exact.abs().clamp_min(1e-37)).abs()
    allowed = {"growth": 4e-6, "log1p": 4e-7, "tanh": 5e-7, "times_less": 1e-7}
    if DEVICE == "cuda":  # whose exp2 may be off by 2 units in the last place, not by half of one
        allowed |= {"growth": 8e-6, "tanh": 4e-6}
    assert error.max() < allowed[name]


def reference_top_k(z, k):
    values, indices = z.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


@pytest.mark.parametrize("k", [1, 3, 20, 128])
def test_the_top_k_is_that_of_a_stable_sort(monkeypatch, k):
    monkeypatch.setattr(tiles, "_TILE", 256)
    g = torch.Generator().manual_seed(k)
    z = torch.randn(7, 700, generator=g)
    z[1] = 0.0
    z[1, ::3] = -0.0  # equal to 0: still the lower index
    z[2] = z[2].bfloat16().float()
    z[3] = torch.randint(3, (700,), generator=g).float()
    z[4, 40:] = -torch.inf
    z[5] = torch.arange(700.0)
    z[6] = -torch.arange(700.0) * 1e30
    found = rows.forward(rows.Logits(z.to(DEVICE)), top_k=k)
    values, indices = reference_top_k(z, k)
    assert torch.equal(found.top_index.cpu(), indices)
    q = values.double().softmax(-1)
    negative_entropy = torch.where(q == 0, 0.0, q * q.log()).sum(-1)
    torch.testing.assert_close(found.terms[2].cpu().double(), negative_entropy, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.3])
def test_how_a_row_is_cut_does_not_matter(monkeypatch, temperature):
    """The merge is exact: one tile, or many, some of them masked as a whole by the one, the other or both."""
    g = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(4, 1000, generator=g)
    teacher = z + 0.01 * torch.randn(4, 1000, generator=g) + 4
    z[1, 64:192] = teacher[1, 64:192] = -torch.inf
    teacher[2, 640:768] = -torch.inf
    z[3, 0] = teacher[3, 900] = 80.0
    labels = torch.tensor([5, 5, 999, 0])

    def evaluate(tile):
        monkeypatch.setattr(tiles, "_TILE", tile)
        student, other = rows.Logits(z.to(DEVICE)), rows.Teacher(rows.Logits(teacher.to(DEVICE)), False)
        common = dict(labels=labels.to(DEVICE), temperature=temperature)
        found = rows.forward(student, other, **common)
        out = torch.empty_like(student.values)
        rows.gradient(student, other, found, out, **common, strength=1.7)
        return found.terms[:2].cpu(), out.cpu()

    x, t = z.double() / temperature, teacher.double() / temperature
    log_s, log_p = x.log_softmax(-1), t.log_softmax(-1)
    kl = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_s)).sum(-1)
    ce = torch.nn.functional.cross_entropy(z.double(), labels, reduction="none")
    gradient = z.double().softmax(-1) - torch.nn.functional.one_hot(labels, 1000)
    gradient = gradient + 1.7 * (log_s.exp() - log_p.exp())
    near, close = (1e-6, 1e-4) if DEVICE == "cuda" else (1e-7, 3e-5)  # for its exp2
    for tile in (64, 256, 1024):
        terms, out = evaluate(tile)
        torch.testing.assert_close(terms[0].double(), ce, rtol=1e-6, atol=near)
        torch.testing.assert_close(terms[1].double(), kl, rtol=close, atol=0)
        torch.testing.assert_close(out.double(), gradient, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("difference", [True, False])
@pytest.mark.parametrize("vocab", [5, 131, 250])
def test_what_stands_beside_padded_rows_does_not_matter(monkeypatch, vocab, difference):
    """The same bits whatever stands in the columns up to a multiple of 16, beyond which nothing is written."""
    monkeypatch.setattr(tiles, "_TILE", 128)
    g = torch.Generator().manual_seed(vocab)
    z, t = torch.randn(2, 4, vocab, generator=g).to(DEVICE)
    labels = torch.tensor([0, -100, vocab - 1, 2], device=DEVICE)
    end = -(-vocab // 16) * 16

    def evaluate(beside, padded):
        def put(values):
            wide = torch.full((4, end + 16), beside, device=DEVICE)
            wide[:, :vocab] = values
            return wide[:, :vocab], wide

        student, other = rows.Logits(put(z)[0]), rows.Teacher(rows.Logits(put(t)[0]), difference)
        out, whole = put(torch.zeros_like(z))
        common = dict(labels=labels, temperature=2.0, padded=padded)
        found = rows.forward(student, other, **common, top_k=3)
        rows.gradient(student, other, found, out, **common, strength=1.7, lambda_diversity=0.3)
        assert torch.equal(whole[:, end:], torch.full((4, 16), beside, device=DEVICE).to(whole)) or beside != beside
        return found.terms, found.top_index, out

    expected = evaluate(0.0, False)
    for beside in (0.0, 1e30, torch.inf, torch.nan):
        for found, exact in zip(evaluate(beside, True), expected, strict=True):
            assert torch.equal(found, exact)


@pytest.mark.parametrize("vocab", [1, 3, 63, 64, 65, 4096, 4097, 32000, 50257, 131072, 2**18, 2**18 + 1, 10**6])
def test_a_row_is_cut_into_whole_blocks(vocab):
    cut = tiles.tiling(vocab)
    assert cut.tile % cut.block == 0
    assert cut.tile & (cut.tile - 1) == 0
    assert (cut.tiles - 1) * cut.tile < vocab <= cut.tiles * cut.tile
    assert (cut.blocks - 1) * cut.block < vocab <= cut.blocks * cut.block
    assert tiles.row_stride(vocab) % 64 == 0
    assert 0 <= tiles.row_stride(vocab) - vocab < 64


def test_chunks_fill_the_budget_and_are_alike():
    assert tiles.chunk_rows(100, 10, 10**6) == 100
    assert tiles.chunk_rows(0, 10, 10**6) == 1
    assert tiles.chunk_rows(5, 10**7, 10**6) == 1
    for rows_, vocab in ((8192, 131072), (8192, 32000), (65536, 256000), (1000, 131072)):
        chunk = tiles.chunk_rows(rows_, 6 * vocab, 512 * 2**20)
        most = 512 * 2**20 // (6 * vocab) // 128 * 128
        assert chunk <= most
        assert -(-rows_ // chunk) == -(-rows_ // most)
        assert chunk == rows_ or chunk % 128 == 0


def test_slices_of_the_vocabulary_fill_the_multiprocessors():
    assert tiles.vocabulary_slices(8192, 4096, 131072) == 1  # 1024 tiles
    for c, d, vocab in ((640, 4096, 131072), (384, 2304, 256000), (128, 4096, 32000)):
        slices = tiles.vocabulary_slices(c, d, vocab)
        assert vocab % slices == 0
        assert (vocab // slices) % 8 == 0
        work = -(-c // 128) * -(-d // 256) * slices
        alone = work // slices
        waves = lambda n: -(-n // tiles.MULTIPROCESSORS)  # noqa: E731
        assert work / waves(work) >= alone / waves(alone)
    assert tiles.vocabulary_slices(640, 4096, 50257) == 1  # is no multiple


def test_every_kernel_compiles_without_a_spill():
    """For sm_80, sm_90 and sm_100, as the launchers launch it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "benchmarks")))}
    command = [sys.executable, ROOT / "benchmarks" / "compile_report.py", "--quick"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "compiled, none spills" in result.stdout
    lines = result.stdout.splitlines()
    for kernel in ("tile_states", "merge", "gradient", "add_top", "jacobi", "cholesky_inverse"):
        for arch in (80, 90, 100):
            assert any(f"| {kernel}" in line and f"| sm_{arch}" in line for line in lines), (kernel, arch)


def spectrum(n, decades, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2 * n, generator=g) * torch.logspace(0, -decades, n)[:, None]
    return (x @ x.T).to(DEVICE)


@pytest.mark.parametrize("n", [1, 2, 3, 20, 32, 61, 64])
def test_eigenvalues_of_a_small_matrix(n):
    a = spectrum(n, 3)
    values, vectors = eigh.eigh(a)
    exact = torch.linalg.eigvalsh(a.double().cpu()).flip(0)
    assert (values.cpu() - exact).abs().max() <= 1e-5 * exact[0]
    assert (vectors.T @ vectors - torch.eye(n, device=DEVICE)).abs().max() < 1e-4
    assert (a @ vectors - vectors * values).abs().max() <= 1e-4 * exact[0]
    assert torch.equal(values, values.sort(descending=True).values)


def test_eigenvalues_of_awkward_matrices():
    near = 4e-6 if DEVICE == "cuda" else 1e-6  # its square roots and divisions are off by a last digit, each time alike
    tiny = 1e-20 * torch.ones(4, 4)
    for a in (torch.zeros(5, 5), torch.ones(6, 6), torch.eye(7), torch.diag(torch.tensor([1.0, -2.0, 1.0])), tiny):
        values, vectors = eigh.eigh(a.to(DEVICE))
        exact = torch.linalg.eigvalsh(a.double()).flip(0)
        torch.testing.assert_close(values.cpu().double(), exact, rtol=near, atol=near * exact.abs().max().item())
        again = (vectors * values) @ vectors.T
        torch.testing.assert_close(again.cpu(), a, rtol=0, atol=near * exact.abs().max().item())
    broken = torch.ones(4, 4)
    broken[1, 2] = broken[2, 1] = torch.nan
    assert eigh.eigh(broken.to(DEVICE))[0].isnan().all()


@pytest.mark.parametrize("n", [1, 5, 32, 64])
def test_inverse_factor(n):
    a = spectrum(n, 1)
    found = eigh.inverse_factor(a)
    assert not found.triu(1).any()
    torch.testing.assert_close(found @ a @ found.T, torch.eye(n, device=DEVICE), rtol=0, atol=1e-5)
    if n > 1:
        a[:, 1] = a[1, :] = 0.0  # a direction that is not there
        found = eigh.inverse_factor(a)
        assert found.isfinite().all()
        assert not found[1].any()


@pytest.mark.parametrize(
    ("d", "rows", "rank", "close"),
    [(40, 100, 10, 2e-5), (150, 300, 10, 1e-3), (150, 7, 10, 2e-4), (200, 400, 40, 3e-3)],
)
def test_the_svd_term_without_waiting_for_the_device(d, rows, rank, close):
    """On a spectrum that falls, of full rank and of low. From d = 65 on the iteration leaves a rest of the gradient."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, d, generator=g) * torch.logspace(0, -2, d)
    weight = torch.randn(500, d, generator=g)
    exact_z = (hidden.double() @ weight.double().T).requires_grad_()
    count = min(rows, 500, d)
    exact = reference.svd(exact_z, min(rank, count))
    head = spectral.head_gram(weight)
    head = spectral.HeadGram(*(m.float().to(DEVICE) for m in head))
    s = (hidden.T @ hidden).to(DEVICE)
    term = spectral.svd_term(s, head, min(rank, count), min(rows, 500), small=eigh)
    assert term.value.item() == pytest.approx(exact.item(), rel=5e-5)
    (exact_grad,) = torch.autograd.grad(exact, exact_z)
    exact_grad = exact_grad @ weight.double()
    grad = hidden @ spectral.gradient_matrix(term, head).cpu()
    assert (grad - exact_grad).norm() < close * exact_grad.norm()
