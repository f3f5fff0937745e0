"""Triton kernels of GroupNorm + SiLU: one launch for groups that fit in registers, else statistics and apply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltxkern.layout import ChannelView, ceil_div, channel_view, contiguous, fresh, power_of_two
from ltxkern.triton.channel_tiles import (
    apply_four,
    apply_one,
    channel_affine,
    channels_of,
    load_two,
    result_of,
    shift_of,
    shifted,
    sum_group,
    tiles_of,
)
from ltxkern.triton.numerics import reciprocal_root, slot_update

if TYPE_CHECKING:
    from ltxkern.ops.group_norm_silu import Arguments


@dataclass(frozen=True)
class Limits:
    """Bounds of the launch heuristic.

    Attributes:
        tile: elements of a tile: 8 a thread at 4 warps, so that four tiles and the slots' means and M2 stay near 64 registers.
        single: largest group (padded to powers of two) kept in registers by one program: 32 elements a thread at 16 warps.
        partials: most partials a group may have where chunks can be longer, since every apply program merges all of them.
        programs: as many as a large card holds at once; chunks are as long as they may be with so many.
        columns: channels of a channels-last tile: 256 bytes at bf16, so that whole cache lines are used.
    """

    tile: int = 1024
    single: int = 16384
    partials: int = 256
    programs: int = 1024
    columns: int = 128


LIMITS = Limits()
BATCH = 4  # tiles that a program takes at once, one 16-byte load of a thread each
# All programs are on the card at once with so many registers a thread, and without a bound a few of them are not.
WALKING = {"num_warps": 4, "maxnreg": 64, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Tile:
    """A tile of positions x groups x channels of a group, which walks `span` positions."""

    positions: int
    groups: int
    channels: int
    span: int


@triton.jit
def _place(pid, spans, channel_blocks, group_blocks, CHANNELS_LAST: tl.constexpr):
    """(batch, group block, channel block, span) of a program; neighbours share memory lines in either layout."""
    if CHANNELS_LAST:
        group_block = pid % group_blocks
        rest = pid // group_blocks
        span = rest % spans
        rest = rest // spans
        batch = rest // channel_blocks
        channel_block = rest % channel_blocks
    else:
        span = pid % spans
        rest = pid // spans
        channel_block = rest % channel_blocks
        rest = rest // channel_blocks
        batch = rest // group_blocks
        group_block = rest % group_blocks
    return batch.to(tl.int64), group_block, channel_block, span.to(tl.int64)


@triton.jit
def _add_four(two, more, shift, seen, mean, m2):
    """Four more values of every slot, which has `seen` of them: moments about their own mean, then Chan's rule."""
    a, b = shifted(two[0], shift), shifted(two[1], shift)
    c, d = shifted(more[0], shift), shifted(more[1], shift)
    centre = ((a + b) + (c + d)) * 0.25
    delta = centre - mean
    share = 4.0 / (seen + 4.0)
    m2 += delta * (delta * (seen * share))
    a, b, c, d = a - centre, b - centre, c - centre, d - centre
    m2 += a * a
    m2 += b * b
    m2 += c * c
    m2 += d * d
    return mean + delta * share, m2


@triton.jit
def _stats_kernel(
    x_ptr,
    conv_bias_ptr,
    partial_ptr,
    plane,
    G,
    S,
    stride_n,
    stride_c,
    stride_s,
    span_length,
    spans,
    channel_blocks,
    group_blocks,
    D: tl.constexpr,
    BS: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    EVEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Mean (as a pair of floats) and M2 of one chunk of each of BG groups; every slot of the tile has moments of its own."""
    batch, group_block, channel_block, span = _place(
        tl.program_id(0), spans, channel_blocks, group_blocks, CHANNELS_LAST
    )
    channel, exists = channels_of(group_block, channel_block, G, D, BG, BD)
    first = span * span_length
    left = tl.minimum(S - first, span_length).to(tl.int32)
    slot = tl.arange(0, BS)[:, None, None]
    tiles = tiles_of(x_ptr, (batch, group_block, channel_block, first), stride_n, stride_c, stride_s, D, BS, BG, BD)
    shift = None
    if conv_bias_ptr is not None:
        shift = shift_of(conv_bias_ptr, channel, exists)
    mean = tl.zeros([BS, BG, BD], tl.float32)
    m2 = tl.zeros([BS, BG, BD], tl.float32)
    whole = left // (4 * BS) * 4 if EVEN else 0
    for i in range(0, whole, 4):
        two = load_two(tiles, i, exists, left, slot, True)
        more = load_two(tiles, i + 2, exists, left, slot, True)
        mean, m2 = _add_four(two, more, shift, i * 1.0, mean, m2)
    for i in range(whole, tl.cdiv(left, BS), 2):
        rest = left - i * BS
        two = load_two(tiles, i, exists, rest, slot, False)
        for j in tl.static_range(2):
            valid = exists & (slot + j * BS < rest)
            mean, m2 = slot_update(shifted(two[j], shift), valid, mean, m2, tl.full([1, 1, 1], i + j, tl.int32))
    count = tl.where(exists, tl.maximum((left - slot + BS - 1) // BS, 0), 0).to(tl.float32)
    total = tl.minimum(BD, D - channel_block * BD) * left
    total = total.to(tl.float32)
    high = sum_group(count * mean, CHANNELS_LAST) / total
    offset = mean - high[None, :, None]
    low = sum_group(tl.where(count > 0, count * offset, 0.0), CHANNELS_LAST) / total
    spread = sum_group(tl.where(count > 0, m2 + count * offset * offset, 0.0), CHANNELS_LAST) - total * low * low
    group = group_block * BG + tl.arange(0, BG)
    at = partial_ptr + ((batch * G + group) * channel_blocks + channel_block) * spans + span
    tl.store(at, high, mask=group < G)
    tl.store(at + plane, low, mask=group < G)
    tl.store(at + 2 * plane, spread, mask=group < G)


@triton.jit
def _merge(
    partial_ptr,
    plane,
    row,
    exists,
    S,
    spans,
    partials,
    total,
    eps,
    span_length,
    D: tl.constexpr,
    BD: tl.constexpr,
    PARTIALS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Mean (pivot + low) and reciprocal standard deviation of each row from its partials, in fixed order."""
    part = tl.arange(0, PARTIALS)[None, :]
    mask = exists[:, None] & (part < partials)
    count = tl.minimum(BD, D - (part // spans) * BD) * tl.minimum(span_length, S - (part % spans) * span_length)
    count = tl.where(part < partials, count, 0).to(tl.float32)
    at = partial_ptr + row[:, None] * partials + part
    pivot = tl.load(partial_ptr + row * partials, mask=exists, other=0.0)
    high = tl.load(at, mask=mask, other=0.0)
    low = tl.load(at + plane, mask=mask, other=0.0)
    m2 = tl.load(at + 2 * plane, mask=mask, other=0.0)
    offset = tl.where(mask, (high - pivot[:, None]) + low, 0.0)
    mean = tl.sum(count * offset, axis=1) / total
    offset = tl.where(mask, offset - mean[:, None], 0.0)
    variance = tl.div_rn(tl.sum(m2 + count * offset * offset, axis=1), total)
    variance = tl.where(variance < 0.0, 0.0, variance)
    return pivot, mean, reciprocal_root(variance + eps, dtype)


@triton.jit
def _apply_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    conv_bias_ptr,
    partial_ptr,
    plane,
    total,
    eps,
    G,
    S,
    out_n,
    out_c,
    out_s,
    stride_n,
    stride_c,
    stride_s,
    residual_n,
    residual_c,
    residual_s,
    span_length,
    spans,
    channel_blocks,
    group_blocks,
    partials,
    D: tl.constexpr,
    BS: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    EVEN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Normalise, residual, SiLU; walks its chunk backwards, since the statistics pass left the tails in the L2 cache."""
    batch, group_block, channel_block, span = _place(
        tl.program_id(0), spans, channel_blocks, group_blocks, CHANNELS_LAST
    )
    channel, exists = channels_of(group_block, channel_block, G, D, BG, BD)
    group = group_block * BG + tl.arange(0, BG)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    pivot, mean, rstd = _merge(
        partial_ptr, plane, batch * G + group, group < G, S, spans, partials, total, eps, span_length,
        D, BD, PARTIALS, dtype,
    )  # fmt: skip
    shift = None
    if conv_bias_ptr is not None:
        shift = shift_of(conv_bias_ptr, channel, exists)
    affine = channel_affine(pivot, mean, rstd, channel, exists, weight_ptr, bias_ptr, shift, dtype)
    first = span * span_length
    left = tl.minimum(S - first, span_length).to(tl.int32)
    slot = tl.arange(0, BS)[:, None, None]
    place = (batch, group_block, channel_block, first)
    out = tiles_of(out_ptr, place, out_n, out_c, out_s, D, BS, BG, BD)
    x = tiles_of(x_ptr, place, stride_n, stride_c, stride_s, D, BS, BG, BD)
    residual = None
    if residual_ptr is not None:
        residual = tiles_of(residual_ptr, place, residual_n, residual_c, residual_s, D, BS, BG, BD)
    whole = left // (4 * BS) * 4 if EVEN else 0
    for i in range(whole, tl.cdiv(left, BS)):
        apply_one(out, x, residual, i, shift, affine, exists, left - i * BS, slot, dtype)
    for i in range(0, whole, 4):
        apply_four(out, x, residual, whole - 4 - i, shift, affine, exists, left, slot, dtype)


@triton.jit
def _single_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    conv_bias_ptr,
    total,
    eps,
    G,
    S,
    out_n,
    out_c,
    out_s,
    stride_n,
    stride_c,
    stride_s,
    residual_n,
    residual_c,
    residual_s,
    group_blocks,
    D: tl.constexpr,
    BS: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """BG whole groups in registers: one read, one write."""
    pid = tl.program_id(0).to(tl.int64)
    batch = pid // group_blocks
    channel, exists = channels_of(pid % group_blocks, 0, G, D, BG, BD)
    position = tl.arange(0, BS)[:, None, None].to(tl.int64)
    valid = exists & (position < S)
    tile = tl.load(x_ptr + batch * stride_n + channel * stride_c + position * stride_s, mask=valid, other=0.0)
    shift = None
    if conv_bias_ptr is not None:
        shift = shift_of(conv_bias_ptr, channel, exists)
    value = shifted(tile, shift)
    pivot = sum_group(tl.where(valid, value, 0.0), CHANNELS_LAST) / total
    offset = tl.where(valid, value - pivot[None, :, None], 0.0)
    mean = sum_group(offset, CHANNELS_LAST) / total
    offset = tl.where(valid, offset - mean[None, :, None], 0.0)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rstd = reciprocal_root(tl.div_rn(sum_group(offset * offset, CHANNELS_LAST), total) + eps, dtype)
    added = None
    if residual_ptr is not None:
        at = residual_ptr + batch * residual_n + channel * residual_c + position * residual_s
        added = tl.load(at, mask=valid, other=0.0)
    affine = channel_affine(pivot, mean, rstd, channel, exists, weight_ptr, bias_ptr, None, dtype)
    out_at = out_ptr + batch * out_n + channel * out_c + position * out_s
    tl.store(out_at, result_of(value, added, None, affine, dtype), mask=valid)


def single_tile(groups: int, depth: int, positions: int) -> tuple[Tile, int] | None:
    """Tile of whole groups for the one-launch kernel, and its warps; or None where a group is too large for registers."""
    size = power_of_two(positions) * power_of_two(depth)
    if size > LIMITS.single:
        return None
    together = max(1, min(power_of_two(groups), LIMITS.tile // size))
    warps = min(16, max(4, size * together // 1024))
    return Tile(power_of_two(positions), together, power_of_two(depth), positions), warps


def walking_tile(batch: int, groups: int, depth: int, positions: int, channels_last: bool) -> Tile:
    """Tile of both passes over larger groups, and how far it walks."""
    if channels_last:
        channels = min(power_of_two(depth), LIMITS.tile)
        together = max(1, min(power_of_two(groups), LIMITS.columns // channels))
        rows = min(power_of_two(positions), max(1, LIMITS.tile // (channels * together)))
    else:
        together = 1
        rows = min(power_of_two(positions), LIMITS.tile)
        channels = min(power_of_two(depth), LIMITS.tile // rows)
    channel_blocks = ceil_div(depth, channels)
    spans = LIMITS.programs // (batch * ceil_div(groups, together) * channel_blocks)
    spans = max(1, min(spans, LIMITS.partials // channel_blocks))
    span = ceil_div(ceil_div(positions, spans), BATCH * rows) * BATCH * rows
    return Tile(rows, together, channels, span)


def _strides(tensor: Tensor | None) -> ChannelView:
    view = ChannelView(0, 0, 0) if tensor is None else channel_view(tensor)
    assert view is not None
    return view


def launch(out: Tensor, args: Arguments) -> None:
    """Launch on checked arguments whose positions collapse to one stride."""
    x = args.x
    if x.numel() == 0:
        return
    if channel_view(out) is None:
        stand_in = fresh(x)
        launch(stand_in, args)
        out.copy_(stand_in)
        return
    batch, channels = x.shape[:2]
    groups = args.num_groups
    depth, positions = channels // groups, x.numel() // (batch * channels)
    total = float(depth * positions)
    conv_bias = contiguous(args.conv_bias)
    tensors = (out, x, contiguous(args.weight), contiguous(args.bias), args.residual, conv_bias)
    view = _strides(x)
    strides = (*_strides(out), *view, *_strides(args.residual))
    channels_last = view.channel == 1 and view.position != 1
    if (single := single_tile(groups, depth, positions)) is not None:
        tile, warps = single
        blocks = ceil_div(groups, tile.groups)
        _single_kernel[(batch * blocks,)](
            *tensors, total, args.eps, groups, positions, *strides, blocks,
            D=depth, BS=tile.positions, BG=tile.groups, BD=tile.channels,
            CHANNELS_LAST=channels_last, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
        return
    tile = walking_tile(batch, groups, depth, positions, channels_last)
    channel_blocks, group_blocks = ceil_div(depth, tile.channels), ceil_div(groups, tile.groups)
    spans = ceil_div(positions, tile.span)
    partials = channel_blocks * spans
    partial = torch.empty((3, batch * groups, partials), dtype=torch.float32, device=x.device)
    plane = batch * groups * partials
    grid, walk = (batch * group_blocks * partials,), (tile.span, spans, channel_blocks, group_blocks)
    even = depth % tile.channels == 0 and groups % tile.groups == 0
    shape = {"D": depth, "BS": tile.positions, "BG": tile.groups, "BD": tile.channels, "EVEN": even}
    _stats_kernel[grid](
        x, conv_bias, partial, plane, groups, positions, *view, *walk,
        **shape, CHANNELS_LAST=channels_last, **WALKING,
    )  # fmt: skip
    # A residual's addresses take more registers, and channels-last also the numbers of eight channels with a shift of each.
    most = 64 if args.residual is None else 80 if channels_last and conv_bias is not None else 72
    _apply_kernel[grid](
        *tensors, partial, plane, total, args.eps, groups, positions, *strides, *walk, partials,
        **shape, CHANNELS_LAST=channels_last, PARTIALS=power_of_two(partials), **WALKING | {"maxnreg": most},
    )  # fmt: skip
