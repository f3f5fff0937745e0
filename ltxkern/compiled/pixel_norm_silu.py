"""Launch geometry of PixelNorm + SiLU: a tile of positions with all their channels stays on chip between its two uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled.programs import THREADS, limits_of, program
from ltxkern.compiled.steps import Argument, Call, Launch, Parameter, divider
from ltxkern.compiled.tensors import (
    CPU_NAMES,
    CUDA_NAMES,
    DeviceLimits,
    aligned16,
    is_channels_last,
    matched,
    param_code,
)
from ltxkern.layout import ceil_div, channel_view, contiguous

if TYPE_CHECKING:
    from ltxkern.ops.pixel_norm_silu import Arguments

OUT, X, WEIGHT = (Argument(i) for i in range(3))
ARGUMENTS = 3
# The sums of squares of pixel_norm_rows, and room to spare.
STATIC_SHARED = 9 << 10
# Of a channel's weight in shared memory.
WEIGHT_BYTES = 4
# Blocks from which on a channels-last thread takes more than one position: two waves of a large card.
WALKING = 1024


class Case(NamedTuple):
    """Everything of a call that its launch depends on."""

    dtype: torch.dtype
    samples: int
    channels: int
    positions: int
    eps: float
    channels_last: bool
    aligned: bool
    weight_code: int
    limits: DeviceLimits | None = None
    # Contiguous: from a sample of out to the next, and from a channel; None: as in x.
    out_strides: tuple[int, int] | None = None

    def vector(self, *lengths: int) -> int:
        """Elements per access along an axis of these lengths."""
        vector = 16 // self.dtype.itemsize
        return vector if self.aligned and not any(length % vector for length in lengths) else 1

    @property
    def out_steps(self) -> tuple[int, int]:
        """Elements from a sample of out to the next, and from a channel."""
        return self.out_strides or (self.channels * self.positions, self.positions)


def _parameters(case: Case) -> dict[str, Parameter]:
    return {
        **{"x": X, "out": OUT, "weight": WEIGHT, "weight_type": case.weight_code},
        **{"samples": case.samples, "channels": case.channels, "positions": case.positions},
        "channels_last": int(case.channels_last),
        **dict(zip(("out_sample", "out_channel"), case.out_steps, strict=True)),
        "eps": case.eps,
    }


def _bits(at_most: int) -> int:
    """Of the largest power of two."""
    return max(at_most, 1).bit_length() - 1


def _launch_parameters(case: Case, lane_bits: int, tiles: int = 1, walk: int = 1) -> dict[str, Parameter]:
    lanes = {"lane_bits": lane_bits, "tiles": tiles, "by_tiles": divider(tiles), "walk": walk}
    return {**_parameters(case), **lanes, "per_channel": 1 / case.channels}


def rows(case: Case, shared_bytes: int, threads: int = THREADS) -> Launch:
    """Contiguous: the widest tile of positions whose channels fit half of a multiprocessor's shared memory, or all of it."""
    vector = case.vector(case.positions, *case.out_steps)
    per_lane = case.channels * vector * case.dtype.itemsize
    room = shared_bytes - STATIC_SHARED - WEIGHT_BYTES * case.channels
    half = room - shared_bytes // 2
    lane_bits = min(_bits((half if half >= 4 * per_lane else room) // per_lane), 5)
    width = vector << lane_bits
    tiles = ceil_div(case.positions, width)
    return Launch(
        f"ltxk::pixel_norm_rows<{CUDA_NAMES[case.dtype]}, {vector}>",
        (case.samples * tiles,),
        threads,
        _launch_parameters(case, lane_bits, tiles),
        shared_bytes=(per_lane << lane_bits) + WEIGHT_BYTES * case.channels,
    )


def most_channels(shared_bytes: int) -> int:
    """Channels whose 16-byte accesses a block's shared memory holds."""
    return (shared_bytes - STATIC_SHARED) // (16 + WEIGHT_BYTES)


def columns(case: Case, threads: int = THREADS) -> Launch:
    """Channels-last: as few lanes of a warp per position as hold its channels in registers."""
    vector = case.vector(case.channels)
    held = 8 if case.dtype == torch.float32 and vector > 1 else 4
    lane_bits = min((ceil_div(case.channels, vector * held) - 1).bit_length(), 5)
    sets = ceil_div(case.samples * case.positions, threads >> lane_bits)
    walk = min(4, max(1, sets // WALKING))
    return Launch(
        f"ltxk::pixel_norm_columns<{CUDA_NAMES[case.dtype]}, {vector}, {held}>",
        (ceil_div(sets, walk),),
        threads,
        _launch_parameters(case, lane_bits, walk=walk),
    )


def cpu_calls(case: Case) -> tuple[Call, ...]:
    """The CPU kernel's call."""
    return (Call(f"pixel_norm_silu<{CPU_NAMES[case.dtype]}>", _parameters(case)),)


def device_steps(case: Case, threads: int = THREADS) -> list[Launch]:
    """One launch."""
    if case.channels_last:
        return [columns(case, threads)]
    assert case.limits is not None
    return [rows(case, case.limits.shared_bytes, threads)]


def plane_strides(out: Tensor) -> tuple[int, int] | None:
    """From a sample and from a channel to the next, where the positions of each lie side by side: frames of a longer buffer do."""
    view = channel_view(out)
    return (view.batch, view.channel) if view is not None and view.position == 1 else None


def describe(
    out: Tensor, args: Arguments, limits: DeviceLimits | None, out_strides: tuple[int, int] | None = None
) -> Case:
    """The case of a call whose x is dense, and out as it or with strides of its own; without limits it is one of the CPU, which
    takes any alignment."""
    x = args.x
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    # A tensor of single positions is both; its channels lie side by side, which the channels-last kernel reads in full lines.
    last = positions == 1 or not x.is_contiguous()
    aligned = limits is None or aligned16(out, x, args.weight)
    code = param_code(args.weight)
    return Case(x.dtype, samples, channels, positions, float(args.eps), last, aligned, code, limits, out_strides)


def run(tier: str, out: Tensor, args: Arguments) -> None:
    """One call in a layout that the kernels know; tensors that lie otherwise pass through a copy."""
    x = args.x
    if x.numel() == 0:
        return
    channels_last = not x.is_contiguous() and is_channels_last(x)
    source, strides, target = matched(x, channels_last), None, out
    if not (is_channels_last(out) if channels_last else out.is_contiguous()):
        # Single positions go by the channels-last kernel, which takes no strides.
        strides = None if channels_last or x[0, 0].numel() == 1 else plane_strides(out)
        target = out if strides else torch.empty_like(source)
    if source is not x:
        args = args._replace(x=source)
    steps = cpu_calls if tier == "cpu" else device_steps
    case = describe(target, args, limits_of(tier, x), strides)
    program(tier, steps, case, ARGUMENTS)(target, source, contiguous(args.weight))
    if target is not out:
        out.copy_(target)
