"""linear_objective, forward and backward, from hidden states.

The floor is what any method pays: bare products of N·V·d in the inputs' own type, three with a teacher (its logits, the
student's, the gradient by the hidden states), two for the cross-entropy alone. Beside balora's Triton path stands how
many bytes it moves, counted from the shapes, and how long they take at the bandwidth of a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import balora

from . import published
from .harness import DEVICE, ON_GPU, Error, budget, error
from .operation import Defaults, Function, Implementation, Loss, Operation, Shape, compiled, needs, own

ALL = balora.BALoraConfig()
CONFIGS = {
    "all": ALL,
    "ce+kl": replace(ALL, lambda_diversity=0.0, lambda_svd=0.0, temperature=1.0),
    "ce": replace(ALL, lambda_consistency=0.0, lambda_diversity=0.0, lambda_svd=0.0),
    "kl": replace(ALL, lambda_consistency=1.0, lambda_diversity=0.0, lambda_svd=0.0, temperature=1.0),  # without CE
}
CHECKED = 64 if ON_GPU else 320  # rows, before all as they are timed
# With the published λ a wrong KL, entropy or SVD term is within the budget of the loss: balora's own are also held
# against the oracle with these, which make of each term a share of the gradient that the budget sees.
WEIGHTS = {"consistency": 5.0, "diversity": 1.0, "svd": 4.0}  # shares of 0.2 to 0.8 of the largest entry of CE's
TERMS = ("ce", *WEIGHTS)
LEADING = 12  # directions that stand out where these are compared
# Allowed of a term beyond the budget, whose yardstick is one number: its roundings may cancel by chance. The SVD term's
# is exact; found were, of a flat spectrum, 1.6e-5 of the Krylov iteration and 3.2e-3 (N 2048, d 1024) of the subspace
# iteration that takes its place on a GPU, where nothing may wait for the device.
BY_CHANCE = {"ce": 1e-5, "consistency": 1e-5, "diversity": 1e-5, "svd": 5e-3 if ON_GPU else 2e-5}


class Inputs:
    """Random ones: logits of size 3, the teacher a tenth of the hidden states away."""

    def __init__(self, leaf: Tensor, teacher: Tensor, weight: Tensor, labels: Tensor, terms: str) -> None:
        self.leaf, self.teacher, self.weight, self.labels = leaf, teacher, weight, labels
        self.terms, self.config, self.head = terms, CONFIGS[terms], balora.LinearHead(weight)
        self.vocab = len(weight)
        self.held = sum(t.numel() * t.element_size() for t in (leaf, teacher, weight, labels))

    def part(self, rows: slice, dtype: torch.dtype | None = None) -> Inputs:
        leaf, teacher, weight = (t.detach() for t in (self.leaf[rows], self.teacher[rows], self.weight))
        if dtype is not None:
            leaf, teacher, weight = (t.to(dtype) for t in (leaf, teacher, weight))
        found = Inputs(leaf.clone().requires_grad_(), teacher, weight, self.labels[rows], self.terms)
        found.config = self.config
        if dtype is None:
            found.head = self.head  # with what a frozen head keeps
        return found

    def weighted(self) -> Inputs:
        """Every term with its weight of ``WEIGHTS``, and leading singular values apart from each other.

        Of the flat spectrum of random logits the leading directions are arbitrary, and so is the gradient by them: 0.7
        of the largest entry off where each σ is right to 3e-3.
        """
        n, d = self.leaf.shape
        scale = torch.ones(d, dtype=torch.float64, device=self.leaf.device)
        some = scale[:LEADING]
        some *= 4 * (1 + (d / n) ** 0.5) * 0.94 ** torch.arange(len(some), device=self.leaf.device)
        found = copy(self)
        leaf, teacher = ((t.detach() * scale).to(t.dtype) for t in (self.leaf, self.teacher))
        found.leaf, found.teacher = leaf.requires_grad_(), teacher
        given = {f"lambda_{name}": value for name, value in WEIGHTS.items()}
        chosen: dict[str, Any] = {k: v for k, v in given.items() if getattr(self.config, k)}
        found.config = replace(self.config, **chosen)
        return found

    def without_svd(self) -> Inputs:
        found = copy(self)
        found.config = replace(self.config, lambda_svd=0.0)
        return found


@dataclass(frozen=True)
class Objective:
    """balora's, by one of its implementations."""

    impl: str

    def __call__(self, p: Inputs) -> Tensor:
        return self.output(p).loss

    def output(self, p: Inputs) -> balora.functional.BALoraOutput:
        return balora.functional.linear_objective(p.leaf, p.teacher, p.head, p.labels, p.config, impl=self.impl)


class OfInputs(Loss):
    def __init__(self, inputs: Inputs, rows: int) -> None:
        oracle = naive if inputs.terms == "kl" else Objective("reference")
        svd = svd_term if inputs.config.lambda_svd else None
        super().__init__(inputs, oracle, rows, lambda p: oracle(p.without_svd()), svd)
        self.products = 3 if inputs.config.lambda_consistency else 2
        self.floor_name = f"{self.products} bare products"

    def floor(self) -> Callable[[], None]:
        hidden, weight = self.inputs.leaf.detach(), self.inputs.weight
        logits, out = hidden.new_empty(len(hidden), len(weight)), torch.empty_like(hidden)

        def run() -> None:
            for _ in range(self.products - 1):
                torch.mm(hidden, weight.T, out=logits)
            torch.mm(logits, weight, out=out)

        return run


class LinearObjective(OfInputs):
    def __init__(self, shape: Shape, dtype: torch.dtype, terms: str) -> None:
        n, d, vocab = shape
        g = torch.Generator(DEVICE).manual_seed(0)
        hidden = torch.randn(n, d, generator=g, device=DEVICE)
        teacher = (hidden + 0.1 * torch.randn(n, d, generator=g, device=DEVICE)).to(dtype)
        weight = (torch.randn(vocab, d, generator=g, device=DEVICE) * (3 / d**0.5)).to(dtype)
        labels = torch.randint(vocab, (n,), generator=g, device=DEVICE)
        super().__init__(Inputs(hidden.to(dtype).requires_grad_(), teacher, weight, labels, terms), CHECKED)

    def errors_of_terms(self, function: Function) -> dict[str, Error]:
        """Each term by itself, and the gradient with the weights of ``WEIGHTS``, of all rows.

        Not of cross-entropy alone, where the loss is the term, nor of the reference, which is the yardstick itself.
        """
        if not isinstance(function, Objective) or function.impl == "reference" or self.inputs.terms == "ce":
            return {}
        weighted, dtype = self._weighted, self.inputs.leaf.dtype
        output = function.output(weighted.inputs)
        (gradient,) = torch.autograd.grad(output.loss, weighted.inputs.leaf)
        errors = weighted.errors_of_all((output.loss.detach(), gradient))
        plain, exact = self._terms
        values = {name: getattr(output, name) for name in exact}
        found = {name: exact[name] * torch.nan if value is None else value for name, value in values.items()}
        terms = budget(found, plain, exact, dtype)
        held = {name: Error(term.found, term.allowed + BY_CHANCE[name]) for name, term in terms.items()}
        # The terms are held by themselves: of the loss, that it is their sum.
        total = torch.stack([WEIGHTS.get(name, 1.0) * value.double() for name, value in found.items()]).sum()
        held["sum"] = Error(error(output.loss, total), 1e-5)
        return held | {"weighted_gradient": errors["gradient"]}

    @cached_property
    def _weighted(self) -> Loss:
        return OfInputs(self.inputs.weighted(), 0)

    @cached_property
    def _terms(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The oracle's, in the inputs' type and in float64; the SVD term in float64 alone."""
        found: list[dict[str, Tensor]] = []
        for dtype in (None, torch.float64):
            total: dict[str, Tensor] = {}
            for part in self._weighted.parts(dtype):
                with torch.no_grad():
                    output = Objective("reference").output(part.without_svd())
                for name in TERMS:
                    if (value := getattr(output, name)) is not None:
                        share = len(part.leaf) / len(self.inputs.leaf) * value.double()
                        total[name] = total[name] + share if name in total else share
            if self._weighted.rest is not None:
                total["svd"] = self._weighted.rest[0] / WEIGHTS["svd"]
            found.append(total)
        return found[0], found[1]


def svd_term(p: Inputs) -> Tensor:
    """λ₃ · −Σ_{i≤k} σ_i(Z)/‖Z‖_F without [N, V]: with W = Q R the σ² of Z = H Wᵀ are the eigenvalues of the smaller
    Gram matrix of H Rᵀ. Wants float64: a square loses half the digits."""
    x = p.leaf @ torch.linalg.qr(p.weight, mode="r")[1].T
    gram = x.T @ x if len(x) > x.shape[1] else x @ x.T
    sigma = torch.linalg.eigvalsh(gram)[-int(p.config.svd_rank) :].sqrt()
    return -p.config.lambda_svd * sigma.sum() / gram.trace().sqrt()


def naive(p: Inputs) -> Tensor:
    """The published terms of the logits of both models in full. "kl" is without the cross-entropy."""
    config = p.config
    z = published.widened(p.leaf @ p.weight.T)
    loss = z.new_zeros(()) if p.terms == "kl" else F.cross_entropy(z, p.labels)
    if config.lambda_consistency:
        with torch.no_grad():
            z_teacher = (p.teacher @ p.weight.T).to(z.dtype)
        loss = loss + config.lambda_consistency * published.consistency(z, z_teacher, config.temperature)
    if config.lambda_diversity:
        loss = loss + config.lambda_diversity * published.diversity(z, config.entropy_top_k)
    if config.lambda_svd:
        loss = loss + config.lambda_svd * published.svd(z, int(config.svd_rank))
    return loss


def torch_linear_cross_entropy(p: Inputs) -> Tensor:
    return F.linear_cross_entropy(p.leaf, p.weight, p.labels, options=torch.nn.LinearCrossEntropyOptions())


# As it is shipped, which is for GPUs: compiled, for each number of rows once. On a CPU what is quicker to start.
LIGER_CHUNKED: dict[str, Any] = dict(compiled=True, chunk_size=1024) if ON_GPU else dict(compiled=False, chunk_size=256)


def liger_chunked(p: Inputs) -> Tensor:
    """Liger's chunked distillation loss with beta 0: KL, teacher first, T = 1."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1.0, weight_soft_loss=p.config.lambda_consistency, beta=0.0, **LIGER_CHUNKED
    )
    found = loss(p.leaf, p.weight, p.teacher, p.weight, p.labels)
    return found[0] if isinstance(found, tuple) else found


def liger_fused(p: Inputs) -> Tensor:
    """Liger's fused linear JSD with beta 0: KL, teacher first, without CE."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.0)(p.leaf, p.weight, p.teacher, p.weight)


def liger_kl(p: Inputs) -> Tensor:
    """Takes the teacher's probabilities, all of them at once."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    with torch.no_grad():
        target = (p.teacher @ p.weight.T).softmax(-1)
    return LigerFusedLinearKLDivLoss()(p.leaf, p.weight, target)


def liger_ce(p: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(p.weight, p.leaf, p.labels)


def cut_cross_entropy(p: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(p.leaf, p.weight, p.labels)


def _has_linear_cross_entropy() -> str | None:
    return None if hasattr(torch.nn, "LinearCrossEntropyOptions") else "this torch has no chunked linear_cross_entropy"


def bytes_moved(case: Loss) -> int:
    """Bytes that the Triton path reads and writes in device memory, counted from the shapes.

    Of each logit: the student's in float32, written once and read twice; the difference and the gradient in the inputs'
    type, the one written and read twice, the other written and read. Of each chunk the head, once for each product.
    """
    from balora_kernels import tiles

    p = case.inputs
    (n, d), vocab, size = p.leaf.shape, len(p.weight), p.leaf.element_size()
    kl = p.config.lambda_consistency != 0
    logit = 3 * 4 + 3 * size * kl + 2 * size
    second = kl or size < 4  # a second buffer: without KL the gradient of float32 takes the place of the logits
    rows = tiles.chunk_rows(n, tiles.row_stride(vocab) * (4 + size * second), balora.fused.CHUNK_BYTES)
    products = 3 if kl else 2
    return n * vocab * logit + -(-n // rows) * products * vocab * d * size + 4 * n * d * size


OWN = ("all", "ce+kl", "ce")
OPERATION = Operation(
    name="linear_objective",
    axes=("N", "d", "V"),
    case=LinearObjective,
    terms=tuple(CONFIGS),
    implementations=(
        own("triton", Objective("triton"), terms=OWN, moved=bytes_moved),
        own("streaming", Objective("streaming"), terms=OWN),
        own("reference", Objective("reference"), terms=OWN),
        Implementation("naive", naive, terms=tuple(CONFIGS)),
        Implementation("naive-compiled", compiled(naive), terms=("all", "ce+kl")),
        Implementation(
            "liger-chunked-jsd",
            liger_chunked,
            terms=("ce+kl",),
            why_not=needs("liger_kernel", gpu=False),
            note="also the gradient by the weight, a fourth product; "
            + ", ".join(f"{key} {value}" for key, value in LIGER_CHUNKED.items()),
        ),
        Implementation("liger-flce", liger_ce, terms=("ce",), why_not=needs("liger_kernel")),
        Implementation("cut-cross-entropy", cut_cross_entropy, terms=("ce",), why_not=needs("cut_cross_entropy")),
        Implementation("torch-linear-ce", torch_linear_cross_entropy, terms=("ce",), why_not=_has_linear_cross_entropy),
        Implementation("liger-fused-jsd", liger_fused, terms=("kl",), why_not=needs("liger_kernel")),
        Implementation("liger-fused-kl", liger_kl, terms=("kl",), why_not=needs("liger_kernel")),
    ),
    cpu=Defaults(
        shapes=[(512, 1024, 32000)],
        dtypes=["bfloat16", "float32"],
        sweeps={"N": ((64, 512, 32000), (1024, 512, 32000)), "V": ((256, 512, 4000), (256, 512, 128000))},
    ),
    gpu=Defaults(
        shapes=[(8192, 4096, 131072), (8192, 2304, 256000), (8192, 4096, 32000), (2048, 4096, 32000)],
        dtypes=["bfloat16"],
        sweeps={"N": ((512, 4096, 131072), (16384, 4096, 131072)), "V": ((8192, 4096, 8192), (8192, 4096, 262144))},
    ),
)
