"""Triton kernels of GroupNorm + SiLU: one launch for groups that fit in registers, else statistics and apply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltxkern.layout import ChannelView, ceil_div, channel_view, contiguous, fresh, power_of_two
from ltxkern.triton.numerics import reciprocal_root, silu

if TYPE_CHECKING:
    from ltxkern.ops.group_norm_silu import Arguments


@dataclass(frozen=True)
class Limits:
    """Bounds of the launch heuristic.

    Attributes:
        tile: elements of a tile; 16 a thread at 4 warps, so that slot means, M2 and values stay near 64 registers.
        single: largest group (padded to powers of two) kept in registers by one program: 32 elements a thread at 16 warps.
        partials: most partials a group may have, since every apply program merges all of them (3 KiB at 256).
        enough: programs beyond which longer spans are preferred to more partials; two waves of a large card.
        columns: channels of a channels-last tile: 256 bytes at bf16, so that whole cache lines are used.
        apply_spans: tiles an apply program walks, to spread the merge of the partials.
    """

    tile: int = 2048
    single: int = 16384
    partials: int = 256
    enough: int = 4096
    columns: int = 128
    apply_spans: int = 4


LIMITS = Limits()


@dataclass(frozen=True)
class Tile:
    """A tile of positions x groups x channels of a group, walked `spans` times along the positions."""

    positions: int
    groups: int
    channels: int
    spans: int
    warps: int


@triton.jit
def _sum_group(value):
    """Sum of a [positions, groups, channels] tile for each group."""
    return tl.sum(tl.sum(value, axis=0), axis=1)


@triton.jit
def _place(pid, spans, channel_blocks, group_blocks, GROUPS_FIRST: tl.constexpr):
    """(batch, group block, channel block, span) of a program; neighbours share memory lines in either layout."""
    if GROUPS_FIRST:
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
def _channels(group_block, channel_block, G, D: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr):
    """Group and channel indices of a tile, [1, BG, 1] and [1, BG, BD], and which of them exist."""
    group = (group_block * BG + tl.arange(0, BG))[None, :, None]
    inside = (channel_block * BD + tl.arange(0, BD))[None, None, :]
    return group, group * D + inside, (group < G) & (inside < D)


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
    spans,
    channel_blocks,
    group_blocks,
    D: tl.constexpr,
    BS: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    SPANS: tl.constexpr,
    GROUPS_FIRST: tl.constexpr,
):
    """Mean (as a pair of floats) and M2 of one chunk of each of BG groups; every slot of the tile runs its own recurrence."""
    batch, group_block, channel_block, span = _place(
        tl.program_id(0), spans, channel_blocks, group_blocks, GROUPS_FIRST
    )
    _, channel, exists = _channels(group_block, channel_block, G, D, BG, BD)
    first = span * (BS * SPANS)
    left = tl.minimum(S - first, BS * SPANS).to(tl.int32)
    slot = tl.arange(0, BS)[:, None, None]
    base = x_ptr + batch * stride_n + first * stride_s + channel.to(tl.int64) * stride_c
    mean = tl.zeros([BS, BG, BD], tl.float32)
    m2 = tl.zeros([BS, BG, BD], tl.float32)
    for i in range(SPANS):
        place = i * BS + slot
        valid = exists & (place < left)
        value = tl.load(base + place.to(tl.int64) * stride_s, mask=valid, other=0.0).to(tl.float32)
        if conv_bias_ptr is not None:
            value += tl.load(conv_bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
        delta = tl.where(valid, value - mean, 0.0)
        mean += delta * (1.0 / (i + 1.0))
        m2 += tl.where(valid, delta * (value - mean), 0.0)
    seen = (left - slot + BS - 1) // BS
    count = tl.where(exists, tl.minimum(tl.maximum(seen, 0), SPANS), 0).to(tl.float32)
    total = tl.minimum(BD, D - channel_block * BD) * left
    total = total.to(tl.float32)
    high = _sum_group(count * mean) / total
    offset = mean - high[None, :, None]
    low = _sum_group(tl.where(count > 0, count * offset, 0.0)) / total
    spread = _sum_group(tl.where(count > 0, m2 + count * offset * offset, 0.0)) - total * low * low
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
    D: tl.constexpr,
    BD: tl.constexpr,
    SPAN: tl.constexpr,
    PARTIALS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Mean (pivot + low) and reciprocal standard deviation of each row from its partials, in fixed order."""
    part = tl.arange(0, PARTIALS)[None, :]
    mask = exists[:, None] & (part < partials)
    count = tl.minimum(BD, D - (part // spans) * BD) * tl.minimum(SPAN, S - (part % spans) * SPAN)
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
def _finish(value, pivot, mean, rstd, channel, valid, exists, weight_ptr, bias_ptr, residual_at, out_at):
    """Affine part, residual and SiLU of a tile, rounded once on the store."""
    scale = rstd[None, :, None]
    value = (value - pivot[None, :, None]) - mean[None, :, None]
    if weight_ptr is not None:
        scale = scale * tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)
        value = value * scale + tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    else:
        value = value * scale
    if residual_at is not None:
        value += tl.load(residual_at, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_at, silu(value, out_at.dtype.element_ty).to(out_at.dtype.element_ty), mask=valid)


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
    spans,
    channel_blocks,
    group_blocks,
    stat_spans,
    partials,
    D: tl.constexpr,
    BS: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    SPANS: tl.constexpr,
    GROUPS_FIRST: tl.constexpr,
    STAT_BD: tl.constexpr,
    STAT_SPAN: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """Normalise, residual, SiLU; walks the tensor backwards, since the statistics pass left its tail in the L2 cache."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, group_block, channel_block, span = _place(pid, spans, channel_blocks, group_blocks, GROUPS_FIRST)
    _, channel, exists = _channels(group_block, channel_block, G, D, BG, BD)
    group = group_block * BG + tl.arange(0, BG)
    pivot, mean, rstd = _merge(
        partial_ptr, plane, batch * G + group, group < G, S, stat_spans, partials, total, eps,
        D, STAT_BD, STAT_SPAN, PARTIALS, out_ptr.dtype.element_ty,
    )  # fmt: skip
    first = span * (BS * SPANS)
    left = tl.minimum(S - first, BS * SPANS).to(tl.int32)
    channel_wide = channel.to(tl.int64)
    for i in range(SPANS):
        place = i * BS + tl.arange(0, BS)[:, None, None]
        valid = exists & (place < left)
        position = first + place
        value = tl.load(x_ptr + batch * stride_n + channel_wide * stride_c + position * stride_s, mask=valid, other=0.0)
        value = value.to(tl.float32)
        if conv_bias_ptr is not None:
            value += tl.load(conv_bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
        residual_at = residual_ptr
        if residual_ptr is not None:
            residual_at = residual_ptr + batch * residual_n + channel_wide * residual_c + position * residual_s
        out_at = out_ptr + batch * out_n + channel_wide * out_c + position * out_s
        _finish(value, pivot, mean, rstd, channel, valid, exists, weight_ptr, bias_ptr, residual_at, out_at)


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
):
    """BG whole groups in registers: one read, one write."""
    pid = tl.program_id(0).to(tl.int64)
    batch = pid // group_blocks
    _, channel, exists = _channels(pid % group_blocks, 0, G, D, BG, BD)
    position = tl.arange(0, BS)[:, None, None].to(tl.int64)
    valid = exists & (position < S)
    value = tl.load(x_ptr + batch * stride_n + channel * stride_c + position * stride_s, mask=valid, other=0.0)
    value = value.to(tl.float32)
    if conv_bias_ptr is not None:
        value += tl.load(conv_bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    pivot = _sum_group(tl.where(valid, value, 0.0)) / total
    offset = tl.where(valid, value - pivot[None, :, None], 0.0)
    mean = _sum_group(offset) / total
    offset = tl.where(valid, offset - mean[None, :, None], 0.0)
    rstd = reciprocal_root(tl.div_rn(_sum_group(offset * offset), total) + eps, out_ptr.dtype.element_ty)
    residual_at = residual_ptr
    if residual_ptr is not None:
        residual_at = residual_ptr + batch * residual_n + channel * residual_c + position * residual_s
    out_at = out_ptr + batch * out_n + channel * out_c + position * out_s
    _finish(value, pivot, mean, rstd, channel, valid, exists, weight_ptr, bias_ptr, residual_at, out_at)


def single_tile(groups: int, depth: int, positions: int) -> Tile | None:
    """Tile of whole groups for the one-launch kernel, or None where a group is too large for registers."""
    size = power_of_two(positions) * power_of_two(depth)
    if size > LIMITS.single:
        return None
    together = max(1, min(power_of_two(groups), LIMITS.tile // 2 // size))
    warps = min(16, max(4, size * together // 1024))
    return Tile(power_of_two(positions), together, power_of_two(depth), 1, warps)


def stats_tile(batch: int, groups: int, depth: int, positions: int, channels_last: bool) -> Tile:
    """Tile of the statistics pass: longer spans until a group has few partials and the card is still full."""
    if channels_last:
        channels = min(power_of_two(depth), LIMITS.tile // 2)
        together = max(1, min(power_of_two(groups), LIMITS.columns // channels))
        rows = min(power_of_two(positions), max(1, LIMITS.tile // (channels * together)))
    else:
        together = 1
        rows = min(power_of_two(positions), LIMITS.tile)
        channels = min(power_of_two(depth), LIMITS.tile // rows)
    spans = 1
    while True:
        partials = ceil_div(depth, channels) * ceil_div(positions, rows * spans)
        programs = batch * ceil_div(groups, together) * partials
        shorter = rows * spans < positions
        if not shorter or not (
            partials > LIMITS.partials or (partials > LIMITS.partials // 4 and programs > LIMITS.enough)
        ):
            return Tile(rows, together, channels, spans, 4)
        spans *= 2


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
    tile = single_tile(groups, depth, positions)
    if tile is not None:
        blocks = ceil_div(groups, tile.groups)
        _single_kernel[(batch * blocks,)](
            *tensors, total, args.eps, groups, positions, *strides, blocks,
            D=depth, BS=tile.positions, BG=tile.groups, BD=tile.channels, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return
    channels_last = view.channel == 1 and view.position != 1
    tile = stats_tile(batch, groups, depth, positions, channels_last)
    span = tile.positions * tile.spans
    channel_blocks, group_blocks = ceil_div(depth, tile.channels), ceil_div(groups, tile.groups)
    spans = ceil_div(positions, span)
    partials = channel_blocks * spans
    partial = torch.empty((3, batch * groups, partials), dtype=torch.float32, device=x.device)
    plane = batch * groups * partials
    _stats_kernel[(batch * group_blocks * partials,)](
        x, conv_bias, partial, plane, groups, positions, *view, spans, channel_blocks, group_blocks,
        D=depth, BS=tile.positions, BG=tile.groups, BD=tile.channels, SPANS=tile.spans, GROUPS_FIRST=channels_last,
        num_warps=tile.warps, enable_fp_fusion=True,
    )  # fmt: skip
    apply_spans = min(LIMITS.apply_spans, power_of_two(ceil_div(positions, tile.positions)))
    walks = ceil_div(positions, tile.positions * apply_spans)
    _apply_kernel[(batch * group_blocks * channel_blocks * walks,)](
        *tensors, partial, plane, total, args.eps, groups, positions, *strides,
        walks, channel_blocks, group_blocks, spans, partials,
        D=depth, BS=tile.positions, BG=tile.groups, BD=tile.channels, SPANS=apply_spans, GROUPS_FIRST=channels_last,
        STAT_BD=tile.channels, STAT_SPAN=span, PARTIALS=power_of_two(partials),
        num_warps=tile.warps, enable_fp_fusion=True,
    )  # fmt: skip
