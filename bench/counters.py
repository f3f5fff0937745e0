"""What one call costs besides time: launches, and memory beyond its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import machine
from cases import Call, count_bytes, result_of, tensors_of

MAX_BUFFERS = 4096
DEVICE_ACTIVITIES = ("kernel", "gpu_memcpy", "gpu_memset")


def buffer_count(bytes_per_call: int, device: torch.device) -> int:
    """How many sets of inputs and outputs it takes that a call finds nothing in the last-level cache."""
    wanted = -(-3 * machine.last_level_cache(device) // max(1, bytes_per_call))
    affordable = machine.free_bytes(device) // 4 // max(1, bytes_per_call)
    return max(2, min(wanted, affordable, MAX_BUFFERS))


def count_launches(function: Callable[..., Any], args: tuple[Any, ...], device: torch.device) -> int | None:
    """Kernels, copies and fills that one call launches on a GPU; None on a CPU, which launches nothing."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        function(*args)
        torch.cuda.synchronize(device)
    events = seen.profiler.kineto_results.events() if seen.profiler is not None else []
    on_device = [event for event in events if event.device_type() == DeviceType.CUDA]
    if on_device and hasattr(on_device[0], "activity_type"):
        return sum(event.activity_type() in DEVICE_ACTIVITIES for event in on_device)
    return sum(not event.is_user_annotation() for event in on_device)


def peak_extra(call: Call, function: Callable[..., Any], args: tuple[Any, ...], device: torch.device) -> int:
    """Bytes that one call holds at its peak beyond its outputs."""
    peak, returned = (_cuda_peak if device.type == "cuda" else _cpu_peak)(function, args, device)
    inputs = {tensor.data_ptr() for tensor in tensors_of(args)}
    fresh = [output for output in result_of(call, args, returned) if output.data_ptr() not in inputs]
    return max(0, peak - count_bytes(fresh))


def _cuda_peak(function: Callable[..., Any], args: tuple[Any, ...], device: torch.device) -> tuple[int, Any]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    returned = function(*args)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before, returned


def _cpu_peak(function: Callable[..., Any], args: tuple[Any, ...], device: torch.device) -> tuple[int, Any]:
    """From the profiler's log of allocations; what torch's allocator does not see is not counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        returned = function(*args)
    events = seen.profiler.kineto_results.events() if seen.profiler is not None else []
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, returned
