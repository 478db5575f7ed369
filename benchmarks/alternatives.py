"""Other ways for the steps of the streaming objective, timed beside the way that is taken: called by ``profiles``.

Every alternative gives the same values, up to rounding; the first of each group is what balora does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from balora_bench import harness, linear_objective
from balora_bench.harness import MIB
from profile_plots import milliseconds
from torch import Tensor

from balora import rows, streaming

COLUMNS = {"group": "step", "way": "way", "ms": "ms", "spread": "±", "ratio": "× balora's way"}


def measure(n: int, d: int, vocab: int, rounds: int) -> list[dict[str, Any]]:
    """Each group in turns. The chunks' and blocks' sizes on the whole objective, the others on one block of rows."""
    found = []
    for group, ways in {**sizes(n, d, vocab), **steps(vocab)}.items():
        seconds = harness.interleaved(ways, rounds if "bytes" in group else 8 * rounds)
        base = harness.median_and_spread(next(iter(seconds.values())))[0]
        for way, times in seconds.items():
            ms, spread = harness.median_and_spread(times)
            row = {"group": group, "way": way, "ms": milliseconds(ms), "spread": milliseconds(spread)}
            found.append({**row, "ratio": f"{ms / base:.2f}"})
    return found


def sizes(n: int, d: int, vocab: int) -> dict[str, dict[str, Callable[[], object]]]:
    case = linear_objective.LinearObjective((n, d, vocab), torch.float32, "all")
    run = case.run(linear_objective.Objective("streaming"))

    def sized(name: str, mib: float) -> Callable[[], object]:
        def call() -> object:
            with mock.patch.object(streaming, name, int(mib * MIB)):
                return run()

        return call

    found = {}
    for group, name in (("bytes of a chunk", "_CHUNK_BYTES"), ("bytes of a block", "_BLOCK_BYTES")):
        now = getattr(streaming, name) / MIB
        found[group] = {f"{mib:g} MiB": sized(name, mib) for mib in (now, now / 8, now / 2, now * 4)}
    return found


def steps(vocab: int) -> dict[str, dict[str, Callable[[], object]]]:
    """Of one block of rows, as large as the streaming path takes it."""
    b, g = max(1, streaming._BLOCK_BYTES // (4 * vocab)), torch.Generator().manual_seed(0)
    z, delta = 3 * torch.randn(b, vocab, generator=g), 0.1 * torch.randn(b, vocab, generator=g)
    p, work = z.softmax(-1), torch.empty(rows.BUFFERS, b, vocab)
    return {
        "top 21 of a row": {
            "torch.topk": lambda: z.topk(21),
            "torch.topk, unsorted": lambda: z.topk(21, sorted=False),
            "maxima of blocks of 64, then topk twice": lambda: by_blocks(z, 21, 64),
        },
        "inner product of each row": {
            "mul into a buffer, sum": lambda: torch.mul(p, delta, out=work[0]).sum(-1),
            "linalg.vecdot": lambda: torch.linalg.vecdot(p, delta),
            "einsum": lambda: torch.einsum("bv,bv->b", p, delta),
        },
        "smallest and largest of each row": {
            "amin, amax": lambda: (delta.amin(-1), delta.amax(-1)),
            "aminmax": lambda: torch.aminmax(delta, dim=-1),
        },
        "p·(e^δ − 1)": {
            "expm1 into a buffer, mul": lambda: torch.expm1(delta, out=work[0]).mul_(p),
            "exp, sub, mul (loses the digits of a small δ)": lambda: torch.exp(delta, out=work[0]).sub_(1).mul_(p),
            "expm1, mul, fresh temporaries": lambda: p * torch.expm1(delta),
        },
    }


def by_blocks(z: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
    """The K largest, of the blocks with the K largest maxima. z [b, V], V a multiple of width; K blocks at least."""
    blocks = z.view(len(z), -1, width)
    k = min(k, z.shape[1])
    chosen = blocks.amax(-1).topk(min(k, blocks.shape[1])).indices  # [b, K]
    part = blocks.gather(1, chosen[:, :, None].expand(-1, -1, width)).flatten(1)
    values, at = part.topk(k)
    return values, chosen.gather(1, at // width) * width + at % width
