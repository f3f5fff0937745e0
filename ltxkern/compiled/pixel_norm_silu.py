"""Launch geometry of PixelNorm + SiLU: a tile of positions with all their channels stays on chip between its two uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled.programs import THREADS, limits_of, program
from ltxkern.compiled.steps import Argument, Call, Launch, Parameter
from ltxkern.compiled.tensors import (
    CPU_NAMES,
    CUDA_NAMES,
    DeviceLimits,
    aligned16,
    is_channels_last,
    matched,
    param_code,
)
from ltxkern.layout import ceil_div, contiguous

if TYPE_CHECKING:
    from ltxkern.ops.pixel_norm_silu import Arguments

OUT, X, WEIGHT = (Argument(i) for i in range(3))
ARGUMENTS = 3
# The sums of squares of pixel_norm_rows, and room to spare.
STATIC_SHARED = 9 << 10


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

    def vector(self, length: int) -> int:
        """Elements per access along an axis of this length."""
        vector = 16 // self.dtype.itemsize
        return vector if self.aligned and length % vector == 0 else 1


def _parameters(case: Case) -> dict[str, Parameter]:
    return {
        **{"x": X, "out": OUT, "weight": WEIGHT, "weight_type": case.weight_code},
        **{"samples": case.samples, "channels": case.channels, "positions": case.positions},
        **{"channels_last": int(case.channels_last), "eps": case.eps},
    }


def _power_of_two(at_most: int) -> int:
    return 1 << (max(at_most, 1).bit_length() - 1)


def rows(case: Case, shared_bytes: int, threads: int = THREADS) -> Launch:
    """Contiguous: the widest tile of positions whose channels fit half of a multiprocessor's shared memory, or all of it."""
    vector = case.vector(case.positions)
    per_lane = case.channels * vector * case.dtype.itemsize
    budget = shared_bytes // 2 if shared_bytes // 2 >= 4 * per_lane else shared_bytes
    lanes = min(_power_of_two((budget - STATIC_SHARED) // per_lane), 32, threads)
    width = lanes * vector
    return Launch(
        f"ltxk::pixel_norm_rows<{CUDA_NAMES[case.dtype]}, {vector}>",
        (case.samples * ceil_div(case.positions, width),),
        threads,
        {**_parameters(case), "lanes": lanes},
        shared_bytes=lanes * per_lane,
    )


def most_channels(shared_bytes: int) -> int:
    """Channels whose 16-byte accesses a block's shared memory holds."""
    return (shared_bytes - STATIC_SHARED) // 16


def columns(case: Case, threads: int = THREADS) -> Launch:
    """Channels-last: as many lanes of a warp per position as its channels fill."""
    vector = case.vector(case.channels)
    lanes = min(32, _power_of_two(ceil_div(case.channels, vector)))
    held = 8 if case.dtype == torch.float32 and vector > 1 else 4
    return Launch(
        f"ltxk::pixel_norm_columns<{CUDA_NAMES[case.dtype]}, {vector}, {held}>",
        (ceil_div(case.samples * case.positions, threads // lanes),),
        threads,
        {**_parameters(case), "lanes": lanes},
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


def describe(out: Tensor, args: Arguments, limits: DeviceLimits | None) -> Case:
    """The case of a call whose x and out share a dense layout; without limits it is one of the CPU, which takes any alignment."""
    x = args.x
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    # A tensor of single positions is both; its channels lie side by side, which the channels-last kernel reads in full lines.
    last = positions == 1 or not x.is_contiguous()
    aligned = limits is None or aligned16(out, x)
    return Case(x.dtype, samples, channels, positions, float(args.eps), last, aligned, param_code(args.weight), limits)


def run(tier: str, out: Tensor, args: Arguments) -> None:
    """One call in a layout that the kernels know; tensors that lie otherwise pass through a copy."""
    x = args.x
    if x.numel() == 0:
        return
    channels_last = not x.is_contiguous() and is_channels_last(x)
    source = matched(x, channels_last)
    target = out if matched(out, channels_last) is out else torch.empty_like(source)
    if source is not x:
        args = args._replace(x=source)
    steps = cpu_calls if tier == "cpu" else device_steps
    case = describe(target, args, limits_of(tier, x))
    program(tier, steps, case, ARGUMENTS)(target, source, contiguous(args.weight))
    if target is not out:
        out.copy_(target)
