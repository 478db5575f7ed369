"""Microbenchmarks of the single operations, with pytest-benchmark: pytest benchmarks/test_micro.py

Each has a peer from torch beside it in its group, and is held against it before it is timed.
"""

import pytest
import torch
from balora_bench import published

from balora import functional as F
from balora import reference

N, V, K, T = 256, 32000, 20, 2.0


@pytest.fixture(scope="module")
def logits():
    g = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(N, V, generator=g)
    return z.requires_grad_(), z.detach() + 0.3 * torch.randn(N, V, generator=g)


LOSSES = {
    "consistency": {
        "balora": lambda z, t: F.consistency_loss(z, t, T, impl="streaming"),
        "torch": lambda z, t: reference.consistency(z, t, T) / N,
    },
    "diversity": {
        "balora": lambda z, t: F.diversity_loss(z, K, impl="streaming"),
        "torch topk": lambda z, t: -torch.distributions.Categorical(logits=z.topk(K).values).entropy().mean(),
    },
    "svd": {
        "balora": lambda z, t: F.svd_loss(z, 10, impl="streaming"),
        "torch svdvals": lambda z, t: reference.svd(z, 10),
        "torch svd_lowrank": lambda z, t: published.svd(z, 10),
    },
    "covariance": {
        "balora": lambda z, t: F.covariance_loss(z[:, :150]),
        "torch": lambda z, t: reference.covariance(z[:, :150]),
    },
}


EXACT = {
    "consistency": lambda z, t: reference.consistency(z, t, T) / N,
    "diversity": lambda z, t: reference.diversity(z, K) / N,
    "svd": lambda z, t: reference.svd(z, 10),
    "covariance": lambda z, t: reference.covariance(z[:, :150]),
}


@pytest.mark.parametrize(("loss", "who"), [(loss, who) for loss in LOSSES for who in LOSSES[loss]])
def test_loss(benchmark, logits, loss, who):
    z, teacher = logits
    benchmark.group = f"{loss}, forward and backward, N {N}, V {V}"

    def run():
        z.grad = None
        value = LOSSES[loss][who](z, teacher)
        value.backward()
        return value.item()

    exact = EXACT[loss](z.detach().double(), teacher.double()).item()
    # float32 sums of torch over 8 million squares are 2.5e-4 off
    assert run() == pytest.approx(exact, rel={"torch svd_lowrank": 0.1, "torch svdvals": 1e-3}.get(who, 1e-5))
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


SVDS = {
    "balora": lambda a: F.randomized_svd(a, 16, impl="torch"),
    "torch svd_lowrank": lambda a: torch.svd_lowrank(a, q=26, niter=2),
    "torch svd": lambda a: torch.linalg.svd(a, full_matrices=False),
}


@pytest.mark.parametrize("who", SVDS)
@pytest.mark.parametrize(("batch", "m", "n"), [(64, 256, 128), (4, 1024, 1024)])
def test_randomized_svd(benchmark, batch, m, n, who):
    g = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, n + 1) ** -1.0
    a = torch.randn(batch, m, n, generator=g) * spectrum / m**0.5
    benchmark.group = f"randomized_svd, rank 16 of [{batch}, {m}, {n}]"
    torch.manual_seed(0)
    exact = torch.linalg.svdvals(a.double())[:, :16]
    assert (SVDS[who](a)[1][:, :16] - exact).abs().max() < 1e-2 * exact.max()
    benchmark.pedantic(SVDS[who], args=(a,), rounds=5, warmup_rounds=1)
