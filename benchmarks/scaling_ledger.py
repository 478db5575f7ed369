"""What a step on fake tensors takes: living bytes and their peak, operations, time at nominal rates, traffic.

docs/scaling.md says why torch's ``MemTracker`` cannot do it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# An H100 (SXM) by its data sheet, 70 % of its arithmetic (bfloat16 on tensor cores, float32 beside them) and 85 % of
# its bandwidth: assumptions, as nothing here has run on a GPU.
HALF_RATE, FLOAT32_RATE, BANDWIDTH = 0.7 * 989e12, 0.7 * 67e12, 0.85 * 3.35e12
_NOTHING = {aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.new_empty_strided, aten._unsafe_view}
_WIDE = {aten.mm.dtype_out, aten.bmm.dtype_out, aten.addmm.dtype_out}  # float32 results of half precision operands


class Ledger(TorchDispatchMode):
    """Bytes of living storages, their peak, and answers to the few questions that only numbers could answer.

    A tensor's values are asked for rarely: which rows are scored (all but the last of each sequence), whether the
    labels are in range (yes), whether a row has a tie, a mask or an outlier (no), whether a factorization succeeded
    (yes), whether a gathered head is the one that is known (yes).
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows  # that are scored
        self.alive: dict[int, tuple[int, str]] = {}  # bytes and label of a storage
        self.now: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.phase = "set-up"
        self.seconds: Counter[str] = Counter()  # by phase
        self.flops: Counter[str] = Counter()
        self.start_peak()

    def start_peak(self) -> None:
        self.total = sum(self.now.values())
        self.peak, self.peak_phase, self.at_peak, self.by_phase = 0, "", {}, Counter()
        for counter in (self.moved, self.seconds, self.flops):
            counter.clear()

    def add(self, tensor: Tensor, label: str) -> None:
        for storage in _storages(tensor):
            key = storage._cdata
            size = storage.nbytes()
            if key in self.alive:
                old, label = self.alive[key]
                size, change = size, size - old
            else:
                weakref.finalize(storage, self._gone, key)
                change = size
            self.alive[key] = size, label
            self._change(label, change)

    def _gone(self, key: int) -> None:
        size, label = self.alive.pop(key)
        self._change(label, -size)

    def _change(self, label: str, size: int) -> None:
        self.now[label] += size
        self.total += size
        if self.total > self.by_phase[self.phase]:
            self.by_phase[self.phase] = self.total
        if self.total > self.peak:
            self.peak, self.peak_phase, self.at_peak = self.total, self.phase, dict(self.now)

    def __enter__(self):
        """FSDP lets go of gathered weights by resizing their storage, which is no operation."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            found = original(storage, size)
            if (key := storage._cdata) in self.alive:
                old, label = self.alive[key]
                self.alive[key] = size, label
                self._change(label, size - old)
            return found

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", resize)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patch.stop()
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = self._answer(func, args, kwargs or {})
        made = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
        for tensor in made:
            self.add(tensor, self.phase)
        if made and not (func.is_view or func._overloadpacket in _NOTHING or func.namespace == "c10d"):
            given = [t for t in tree_leaves(args if func in _WIDE else (args, kwargs)) if isinstance(t, Tensor)]
            factor = given[func is aten.addmm.dtype_out] if given else None
            self.spend(_flops(func, given), torch.float32 if factor is None else factor.dtype, *given, *made)
        return found

    def spend(self, flops: int, dtype: torch.dtype, *tensors: Tensor) -> None:
        """Time of an operation at the nominal rates: of its arithmetic, or of reading and writing, which is longer."""
        size = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
        rate = HALF_RATE if dtype in (torch.bfloat16, torch.float16) else FLOAT32_RATE
        self.flops[self.phase] += flops
        self.seconds[self.phase] += max(flops / rate, size / BANDWIDTH)

    def _answer(self, func, args, kwargs):
        if func is aten.nonzero.default:
            return args[0].new_empty(self.rows, args[0].dim(), dtype=torch.int64)
        if func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            (mask,) = args[1]
            return args[0].new_empty(self.rows, *args[0].shape[mask.dim() :])
        if func in (aten.index_put.default, aten._unsafe_index_put.default) and args[1][0].dtype == torch.bool:
            return torch.empty_like(args[0])
        if func is aten.equal.default:
            return True
        if func is aten._local_scalar_dense.default:
            kind = args[0].dtype
            return not getattr(args[0], "asks_for_any", False) if kind == torch.bool else int(kind != torch.int32)
        if func in _WIDE:
            return kwargs["out"]
        found = func(*args, **kwargs)
        if func in (aten.any.default, aten.any.dim):
            found.asks_for_any = True
        if func is torch.ops.c10d._allgather_base_.default:
            self.moved["gathered"] += args[0].nbytes
        if func is torch.ops.c10d._reduce_scatter_base_.default:
            self.moved["scattered"] += args[1].nbytes
        return found


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    if hasattr(tensor, "_local_tensor"):  # a DTensor
        tensor = tensor._local_tensor
    yield tensor.untyped_storage()


def _flops(func: Any, tensors: list[Tensor]) -> int:
    """Of products and attention; 0 of all else. tensors: what it was given."""
    if func._overloadpacket in (aten.mm, aten.bmm):
        return 2 * tensors[0].numel() * tensors[1].shape[-1]
    if func._overloadpacket in (aten.addmm, aten.addmm_):
        return 2 * tensors[1].numel() * tensors[2].shape[-1]
    if func._overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu:
        return 4 * tensors[0].numel() * tensors[1].shape[2]
    if func._overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return 10 * tensors[1].numel() * tensors[2].shape[2]
    return 0
