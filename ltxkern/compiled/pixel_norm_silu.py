"""Launch geometry of PixelNorm + SiLU: a tile of positions with all their channels stays on chip between its two uses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled import extension
from ltxkern.compiled.steps import Argument, Call, Launch, Parameter
from ltxkern.compiled.tensors import (
    CPU_NAMES,
    CUDA_NAMES,
    aligned16,
    ceil_div,
    device_limits,
    is_channels_last,
    matched,
    param_code,
)

OUT, X, WEIGHT = (Argument(i) for i in range(3))
ARGUMENTS = 3
THREADS = 256
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


def describe(out: Tensor, x: Tensor, eps: float, weight: Tensor | None) -> Case:
    """The case of a call whose x and out share a dense layout."""
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    # A tensor of single positions is both; its channels lie side by side, which the channels-last kernel reads in full lines.
    channels_last = positions == 1 or not x.is_contiguous()
    return Case(x.dtype, samples, channels, positions, float(eps), channels_last, aligned16(out, x), param_code(weight))


@functools.lru_cache(maxsize=1024)
def _device_program(tier: str, device: int, case: Case) -> Callable[..., None]:
    launch = columns(case) if case.channels_last else rows(case, device_limits(device).shared_bytes)
    return extension.program_builder(tier)((launch,), ARGUMENTS)


@functools.lru_cache(maxsize=1024)
def _cpu_program(case: Case) -> Callable[..., None]:
    return extension.cpu_program(cpu_calls(case), ARGUMENTS)


def run(
    plan_for: Callable[[Case, Tensor], Callable[..., None]], out: Tensor, x: Tensor, eps: float, weight: Tensor | None
) -> None:
    """One call in a layout that the kernels know; tensors that lie otherwise pass through a copy."""
    if x.numel() == 0:
        return
    channels_last = not x.is_contiguous() and is_channels_last(x)
    source = matched(x, channels_last)
    target = out if matched(out, channels_last) is out else torch.empty_like(source)
    weight = None if weight is None else weight.contiguous()
    plan_for(describe(target, source, eps, weight), source)(target, source, weight)
    if target is not out:
        out.copy_(target)


def load(tier: str) -> Callable[..., None]:
    """The kernel of a compiled tier ("cuda", "nvrtc" or "cpu"), called as `kernel(out, *args)`."""
    if tier == "cpu":
        return functools.partial(run, lambda case, x: _cpu_program(case))
    return functools.partial(run, lambda case, x: _device_program(tier, x.device.index, case))
