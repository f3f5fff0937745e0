"""What the launch modules need to know of tensors: layout, type names, alignment, the device's limits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled import extension
from ltxkern.compiled.steps import Launch

CUDA_NAMES = {torch.float32: "float", torch.float16: "ltxk::f16", torch.bfloat16: "ltxk::bf16", torch.float64: "double"}
CPU_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}
# Codes of ParamType in csrc/include/ltxkern/types.cuh.
PARAM_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
CODED = {code: dtype for dtype, code in PARAM_CODES.items()}


def param_code(tensor: Tensor | None) -> int:
    """Type code of an optional per-channel parameter."""
    return 0 if tensor is None else PARAM_CODES[tensor.dtype]


def is_channels_last(x: Tensor) -> bool:
    """Whether (N, C, *) lies in memory as (N, *, C) without gaps."""
    return x.dim() > 2 and x.movedim(1, -1).is_contiguous()


def aligned16(*tensors: Tensor | None) -> bool:
    """Whether every tensor begins on a 16-byte boundary."""
    for tensor in tensors:  # noqa: SIM110 - a generator doubles the time
        if tensor is not None and tensor.data_ptr() % 16:
            return False
    return True


def matched(x: Tensor, channels_last: bool) -> Tensor:
    """`x` in the working layout; a copy only where it lies otherwise."""
    if channels_last:
        return x if is_channels_last(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


class DeviceLimits(NamedTuple):
    """What the launch heuristics ask of a device."""

    multiprocessors: int
    shared_bytes: int
    # Blocks of a launch that it holds at once; None: as counted from the limits.
    held: Callable[[Launch], int] | None = None


@functools.cache
def device_limits(index: int) -> DeviceLimits:
    """Limits of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
    return DeviceLimits(properties.multi_processor_count, shared)


def refuse_device(tier: str, x: Tensor) -> str | None:
    """Why a CUDA tier cannot serve this tensor for where it lies, or None."""
    return _refuse_capability(tier, x.device.index) if x.is_cuda else f"needs CUDA tensors, got {x.device}"


@functools.cache
def _refuse_capability(tier: str, index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, cuda:{index} has {capability}"
    return extension.unserved(tier, index)
