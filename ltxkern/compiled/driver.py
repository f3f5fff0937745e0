"""The CUDA driver through ctypes: why no device is seen, and for the NVRTC tier loaded kernels, what a device holds, launches."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ltxkern.compiled.steps import Launch, Zero, grid3, pack

# Numbers of the driver's function, device and launch attributes, and of a capture mode.
_MAX_THREADS, _STATIC_SHARED, _MAX_DYNAMIC_SHARED, _SHARED_CARVEOUT = 0, 1, 8, 9
_MULTIPROCESSORS, _COOPERATIVE_LAUNCH, _SHARED_OPTIN = 16, 95, 97
_COOPERATIVE = 2
_RELAXED = 2
# The oldest drivers that a major version of the CUDA runtime works with.
LEAST_DRIVER = {12: 525, 13: 580}

# What runs a step: the loaded kernel (None where it is no launch), the addresses of the call's tensors, the stream.
Runner = Callable[[ctypes.c_void_p | None, list[int], int], None]


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint32 * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The driver's library; OSError where there is no driver."""
    return ctypes.CDLL("libcuda.so.1")


def check(status: int, what: str) -> None:
    """RuntimeError for a status other than success."""
    if status != 0:
        message = ctypes.c_char_p()
        library().cuGetErrorString(status, ctypes.byref(message))
        raise RuntimeError(f"{what}: {(message.value or b'unknown error').decode()}")


def _supported() -> tuple[int, int] | None:
    """The newest CUDA version that the driver knows; None without a driver. It touches no device."""
    version = ctypes.c_int()
    try:
        check(library().cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
    except OSError:
        return None
    return version.value // 1000, version.value % 1000 // 10


def forked() -> str | None:
    """Why this process can never use CUDA, or None."""
    if torch.cuda._is_in_bad_fork():
        return "CUDA was in use before this process was forked from another: start it by the method spawn"
    return None


def no_device() -> str | None:
    """Why torch sees no CUDA device in this process as it is now, or None where it sees one."""
    if (reason := forked()) is not None or torch.cuda.is_available():
        return reason
    if torch.version.cuda is None:
        return f"no CUDA device: torch {torch.__version__} is a build for CPUs"
    if (driver := _supported()) is None:
        return "no CUDA device: there is no NVIDIA driver"
    if driver[0] < (major := int(torch.version.cuda.split(".")[0])):
        least = f" to {LEAST_DRIVER[major]} or newer" if major in LEAST_DRIVER else ""
        return (
            f"the NVIDIA driver supports CUDA {driver[0]}.{driver[1]}, torch {torch.__version__} needs {torch.version.cuda}: "
            f"update the driver{least}, or install torch for CUDA {driver[0]}"
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"no CUDA device: torch.cuda.is_available() is false{'' if hidden is None else f', CUDA_VISIBLE_DEVICES={hidden}'}"


class Unused:
    """Whether this process has not used CUDA yet, and who is told when it does.

    Until then a call asks no device: the question alone would fix CUDA_VISIBLE_DEVICES, and forbid CUDA to processes forked later.
    """

    def __init__(self) -> None:
        self._over = False
        self._told: set[Callable[[], None]] = set()

    def __call__(self, then: Callable[[], None]) -> bool:
        """The answer; where it is True, `then` is called once it no longer is."""
        if self._over or torch.cuda.is_initialized():
            return False
        if then not in self._told:
            self._told.add(then)
            torch.cuda._lazy_call(functools.partial(self._end, then))
        return True

    def _end(self, then: Callable[[], None]) -> None:
        self._over = True
        then()


unused = Unused()


@contextmanager
def on_device(index: int) -> Iterator[None]:
    """A device and its primary context, which torch uses too, are current in this thread."""
    with torch.cuda.device(index):
        context = ctypes.c_void_p()
        check(library().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
        if not context.value:
            check(library().cuDevicePrimaryCtxRetain(ctypes.byref(context), index), "cuDevicePrimaryCtxRetain")
            check(library().cuCtxSetCurrent(context), "cuCtxSetCurrent")
        yield


@contextmanager
def _relaxed() -> Iterator[None]:
    """Outside the rules that a graph capture of any thread lays on all of them."""
    mode = ctypes.c_int(_RELAXED)
    check(library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "cuThreadExchangeStreamCaptureMode")
    try:
        yield
    finally:
        library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def load(image: bytes, name: str) -> ctypes.c_void_p:
    """A kernel of a cubin, on the current device."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with _relaxed():
        check(library().cuModuleLoadData(ctypes.byref(module), image), "cuModuleLoadData")
        check(library().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "cuModuleGetFunction")
    return function


def _of_function(attribute: int, function: ctypes.c_void_p) -> int:
    value = ctypes.c_int()
    check(library().cuFuncGetAttribute(ctypes.byref(value), attribute, function), "cuFuncGetAttribute")
    return value.value


def _of_device(attribute: int, device: int) -> int:
    value = ctypes.c_int()
    check(library().cuDeviceGetAttribute(ctypes.byref(value), attribute, device), "cuDeviceGetAttribute")
    return value.value


_allowing = threading.Lock()


def allow_shared(function: ctypes.c_void_p, wanted: int) -> None:
    """Allows dynamic shared memory beyond what a kernel has without a request: 48 KiB less its static memory. Never lowered."""
    if wanted + _of_function(_STATIC_SHARED, function) <= 48 << 10:
        return
    with _allowing:
        if wanted > _of_function(_MAX_DYNAMIC_SHARED, function):
            for attribute, value in ((_MAX_DYNAMIC_SHARED, wanted), (_SHARED_CARVEOUT, 100)):
                check(library().cuFuncSetAttribute(function, attribute, value), "cuFuncSetAttribute")


def held(function: ctypes.c_void_p, block: int, shared: int, cooperative: bool, device: int) -> int:
    """Blocks of a launch that the current device holds at once; 0 where it cannot run it."""
    if (
        shared + _of_function(_STATIC_SHARED, function) > _of_device(_SHARED_OPTIN, device)
        or block > _of_function(_MAX_THREADS, function)
        or (cooperative and not _of_device(_COOPERATIVE_LAUNCH, device))
    ):
        return 0
    allow_shared(function, shared)
    found = ctypes.c_int()
    status = library().cuOccupancyMaxActiveBlocksPerMultiprocessor(
        ctypes.byref(found), function, block, ctypes.c_size_t(shared)
    )
    check(status, "cuOccupancyMaxActiveBlocksPerMultiprocessor")
    return found.value * _of_device(_MULTIPROCESSORS, device)


def zeroing(step: Zero) -> Runner:
    """What runs a `Zero`."""

    def run(_: ctypes.c_void_p | None, addresses: list[int], stream: int) -> None:
        address = ctypes.c_uint64(addresses[step.target.index] + step.target.offset)
        size = ctypes.c_size_t(step.bytes)
        status = library().cuMemsetD8Async(address, ctypes.c_ubyte(0), size, ctypes.c_void_p(stream))
        check(status, "cuMemsetD8Async")

    return run


def launching(step: Launch) -> Runner:
    """What runs a `Launch`."""
    template, relocations = pack(step.parameters)
    together = _Attribute(_COOPERATIVE)
    together.value[0] = 1
    attributes = ctypes.pointer(together)
    grid, block = (ctypes.c_uint * 3)(*grid3(step.grid)), (ctypes.c_uint * 3)(step.block, 1, 1)

    def run(function: ctypes.c_void_p | None, addresses: list[int], stream: int) -> None:
        parameters = bytearray(template)
        for slot, argument, offset in relocations:
            address = addresses[argument]
            parameters[8 * slot : 8 * slot + 8] = (address + offset if address else 0).to_bytes(8, "little")
        buffer = (ctypes.c_char * len(parameters)).from_buffer(parameters)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        config = _Config(grid, block, step.shared_bytes, stream, attributes, step.cooperative)
        check(library().cuLaunchKernelEx(ctypes.byref(config), function, pointers, None), f"launch of {step.kernel}")

    return run
