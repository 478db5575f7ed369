"""Elementary functions. Exponents are in units of log 2, for which the hardware has an instruction."""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634


@triton.jit
def power2(x):
    """2ˣ of a block; a result below 2^−126 is 0. tl.exp2 keeps those, which takes three instructions more for each."""
    if _INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def times_less(x, k, c):
    """x·k − c, rounded once: of two large numbers that nearly cancel the digits that are left are right."""
    if _INTERPRETED:
        return (x.to(tl.float64) * k - c).to(tl.float32)
    else:
        return tl.fma(x, k, -c)


@triton.jit
def weighted_growth(weight, grown, x):
    """weight·(2ˣ − 1), where grown is weight·2ˣ (which may be finite where 2ˣ is not).

    Up to |x| = 1/16 by the Taylor series of (2ˣ − 1)/x, whose first term left out is 3e-8 of the sum; beyond, the
    subtraction loses a factor of 24 at most.
    """
    p = x * 9.6181291076e-3 + 5.5504108665e-2
    p = p * x + 2.4022650696e-1
    p = p * x + 6.9314718056e-1
    return tl.where(tl.abs(x) <= 0.0625, (weight * x) * p, grown - weight)


@triton.jit
def log1p(x):
    """log(1 + x) for x > −1: up to |x| = 1/2 as 2·artanh(x/(2 + x)), whose series leaves out 1e-8 of the sum."""
    w = x / (2.0 + x)
    s = w * w
    p = s * (1.0 / 13.0) + 1.0 / 11.0
    p = p * s + 1.0 / 9.0
    p = p * s + 1.0 / 7.0
    p = p * s + 1.0 / 5.0
    p = p * s + 1.0 / 3.0
    return tl.where(tl.abs(x) <= 0.5, 2.0 * w * (1.0 + s * p), tl.log(1.0 + x))


@triton.jit
def tanh(x):
    """tanh(x) = −(w − 1)/(w + 1) with w = e^(−2|x|), with the sign of x."""
    twice = tl.abs(x) * -2.8853900817779268
    shrunk = power2(twice)
    magnitude = -weighted_growth(1.0, shrunk, twice) / (1.0 + shrunk)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(values, axis: tl.constexpr):
    """The maximum along an axis; NaN if one is. tl.max passes over a NaN."""
    if _INTERPRETED:
        nan = tl.max((values != values).to(tl.int32), axis) != 0
        return tl.where(nan, float("nan"), tl.max(values, axis))
    else:
        return tl.reduce(values, axis, _larger)


@triton.jit
def total(values):
    """The sum of a block, over all its dimensions at once: a thread first adds its own."""
    return tl.sum(tl.reshape(values, [values.numel]), 0)
