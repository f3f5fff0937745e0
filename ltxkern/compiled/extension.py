"""The compiled tiers: the prebuilt extension `ltxkern._C`, or its CUDA sources through NVRTC, or the reason why not.

An op's own module here works out a tuple of steps (`ltxkern.compiled.steps`: kernel, grid, parameters) from shapes alone; this
module turns them into what is called with tensors. The prebuilt tier, the NVRTC tier and the tests' CPU shim take the
same steps.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ltxkern import debug, sources
from ltxkern.compiled import driver
from ltxkern.compiled.steps import Call, Step, Zero, grid3, pack

logger = logging.getLogger("ltxkern")


def device_program(binding: ModuleType, steps: Sequence[Step], arguments: int) -> Any:
    """The steps as a program of a compiled module: `program(*tensors)` runs them on the tensors' current stream."""
    program = binding.DeviceProgram(arguments)
    for step in steps:
        if isinstance(step, Zero):
            program.add_zero(step.target.index, step.target.offset, step.bytes)
        else:
            shape = step.block, step.shared_bytes, step.cooperative
            program.add_launch(step.kernel, grid3(step.grid), *shape, *pack(step.parameters))
    return program


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _cuda_program(steps: Sequence[Step], arguments: int) -> Callable[..., None]:
    program = device_program(module(), steps, arguments)
    if _has_exchange_api():
        return program

    def run(*tensors: Tensor | None) -> None:
        device = next(tensor.device.index for tensor in tensors if tensor is not None)
        program.raw(_addresses(tensors), device, torch._C._cuda_getCurrentRawStream(device))

    return run


def program_builder(tier: str) -> Callable[[Sequence[Step], int], Callable[..., None]]:
    """What makes programs of a CUDA tier: "cuda" or "nvrtc"."""
    if tier == "nvrtc":
        from ltxkern.compiled import nvrtc

        build = nvrtc.program
    else:
        build = _cuda_program
    return lambda steps, arguments: debug.recorded(steps, build(steps, arguments))


def cpu_program(calls: Sequence[Call], arguments: int) -> Callable[..., None]:
    """CPU calls as a program: `program(*tensors)` runs them with torch's number of threads."""
    program = module().CpuProgram(arguments)
    for call in calls:
        program.add_call(call.kernel, *pack(call.parameters))
    if _has_exchange_api():
        return debug.recorded(calls, program)
    return debug.recorded(calls, lambda *tensors: program.raw(torch.get_num_threads(), _addresses(tensors)))


@functools.cache
def held(tier: str, device: int, kernel: str, block: int, shared_bytes: int, cooperative: bool) -> int:
    """Blocks of a launch that a device holds at once, as its driver says; 0: it cannot run it."""
    if tier == "nvrtc":
        from ltxkern.compiled import nvrtc

        return nvrtc.held(kernel, block, shared_bytes, cooperative, device)
    found: int = module().held(kernel, block, shared_bytes, cooperative, device)
    return found


def unserved(tier: str, device: int) -> str | None:
    """Why a CUDA tier has no code for a device, or None if it has; NVRTC compiles for the one that is there."""
    return None if tier == "nvrtc" else module().cuda_unserved(device)


def _has_exchange_api() -> bool:
    return hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


@functools.cache
def module() -> ModuleType:
    """The extension module; torch's DLPack exchange API is handed to it once."""
    binding = importlib.import_module("ltxkern._C")
    if _has_exchange_api():
        binding.use_exchange_api(torch.Tensor.__dlpack_c_exchange_api__)
        binding.use_torch(*given_to_modules())
    return binding


def given_to_modules() -> tuple[Any, ...]:
    """What an extension module needs of torch beside its exchange API, in the order of `use_torch`."""
    kinds, fresh = (Tensor, torch.nn.Parameter), (torch.empty_like, torch.contiguous_format)
    return *kinds, torch.is_grad_enabled, Tensor.is_neg, *fresh, torch.get_num_threads, forward_ad


def known_calls(indices: Sequence[tuple[int, int]], followed: Sequence[Callable[[], Any]]) -> Any:
    """Where the programs of calls are kept; None where they are not: without an exchange API, and where LTXKERN_DEBUG watches.

    Args:
        indices: places of an argument that holds indices and of the one whose rows they are.
        followed: functions that return something true where torch has to see a call.
    """
    if _extension_missing() is not None or not _has_exchange_api() or debug.level():
        return None
    return module().KnownCalls(indices, followed)


@functools.cache
def _extension_missing() -> str | None:
    if importlib.util.find_spec("ltxkern._C") is None:
        return "ltxkern._C is not built: reinstall with a C++ compiler (LTXKERN_BUILD=auto pip install .)"
    try:
        built = getattr(module(), "source_digest", None)
    except (ImportError, RuntimeError) as error:
        return f"ltxkern._C does not load: {error}"
    if built == sources.packaged():
        return None
    reason = (
        "ltxkern._C was built from other sources than this package has: rebuild it: LTXKERN_BUILD=auto pip install . "
        "(in a checkout: python setup.py build_ext --inplace)"
    )
    logger.warning("%s", reason)
    return reason


def unavailable(tier: str) -> str | None:
    """Why a compiled tier ("cuda", "nvrtc", "cpu") cannot run in this process as it is now, or None if it can."""
    if tier == "nvrtc":
        from ltxkern.compiled import nvrtc

        return nvrtc.unavailable()
    if (reason := _extension_missing()) is not None:
        return reason
    if tier == "cpu":
        if not module().cpu_kernels():
            return f"no CPU kernels for instruction set {module().isa()} in this build"
        return None
    if (reason := module().cuda_unavailable()) is not None:
        return driver.forked() or reason
    return driver.no_device()
