"""The compiled tiers: the prebuilt extension `ltxkern._C`, or its CUDA sources through NVRTC, or the reason why not.

An op's own module here works out a tuple of steps (`ltxkern.compiled.steps`: kernel, grid, parameters) from shapes alone; this
module turns them into what is called with tensors. The prebuilt tier, the NVRTC tier and the tests' CPU shim take the
same steps.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ltxkern import debug, inventory
from ltxkern.compiled.steps import Call, Step, Zero, grid3, pack


def device_plan(binding: ModuleType, steps: Sequence[Step], arguments: int) -> Any:
    """The steps as a plan of a compiled module: `plan(*tensors)` runs them on the tensors' current stream."""
    plan = binding.DevicePlan(arguments)
    for step in steps:
        if isinstance(step, Zero):
            plan.add_zero(step.target.index, step.target.offset, step.bytes)
        else:
            parameters, relocations = pack(step.parameters)
            plan.add_launch(
                *(step.kernel, grid3(step.grid), step.block, step.shared_bytes, step.cluster, step.cooperative),
                *(parameters, relocations),
            )
    return plan


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _cuda_plan(steps: Sequence[Step], arguments: int) -> Callable[..., None]:
    plan = device_plan(module(), steps, arguments)
    if _has_exchange_api():
        return plan

    def run(*tensors: Tensor | None) -> None:
        device = next(tensor.device.index for tensor in tensors if tensor is not None)
        plan.raw(_addresses(tensors), device, torch._C._cuda_getCurrentRawStream(device))

    return run


def plan_builder(tier: str) -> Callable[[Sequence[Step], int], Callable[..., None]]:
    """What makes plans of a CUDA tier: "cuda" or "nvrtc"."""
    if tier == "nvrtc":
        from ltxkern.compiled import nvrtc

        build = nvrtc.plan
    else:
        build = _cuda_plan
    return lambda steps, arguments: debug.recorded(steps, build(steps, arguments))


def cpu_plan(calls: Sequence[Call], arguments: int) -> Callable[..., None]:
    """CPU calls as a plan: `plan(*tensors)` runs them with torch's number of threads."""
    plan = module().CpuPlan(arguments)
    for call in calls:
        plan.add_call(call.kernel, *pack(call.parameters))
    if _has_exchange_api():
        return debug.recorded(calls, lambda *tensors: plan(torch.get_num_threads(), *tensors))
    return debug.recorded(calls, lambda *tensors: plan.raw(torch.get_num_threads(), _addresses(tensors)))


def _has_exchange_api() -> bool:
    return hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


@functools.cache
def module() -> ModuleType:
    """The extension module; torch's DLPack exchange API is handed to it once."""
    binding = importlib.import_module("ltxkern._C")
    if _has_exchange_api():
        binding.use_exchange_api(torch.Tensor.__dlpack_c_exchange_api__)
    return binding


@functools.cache
def _extension_missing() -> str | None:
    if importlib.util.find_spec("ltxkern._C") is None:
        return "ltxkern._C is not built: reinstall with a C++ compiler (LTXKERN_BUILD=auto pip install .)"
    try:
        module()
    except (ImportError, RuntimeError) as error:
        return f"ltxkern._C does not load: {error}"
    return None


def unavailable(tier: str) -> str | None:
    """Why a compiled tier ("cuda", "nvrtc", "cpu") cannot run in this process, or None if it can."""
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
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: torch.cuda.is_available() is false"
    return None


@functools.cache
def _registered(tier: str) -> frozenset[str]:
    return frozenset(module().cpu_kernels() if tier == "cpu" else module().kernels())


def lacks(tier: str, op: str) -> str | None:
    """Why the loaded extension cannot serve an op in the tier "cuda" or "cpu", or None if it can: an older build lacks kernels."""
    wanted = (inventory.CPU if tier == "cpu" else inventory.CUDA).get(op, ())
    absent = [kernel for kernel in wanted if kernel not in _registered(tier)]
    if not absent:
        return None
    return (
        f"ltxkern._C was built without {', '.join(absent)}: it is older than this package; rebuild it: "
        "LTXKERN_BUILD=auto pip install . (in a checkout: python setup.py build_ext --inplace)"
    )
