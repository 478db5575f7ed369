"""Elementary functions that keep their relative accuracy near 0, which those of the hardware do not."""

import triton
import triton.language as tl


@triton.jit
def exp_tail(x):
    """(eˣ − 1 − x)/x² by its Taylor series; for |x| ≤ 1/2 the first term left out is 1e-8 of the sum."""
    p = x * (1.0 / 362880.0) + 1.0 / 40320.0
    p = p * x + 1.0 / 5040.0
    p = p * x + 1.0 / 720.0
    p = p * x + 1.0 / 120.0
    p = p * x + 1.0 / 24.0
    p = p * x + 1.0 / 6.0
    return p * x + 0.5


@triton.jit
def weighted_expm1(weight, grown, x):
    """weight·(eˣ − 1), where grown is weight·eˣ (which may be finite where eˣ is not)."""
    return tl.where(tl.abs(x) <= 0.5, weight * x * (1.0 + x * exp_tail(x)), grown - weight)


@triton.jit
def weighted_rise(weight, grown, growth, x):
    """weight·(x eˣ − eˣ + 1), which is never negative; growth is weight·(eˣ − 1)."""
    return tl.where(tl.abs(x) <= 0.5, weight * x * x * (1.0 + (x - 1.0) * exp_tail(x)), x * grown - growth)


@triton.jit
def log1p(x):
    """log(1 + x) for x > −1: up to |x| = 1/2 as 2·artanh(x/(2 + x)), whose series leaves out 1e-9 of the sum."""
    w = x / (2.0 + x)
    s = w * w
    p = s * (1.0 / 13.0) + 1.0 / 11.0
    p = p * s + 1.0 / 9.0
    p = p * s + 1.0 / 7.0
    p = p * s + 1.0 / 5.0
    p = p * s + 1.0 / 3.0
    small = 2.0 * w * (1.0 + s * p)
    return tl.where(tl.abs(x) <= 0.5, small, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    """tanh(x) = −(e^(−2|x|) − 1)/(e^(−2|x|) + 1), with the sign of x."""
    twice = -2.0 * tl.abs(x)
    shrunk = tl.exp(twice)
    magnitude = -weighted_expm1(1.0, shrunk, twice) / (1.0 + shrunk)
    return tl.where(x < 0, -magnitude, magnitude)
