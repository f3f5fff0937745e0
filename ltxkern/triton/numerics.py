"""Device functions that several Triton kernels share: merging of moments, roots, and rounding as torch does it."""

from __future__ import annotations

import triton
import triton.language as tl

from ltxkern.triton import interpreted


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
def reciprocal_root(value, dtype: tl.constexpr):
    """`1 / sqrt(value)` in fp32: both steps correctly rounded, or within two units in the last place for results of 16 bits."""
    if dtype == tl.float32:
        return tl.div_rn(1.0, tl.sqrt_rn(value))
    else:
        return tl.rsqrt(value)


if interpreted():

    @triton.jit
    def _below(scaled):
        return 1.0 / (-1.4426950408889634 - 1.4426950408889634 * tl.exp2(scaled))

else:

    @triton.jit
    def _below(scaled):
        """Of the special functions alone: what the language offers takes twice the instructions for results below 1e-36."""
        return tl.inline_asm_elementwise(
            """{ .reg .f32 t;
            ex2.approx.ftz.f32 t, $1;
            fma.rn.ftz.f32 t, t, 0fBFB8AA3B, 0fBFB8AA3B;
            rcp.approx.ftz.f32 $0, t; }""",
            "=f,f", [scaled], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def exp_accurate(value):
    """`exp` in fp32 to two units in the last place: what the rounded product with log2(e) lacks is made up for."""
    scaled = value * 1.4426950216293335
    rest = tl.fma(value, 1.4426950216293335, -scaled) + value * 1.9259629911e-8
    # Of an infinite product nothing is lacking.
    return tl.exp2(scaled) * tl.where(tl.abs(scaled) < 1e4, 1.0 + rest * 0.6931471805599453, 1.0)


@triton.constexpr_function
def silu_factor(dtype):
    """What a value is multiplied by before `silu_scaled`, so that kernels fold it into a scale of their own."""
    return 1.0 if dtype == tl.float32 else -1.4426950408889634


@triton.jit
def silu_scaled(scaled, dtype: tl.constexpr):
    """`value / (1 + exp(-value))` of value * factor, of quick steps (two ulp) where the result is rounded to 16 bits."""
    if dtype == tl.float32:
        return tl.div_rn(scaled, 1.0 + tl.exp(-scaled))
    else:
        return scaled * _below(scaled)


@triton.jit
def silu(value, dtype: tl.constexpr):
    """`silu_scaled` of a value that is not scaled yet."""
    factor: tl.constexpr = silu_factor(dtype)
    return silu_scaled(value * factor, dtype)


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
