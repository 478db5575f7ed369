"""The probe: on a few fixed rows, how a model that is being trained has moved from the pre-trained one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional, reference
from .attachment import attachment
from .checks import IGNORE_INDEX
from .config import BALoraConfig
from .output_layer import decoder_of, heads_of
from .pretrained import evaluating, teacher

TOKENS = 256  # that are measured, at most
ROWS = 32  # that they are taken from, at most
SINGULAR_VALUES = 64
_HELD_ENTRIES = 2**24  # of logits, where the model gives nothing else
_TILE = 2**13  # columns of the logits at a time


class Measured(NamedTuple):
    """Means over the probe's tokens, in nats a token."""

    ce: float
    kl: float  # KL(pre-trained ‖ model) at temperature 1
    entropy: float
    spectrum: list[float]  # σ_i / ‖Z‖_F of the logits Z, descending


class Probe:
    """A fixed batch of rows, forwarded without gradients and in evaluation mode through an attached model.

    Nothing of the model or of its training changes by it: modes, ``requires_grad``, gradients and random numbers are as
    they were. The entropy is that of the ``entropy_top_k`` most likely tokens, or of the whole vocabulary where the
    attached config has ``diversity="full"``.

    Args:
        model: attached by ``balora.attach``, perhaps wrapped since.
        rows: examples with ``input_ids`` and ``labels`` (−100: not scored), as lists or tensors [S]; without labels,
            each token is scored that an ``attention_mask`` does not leave out. They are taken from the first on, up to
            256 scored tokens or 32 rows; the last one is cut.
        autocast: the type of the training's autocast, None without one.

    Raises:
        ValueError: the model is not attached, a row has no ``input_ids``, or no token of the rows is scored.
    """

    def __init__(
        self, model: nn.Module, rows: Iterable[Mapping[str, Any]], autocast: torch.dtype | None = None
    ) -> None:
        self.base: Any
        self.base, self.attachment = attachment(model)
        self.autocast = autocast
        self.device = self.base.get_input_embeddings().weight.device
        self.rows, self.tokens = _taken(rows)
        if not self.tokens:
            raise ValueError("rows: expected input_ids and labels with a token that is scored, found none")
        config = self.attachment.config
        self.config = BALoraConfig(
            lambda_consistency=1.0,
            lambda_diversity=1.0,
            lambda_svd=0.0,
            temperature=1.0,
            diversity="full" if config.diversity == "full" else "topk",
            entropy_top_k=config.entropy_top_k,
        )
        self._teacher_hidden: Tensor | None = None  # [N, d]

    @torch.no_grad()
    def measure(self, pre_trained: bool = False) -> Measured:
        """The model as it is now; or, if ``pre_trained``, with its adapters off."""
        heads = None if self.attachment.heads is None else heads_of(self.base, self.attachment.heads)
        if heads is None or isinstance(heads, str):
            return self._from_logits(pre_trained)
        if self._teacher_hidden is None:
            with teacher(self.base):
                self._teacher_hidden = self._hidden()
        student, own = (heads.teacher or heads.student, None) if pre_trained else heads
        hidden = self._teacher_hidden if pre_trained else self._hidden()
        hidden, initial = (t.to(student.weight.device) for t in (hidden, self._teacher_hidden))
        labels = torch.cat([labels[kept] for _, labels, kept in self.rows]).to(hidden.device)
        found = functional.linear_objective(hidden, initial, student, labels, self.config, teacher_head=own)
        assert found.consistency is not None
        assert found.diversity is not None
        spectrum = _spectrum(_tiles(hidden, student))
        return Measured(found.ce.item(), found.consistency.item(), -found.diversity.item(), spectrum)

    def _hidden(self) -> Tensor:
        """The last hidden state of the tokens that are scored, [N, d]."""
        decoder = decoder_of(self.base)
        assert decoder is not None  # else attach would not have found the head
        # Row by row: without padding, and in little memory.
        return torch.cat([self._scored(decoder, row, "last_hidden_state") for row in self.rows])

    def _scored(self, module: nn.Module, row: tuple[Tensor, Tensor, Tensor], name: str) -> Tensor:
        ids, _, kept = row
        with evaluating(self.base), torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            found = getattr(module(input_ids=ids[None].to(self.device), use_cache=False), name)
        return found[0, kept.to(found.device)]

    def _from_logits(self, pre_trained: bool) -> Measured:
        """Of a model whose head is no ``LinearHead``: from the logits of its own forward, a row at a time."""
        sums = torch.zeros(3, dtype=torch.float64)  # CE, KL, −H
        held: list[Tensor] = []
        room = 0
        for row in self.rows:
            with teacher(self.base):
                initial = self._scored(self.base, row, "logits").float()  # [n, V]
            z = initial if pre_trained else self._scored(self.base, row, "logits").float()
            ce = nn.functional.cross_entropy(z, row[1][row[2]].to(z.device))
            kl = functional.consistency_loss(z, initial, temperature=1.0)
            top_k = self.config.entropy_top_k if self.config.diversity == "topk" else z.shape[1]
            negative_entropy = functional.diversity_loss(z, top_k=top_k)
            sums += len(z) * torch.stack([ce, kl, negative_entropy]).double().cpu()
            if not held:
                room = max(_HELD_ENTRIES // z.shape[1], SINGULAR_VALUES)
            held.append(z[:room].clone())
            room -= len(held[-1])
        ce, kl, negative_entropy = sums / self.tokens
        return Measured(ce.item(), kl.item(), -negative_entropy.item(), _spectrum([torch.cat(held)]))


def _taken(rows: Iterable[Mapping[str, Any]]) -> tuple[list[tuple[Tensor, Tensor, Tensor]], int]:
    """(token ids [S], the label of each position [S], which positions are scored [n]) of the first rows, and Σ n."""
    taken: list[tuple[Tensor, Tensor, Tensor]] = []
    left = TOKENS
    for row in rows:
        if not left or len(taken) == ROWS:
            break
        ids, labels = _ids_and_labels(row)
        ids, labels = ids[:-1], labels[1:]  # position t is scored against label t + 1
        scored = (labels != IGNORE_INDEX).nonzero().squeeze(-1)[:left]
        if len(scored):
            end = int(scored[-1]) + 1
            taken.append((ids[:end], labels[:end], scored))
            left -= len(scored)
    return taken, TOKENS - left


def _ids_and_labels(row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    if not isinstance(row, Mapping) or "input_ids" not in row:
        found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"rows: expected examples with input_ids and labels, found {found or 'an empty one'}")
    ids = torch.as_tensor(row["input_ids"], dtype=torch.int64).cpu()
    if "labels" in row:
        return ids, torch.as_tensor(row["labels"], dtype=torch.int64).cpu()
    # A collator makes the labels of the ids, such as DataCollatorForLanguageModeling: all but the padding.
    real = torch.as_tensor(row.get("attention_mask", torch.ones_like(ids))).cpu()
    return ids, ids.masked_fill(real == 0, IGNORE_INDEX)


def _tiles(hidden: Tensor, head: functional.LinearHead) -> Iterator[Tensor]:
    """The logits [N, V] in tiles of columns, float32."""
    weight, bias, a, b = (None if t is None else t.detach() for t in head.tensors)
    assert weight is not None
    for start in range(0, len(weight), _TILE):
        at = slice(start, start + _TILE)
        lora = None if a is None or b is None or head.lora is None else (a, b[at], head.lora[2])
        yield reference.logits(hidden, weight[at], None if bias is None else bias[at], head.softcap, head.scale, lora)


def _spectrum(tiles: Iterable[Tensor]) -> list[float]:
    """σ_i(Z) / ‖Z‖_F, descending, of Z [N, V] in tiles of columns: its Gram matrix is [N, N]."""
    gram: Tensor | float = 0.0
    for z in tiles:
        wide = z.double()  # of float32 squares a σ below 3e-4 of the largest would be rounding
        gram = gram + wide @ wide.T
    assert isinstance(gram, Tensor)
    if not torch.isfinite(gram).all():
        return []
    values = torch.linalg.eigvalsh(gram).clamp_min(0).flip(0)
    total = values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return (values[:SINGULAR_VALUES] / total).sqrt().tolist()
