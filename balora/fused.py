"""The objective and the losses on logits with the Triton kernels of ``balora_kernels``.

The twin of ``streaming``: the same terms and gradients, but a chunk is as large as a byte budget allows, its logits are
products on tensor cores with float32 results, and kernels turn it into terms and, in place of the difference logits,
into the gradient.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import batch, spectral, streaming
from .config import rank_of
from .head import Linear
from .precision import float32_products

# Logits (float32), difference logits and, in their place, the gradient of a chunk. 512 rows of V = 131,072: products
# are bound by arithmetic (1024 operations for two bytes of W), and what else is there (the parts of H·K and of dH) fits
# 600 MiB. Logits in bfloat16 would save 6 of 22 bytes a logit, and make the error of CE's gradient 0.65 % instead of
# 0.13 % (N 128, d 1024, V 32,000, logits of size 4).
CHUNK_BYTES = 448 * 2**20
TOP_K_MAX = 128  # of the kernels
STATS = 8  # numbers of a row that they keep for the gradient
_RANK_MAX = 54  # of the SVD term without waiting for the device: of 64 columns ten are spare
_WIDENED_BYTES = 32 * 2**20
_LARGEST_HALF = 2.0**14  # a quarter of what float16 holds: room for the sum of the terms of a gradient


def objective(*arguments: Any, masked: bool = False) -> tuple[streaming.Terms, streaming.Gradients]:
    """``streaming.objective`` with the kernels.

    masked says that rows whose label is negative are among the given ones: they are left out, at the cost of the
    others, but without asking the device how many they are.
    """
    return streaming.objective(*arguments, run=partial(_Run, masked=masked))


class _Run(streaming.Run):
    def __init__(self, *arguments, masked: bool) -> None:
        super().__init__(*arguments)
        # Products of half precision with float32 results; another mixture is widened, as ``Linear`` does it.
        hidden, weight = self.hidden.dtype, self.head.weight.dtype
        self.half = hidden if hidden == weight and hidden != torch.float32 else None
        self.k_parts: tuple[Tensor, Tensor] | None = None
        self.masked = masked
        if masked:
            self.valid_rows = (self.labels >= 0).sum()
            self._refuse_what_waits()

    def _refuse_what_waits(self) -> None:
        """Terms of the whole batch that need the number of valid rows, or wait for a decomposition, as that of WᵀW,
        which a replayed graph would keep where W has moved on."""
        config = self.config
        svd = config.lambda_svd != 0
        waits = self.whole
        waits = waits or (svd and (self.trained_head or isinstance(config.svd_rank, float) or config.svd_variance != 0))
        if waits or (svd and self.hidden.is_cuda and self.small(min(self.n, self.vocab)) is None):
            raise ValueError(
                "config: a captured CUDA graph cannot wait for the device, as terms of the whole batch that take the "
                "logits themselves (covariance, normalized squares, SVD under a soft-cap or with V < d), the nuclear "
                f"norm, a fraction or more than {_RANK_MAX} as svd_rank, svd_variance, and the SVD term of a head that "
                "is trained do"
            )

    def pick(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Rows that are left out are zeros: not even a NaN in them counts."""
        part = super().pick(tensor, start, stop)
        return torch.where(self.labels[start:stop, None] >= 0, part, 0) if self.masked and part.dim() == 2 else part

    def token_terms(self) -> tuple[Tensor, Tensor, Tensor]:
        from balora_kernels import rows, tiles

        config, vocab, head = self.config, self.vocab, self.head
        row = tiles.row_stride(vocab)
        self._split_k()  # before there are buffers
        difference = self.kl and self.own_head is None
        narrow_difference = difference and self.half is not None and head.lora is None
        # The gradient takes the place of the difference logits, or of the logits, where the type is the same.
        apart = self.half is not None and self.need_grad and not narrow_difference
        row_bytes = row * (4 + (0 if not self.kl else 2 if narrow_difference else 4) + 2 * apart)
        chunk = tiles.chunk_rows(self.n, row_bytes, CHUNK_BYTES)
        new = self.hidden.new_empty
        z_buffer = new(chunk, row, dtype=torch.float32)
        t_buffer = new(chunk, row, dtype=self.half if narrow_difference else torch.float32) if self.kl else None
        g_buffer = new(chunk, row, dtype=self.half) if apart else t_buffer if narrow_difference else z_buffer
        entropy = config.lambda_diversity != 0 and config.diversity == "topk"
        # float16 holds 6e-8 at least: small probabilities are lifted, by a power of two that keeps the largest sum.
        bound = 1 + config.lambda_consistency * config.temperature * self.kl + config.lambda_diversity * entropy
        lift = _lift(bound) if self.half == torch.float16 else 1.0

        bias = None if head.bias is None else head.bias.detach().contiguous()
        found = []
        for start in range(0, self.n, chunk):
            stop = min(start + chunk, self.n)
            h = self.pick(self.hidden, start, stop)  # [c, d]
            y = self.pick(self.labels, start, stop).contiguous()
            z = z_buffer[: stop - start, :vocab]
            self._multiply(self.linear, h, z)
            student = rows.Logits(z, bias, head.scale, head.softcap)
            teacher = None
            if t_buffer is not None and self.teacher_hidden is not None:
                t = self.pick(self.teacher_hidden, start, stop)
                t_out = t_buffer[: stop - start, :vocab]
                if self.own_head is not None and self.teacher_linear is not None:
                    self._multiply(self.teacher_linear, t, t_out)
                    other = self.own_head
                    t_bias = None if other.bias is None else other.bias.detach().contiguous()
                    teacher = rows.Teacher(rows.Logits(t_out, t_bias, other.scale, other.softcap), False)
                else:
                    # Subtracted before the product, so that its error is relative to the difference.
                    teacher = self._subtracted(t.float() - h, t_out, rows)
            common: dict[str, Any] = {
                "labels": y, "temperature": config.temperature if self.kl else 1.0, "padded": True
            }  # fmt: skip
            seen = rows.forward(student, teacher, **common, top_k=min(config.entropy_top_k, vocab) if entropy else None)
            found.append(seen.terms.sum(1, dtype=torch.float64))
            if g_buffer is not None and self.need_grad:
                g = g_buffer[: stop - start, :vocab]
                rows.gradient(
                    student,
                    teacher,
                    seen,
                    g,
                    **common,
                    strength=config.lambda_consistency * config.temperature,
                    lambda_diversity=config.lambda_diversity,
                    out_scale=lift,
                )
                self._gradients_of_chunk(g, lift, h, start, stop)
        ce, kl, negative_entropy = torch.stack(found).sum(0)
        return ce, kl, negative_entropy

    def _multiply(self, linear: Linear, h: Tensor, out: Tensor) -> None:
        """out = H Wᵀ + s·(H Aᵀ) Bᵀ, without bias and scale. h [c, d] -> out [c, V] float32."""
        if self.half is not None and linear.weight.dtype == h.dtype:
            product(h, linear.weight.T, out)
        else:
            wide = h.to(self.dtype)
            for part, tile in linear.tiles():
                torch.mm(wide, tile.T, out=out[:, part])
        if linear.a is not None and linear.extra is not None:
            x = linear.scaling * (h.to(self.dtype) @ linear.a.T)
            out.addmm_(x, linear.extra[:, : x.shape[1]].T)

    def _subtracted(self, t: Tensor, out: Tensor, rows: Any) -> Any:
        """The difference logits of t = H_P − H [c, d] float32, as the kernels take them."""
        factor = None
        if out.dtype == torch.float32:
            self._multiply(self.linear, t, out)
        else:
            if out.dtype == torch.float16:
                # Its small differences would lose their digits: the largest comes to between 1/2 and 1, by a power of 2
                exponent = torch.frexp(t.abs().amax()).exponent
                t = torch.ldexp(t, -exponent)
                factor = torch.ldexp(torch.ones_like(t[:1, 0]), exponent)
            torch.mm(t.to(out.dtype), self.linear.weight.T, out=out)
        return rows.Teacher(rows.Logits(out, None, self.head.scale), True, factor)

    def _gradients_of_chunk(self, g: Tensor, lift: float, h: Tensor, start: int, stop: int) -> None:
        """From the gradient by H Wᵀ + …, times lift, [c, V], to those by hidden states, weight, bias, A and B."""
        if self.half is None:
            return self._backward(g, h.to(self.dtype), start, stop)
        linear, down = self.linear, 1 / lift
        wide = h if linear.extra is None else h.to(self.dtype)  # where an adapter or a bias has use for it
        if self.grad_weight is not None:
            add_product(self.grad_weight, g.T, h, linear.scale * down)
        x = linear.columns(wide)
        step = max(1, _WIDENED_BYTES // (4 * len(g)))  # columns of g that are widened to float32 at a time
        if self.grad_extra is not None and x is not None:
            for tile, part in zip(g.split(step, 1), self.grad_extra.split(step), strict=True):
                part.addmm_(tile.to(self.dtype).T, x, alpha=linear.scale * down)
        if self.grad_hidden is None and self.grad_a is None:
            return None
        dx = _times_weight(g, linear.weight)
        if linear.a is not None and linear.extra is not None:
            tiles = zip(g.split(step, 1), linear.extra[:, : len(linear.a)].split(step), strict=True)
            dx = torch.cat([dx, sum(tile.to(self.dtype) @ part for tile, part in tiles)], 1)
        if linear.scale != 1:
            dx *= linear.scale
        if lift != 1:
            dx *= down
        self._add_svd(dx, h, start)
        return self._to_hidden(dx, wide, start, stop)

    def _on_tensor_cores(self) -> bool:
        """Whether the products of X have half precision operands; beside H it has no columns then."""
        return self.half is not None and self.hidden.is_cuda and self.linear.extra is None

    def gram(self) -> Tensor:
        if not self._on_tensor_cores():
            return super().gram()
        total = None
        step = max(1, CHUNK_BYTES // (16 * self.hidden.shape[1]))
        for start in range(0, self.n, step):
            h = self.pick(self.hidden, start, min(start + step, self.n))
            found = h.new_empty(self.d, self.d, dtype=torch.float32)
            product(h.T, h, found)
            found *= self.linear.scale**2
            total = found if total is None else total.add_(found)
        assert total is not None
        return total

    def small(self, count: int) -> Any:
        """On a device the kernels for small matrices: a decomposition by torch waits for it, and takes longer."""
        from balora_kernels import eigh

        config = self.config
        beside = 0 if self.linear.extra is None else self.linear.extra.shape[1]
        fits = self.d + beside <= eigh.LARGEST
        fits = fits or spectral.waits_for_nothing(rank_of(config.svd_rank, count), eigh) > 0
        return eigh if _never_waits(self.hidden) and config.svd_norm == "fro" and fits else None

    def x(self, h: Tensor, start: int) -> Tensor:
        """Rows that are left out are zeros, the 1 beside a bias too."""
        x = super().x(h, start)
        return x * (self.labels[start : start + len(h), None] >= 0) if self.masked else x

    def _split_k(self) -> None:
        """K in two parts of bfloat16, which together keep 16 bits of it; of the hidden states nothing is lost then."""
        if self.k is not None and self._on_tensor_cores() and self.half == torch.bfloat16:
            coarse = self.k.bfloat16()
            self.k_parts = coarse, (self.k - coarse).bfloat16()
            self.k = coarse

    def _add_svd(self, dx: Tensor, h: Tensor, start: int) -> None:
        if self.k_parts is None:
            return super()._add_svd(dx, h.to(self.dtype), start)
        found = torch.empty_like(dx)
        for part in self.k_parts:
            product(h, part, found)
            dx.add_(found, alpha=self.linear.scale**2)
        return None

    @float32_products()
    def batch_terms(self) -> batch.BatchTerms:
        """The SVD term of a soft-capped head in half precision on tensor cores; all else as ``streaming`` has it.

        With τ = tanh(scale·H Wᵀ/cap), Z = cap·τ. Two passes over tiles of τ, of columns where V > N, else of rows: the
        Gram matrix, from float16 (whatever the inputs are: |τ| ≤ 1 fits it, and it has three bits more), and the
        gradient, from float32: what cancels between its two parts must not have been rounded.
        """
        if not self.only_svd or self.half is None or self.head.softcap is None or self.linear.extra is not None:
            return super().batch_terms()  # in float32
        from balora_kernels import rows, tiles

        config, n, vocab, cap, weight = self.config, self.n, self.vocab, self.head.softcap, self.linear.weight
        h = self.pick(self.hidden, 0, n)
        by_columns, count = vocab > n, min(n, vocab)
        # At N 2048 and V 256,000 a tile has 36,608 columns: the sums over tiles, [N, N] and [N, d], are read and
        # written seven times (0.5 GB; the tiles' own passes are 19 GB), and G·W has slices enough to fill the device.
        step = tiles.chunk_rows(max(n, vocab), count * (4 + 2), CHUNK_BYTES)
        parts = [slice(i, min(i + step, max(n, vocab))) for i in range(0, max(n, vocab), step)]
        places = [(slice(0, n), part) if by_columns else (part, slice(0, vocab)) for part in parts]
        shape = (n, tiles.row_stride(step)) if by_columns else (step, tiles.row_stride(vocab))
        z_buffer = h.new_empty(shape, dtype=torch.float32)
        half_buffer = h.new_empty(shape, dtype=torch.float16)

        def tile(row: slice, column: slice) -> tuple[Tensor, Tensor]:
            """The product H Wᵀ there, float32, and room for as many numbers in half precision."""
            at = slice(row.stop - row.start), slice(column.stop - column.start)
            product(h[row], weight[column].T, z_buffer[at])
            return z_buffer[at], half_buffer[at]

        gram = h.new_zeros(count, count, dtype=torch.float32)
        for place in places:
            z, half = tile(*place)
            rows.cap(z, self.head.scale / cap, half, _LARGEST_HALF)
            a = half if by_columns else half.T
            add_product(gram, a, a.T, (cap / _LARGEST_HALF) ** 2)
        rank = rank_of(config.svd_rank, count)
        term = spectral.svd_term(gram, None, rank, count, norm=config.svd_norm, variance=config.svd_variance)
        zero = torch.zeros_like(term.value)
        if not self.need_grad:
            return batch.BatchTerms(zero, zero, term.value)
        # By Z the gradient is U diag(w) Uᵀ Z + multiple·Z (by rows of Z, with V for U, Z V diag(w) Vᵀ + …).
        strength = config.lambda_svd * n * cap
        lift = 1.0
        if self.half == torch.float16:
            sigma = (term.directions * (gram @ term.directions)).sum(0).clamp_min(0).sqrt()
            largest = (term.weights.abs() * sigma).amax() + term.multiple.abs() * gram.trace().clamp_min(0).sqrt()
            lift = _lift(strength / cap * largest.item())
        u, w, multiple = term.directions, strength * lift * term.weights, strength * lift * term.multiple
        dx = h.new_zeros(n, self.d, dtype=torch.float32)
        scale = self.linear.scale / lift
        for row, column in places:
            z, half = tile(row, column)
            rows.cap(z, self.head.scale / cap, z)
            left, right = (u, w[:, None] * (u.T @ z)) if by_columns else (z @ u, w[:, None] * u.T)
            g = half.view(self.half)
            rows.capped_gradient(z, multiple, left, right, g)
            if self.grad_weight is not None:
                add_product(self.grad_weight[column], g.T, h[row], scale)
            if self.grad_hidden is not None:
                dx[row] += _times_weight(g, weight[column])
        self._to_hidden(dx.mul_(scale), h, 0, n)
        return batch.BatchTerms(zero, zero, term.value)


def _lift(bound: float) -> float:
    """A power of two that brings what is no larger than the bound near the upper end of float16; 1 of 0, ∞ and NaN."""
    return 2.0 ** math.floor(math.log2(_LARGEST_HALF / bound)) if 0 < bound < math.inf else 1.0


def _never_waits(tensor: Tensor) -> bool:
    """Whether nothing may wait for a device. Tests take a device's ways on a CPU with it."""
    return tensor.is_cuda


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b with half precision operands and a float32 result. a [m, k], b [k, n] -> out [m, n]."""
    if a.is_cuda:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    else:  # no such product there
        torch.mm(a.float(), b.float(), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """total += alpha · a b with half precision operands. a [m, k], b [k, n], total [m, n] float32."""
    if a.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, beta=1, alpha=alpha, out=total)
    else:
        total.addmm_(a.float(), b.float(), alpha=alpha)


def _times_weight(g: Tensor, weight: Tensor) -> Tensor:
    """G·W in slices of the vocabulary, side by side and then summed. g [c, V], weight [V, d] -> [c, d] float32."""
    from balora_kernels import tiles

    (c, vocab), d = g.shape, weight.shape[1]
    slices = tiles.vocabulary_slices(c, d, vocab)
    if slices == 1:
        out = g.new_empty(c, d, dtype=torch.float32)
        product(g, weight, out)
        return out
    g, weight = g.unflatten(1, (slices, -1)).transpose(0, 1), weight.unflatten(0, (slices, -1))
    out = g.new_empty(slices, c, d, dtype=torch.float32)
    if g.is_cuda:
        torch.ops.aten.bmm.dtype_out(g, weight, torch.float32, out=out)
    else:
        torch.bmm(g.float(), weight.float(), out=out)
    return out.sum(0)


def consistency(z: Tensor, z_teacher: Tensor, temperature: float, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """T² · Σ_n KL(softmax(Z_P,n/T) ‖ softmax(Z_n/T)) of given logits, and what its gradient needs.

    z, z_teacher [N, V] or [B, S, V] of any strides; valid [N] -> [].
    """
    from balora_kernels import rows

    found = rows.forward(
        rows.Logits(z), rows.Teacher(rows.Logits(z_teacher), False), valid=valid, temperature=temperature
    )
    return temperature**2 * found.terms[1].sum(dtype=torch.float64), found.stats


def consistency_gradient(
    z: Tensor,
    z_teacher: Tensor,
    temperature: float,
    valid: Tensor | None,
    saved: Tensor | None,
    out: Tensor,
    scale: Tensor,
) -> None:
    """out = scale times the gradient of ``consistency`` by Z."""
    from balora_kernels import rows

    rows.gradient(
        rows.Logits(z),
        rows.Teacher(rows.Logits(z_teacher), False),
        rows.Found(z.new_empty(0), saved, None, None),
        out,
        valid=valid,
        temperature=temperature,
        strength=temperature,
        scale=scale,
    )


def diversity(z: Tensor, top_k: int, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """−Σ_n H(softmax of the K largest of Z_n) of given logits; its gradient [N, K], and where that is [N, K]."""
    from balora_kernels import rows

    found = rows.forward(rows.Logits(z), valid=valid, top_k=min(top_k, z.shape[-1]))
    assert found.top_gradient is not None
    assert found.top_index is not None
    return found.terms[2].sum(dtype=torch.float64), found.top_gradient, found.top_index
