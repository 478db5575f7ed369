"""The K largest of a row, exactly and in constant work.

Order elements by (value descending, index ascending), and blocks of columns by their first element in that order. Then
the first K elements lie in the first K blocks: if the block of one of them were not among these, each of K blocks would
hold an element before it. So the maxima of the blocks are sorted, K blocks gathered, their elements sorted.

An element is one 64-bit key: the bits of its value in an order of integers, then its index reversed. Ties go to the
lower index; no order of threads can change the result.
"""

import triton
import triton.language as tl


@triton.jit
def comparable(value):
    """A NaN as +∞: both make the entropy of the row NaN, and −0 as 0, to which it is equal."""
    value = tl.where(value != value, float("inf"), value)
    return tl.where(value == 0.0, 0.0, value)


@triton.jit
def pack(value, index, mask):
    """The key of a comparable float32 and its index; beyond the mask one that is below all."""
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    return tl.where(mask, key, -0x7FFFFFFFFFFFFFFF)


@triton.jit
def unpack_value(key):
    ordered = (key >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def unpack_index(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def largest_blocks(maxima_ptr, blocks, BLOCKS: tl.constexpr, KP: tl.constexpr):
    """The KP blocks with the largest maxima, [KP]; a number ≥ blocks where there are fewer."""
    block = tl.arange(0, BLOCKS)
    mask = block < blocks
    value = tl.load(maxima_ptr + block, mask=mask, other=float("-inf"))
    key = tl.topk(pack(comparable(value), block, mask), KP)
    return tl.where(key == -0x7FFFFFFFFFFFFFFF, blocks, unpack_index(key))
