"""The output layer of a model, and the linear part of it as one map with an adapter and a bias as further columns."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import spectral
from .checks import check_number, describe
from .precision import bfloat16_products

_KEYS = itertools.count()
_HEADS: weakref.WeakValueDictionary[int, LinearHead] = weakref.WeakValueDictionary()


class LinearHead:
    """An output layer: logits = cap · tanh(a / cap) with a = scale · (H (W + s·B A)ᵀ + b); without a cap, a itself.

    Args:
        weight: W [V, d], any floating type; it may be tied to the embedding.
        bias: b [V].
        softcap: cap, above 0 (Gemma's ``final_logit_softcapping``).
        scale: a constant factor (Cohere's ``logit_scale``, 1 / Granite's ``logits_scaling``).
        lora: (A [r, d], B [V, r], s), an adapter on the head itself; s is its scaling, alpha / r.

    Weight, bias, A and B get a gradient where they require one, accumulated in float32 (float64).

    The Gram matrix of the map that the SVD term needs is computed on first use (V·d² operations) and, while the head is
    frozen, kept until an in-place operation changes a tensor (one through ``.data`` is not seen).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type, device or range; the message names it.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        softcap: float | None = None,
        scale: float = 1.0,
        lora: tuple[Tensor, Tensor, float] | None = None,
    ) -> None:
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise TypeError(f"weight: expected a floating-point tensor [V, d], found {describe(weight)}")
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"weight: expected the shape [V, d] with V and d of at least 1, found {describe(weight)}")
        vocab, d = weight.shape
        if bias is not None:
            self._check_tensor("bias", bias, weight, (vocab,))
        if lora is not None:
            if not isinstance(lora, (tuple, list)) or len(lora) != 3:
                raise TypeError(f"lora: expected (A, B, scaling), found {_kinds(lora)}")
            a, b, scaling = lora
            rank = a.shape[0] if isinstance(a, Tensor) and a.dim() == 2 else "r"
            self._check_tensor("lora: A", a, weight, (rank, d))
            self._check_tensor("lora: B", b, weight, (vocab, rank))
            check_number("lora: scaling", scaling)
        if softcap is not None:
            check_number("softcap", softcap)
            if softcap <= 0:
                raise ValueError(f"softcap: expected a number above 0 or None, found {softcap!r}")
        check_number("scale", scale)
        self.weight, self.bias, self.softcap, self.scale, self.lora = weight, bias, softcap, float(scale), lora
        self._register()

    def _register(self) -> None:
        self.key = next(_KEYS)
        _HEADS[self.key] = self
        self._weight_gram: _WeightGram | None = None
        self._gram: tuple[Any, spectral.HeadGram] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, or in a file: the key is this head's own, and what it has computed it computes again."""
        return {k: v for k, v in vars(self).items() if k not in ("key", "_weight_gram", "_gram")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._register()

    @staticmethod
    def _check_tensor(name: str, value: Any, weight: Tensor, shape: tuple) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, found {describe(value)}")
        if tuple(value.shape) != shape or 0 in value.shape:
            raise ValueError(f"{name}: expected the shape {list(shape)}, found {describe(value)}")
        if value.device != weight.device:
            raise ValueError(f"{name}: expected weight's device {weight.device}, found {value.device}")
        if (value.dtype == torch.float64) != (weight.dtype == torch.float64):
            raise TypeError(f"{name}: the weight is {weight.dtype}, found {value.dtype}; float64 does not mix")

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(weight, bias, A, B): what may be trained."""
        a, b, _ = self.lora if self.lora is not None else (None, None, 0.0)
        return self.weight, self.bias, a, b

    @classmethod
    def known(cls, key: int, tensors: list[Tensor | None]) -> LinearHead:
        """The head with that key, which an operator cannot take; one like it where the tensors have been replaced."""
        head = _HEADS[key]
        places = [[None if t is None else t.data_ptr() for t in ts] for ts in (head.tensors, tensors)]
        if places[0] == places[1]:
            return head
        weight, bias, a, b = tensors
        assert weight is not None
        lora = None if a is None or b is None or head.lora is None else (a, b, head.lora[2])
        return cls(weight, bias, head.softcap, head.scale, lora)

    def replaced(
        self, weight: Tensor, bias: Tensor | None = None, lora: tuple[Tensor, Tensor, float] | None = None
    ) -> LinearHead:
        """This head where it has these tensors and they are frozen, else one like it; of a frozen weight it keeps what
        it knows. A trained tensor may have changed in ways that torch does not count."""
        ours, theirs = (h and (id(h[0]), id(h[1]), h[2]) for h in (self.lora, lora))
        other = LinearHead(weight, bias, self.softcap, self.scale, lora)
        frozen = not any(t is not None and t.requires_grad for t in other.tensors)
        if weight is self.weight and _same(bias, self.bias) and ours == theirs and frozen:
            return self
        if not weight.requires_grad:
            other._weight_gram = self._weight_gram
        return other

    @property
    def gram(self) -> spectral.HeadGram:
        """[W, B, b]ᵀ[W, B, b] and a factor of it, or of what an adapter leaves of it (``spectral.head_gram``)."""
        # A tensor that is trained may change in ways that torch does not count.
        trained = any(t is not None and t.requires_grad for t in self.tensors)
        of_weight = None if self.weight.requires_grad else self._weight_gram
        if of_weight is None or not of_weight.fits(self.weight):
            of_weight = _WeightGram(self.weight)
        known = of_weight.gram
        key = (id(known), *(_version(t) for t in self.tensors[1:] if t is not None))
        if self._gram is not None and self._gram[0] == key and not trained:
            return self._gram[1]
        linear = Linear(self, known.dtype)
        lift = None if linear.a is None else linear.lift
        with torch.autocast(known.device.type, enabled=False):
            found = spectral.head_gram(self.weight.detach(), linear.extra, known, lift)
        self._weight_gram = None if self.weight.requires_grad else of_weight
        self._gram = None if trained else (key, found)
        return found

    def prepare_svd(self) -> None:
        """Compute what a frozen head keeps for the SVD term, where the term takes that."""
        fits = self.softcap is None and self.weight.shape[0] >= self.weight.shape[1]
        if fits and not any(t is not None and t.requires_grad for t in self.tensors):
            _ = self.gram


class _WeightGram:
    """WᵀW [d, d], and what W it is of."""

    def __init__(self, weight: Tensor) -> None:
        self.gram = spectral.gram([weight.detach()])
        self._weight, self._version = weakref.ref(weight), _version(weight)
        self._sums = None if weight.requires_grad else _bit_sums(weight)  # a trained one is not kept

    def fits(self, weight: Tensor) -> bool:
        """Whether it is of this weight: the same tensor, unchanged in the same memory, or else the same numbers.

        FSDP and ZeRO-3 gather a weight into other memory in every step; to read it costs little beside V·d².
        """
        version = _version(weight)
        if version == self._version and weight is self._weight():
            return True
        if self._sums is None or version[1:] != self._version[1:] or not torch.equal(_bit_sums(weight), self._sums):
            return False
        self._weight, self._version = weakref.ref(weight), version
        return True


def _bit_sums(weight: Tensor) -> Tensor:
    """The sums of the rows' and of the columns' bits as whole numbers, exact whatever the order, [V + d]."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.dtype.itemsize]
    rows, columns = [], torch.zeros(weight.shape[1], dtype=torch.int64, device=weight.device)
    for part in weight.detach().view(kind).split(spectral.rows_at_a_time(weight)):
        wide = part.long()
        rows.append(wide.sum(1))
        columns += wide.sum(0)
    return torch.cat([*rows, columns])


def _kinds(value: Any) -> str:
    """The types in a tuple, which may hold large tensors."""
    if not isinstance(value, (tuple, list)):
        return describe(value)
    return f"({', '.join(type(entry).__name__ for entry in value)})"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether they are one tensor, or two views of it (BART's bias is taken out of a buffer every time)."""
    return a is b or (a is not None and b is not None and a.shape == b.shape and _version(a) == _version(b))


def _version(tensor: Tensor) -> tuple[Any, ...]:
    # inference tensors do not count their changes: nothing is equal to a new object
    return tensor.data_ptr(), tensor.device, object() if tensor.is_inference() else tensor._version


class Linear:
    """The linear part of a head, scale · X [W | E]ᵀ: X = [H | s·H Aᵀ | 1], E = [B | b], so it stays one linear map.

    Shapes: c rows of a chunk, e = r + 1 columns (or r, or 1, or none).
    """

    _TILE_BYTES = 4 * 2**20  # a tile of the head that is widened: it should stay in the cache
    _TILE_BYTES_CUDA = 128 * 2**20  # and on a device have work for all of it

    def __init__(self, head: LinearHead, dtype: torch.dtype) -> None:
        self.dtype, self.scale = dtype, head.scale
        self.weight = head.weight.detach()
        bias, a, b = (None if t is None else t.detach() for t in head.tensors[1:])
        self.a = None if a is None else a.to(dtype)  # [r, d]
        self.scaling = 0.0 if head.lora is None else head.lora[2]
        columns = [t.to(dtype) for t in (b, None if bias is None else bias[:, None]) if t is not None]
        self.extra = torch.cat(columns, 1) if columns else None  # [V, e]
        self.has_bias = bias is not None
        self._buffer: Tensor | None = None

    def columns(self, h: Tensor, with_bias: bool = True) -> Tensor | None:
        """The columns of X beside H. h [c, d] -> [c, e]."""
        parts = [] if self.a is None else [self.scaling * (h @ self.a.T)]
        if self.has_bias and with_bias:
            parts.append(h.new_ones(len(h), 1))
        return torch.cat(parts, 1) if parts else None

    def lift(self, y: Tensor) -> Tensor:
        """M Y with X = [H | 1] M, of an adapter. y [d + r + 1, k] -> [d + 1, k]; without a bias one row less."""
        assert self.a is not None
        r, d = self.a.shape
        lifted = y[:d].addmm(self.a.T, y[d : d + r], alpha=self.scaling)
        return torch.cat([lifted, y[d + r :]]) if self.has_bias else lifted

    def forward(
        self, h: Tensor, x: Tensor | None, out: Tensor, at: slice = slice(None), bfloat16: bool = False
    ) -> None:
        """out = scale · (h Wᵀ + x Eᵀ), for the entries ``at`` of the vocabulary. h [c, d], x [c, e] -> out [c, V].

        x may lack the last columns of E. bfloat16 says that h holds bfloat16 numbers.
        """
        with bfloat16_products(bfloat16 and self.weight.dtype == torch.bfloat16 and h.device.type == "cpu"):
            for part, tile in self.tiles(at):
                torch.mm(h, tile.T, out=out[:, part])
        if x is not None and self.extra is not None:
            out.addmm_(x, self.extra[at, : x.shape[1]].T)
        if self.scale != 1:
            out.mul_(self.scale)

    def backward(self, g: Tensor, at: slice = slice(None)) -> Tensor:
        """The gradient by [H | s·H Aᵀ], [c, d + r], of what has the gradient g [c, V] by the output of ``forward``."""
        total = None
        for part, tile in self.tiles(at):
            if total is None:
                total = g[:, part] @ tile
            else:
                total.addmm_(g[:, part], tile)
        assert total is not None
        return self.with_adapter(g, total, at)

    def with_adapter(self, g: Tensor, dh: Tensor, at: slice = slice(None)) -> Tensor:
        """The gradient by H, [c, d], with that by the adapter's columns beside it, both times the scale."""
        if self.a is not None and self.extra is not None:
            dh = torch.cat([dh, g.to(self.dtype) @ self.extra[at, : len(self.a)]], 1)
        return dh if self.scale == 1 else dh.mul_(self.scale)

    def tiles(self, at: slice = slice(None)) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the arithmetic's type: whole where it has that already, else a tile of the vocabulary at a
        time, in one reused buffer. Yields where the tile lies within ``at``, and the tile."""
        weight = self.weight[at]
        if weight.dtype == self.dtype:
            yield slice(0, len(weight)), weight
            return
        tile_bytes = self._TILE_BYTES_CUDA if weight.is_cuda else self._TILE_BYTES
        step = max(1, min(len(weight), tile_bytes // (weight.shape[1] * self.dtype.itemsize)))
        if self._buffer is None or len(self._buffer) < step:
            self._buffer = weight.new_empty(step, weight.shape[1], dtype=self.dtype)
        for start in range(0, len(weight), step):
            stop = min(start + step, len(weight))
            yield slice(start, stop), self._buffer[: stop - start].copy_(weight[start:stop])
