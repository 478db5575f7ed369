"""Every choice of a size, with its reason. Nothing is searched at run time, and nothing depends on how many rows are
worked on at once: the same logits give the same bits however they are chunked.

None of it has been timed on a device yet: the reasons are counts of bytes, registers and multiprocessors, and the
compiler's report (``benchmarks/compile_report.py``).
"""

from __future__ import annotations

from typing import NamedTuple

MULTIPROCESSORS = 132  # of an H100 or H200; an A100 has 108, a B200 148

# A tile of a row that one program holds in registers. 4096 logits in float32 with their differences in bfloat16 are
# 24 KB in flight for a program of 4 warps; the registers let three to four of them on a multiprocessor, which covers
# the product of bandwidth and latency (about 40 KB each on an H200), and 16 rows of 32,000 are 128 programs: the chip
# is full.
_TILE = 4096
_PER_THREAD = 32

# The columns whose maximum stands for them in the search for the top K: of V = 131,072 and K = 20 the search sorts 2048
# maxima, then 32 · 64 logits. The two are equal at V = K · 64², and above 2¹⁸ the first would lead by far.
_BLOCK = 64
_BLOCK_LARGE = 128
_LARGE = 2**18

# Of a logit's gradient with an outer product of k columns: a program of 16 rows reads right, [k, V], once for all of
# them, 2.5 bytes a logit at k = 10 instead of 40, beside the 6 of the logit and its gradient. 16 numbers a thread.
OUTER_ROWS = 16
OUTER_COLUMNS = 256


def power_of_two(n: int) -> int:
    """The smallest power of two that is no less than n ≥ 1."""
    return 1 << (n - 1).bit_length()


class Tiling(NamedTuple):
    """How a row of V logits is cut."""

    tile: int  # columns of a tile
    tiles: int
    block: int  # columns of a block of the top-K search; a tile holds whole ones
    blocks: int


def tiling(vocab: int) -> Tiling:
    block = _BLOCK if vocab <= _LARGE else _BLOCK_LARGE
    tile = min(_TILE, max(power_of_two(vocab), block))
    return Tiling(tile, -(-vocab // tile), block, -(-vocab // block))


def tile_warps(tiling: Tiling) -> int:
    return min(8, max(1, tiling.tile // (32 * _PER_THREAD)))


def merge_warps(tiling: Tiling, top_k: int | None) -> int:
    """Of the merge: 8 of the 64-bit keys that it sorts for a thread. With 16 it has a sixth fewer instructions, but the
    compiler of some releases spills. K above 64 with V above 2¹⁸ has more keys than registers: it spills, and works."""
    if top_k is None:
        return 1
    keys = max(power_of_two(tiling.blocks), power_of_two(max(top_k, 2)) * tiling.block)
    return min(16, max(4, keys // (8 * 32)))


def row_stride(vocab: int) -> int:
    """Of a buffer of logits: rows start at 128 bytes, so that loads are wide and the tensor cores' copies aligned."""
    return -(-vocab // 64) * 64


def chunk_rows(rows: int, row_bytes: int, budget: int) -> int:
    """Rows of a chunk: as many as the budget holds, whole tiles of 128 where there are several, all about as large."""
    most = max(1, budget // row_bytes)
    if most >= rows:
        return max(rows, 1)
    unit = 128 if most >= 128 else 1
    count = -(-rows // (most // unit * unit))
    return -(-rows // (count * unit)) * unit


def vocabulary_slices(rows: int, d: int, vocab: int) -> int:
    """Into how many slices of the vocabulary the product G·W [rows, d] is cut, to be summed afterwards.

    At 512 rows and d = 4096 it has 64 tiles of 128 × 256 for 132 multiprocessors, each with a loop of V; two slices
    fill 97 % of them. The fewest of up to 24 slices that keep nine tenths busy are taken, else the best. A slice is a
    multiple of 64 columns.
    """
    tiles = -(-rows // 128) * -(-d // 256)
    best, best_use = 1, 0.0
    for slices in range(1, 25):
        if vocab % (64 * slices) or vocab // slices < 4096:
            continue
        work = tiles * slices
        use = work / (-(-work // MULTIPROCESSORS) * MULTIPROCESSORS)
        if use >= 0.9:
            return slices
        if use > best_use + 0.02:
            best, best_use = slices, use
    return best
