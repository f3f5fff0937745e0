"""Triton kernel of PixelNorm + SiLU: the channels of a few positions stay in registers, one read and one write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ltxkern.layout import ceil_div, channel_view, contiguous, fresh, power_of_two
from ltxkern.triton.numerics import reciprocal_root, silu

if TYPE_CHECKING:
    from ltxkern.ops.pixel_norm_silu import Arguments


@dataclass(frozen=True)
class Limits:
    """Bounds of the launch heuristic.

    Attributes:
        tile: elements of a tile at 8 warps: 32 a thread.
        line: positions of a contiguous tile at least: 32 bytes, one memory sector, at 16 bits.
        last_tile: elements of a channels-last tile at 4 warps: 32 a thread, several whole rows.
    """

    tile: int = 8192
    line: int = 16
    last_tile: int = 4096


LIMITS = Limits()


@triton.jit
def _add_eight(a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q):
    return a + i, b + j, c + k, d + m, e + n, f + o, g + p, h + q


@triton.jit
def _column_sums(value, BC: tl.constexpr, BS: tl.constexpr):
    """Sums [1, BS] of the columns of [BC, BS].

    A thread has eight columns side by side, and the sums of each column lie side by side in shared memory: eight or more threads of
    a row would meet in one bank, unless first, second and further columns of each thread are tensors of their own.
    """
    if BS >= 64:
        even, odd = tl.split(tl.reshape(value, [BC, BS // 8, 2, 2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        a0, a1 = tl.split(a)
        b0, b1 = tl.split(b)
        c0, c1 = tl.split(c)
        d0, d1 = tl.split(d)
        a0, a1, b0, b1, c0, c1, d0, d1 = tl.reduce((a0, a1, b0, b1, c0, c1, d0, d1), 0, _add_eight)
        even = tl.join(tl.join(a0, a1), tl.join(c0, c1))
        odd = tl.join(tl.join(b0, b1), tl.join(d0, d1))
        return tl.reshape(tl.join(even, odd), [1, BS])
    else:
        return tl.sum(value, axis=0, keep_dims=True)


@triton.jit
def _pixel_norm_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    eps,
    scale,
    C,
    S,
    out_n,
    out_c,
    out_s,
    stride_n,
    stride_c,
    stride_s,
    blocks,
    BC: tl.constexpr,
    BS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """A tile of all channels x BS positions; `scale` is 1 / C."""
    pid = tl.program_id(0)
    batch = (pid // blocks).to(tl.int64)
    first = (pid % blocks).to(tl.int64) * BS
    if CHANNELS_LAST:
        channel = tl.arange(0, BC)[None, :].to(tl.int64)
        position = first + tl.arange(0, BS)[:, None]
    else:
        channel = tl.arange(0, BC)[:, None].to(tl.int64)
        position = first + tl.arange(0, BS)[None, :]
    valid = (channel < C) & (position < S)
    value = tl.load(x_ptr + batch * stride_n + channel * stride_c + position * stride_s, mask=valid, other=0.0)
    value = value.to(tl.float32)
    if CHANNELS_LAST:
        mean_square = tl.sum(value * value, axis=1, keep_dims=True) * scale
    else:
        mean_square = _column_sums(value * value, BC, BS) * scale
    value = value * reciprocal_root(mean_square + eps, out_ptr.dtype.element_ty)
    if weight_ptr is not None:
        value *= tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    value = silu(value, out_ptr.dtype.element_ty)
    at = out_ptr + batch * out_n + channel * out_c + position * out_s
    tl.store(at, value.to(out_ptr.dtype.element_ty), mask=valid)


def tile_positions(channels: int, positions: int, channels_last: bool) -> tuple[int, int]:
    """(positions of a tile, warps)."""
    width = power_of_two(channels)
    if channels_last:
        rows = max(1, LIMITS.last_tile // width)
    else:
        rows = max(LIMITS.line, LIMITS.tile // width)
    rows = min(rows, power_of_two(positions))
    return rows, min(16, max(4, rows * width // 1024))


def launch(out: Tensor, args: Arguments) -> None:
    """Launch on checked arguments whose positions collapse to one stride."""
    x = args.x
    if x.numel() == 0:
        return
    view, target = channel_view(x), channel_view(out)
    assert view is not None
    if target is None:
        stand_in = fresh(x)
        launch(stand_in, args)
        out.copy_(stand_in)
        return
    batch, channels = x.shape[:2]
    positions = x.numel() // (batch * channels)
    if positions == 1:
        batch, positions = 1, batch
        view, target = view._replace(position=view.batch), target._replace(position=target.batch)
    channels_last = view.channel == 1 and view.position != 1
    rows, warps = tile_positions(channels, positions, channels_last)
    blocks = ceil_div(positions, rows)
    _pixel_norm_kernel[(batch * blocks,)](
        out, x, contiguous(args.weight), args.eps, 1.0 / channels, channels, positions, *target, *view, blocks,
        BC=power_of_two(channels), BS=rows, CHANNELS_LAST=channels_last, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
