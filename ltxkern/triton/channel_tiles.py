"""Device functions of GroupNorm's Triton kernels: tiles of positions x groups x channels, and what happens to their elements."""

from __future__ import annotations

import triton
import triton.language as tl

from ltxkern.triton.numerics import silu_factor, silu_scaled


@triton.jit
def sum_group(value, CHANNELS_LAST: tl.constexpr):
    """Sum of a [positions, groups, channels] tile for each group; first of what lies side by side, most of it in one thread."""
    if CHANNELS_LAST:
        total = tl.sum(tl.sum(value, axis=2), axis=0)
    else:
        total = tl.sum(tl.sum(value, axis=0), axis=1)
    return total


@triton.jit
def channels_of(group_block, channel_block, G, D: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr):
    """Channel indices of a tile, [1, BG, BD], and which of them exist."""
    group = (group_block * BG + tl.arange(0, BG))[None, :, None]
    inside = (channel_block * BD + tl.arange(0, BD))[None, None, :]
    return group * D + inside, (group < G) & (inside < D)


@triton.jit
def tiles_of(
    ptr, place, stride_n, stride_c, stride_s, D: tl.constexpr, BS: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr
):
    """(where a chunk begins in a tensor, where a tile's elements lie behind its first, how far apart tiles lie)."""
    batch, group_block, channel_block, first = place
    start = group_block * (BG * D) + channel_block * BD
    channel = tl.arange(0, BG)[None, :, None] * D + tl.arange(0, BD)[None, None, :]
    inside = tl.arange(0, BS)[:, None, None].to(tl.int64) * stride_s + channel.to(tl.int64) * stride_c
    step = tl.full([], BS, tl.int64) * stride_s
    return ptr + batch * stride_n + start.to(tl.int64) * stride_c + first * stride_s, inside, step


@triton.jit
def _load(tiles, i, mask, left, slot, WHOLE: tl.constexpr):
    """The i-th tile; unless it is whole zeros beyond `left` positions and outside `mask`."""
    base, inside, step = tiles
    at = base + i * step + inside
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=mask & (slot < left), other=0.0)


@triton.jit
def load_two(tiles, i, mask, left, slot, WHOLE: tl.constexpr):
    """The i-th tile and the next."""
    rows: tl.constexpr = slot.shape[0]
    return _load(tiles, i, mask, left, slot, WHOLE), _load(tiles, i + 1, mask, left - rows, slot, WHOLE)


@triton.jit
def shift_of(conv_bias_ptr, channel, exists):
    """The convolution's bias of every channel."""
    return tl.load(conv_bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def shifted(tile, shift):
    """A tile in fp32 with the convolution's bias, if there is one."""
    value = tile.to(tl.float32)
    if shift is not None:
        value += shift
    return value


@triton.jit
def _exact_sum(a, b):
    """The rounded sum, and what it lacks."""
    total = a + b
    taken = total - a
    return total, (a - (total - taken)) + (b - taken)


@triton.jit
def channel_affine(pivot, mean, rstd, channel, exists, weight_ptr, bias_ptr, shift, dtype: tl.constexpr):
    """(centre, scale, offset) of every channel: silu_scaled((value - centre) * scale + offset)."""
    centre, low = _exact_sum(pivot, mean)
    centre, low, scale = centre[None, :, None], low[None, :, None], rstd[None, :, None]
    # fp32 takes the shift with each value: the mean is that of sums as they are rounded.
    if shift is not None and dtype != tl.float32:
        centre, rest = _exact_sum(centre, -shift)
        low += rest
    if weight_ptr is not None:
        scale = scale * tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)
        offset = tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32) - low * scale
    else:
        offset = -low * scale
    factor: tl.constexpr = silu_factor(dtype)
    return centre, scale * factor, offset * factor


@triton.jit
def result_of(tile, added, shift, affine, dtype: tl.constexpr):
    """A tile of the result, rounded once; `added` is the residual's or None."""
    centre, scale, offset = affine
    if dtype == tl.float32:
        value = shifted(tile, shift)
    else:
        value = tile.to(tl.float32)
    value = (value - centre) * scale + offset
    if added is not None:
        factor: tl.constexpr = silu_factor(dtype)
        value += added.to(tl.float32) * factor
    return silu_scaled(value, dtype).to(dtype)


@triton.jit
def apply_one(out, x, residual, i, shift, affine, mask, left, slot, dtype: tl.constexpr):
    """The i-th tile, which may not be whole."""
    tile = _load(x, i, mask, left, slot, False)
    added = None
    if residual is not None:
        added = _load(residual, i, mask, left, slot, False)
    base, inside, step = out
    tl.store(base + i * step + inside, result_of(tile, added, shift, affine, dtype), mask=mask & (slot < left))


@triton.jit
def _store_two(out, i, two, added, shift, affine, dtype: tl.constexpr):
    base, inside, step = out
    at = base + i * step + inside
    tl.store(at, result_of(two[0], added[0], shift, affine, dtype))
    tl.store(at + step, result_of(two[1], added[1], shift, affine, dtype))


@triton.jit
def apply_four(out, x, residual, i, shift, affine, mask, left, slot, dtype: tl.constexpr):
    """The i-th tile and the next three, all whole; four loads are under way at once, and no more registers than they need."""
    two = load_two(x, i, mask, left, slot, True)
    if residual is not None:
        _store_two(out, i, two, load_two(residual, i, mask, left, slot, True), shift, affine, dtype)
        more = load_two(x, i + 2, mask, left, slot, True)
        _store_two(out, i + 2, more, load_two(residual, i + 2, mask, left, slot, True), shift, affine, dtype)
    else:
        more = load_two(x, i + 2, mask, left, slot, True)
        _store_two(out, i, two, (None, None), shift, affine, dtype)
        _store_two(out, i + 2, more, (None, None), shift, affine, dtype)
