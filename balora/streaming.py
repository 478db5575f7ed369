"""The objective in chunks, with hand-written gradients: plain PyTorch, any device, never [N, V] in memory.

A chunk of rows has its logits and difference logits in two reused buffers. Small blocks of rows, which stay in the
cache, are turned into loss terms and, in place, into the gradient by the logits (``rows``); one product then turns the
chunk into the gradient by the hidden states. The arithmetic is float32 (float64 for float64 inputs). Of bfloat16 inputs
only the difference logits and the gradient by the logits are rounded to bfloat16, before a product.

Terms that belong to the whole batch (SVD, covariance, normalized squares) come from Gram matrices: [d, d] ones where
the logits are a linear map of the hidden states (``spectral``), else those of ``batch``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import batch, rows, spectral
from .config import rank_of
from .head import Linear, LinearHead
from .precision import float32_products, multiplies_bfloat16

if TYPE_CHECKING:
    from .config import BALoraConfig

_CHUNK_BYTES = 72 * 2**20  # the logits and difference logits of a chunk
_BLOCK_BYTES = 2 * 2**20  # a block of rows that is worked on at once; it should stay in the cache


class Terms(NamedTuple):
    """Sums over the valid rows; the SVD term, covariance and normalized squares times their number."""

    ce: Tensor  # []
    consistency: Tensor  # [], with its T²
    diversity: Tensor  # [], with its sign
    svd: Tensor  # [], with its sign


class Gradients(NamedTuple):
    """Of (CE + λ₁·consistency + λ₂·diversity + λ₃·svd) / norm, as ``Terms`` has them; None where nobody asked."""

    hidden: Tensor | None  # [M, d]; the type of hidden, float32 for float16
    weight: Tensor | None  # [V, d], float32 or float64, as those below
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, d]
    lora_b: Tensor | None  # [V, r]


def objective(
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    head: LinearHead,
    teacher_head: LinearHead | None,
    labels: Tensor,
    kept: Tensor | None,
    config: BALoraConfig,
    need: tuple[bool, bool, bool, bool, bool],
    norm: Tensor | None = None,
    *,
    run: Callable[..., Run] | None = None,
) -> tuple[Terms, Gradients]:
    """The terms of the objective over the valid rows, and the gradients of their weighted sum over ``norm``.

    The terms are not divided by the number of rows. A term whose λ is 0 is not computed, and is 0.

    Args:
        hidden, teacher_hidden: [M, d]; the teacher [M, d_T], None if λ₁ is 0.
        teacher_head: where the teacher has a head of its own.
        labels: [M], those of the valid rows in [0, V).
        kept: the valid rows [N], ascending; None for all.
        need: which gradients are asked for: hidden, weight, bias, A, B.
        run: how it is evaluated; ``fused`` has another one.
    """
    dtype = torch.float64 if torch.float64 in (hidden.dtype, head.weight.dtype) else torch.float32
    batch_run = (run or Run)(hidden, teacher_hidden, head, teacher_head, labels, kept, config, need, norm, dtype)
    if batch_run.n == 0:
        zero = hidden.new_zeros((), dtype=dtype)
        return Terms(zero, zero, zero, zero), batch_run.gradients()
    svd = batch_run.linear_svd()
    ce, kl, entropy = batch_run.token_terms()
    whole = batch_run.batch_terms()
    n = batch_run.valid_rows
    consistency = whole.consistency * n if config.consistency == "normalized_mse" else config.temperature**2 * kl
    diversity = whole.covariance * n if config.diversity == "covariance" else entropy
    svd = (whole.svd if svd is None else svd) * n
    terms = Terms(*(t.to(dtype) for t in (ce, consistency, diversity, svd)))
    return terms, batch_run.gradients()


class Run:
    """One evaluation of the objective: its inputs, how they are multiplied, and the gradients as they grow."""

    def __init__(self, hidden, teacher_hidden, head, teacher_head, labels, kept, config, need, norm, dtype) -> None:
        self.hidden, self.labels, self.kept, self.config, self.dtype = hidden, labels, kept, config, dtype
        self.head, self.need = head, need
        self.scale = 1.0 if norm is None else 1 / norm.to(dtype)
        self.teacher_hidden = None if config.lambda_consistency == 0 else teacher_hidden
        self.linear = Linear(head, dtype)
        self.own_head = None if teacher_head is None or self.teacher_hidden is None else teacher_head
        self.teacher_linear = None if self.own_head is None else Linear(self.own_head, dtype)
        self.n = len(hidden) if kept is None else len(kept)
        self.valid_rows: int | Tensor = self.n
        self.vocab, self.d = head.weight.shape
        self.need_grad = any(need)
        self.trained_head = any(need[1:])
        kl = self.teacher_hidden is not None and config.consistency == "kl"
        self.kl = kl
        svd = config.lambda_svd != 0
        # A classifier has fewer classes than hidden units: Z itself has the smaller Gram matrix.
        self.whole_svd = svd and (head.softcap is not None or self.vocab < self.d)
        others = self.teacher_hidden is not None and config.consistency == "normalized_mse"
        others = others or (config.lambda_diversity != 0 and config.diversity == "covariance")
        self.whole = self.whole_svd or others
        self.only_svd = self.whole_svd and not others
        narrow = hidden.dtype == head.weight.dtype == torch.bfloat16 and multiplies_bfloat16(hidden.device)
        self.narrow_delta = narrow and kl and self.own_head is None and head.lora is None and head.softcap is None
        self.narrow_grad = narrow and self.need_grad and not self.trained_head

        self.grad_hidden: Tensor | None = None
        if need[0]:
            # float16 would flush the small entries before a loss scale can lift them; bfloat16 has the range.
            keep = dtype if hidden.dtype == torch.float16 else hidden.dtype
            self.grad_hidden = torch.zeros_like(hidden, dtype=keep, memory_format=torch.contiguous_format)
        extra = self.linear.extra
        self.grad_weight = None
        if need[1]:  # an operator has to tell the strides of its results from the shapes alone
            self.grad_weight = torch.zeros_like(head.weight, dtype=dtype, memory_format=torch.contiguous_format)
        self.grad_extra = torch.zeros_like(extra) if extra is not None and (need[2] or need[4]) else None
        self.grad_a = torch.zeros_like(self.linear.a) if need[3] and self.linear.a is not None else None
        self.k: Tensor | None = None  # the SVD term's part of the gradient by X is X·K

    def pick(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        return tensor[start:stop] if self.kept is None else tensor[self.kept[start:stop]]

    def x(self, h: Tensor, start: int) -> Tensor:
        """scale · X for a chunk of hidden states, which begins at that row. [c, d] -> [c, d + e]."""
        columns = self.linear.columns(h)
        x = h if columns is None else torch.cat([h, columns], 1)
        return x if self.linear.scale == 1 else x * self.linear.scale

    def gram(self) -> Tensor:
        """XᵀX times scale², [d + e, d + e]."""
        step = spectral.rows_at_a_time(self.hidden)
        return spectral.gram(
            self.x(self.pick(self.hidden, i, min(i + step, self.n)).to(self.dtype), i) for i in range(0, self.n, step)
        )

    def small(self, count: int) -> Any:
        """What decomposes small matrices for the SVD term; None for torch."""
        return None

    @float32_products()
    def linear_svd(self) -> Tensor | None:
        """The SVD term from [d, d] matrices; its gradient is kept as K, or added to those of a trained head."""
        config = self.config
        if config.lambda_svd == 0 or self.whole_svd:
            return None
        s, of_head = self.gram(), self.head.gram
        count = min(self.n, self.vocab)
        term = spectral.svd_term(
            s,
            of_head,
            rank_of(config.svd_rank, count),
            count,
            norm=config.svd_norm,
            variance=config.svd_variance,
            iterate=self.dtype,
            need_weight_grad=self.trained_head,
            small=self.small(count),
        )
        weight = config.lambda_svd * self.valid_rows
        if self.grad_hidden is not None or self.grad_a is not None:
            self.k = spectral.gradient_matrix(term, of_head) * weight
            if self.hidden.dtype in (torch.bfloat16, torch.float16):  # whose own rounding is larger by far
                self.k = self.k.to(self.dtype)
        if term.k_weight is not None:
            k = term.k_weight * weight  # [d + e, d + e]
            # In the type of k, whose small singular values would be lost in the rounding of large ones.
            step = spectral.rows_at_a_time(self.linear.weight)
            for start in range(0, self.vocab, step):
                part = slice(start, start + step)
                wide = self.linear.weight[part].to(k.dtype)
                if self.linear.extra is not None:
                    wide = torch.cat([wide, self.linear.extra[part].to(k.dtype)], 1)
                if self.grad_weight is not None:
                    self.grad_weight[part] += wide @ k[:, : self.d]
                if self.grad_extra is not None:
                    self.grad_extra[part] += wide @ k[:, self.d :]
        return term.value

    def token_terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """CE, KL (without T²) and −entropy, sums over the rows; their gradients and the SVD term's are added."""
        vocab = self.vocab
        wide, narrow = self.dtype.itemsize, self.narrow_delta or self.narrow_grad
        # A product with a [c, V] operand in bfloat16 packs it: that is there once more.
        row_bytes = wide + (4 if narrow else 0) + (wide if self.kl and not self.narrow_delta else 0)
        row_bytes *= vocab
        count = -(-self.n // max(1, _CHUNK_BYTES // row_bytes))
        chunk = -(-self.n // count)
        block = max(1, min(chunk, _BLOCK_BYTES // (vocab * wide)))
        new = self.hidden.new_empty
        z = new(chunk, vocab, dtype=self.dtype)
        half = new(chunk, vocab, dtype=torch.bfloat16) if narrow else None
        delta = new(chunk, vocab, dtype=self.dtype) if self.kl and not self.narrow_delta else None
        work = new(rows.BUFFERS, block, vocab, dtype=self.dtype)
        apart = self.narrow_delta or self.own_head is not None
        block_delta = new(block, vocab, dtype=self.dtype) if self.kl and apart else None
        slope = new(block, vocab, dtype=self.dtype) if self.head.softcap is not None else None
        found = self.hidden.new_zeros(3, dtype=spectral.accumulation_dtype(z))

        for start in range(0, self.n, chunk):
            stop = min(start + chunk, self.n)
            h = self.pick(self.hidden, start, stop).to(self.dtype)  # [c, d]
            y = self.pick(self.labels, start, stop)
            half_inputs = self.hidden.dtype == torch.bfloat16
            self.linear.forward(h, self.linear.columns(h), z[: stop - start], bfloat16=half_inputs)
            if self.kl:
                self._difference(h, start, stop, half if delta is None else delta)
            for first in range(0, stop - start, block):
                here = slice(first, min(first + block, stop - start))
                d = None if delta is None else delta[here]
                if self.narrow_delta and block_delta is not None and half is not None:
                    d = block_delta[: here.stop - first].copy_(half[here])
                terms = self._block(z[here], d, y[here], work, slope, block_delta)
                found += torch.stack([t.sum() for t in terms]).to(found)
                if self.narrow_grad and half is not None:
                    half[here] = z[here]
            if self.need_grad:
                g = half if self.narrow_grad and half is not None else z
                self._backward(g[: stop - start], h, start, stop)
        return found[0], found[1], found[2]

    def _difference(self, h: Tensor, start: int, stop: int, out: Tensor | None) -> None:
        """What ``_block`` turns into δ/T: the difference logits, over T where they are final, or a teacher's logits."""
        assert self.teacher_hidden is not None
        assert out is not None
        out = out[: stop - start]
        t = self.pick(self.teacher_hidden, start, stop).to(self.dtype)
        if self.teacher_linear is not None:
            half_inputs = self.teacher_hidden.dtype == torch.bfloat16
            return self.teacher_linear.forward(t, self.teacher_linear.columns(t), out, bfloat16=half_inputs)
        # Z_P − Z = (H_P − H) Wᵀ: subtracted before the product, so that its error is relative to the difference.
        t = t - h  # not in place: it may be the caller's
        if self.head.softcap is None:
            t *= 1 / self.config.temperature
        if self.narrow_delta:
            torch.mm((t * self.linear.scale).bfloat16(), self.linear.weight.T, out=out)
            return None
        return self.linear.forward(t, self.linear.columns(t, with_bias=False), out)

    def _block(
        self, z: Tensor, delta: Tensor | None, y: Tensor, work: Tensor, slope: Tensor | None, free: Tensor | None
    ) -> rows.RowTerms:
        """The terms of a block of rows; z becomes their gradient. ``free`` takes δ beside a teacher's own logits."""
        config, cap = self.config, self.head.softcap
        work = work[:, : len(z)]
        slope = None if slope is None else slope[: len(z)]
        teacher: Tensor | None = None
        if self.own_head is not None and delta is not None and free is not None:
            teacher = delta
            if self.own_head.softcap is not None:
                rows.softcap(teacher, None, self.own_head.softcap, None, work)
            if cap is not None:
                rows.softcap(z, None, cap, slope, work)
            delta = rows.subtract_logits(teacher, z, config.temperature, out=free[: len(z)])
        elif cap is not None:
            rows.softcap(z, delta, cap, slope, work)
            if delta is not None:
                delta.mul_(1 / config.temperature)
        terms = rows.block(
            z,
            delta,
            y,
            lambda_consistency=config.lambda_consistency,
            lambda_diversity=0.0 if config.diversity == "covariance" else config.lambda_diversity,
            temperature=config.temperature,
            top_k=config.entropy_top_k if config.diversity == "topk" else None,
            work=work,
            need_grad=self.need_grad,
            teacher=teacher,
        )
        if slope is not None and self.need_grad:
            z.mul_(slope)
        return terms

    def _backward(self, g: Tensor, h: Tensor, start: int, stop: int) -> None:
        """From the gradient by the linear part's output, [c, V], to those by hidden states, weight, bias, A and B."""
        if self.trained_head:
            self._head_gradients(g, h, slice(None))
        if self.grad_hidden is None and self.grad_a is None:
            return
        if g.dtype == self.dtype:
            dx = self.linear.backward(g)  # [c, d + r]
        else:
            dx = self.linear.with_adapter(g, (g @ self.linear.weight).to(self.dtype))
        self._add_svd(dx, h, start)
        self._to_hidden(dx, h, start, stop)

    @float32_products()
    def _add_svd(self, dx: Tensor, h: Tensor, start: int) -> None:
        """dx += scale·X·K."""
        if self.k is not None:
            x = self.x(h, start).to(self.k.dtype)
            dx += (x @ self.k[:, : dx.shape[1]] * self.linear.scale).to(self.dtype)

    def _head_gradients(self, g: Tensor, h: Tensor, at: slice) -> None:
        if self.grad_weight is not None:
            self.grad_weight[at].addmm_(g.T, h, alpha=self.linear.scale)
        x = self.linear.columns(h)
        if self.grad_extra is not None and x is not None:
            self.grad_extra[at].addmm_(g.T, x, alpha=self.linear.scale)

    def _to_hidden(self, dx: Tensor, h: Tensor, start: int, stop: int) -> None:
        """The gradient by [H | s·H Aᵀ], [c, d + r], to that by H and A."""
        dh = dx[:, : self.d]
        if self.linear.a is not None:
            du = self.linear.scaling * dx[:, self.d :]  # [c, r]
            dh = dh.addmm(du, self.linear.a)
            if self.grad_a is not None:
                self.grad_a.addmm_(du.T, h)
        if self.grad_hidden is None:
            return
        at = slice(start, stop) if self.kept is None else self.kept[start:stop]
        self.grad_hidden[at] += (dh * self.scale).to(self.grad_hidden.dtype)

    @float32_products()
    def batch_terms(self) -> batch.BatchTerms:
        """The terms that need the logits of the whole batch at once, over tiles of them."""
        config = self.config
        zero = self.hidden.new_zeros((), dtype=self.dtype)
        if not self.whole:
            return batch.BatchTerms(zero, zero, zero)
        h = self.pick(self.hidden, 0, self.n).to(self.dtype)
        x = self.linear.columns(h)
        t = None
        if config.consistency == "normalized_mse" and self.teacher_hidden is not None:
            t = self.pick(self.teacher_hidden, 0, self.n).to(self.dtype)
        count = min(self.n, self.vocab)
        solver = batch.Batch(
            (self.n, self.vocab),
            h,
            lambda_consistency=config.lambda_consistency if t is not None else 0.0,
            lambda_covariance=config.lambda_diversity if config.diversity == "covariance" else 0.0,
            lambda_svd=config.lambda_svd if self.whole_svd else 0.0,
            rank=rank_of(config.svd_rank, count),
            norm=config.svd_norm,
            variance=config.svd_variance,
        )
        teacher_head = self.own_head or self.head
        teacher_linear = self.teacher_linear or self.linear
        u = None if t is None else teacher_linear.columns(t)

        def tile(rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
            z = _capped(self.linear, self.head.softcap, h[rows], None if x is None else x[rows], columns)
            if t is None:
                return z, None
            return z, _capped(teacher_linear, teacher_head.softcap, t[rows], None if u is None else u[rows], columns)

        terms = solver.solve(tile)
        if self.need_grad:
            r = 0 if self.linear.a is None else len(self.linear.a)
            dx = torch.zeros(self.n, self.d + r, dtype=self.dtype, device=h.device)
            for row, column in solver.tiles():
                z, z_teacher = tile(row, column)
                g = solver.gradient(z, z_teacher).mul_(self.n)
                if self.head.softcap is not None:
                    g.addcmul_(g * z, z, value=-1 / self.head.softcap**2)
                if self.trained_head:
                    self._head_gradients(g, h[row], column)
                dx[row] += self.linear.backward(g, column)
            self._to_hidden(dx, h, 0, self.n)
        return terms

    def gradients(self) -> Gradients:
        hidden, e = self.grad_hidden, self.grad_extra
        for grad in (self.grad_weight, e, self.grad_a):
            if grad is not None:
                grad *= self.scale
        r = 0 if self.linear.a is None else len(self.linear.a)
        # Copies, where both are trained: results of an operator must not share memory.
        bias = e[:, -1].clone() if e is not None and self.need[2] else None
        b = e[:, :r].clone() if e is not None and self.need[4] else None
        return Gradients(hidden, self.grad_weight, bias, self.grad_a, b)


def _capped(linear: Linear, cap: float | None, h: Tensor, x: Tensor | None, at: slice) -> Tensor:
    """The logits of some rows at some entries of the vocabulary. h [c, d], x [c, e] -> [c, v]."""
    z = h.new_empty(len(h), len(linear.weight[at]))
    linear.forward(h, x, z, at)
    return z if cap is None else z.div_(cap).tanh_().mul_(cap)


def consistency(z: Tensor, z_teacher: Tensor, temperature: float, kept: Tensor | None) -> tuple[Tensor, None]:
    """T² · Σ_n KL(softmax(Z_P,n/T) ‖ softmax(Z_n/T)) of given logits, and what its gradient needs: nothing more.

    Blocks of rows are widened to float32, nothing of size [N, V] is held. kept are the rows that count, None for all.
    z, z_teacher [M, V] -> [].
    """
    return _consistency(z, z_teacher, temperature, kept, None, 1.0), None


def consistency_gradient(
    z: Tensor, z_teacher: Tensor, temperature: float, kept: Tensor | None, _: None, out: Tensor, scale: Tensor
) -> None:
    """out [M, V] = scale times the gradient of ``consistency`` by Z, 0 where a row does not count."""
    if kept is not None:
        out.zero_()
    _consistency(z, z_teacher, temperature, kept, out, scale)


def _consistency(
    z: Tensor, z_teacher: Tensor, temperature: float, kept: Tensor | None, out: Tensor | None, scale: float | Tensor
) -> Tensor:
    total = z.new_zeros((), dtype=spectral.accumulation_dtype(z))
    wide = torch.promote_types(z.dtype, torch.float32)
    buffers: Tensor | None = None
    for at, size in _blocks(z, kept):
        if buffers is None:
            buffers = z.new_empty(rows.BUFFERS + 2, size, z.shape[1], dtype=wide)
        work = buffers[:, :size]
        block, teacher = work[-2].copy_(z[at]), z_teacher[at].to(wide)
        terms = rows.block(
            block,
            rows.subtract_logits(teacher, block, temperature, out=work[-1]),
            None,
            lambda_consistency=scale,
            lambda_diversity=0.0,
            temperature=temperature,
            top_k=None,
            work=work,
            need_grad=out is not None,
            teacher=teacher,
        )
        total += terms.kl.sum()
        if out is not None:
            out[at] = block if kept is None else block.to(out.dtype)
    return temperature**2 * total


def diversity(z: Tensor, top_k: int, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """−Σ_n H(softmax of the K largest of Z_n) of given logits; its gradient, which is 0 but for K entries of a row.

    z [M, V], kept [N] or None -> [], values [N, K] and where they are [N, K].
    """
    total = z.new_zeros((), dtype=spectral.accumulation_dtype(z))
    wide = torch.promote_types(z.dtype, torch.float32)
    found = [rows.focused_entropy(z[at].to(wide), top_k) for at, _ in _blocks(z, kept)]
    if not found:
        empty = z.new_zeros(0, min(top_k, z.shape[1]), dtype=wide)
        return total, empty, empty.long()
    negative_entropy, gradient, where = (torch.cat(parts) for parts in zip(*found, strict=True))
    return total + negative_entropy.sum(dtype=total.dtype), gradient, where


def _blocks(z: Tensor, kept: Tensor | None) -> Iterator[tuple[Any, int]]:
    """Blocks of rows that fit the cache: an index of z, and how many rows it has."""
    n = len(z) if kept is None else len(kept)
    step = max(1, min(n, _BLOCK_BYTES // (z.shape[1] * torch.promote_types(z.dtype, torch.float32).itemsize)))
    for start in range(0, n, step):
        stop = min(start + step, n)
        yield slice(start, stop) if kept is None else kept[start:stop], stop - start
