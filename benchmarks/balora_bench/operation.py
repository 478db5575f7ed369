"""What a benchmark says of an operation: its shapes, its implementations, and cases that run, check and bound them."""

from __future__ import annotations

import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from balora import dispatch

from . import harness

Shape = tuple[int, ...]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Implementation:
    name: str
    function: Function  # of a case's inputs
    own: bool = False  # balora's: outside the error budget it ends the command with status 1
    terms: tuple[str, ...] = ("all",)  # of the objective, that it has
    why_not: Callable[[], str | None] = lambda: None  # why it cannot run on this machine
    note: str = ""  # what it computes besides, or leaves out
    moved: Callable[[Any], int] | None = None  # bytes that it moves, of a case

    @property
    def label(self) -> str:
        return f"balora {self.name}" if self.own else self.name


def own(name: str, function: Function, **more: Any) -> Implementation:
    """An implementation of balora's, with dispatch's reasons against it."""

    def why_not() -> str | None:
        reasons = dispatch.why_not(name)
        if name in ("triton", "cuda") and not harness.ON_GPU and not reasons:
            reasons = ["needs a CUDA device: Triton's interpreter is there for tests"]
        return "; ".join(reasons) or None

    return Implementation(name, function, own=True, why_not=why_not, **more)


def needs(package: str, gpu: bool = True) -> Callable[[], str | None]:
    """Why what needs that package, and a GPU, cannot run here."""

    def why_not() -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        return "needs a CUDA device" if gpu and not harness.ON_GPU else None

    return why_not


def compiled(function: Function) -> Function:
    """torch.compile of it, which is imported where it is used: that takes seconds."""
    return lambda inputs: _compile(function)(inputs)


@cache
def _compile(function: Function) -> Function:
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # of its own parts
    return torch.compile(function)


@dataclass(frozen=True)
class Defaults:
    """For the CPU, or for a GPU. A sweep doubles a size, from a shape up to another."""

    shapes: Sequence[Shape]
    dtypes: Sequence[str]
    sweeps: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)


@dataclass(frozen=True)
class Operation:
    name: str
    axes: tuple[str, ...]  # of a shape
    case: Callable[[Shape, torch.dtype, str], Case]
    implementations: tuple[Implementation, ...]
    cpu: Defaults
    gpu: Defaults
    terms: tuple[str, ...] = ("all",)

    @property
    def defaults(self) -> Defaults:
        return self.gpu if harness.ON_GPU else self.cpu

    def describe(self, shape: Shape) -> str:
        return ", ".join(f"{axis} {size}" for axis, size in zip(self.axes, shape, strict=True))


class Case(ABC):
    """Inputs of one shape, type and choice of terms."""

    floor_name: str
    share: float = 1.0  # of the work, that is done where an implementation is checked
    held: int  # bytes of the inputs and of the gradients
    returned: int = 0  # bytes of the gradients

    @abstractmethod
    def floor(self) -> Callable[[], object]:
        """What no method can avoid, as a run."""

    @abstractmethod
    def run(self, function: Function) -> Callable[[], object]:
        """What is timed."""

    @abstractmethod
    def small(self, function: Function) -> Callable[[], object]:
        """The same on the part that is checked."""

    @abstractmethod
    def errors(self, function: Function) -> dict[str, harness.Error]:
        """Of the results on a part of the inputs."""

    def errors_of_all(self, results: Any) -> dict[str, harness.Error]:
        """Of what a run on all inputs returned; nothing where that part is all of them."""
        return {}

    def errors_of_terms(self, function: Function) -> dict[str, harness.Error]:
        """Of what the budget of the whole would hide, on all inputs: asked of balora's own."""
        return {}


_CHUNK = 2**24  # logits that the oracle of all rows has at a time


class Inputs(Protocol):
    """Of a loss; the gradient is taken by the leaf [N, …]."""

    leaf: Tensor
    vocab: int  # logits of a row
    held: int  # bytes

    def part(self, rows: slice, dtype: torch.dtype | None = None) -> Any:
        """The same with those rows alone, in another type."""


class Loss(Case):
    """A loss and its gradient, held against an oracle in float64: on the first rows, and on all as they are timed.

    Of all rows, which may be too many to materialize, the oracle goes through chunks: the loss is a mean over the rows,
    and what is none is a term apart. The gradient is compared in all rows, or, where it has more than 2²⁷ entries, in
    64 at both ends and in those on both sides of every multiple of 128, the borders of the chunks of many rows.

    Args:
        oracle: the equation, everything materialized; in the inputs' type the yardstick of the budget.
        rows: that are checked first.
        oracle_of_rows: the part of the oracle that is a mean over the rows; all of it where it is not given.
        whole: the rest of it, of all inputs, at a cost that all rows allow.
    """

    def __init__(
        self,
        inputs: Any,
        oracle: Function,
        rows: int,
        oracle_of_rows: Function | None = None,
        whole: Function | None = None,
    ) -> None:
        self.inputs, self._oracle = inputs, oracle
        self._oracle_of_rows, self._whole = oracle_of_rows or oracle, whole
        n, dtype = len(inputs.leaf), inputs.leaf.dtype
        self._few = inputs.part(slice(min(rows, n)))
        self.share = min(rows, n) / n
        self.returned = inputs.leaf.numel() * dtype.itemsize
        self.held = inputs.held + self.returned

    def run(self, function: Function) -> Callable[[], tuple[Tensor, Tensor]]:
        return _forward_backward(function, self.inputs)

    def small(self, function: Function) -> Callable[[], tuple[Tensor, Tensor]]:
        return _forward_backward(function, self._few)

    @cached_property
    def _yardstick(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        wide = self._few.part(slice(None), torch.float64)
        return _named(self._oracle, self._few), _named(self._oracle, wide)

    def errors(self, function: Function) -> dict[str, harness.Error]:
        return harness.budget(_named(function, self._few), *self._yardstick, self._few.leaf.dtype)

    @cached_property
    def _compared(self) -> Tensor:
        """The rows in which the gradient of all is compared."""
        n, device = len(self.inputs.leaf), self.inputs.leaf.device
        rows = torch.arange(n, device=device)
        if self.inputs.leaf.numel() <= 2**27:
            return rows
        return rows[(rows < 64) | (rows >= n - 64) | (rows % 128 == 0) | (rows % 128 == 127)]

    @cached_property
    def _yardstick_of_all(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self._in_chunks(None), self._in_chunks(torch.float64)

    def _in_chunks(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The oracle's loss, and the compared rows of its gradient, both in float64; the equation in that type."""
        n, compared = len(self.inputs.leaf), self._compared
        loss, gradients = torch.zeros((), dtype=torch.float64, device=compared.device), []
        start = 0
        for part in self.parts(dtype):
            found, gradient = _forward_backward(self._oracle_of_rows, part)()
            rows = len(part.leaf)
            inside = compared[(compared >= start) & (compared < start + rows)] - start
            loss += rows / n * found.double()
            gradients.append(rows / n * gradient[inside].double())
            start += rows
        gradient = torch.cat(gradients)
        if self.rest is not None:
            loss, gradient = loss + self.rest[0], gradient + self.rest[1][compared]
        return {"loss": loss, "gradient": gradient}

    def parts(self, dtype: torch.dtype | None) -> Iterator[Any]:
        """All rows, as many at a time as may be materialized, in that type."""
        step = max(1, _CHUNK // self.inputs.vocab)
        for start in range(0, len(self.inputs.leaf), step):
            yield self.inputs.part(slice(start, start + step), dtype)

    @cached_property
    def rest(self) -> tuple[Tensor, Tensor] | None:
        """Of the oracle, what is no mean over the rows, in float64 for the yardstick too: computed once."""
        if self._whole is None:
            return None
        return _forward_backward(self._whole, self.inputs.part(slice(None), torch.float64))()

    def errors_of_all(self, results: tuple[Tensor, Tensor]) -> dict[str, harness.Error]:
        if self.share == 1:  # errors() had all rows
            return {}
        loss, gradient = results
        found = {"loss": loss, "gradient": gradient[self._compared]}
        return harness.budget(found, *self._yardstick_of_all, self.inputs.leaf.dtype)


def _forward_backward(function: Function, inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    def run() -> tuple[Tensor, Tensor]:
        loss = function(inputs)
        # not backward(): a leaf's .grad is a copy, which the hidden states of a model, no leaf, do not have
        (grad,) = torch.autograd.grad(loss, inputs.leaf)
        return loss.detach(), grad

    return run


def _named(function: Function, inputs: Inputs) -> dict[str, Tensor]:
    return dict(zip(("loss", "gradient"), _forward_backward(function, inputs)(), strict=True))
