"""The losses on logits, forward and backward: consistency_loss, diversity_loss, svd_loss, covariance_loss.

The floor is the bytes that no method can avoid, moved by copies in the same rounds: each logit read forward, read again
backward (the entropy's backward reads K entries of a row alone), and its gradient written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from balora import functional, reference

from . import harness, published
from .harness import DEVICE
from .operation import Defaults, Function, Implementation, Loss, Operation, Shape, compiled, needs, own

K, T, RANK = 20, 2.0, 10
CHECKED = 64  # rows, before all as they are timed


class Logits:
    """A student's and a teacher's [N, V]."""

    def __init__(self, leaf: Tensor, teacher: Tensor) -> None:
        self.leaf, self.teacher = leaf, teacher
        self.vocab = leaf.shape[1]
        self.held = sum(t.numel() * t.element_size() for t in (leaf, teacher))

    def part(self, rows: slice, dtype: torch.dtype | None = None) -> Logits:
        leaf, teacher = (t.detach()[rows].to(dtype or t.dtype) for t in (self.leaf, self.teacher))
        return Logits(leaf.clone().requires_grad_(), teacher)

    @property
    def wide(self) -> Tensor:
        """The student's, as the published code widens half precision."""
        return published.widened(self.leaf)


class LogitLoss(Loss):
    def __init__(self, inputs: Logits, oracle: Function, passes: int, rows: int = CHECKED) -> None:
        super().__init__(inputs, oracle, rows)
        self._passes = passes
        self.floor_name = f"copies of {passes} passes"

    def floor(self) -> Callable[[], None]:
        return harness.copies(self.inputs.leaf, self._passes)


def of_two_models(oracle: Function, passes: int) -> Callable[[Shape, torch.dtype, str], LogitLoss]:
    """Random logits of size 3, the teacher's a tenth of that away.

    A gap follows the K largest of a row: among equal logits of half precision peers take others than balora does.
    """

    def case(shape: Shape, dtype: torch.dtype, terms: str) -> LogitLoss:
        g = torch.Generator(DEVICE).manual_seed(0)
        z = 3 * torch.randn(shape, generator=g, device=DEVICE)
        z.scatter_add_(1, z.topk(min(K, shape[1])).indices, z.new_ones(()).expand(shape))
        teacher = (z + 0.3 * torch.randn(shape, generator=g, device=DEVICE)).to(dtype)
        return LogitLoss(Logits(z.to(dtype).requires_grad_(), teacher), oracle, passes)

    return case


def of_one_model(oracle: Function, passes: int) -> Callable[[Shape, torch.dtype, str], LogitLoss]:
    """Logits with singular values that fall, about as 1/i, as those of language models do. All rows are checked."""

    def case(shape: Shape, dtype: torch.dtype, terms: str) -> LogitLoss:
        g = torch.Generator(DEVICE).manual_seed(0)
        n, vocab = shape
        count = min(n, vocab, 256)
        scale = torch.arange(1, count + 1, device=DEVICE) ** -1.0
        left = torch.randn(n, count, generator=g, device=DEVICE) * scale
        z = left @ torch.randn(count, vocab, generator=g, device=DEVICE)
        z += 0.01 * torch.randn(n, vocab, generator=g, device=DEVICE)
        z = z.to(dtype)
        return LogitLoss(Logits(z.requires_grad_(), z.new_empty(0)), oracle, passes, rows=n)

    return case


def naive_consistency(p: Logits) -> Tensor:
    return published.consistency(p.wide, p.teacher, T)


def liger_jsd(p: Logits) -> Tensor:
    """Liger's JSD with beta 0: KL, teacher first, of log-softmaxes that are there already."""
    from liger_kernel.transformers import LigerJSD

    z = p.wide
    with torch.no_grad():
        target = (p.teacher.to(z.dtype) / T).log_softmax(-1)
    return T**2 * LigerJSD(beta=0.0)((z / T).log_softmax(-1), target)


def liger_kl(p: Logits) -> Tensor:
    from liger_kernel.transformers import LigerKLDIVLoss

    z = p.wide
    with torch.no_grad():
        target = (p.teacher.to(z.dtype) / T).softmax(-1)
    return T**2 * LigerKLDIVLoss(reduction="batchmean")((z / T).log_softmax(-1), target)


def naive_diversity(p: Logits) -> Tensor:
    return published.diversity(p.wide, K)


def svd_lowrank(q: int, niter: int) -> Callable[[Logits], Tensor]:
    return lambda p: published.svd(p.wide, RANK, q, niter)


def naive_covariance(p: Logits) -> Tensor:
    covariance = torch.cov(p.wide.T)
    return (covariance - covariance.diag().diag()).square().sum() / len(covariance)


def consistency(impl: str) -> Callable[[Logits], Tensor]:
    return lambda p: functional.consistency_loss(p.leaf, p.teacher, T, impl=impl)


def diversity(impl: str) -> Callable[[Logits], Tensor]:
    return lambda p: functional.diversity_loss(p.leaf, K, impl=impl)


def svd(impl: str) -> Callable[[Logits], Tensor]:
    return lambda p: functional.svd_loss(p.leaf, RANK, impl=impl)


def svd_oracle(p: Logits) -> Tensor:
    """From the eigenvalues of the smaller Gram matrix in float64, but of float32 inputs, where it is the yardstick of
    plain torch, by a decomposition: that takes minutes of the GPU's shapes in float64.

    Its own error is 1e-12 of the largest entry of the gradient; in half precision, whose rounding is 4e-3, it is as far
    from float64 as the decomposition.
    """
    if p.leaf.dtype == torch.float32:
        return functional.svd_loss(p.leaf, RANK, impl="reference")
    z = p.leaf.double()
    gram = z @ z.T if len(z) <= z.shape[1] else z.T @ z
    return -torch.linalg.eigvalsh(gram)[-RANK:].clamp_min(0).sqrt().sum() / gram.trace().sqrt()


def plain_covariance(p: Logits) -> Tensor:
    return reference.covariance(p.wide)


_SWEEPS_CPU: dict[str, tuple[Shape, Shape]] = {
    "N": ((32, 32000), (1024, 32000)),
    "V": ((128, 4000), (128, 256000)),
}
_SWEEPS_GPU: dict[str, tuple[Shape, Shape]] = {
    "N": ((512, 131072), (16384, 131072)),
    "V": ((8192, 8192), (8192, 262144)),
}
_CPU = Defaults([(256, 32000)], ["bfloat16", "float32"], _SWEEPS_CPU)
_GPU = Defaults([(8192, 32000), (8192, 131072), (16, 131072)], ["bfloat16"], _SWEEPS_GPU)

CONSISTENCY = Operation(
    name="consistency_loss",
    axes=("N", "V"),
    case=of_two_models(consistency("reference"), passes=5),
    implementations=(
        own("triton", consistency("triton")),
        own("streaming", consistency("streaming")),
        own("reference", consistency("reference")),
        Implementation("naive", naive_consistency),
        Implementation("naive-compiled", compiled(naive_consistency)),
        Implementation("liger-jsd", liger_jsd, why_not=needs("liger_kernel")),
        Implementation("liger-kl-div", liger_kl, why_not=needs("liger_kernel")),
    ),
    cpu=_CPU,
    gpu=_GPU,
)
DIVERSITY = Operation(
    name="diversity_loss",
    axes=("N", "V"),
    case=of_two_models(diversity("reference"), passes=2),
    implementations=(
        own("triton", diversity("triton")),
        own("streaming", diversity("streaming")),
        own("reference", diversity("reference")),
        Implementation("naive", naive_diversity),
        Implementation("naive-compiled", compiled(naive_diversity)),
    ),
    cpu=_CPU,
    gpu=_GPU,
)
SVD = Operation(
    name="svd_loss",
    axes=("N", "V"),
    case=of_one_model(svd_oracle, passes=3),
    implementations=(
        own("cuda", svd("cuda")),
        own("streaming", svd("streaming")),
        own("reference", svd("reference"), note="torch.linalg.svdvals"),
        Implementation("naive", svd_lowrank(15, 2), note="torch.svd_lowrank, q 15, 2 iterations, as published"),
        Implementation("svd-lowrank-64", svd_lowrank(64, 4), note="torch.svd_lowrank, q 64, 4 iterations"),
    ),
    cpu=Defaults([(256, 8000), (600, 8000)], ["bfloat16", "float32"]),
    gpu=Defaults([(512, 32000), (1024, 32000)], ["bfloat16"]),
)
COVARIANCE = Operation(
    name="covariance_loss",
    axes=("M", "C"),
    case=of_one_model(plain_covariance, passes=3),
    implementations=(
        own("streaming", lambda p: functional.covariance_loss(p.leaf)),
        own("reference", plain_covariance),
        Implementation("naive", naive_covariance, note="torch.cov"),
        Implementation("naive-compiled", compiled(naive_covariance)),
    ),
    cpu=Defaults([(32, 150), (512, 1000)], ["float32"]),
    gpu=Defaults([(32, 150), (1024, 1000)], ["float32"]),
)
