"""Device functions that several Triton kernels share: merging of moments, roots, and rounding as torch does it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slot_update(value, valid, mean, m2, step):
    """One step of the running (mean, M2) of every slot of a tile; `step` counts from 0."""
    delta = tl.where(valid, value - mean, 0.0)
    mean += delta * (1.0 / (step + 1)).to(value.dtype)
    return mean, m2 + tl.where(valid, delta * (value - mean), 0.0)


@triton.jit
def merge_moments(count, mean, low, m2, total):
    """(mean, its low part, M2) of the union of parts with the given counts, means `mean + low` and M2.

    The low part is what the rounded mean lacks; without it a mean of 1000 standard deviations costs three digits. Equal means
    merge to themselves exactly.
    """
    centre = tl.sum(count * mean) / total
    centre += tl.sum(tl.where(count > 0, count * (mean - centre), 0.0)) / total
    offset = tl.where(count > 0, (mean - centre) + low, 0.0)
    rest = tl.sum(count * offset) / total
    return centre, rest, tl.sum(m2 + count * offset * offset) - total * rest * rest


@triton.jit
def chunk_moments_count(first, length, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """How many values each slot of a chunk of TILES tiles has seen, the chunk starting at `first` of `length`."""
    seen = (length - first - tl.arange(0, BLOCK) + BLOCK - 1) // BLOCK
    return tl.minimum(tl.maximum(seen, 0), TILES)


@triton.jit
def square_root(value):
    """Correctly rounded square root in fp32 and fp64."""
    if value.dtype == tl.float64:
        return tl.sqrt(value)
    else:
        return tl.sqrt_rn(value)


@triton.jit
def divide(value, by):
    """Correctly rounded quotient in fp32 and fp64: an error in a factor that scales a whole tensor would show everywhere."""
    if by.dtype == tl.float64:
        return value / by
    else:
        return tl.div_rn(value, by)


@triton.jit
def reciprocal_root(value):
    """`1 / sqrt(value)` in fp32, both steps correctly rounded."""
    return tl.div_rn(1.0, tl.sqrt_rn(value))


@triton.jit
def silu(value, dtype: tl.constexpr):
    """`value / (1 + exp(-value))`; the quick division (two units in the last place) where the result is rounded to 16 bits."""
    if dtype == tl.float32:
        return tl.div_rn(value, 1.0 + tl.exp(-value))
    else:
        return value / (1.0 + tl.exp(-value))


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """`value` in a dtype that may be narrower; fp64 reaches the 16-bit types through fp32, as in torch."""
    if dtype == tl.float64 or dtype == tl.float32:
        return value.to(dtype)
    else:
        return value.to(tl.float32).to(dtype)


@triton.jit
def scalar(value, dtype: tl.constexpr):
    """An fp64 argument in the compute dtype, as a tensor of one (a bare Python float where the kernel is interpreted)."""
    return tl.full([1], value, dtype)
