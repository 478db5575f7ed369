"""A block of rows of logits, turned into loss terms and, in place, into their gradient: the twin of the row kernel.

Every pass runs over buffers that the caller allocates once: on a CPU a fresh temporary costs several times the
arithmetic on it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_FAR = 30.0  # a row with a |δ|/T above it, its mean taken off, takes the guarded form
_MASKED = -1000.0  # stands for the δ/T of −∞ of an entry that the teacher masks: e^−1000 is 0 in every type
BUFFERS = 5  # of the block's shape, for ``block``


class RowTerms(NamedTuple):
    """Of each row [b]; 0 where a term was not asked for."""

    ce: Tensor
    kl: Tensor  # without T²
    negative_entropy: Tensor


def block(
    z: Tensor,
    delta: Tensor | None,
    labels: Tensor | None,
    *,
    lambda_consistency: float | Tensor,
    lambda_diversity: float,
    temperature: float,
    top_k: int | None,
    work: Tensor,
    need_grad: bool,
    teacher: Tensor | None = None,
) -> RowTerms:
    """CE, KL(P ‖ S) at temperature T and −H of the top K of each row. z and delta are overwritten.

    If asked for, z becomes the gradient of CE + λ₁·T²·KL − λ₂·H. Without labels there is no CE, without delta no KL
    (one of them is there); with top_k None the entropy is that of the whole row, and λ₂ = 0 leaves it out.

    z [b, V]; delta [b, V] is (Z_P − Z)/T; labels [b]; work [5, b, V], all of z's type. teacher [b, V] is Z_P, where it
    is known by itself: of a row far from it δ has lost digits.
    """
    terms = RowTerms(*z.new_zeros(3, z.shape[0]))
    entropy = lambda_diversity != 0
    top: Tensor | None = None
    if entropy and top_k is not None:
        values, top = _top_k(z, top_k)  # [b, K]
        highest = values[:, :1]
        top_grad = _entropy(values, terms.negative_entropy)
    else:
        highest = z.amax(-1, keepdim=True)  # [b, 1]

    whole_entropy = entropy and top_k is None
    p_soft: Tensor | None = None  # softmax(Z / T)
    if delta is not None:
        scaled = z
        if temperature != 1:  # a maximum of 0 first: rounding Z/T would cost exponents of a far larger Z their digits
            scaled = torch.sub(z, highest, out=work[0]).mul_(1 / temperature)
        p_soft = torch.softmax(scaled, -1, out=work[1])
    p: Tensor | None = None  # softmax(Z)
    inverse_squares: Tensor | None = None
    if labels is not None or whole_entropy:
        if p_soft is not None and temperature == 2 and not whole_entropy:
            # softmax(Z) ∝ softmax(Z/2)²: the default temperature saves an exponential.
            squares = _dot(p_soft, p_soft, work[4])[:, None]
            log_total = squares.log() - 2 * p_soft.amax(-1, keepdim=True).log()  # log Σ exp(z − max z)
            inverse_squares = 1 / squares
        else:
            p = p_soft if p_soft is not None and temperature == 1 else torch.softmax(z, -1, out=work[2])
            log_total = -p.amax(-1, keepdim=True).log()
    if labels is not None:
        labels = labels[:, None]
        terms.ce.copy_((log_total + (highest - z.gather(-1, labels))).squeeze(-1))
    log_p: Tensor | None = None
    if whole_entropy and p is not None:
        # Below −10⁴ the probability is 0 in every type, and 0 · −∞ must not be NaN.
        log_p = torch.sub(z, highest, out=work[3]).sub_(log_total).clamp_min_(-1e4)
        terms.negative_entropy.copy_(_dot(p, log_p, work[4]))

    pull: Tensor | None = None
    far: Tensor | None = None
    if delta is not None and p_soft is not None:
        kl, weighted, shift, mean = _kl(p_soft, delta, work[0], work[4])
        terms.kl.copy_(kl)
        near = (delta.amin(-1) >= -_FAR) & (delta.amax(-1) <= _FAR)
        if not near.all():  # a row with a NaN is far
            far = (~near).nonzero().squeeze(-1)
            x = (z[far].double() - highest[far]) / temperature
            x_teacher = x + delta[far]
            if teacher is not None:
                x_teacher = teacher[far].double()
                x_teacher = (x_teacher - x_teacher.amax(-1, keepdim=True)) / temperature - mean[far]
            far_kl, far_pull = _kl_far(x, x_teacher, delta[far].double())
            terms.kl[far], pull = far_kl.to(z.dtype), far_pull.to(z.dtype)
    if not need_grad:
        return terms

    if p_soft is None:
        assert p is not None
        z.copy_(p)
    else:
        # T²·KL by z is T (p_S − p_P), and p_P − p_S = p_S (e^(δ/T) − 1) e^(−Δ) + p_S (e^(−Δ) − 1).
        strength = lambda_consistency * temperature
        decay = 1 / (1 + shift)  # e^(−Δ) [b, 1]
        drop = strength * shift * decay  # −strength · (e^(−Δ) − 1)
        if far is not None and pull is not None:
            base = 0.0 if labels is None else z[far].softmax(-1)
            pull = base + strength * pull
        if inverse_squares is not None:
            torch.mul(p_soft, inverse_squares, out=z).add_(drop).mul_(p_soft)
        elif p is not None:
            torch.addcmul(p, p_soft, drop, out=z)
        else:
            torch.mul(p_soft, drop, out=z)
        z.addcmul_(weighted, -strength * decay)
        if far is not None and pull is not None:
            z[far] = pull
    if labels is not None:
        z.scatter_add_(-1, labels, z.new_full(labels.shape, -1.0))
    if top is not None:
        z.scatter_add_(-1, top, lambda_diversity * top_grad)
    if log_p is not None and p is not None:
        # d(−H)/dz_j = p_j (log p_j + H)
        log_p.sub_(terms.negative_entropy[:, None]).mul_(lambda_diversity)
        z.addcmul_(p, log_p)
    return terms


def _kl(p_soft: Tensor, delta: Tensor, out: Tensor, work: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL(P ‖ S) of each row [b]; p_S·expm1(δ/T) [b, V], in ``out``; its sum e^Δ − 1 [b, 1]; and the mean [b, 1] that
    δ/T loses.

    With s = Σ p_S·expm1(δ/T): Δ = lse_P − lse_S = log1p(s), and KL = Σ p_P·δ/T − Δ with p_P = p_S·e^(δ/T)/(1 + s).
    No two rounded probabilities are subtracted, and a common offset of the row, which changes nothing, is taken off
    first: so the relative accuracy is kept however close the teacher is. s is then ≥ 0, and 1 + s does not cancel.
    """
    mean = _dot(p_soft, delta, work)[:, None]
    mean = torch.where(mean.abs() <= _FAR, mean, 0.0)  # a larger one would cost a far row its digits
    delta.sub_(mean)
    weighted = torch.expm1(delta, out=out).mul_(p_soft)
    shift = weighted.sum(-1, keepdim=True)  # [b, 1]
    left = _dot(p_soft, delta, work)  # by rounding
    rise = _dot(weighted, delta, work)
    kl = (left + rise) / (1 + shift.squeeze(-1)) - shift.squeeze(-1).log1p()
    return kl, weighted, shift, mean


def _dot(a: Tensor, b: Tensor, work: Tensor) -> Tensor:
    """The inner product of each row. a, b, work [b, V] -> [b]."""
    return torch.mul(a, b, out=work).sum(-1)


def _kl_far(x: Tensor, x_teacher: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """KL of each row and p_S − p_P, where e^δ may overflow or the sum cancel (all divided by T; x ≤ 0, its maximum 0;
    x_teacher is x + δ). In float64: of a large δ float32 would cost both sides tens of units in the last place.

    An element with a large δ takes the difference of two probabilities, which is then no cancellation; one with a
    small δ keeps expm1. Δ is the log1p of the sum while that sum is small, else the difference of the log-sum-exps.
    """
    lse_student = x.exp().sum(-1, keepdim=True).log()
    p_student = (x - lse_student).exp()
    growth = torch.where(delta.abs() <= 1, p_student * delta.expm1(), (x_teacher - lse_student).exp() - p_student)
    total = growth.sum(-1, keepdim=True)
    top = x_teacher.amax(-1, keepdim=True)
    lse_teacher = (x_teacher - top).exp().sum(-1, keepdim=True).log() + top
    lse_difference = torch.where(total.abs() <= 0.5, total.log1p(), lse_teacher - lse_student)
    p_teacher = (x_teacher - lse_teacher).exp()
    # log p_P − log p_S. A large δ and a large Δ have lost the digits that their difference needs.
    u = torch.where(delta.abs() <= 1, delta - lse_difference, (x_teacher - lse_teacher) - (x - lse_student))
    growth = u.expm1()
    near = u.abs() <= 1
    pull = torch.where(p_teacher == 0, 0.0, p_teacher * u)  # of an entry that the student alone masks u is ∞
    terms = torch.where(near, p_student * (u * growth - (growth - u)), pull - p_teacher + p_student)
    return terms.sum(-1), torch.where(near, -p_student * growth, p_student - p_teacher)


def _entropy(values: Tensor, negative_entropy: Tensor) -> Tensor:
    """−H of the softmax of each row, into ``negative_entropy`` [b]; its gradient q (log q + H). values [b, K]."""
    log_q = values.log_softmax(-1)
    q = log_q.exp()
    q_log_q = torch.where(q == 0, torch.zeros_like(q), q * log_q)  # a −inf logit contributes 0
    negative_entropy.copy_(q_log_q.sum(-1))
    return q_log_q - q * negative_entropy[:, None]


def _top_k(z: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K largest entries of each row, descending, and where they are: ties across the K-th place go to the lower
    index. z [b, V] -> [b, min(K, V)] twice."""
    vocab = z.shape[-1]
    k = min(top_k, vocab)
    values, indices = z.topk(min(k + 1, vocab), dim=-1)
    if k < vocab:
        # topk breaks ties as it likes; only a tie between the K-th and the next matters to the set that it picks.
        tied = values[:, k - 1] == values[:, k]
        if tied.any():
            indices[tied, :k] = z[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return values[:, :k], indices[:, :k]


def softcap(z: Tensor, delta: Tensor | None, cap: float, slope: Tensor | None, work: Tensor) -> None:
    """z = cap·tanh(a/cap) in place of a, and δ = z_P − z in place of a_P − a; slope becomes dz/da. All [b, V].

    With x = tanh(a/cap) and y = tanh((a_P − a)/cap): δ = cap·y·(1 − x²)/(1 + x·y), which keeps the relative accuracy
    of a small difference; a large one is subtracted. work [5, b, V].
    """
    z.div_(cap)
    if delta is not None:
        delta.div_(cap)
        teacher = torch.add(z, delta, out=work[0]).tanh_()
    x = z.tanh_()
    one_less = torch.mul(x, x, out=work[1] if slope is None else slope).neg_().add_(1)  # 1 − x²
    if delta is not None:
        far = delta.abs() > 1
        y = delta.tanh_()
        divisor = torch.mul(x, y, out=work[2]).add_(1)
        small = torch.mul(y, one_less, out=work[3]).div_(divisor)
        torch.where(far, teacher.sub_(x), small, out=delta)
        delta.mul_(cap)
    x.mul_(cap)


def subtract_logits(teacher: Tensor, z: Tensor, temperature: float, out: Tensor) -> Tensor:
    """δ/T = (Z_P − Z)/T, into ``out``, up to a constant of the row. All [b, V].

    The constant makes both maxima 0: so an entry below −1000 is one to which the teacher gives no probability. 0 where
    both are −∞, a masked vocabulary.
    """
    highest = teacher.amax(-1, keepdim=True), z.amax(-1, keepdim=True)  # [b, 1] each
    offset = highest[0] - highest[1]
    masked = torch.isneginf(z)
    both = (masked & torch.isneginf(teacher)) if masked.any() else None
    if (offset.abs() > 1).any():
        # The difference is as large as the offset, and loses digits to it: what rounding took is added again.
        difference, lost = _two_difference(teacher, z)
        lost -= _two_difference(*highest)[1]
        torch.sub(difference, offset, out=out).add_(lost)
    else:
        torch.sub(teacher, z, out=out).sub_(offset)
    if both is not None:
        out.masked_fill_(both, 0.0)
    return out.mul_(1 / temperature).clamp_min_(_MASKED)


def _two_difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a − b as it is rounded, and the rest of it: the sum of both is exact (Knuth; 0 where one is not finite)."""
    difference = a - b
    back = a - difference
    return difference, (a - (difference + back)).add_(back.sub_(b)).nan_to_num_(0.0, 0.0, 0.0)


def focused_entropy(z: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """−H of the K largest of each row [b]; its gradient by them [b, K]; where they are [b, K]. z [b, V]."""
    values, top = _top_k(z, top_k)
    negative_entropy = z.new_empty(len(z))
    return negative_entropy, _entropy(values, negative_entropy), top
