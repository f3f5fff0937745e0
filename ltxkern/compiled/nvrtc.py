"""The CUDA sources through NVRTC, for machines without nvcc: CuPy compiles the packaged headers at first use, the driver launches.

Cubins are kept on disk under LTXKERN_CACHE_DIR (default ~/.cache/ltxkern), keyed by the sources, the architecture, the kernel and
the compiler; a damaged file is compiled again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltxkern import sources
from ltxkern.compiled.steps import Launch, Step, Zero, grid3, pack

logger = logging.getLogger("ltxkern")

OPTIONS = ("-std=c++17", "--device-as-default-execution-space")
_MAGIC = b"ltxkern-cubin-1\n"
# Numbers of the driver's function and launch attributes.
_STATIC_SHARED = 1
_MAX_DYNAMIC_SHARED = 8
_SHARED_CARVEOUT = 9
_COOPERATIVE = 2
_CLUSTER_DIMENSION = 4


@functools.cache
def include_directory() -> Path:
    """Folder that holds ltxkern/*.cuh: package data of an installed wheel, csrc/include of a source tree."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc" / "include"):
        if (folder / "ltxkern" / "platform.cuh").is_file():
            return folder
    raise FileNotFoundError("the CUDA headers of ltxkern are not installed: reinstall the package")


@functools.cache
def _sources_hash() -> str:
    return sources.digest(include_directory() / "ltxkern")


def header_of(kernel: str) -> str:
    """The header that defines a kernel: the one whose text names it before its template arguments."""
    name = kernel.split("<", 1)[0].removeprefix("ltxk::")
    for path in sorted((include_directory() / "ltxkern").glob("*.cuh")):
        text = path.read_text()
        if f" {name}(" in text and "__global__" in text:
            return path.name
    raise KeyError(f"no packaged header defines the kernel {kernel}")


@functools.cache
def _nvrtc() -> Any:
    from cupy.cuda import nvrtc

    return nvrtc


def cache_directory() -> Path:
    """Where cubins are kept."""
    return Path(os.environ.get("LTXKERN_CACHE_DIR", "") or Path.home() / ".cache" / "ltxkern") / "cubin"


def _whole_elf(image: bytes) -> bytes:
    """CuPy's binding leaves out the last byte, as if it were the NUL of PTX; it ends the program header table, and is zero."""
    (table,), (entry, entries) = struct.unpack_from("<Q", image, 32), struct.unpack_from("<HH", image, 54)
    return image + bytes(max(0, table + entry * entries - len(image)))


def compile_cubin(kernels: Sequence[str], architecture: str) -> tuple[bytes, list[str]]:
    """Compile kernels of one header.

    Args:
        kernels: C++ name expressions.
        architecture: e.g. "sm_90".
    Returns:
        The cubin and the kernels' mangled names in it.
    Raises:
        RuntimeError: the compiler's log.
    """
    nvrtc = _nvrtc()
    source = f'#include "ltxkern/{header_of(kernels[0])}"\n'
    program = nvrtc.createProgram(source, "ltxkern.cu", (), ())
    try:
        for kernel in kernels:
            nvrtc.addNameExpression(program, kernel)
        options = (f"--gpu-architecture={architecture}", f"-I{include_directory()}", *OPTIONS)
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(f"NVRTC could not compile {kernels}: {nvrtc.getProgramLog(program)}") from error
        return _whole_elf(nvrtc.getCUBIN(program)), [nvrtc.getLoweredName(program, kernel) for kernel in kernels]
    finally:
        nvrtc.destroyProgram(program)


def _read_cached(path: Path) -> tuple[bytes, str] | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    head, _, rest = content.partition(b"\n")
    digest, _, body = rest.partition(b"\n")
    if head + b"\n" != _MAGIC or hashlib.sha256(body).hexdigest().encode() != digest:
        logger.warning("damaged cubin %s is compiled again", path)
        return None
    name, _, cubin = body.partition(b"\n")
    return cubin, name.decode()


def cubin(kernel: str, architecture: str) -> tuple[bytes, str]:
    """A kernel's cubin and mangled name, from the disk cache or the compiler."""
    version = ".".join(map(str, _nvrtc().getVersion()))
    key = "\0".join((_sources_hash(), kernel, architecture, version, *OPTIONS))
    path = cache_directory() / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    if (cached := _read_cached(path)) is not None:
        return cached
    compiled, (name,) = compile_cubin([kernel], architecture)
    body = name.encode() + b"\n" + compiled
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
            partial.write(_MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        Path(partial.name).replace(path)
    except OSError as error:
        logger.warning("cubin cache %s cannot be written: %s", path.parent, error)
    return compiled, name


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
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, what: str) -> None:
    if status != 0:
        message = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(message))
        raise RuntimeError(f"{what}: {(message.value or b'unknown error').decode()}")


def _bind_context(device: int) -> None:
    """The device's primary context, which torch uses too, becomes current in a thread that has none."""
    context = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if not context.value:
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
        _check(_driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")


@functools.cache
def _function(kernel: str, device: int) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(device)
    image, name = cubin(kernel, f"sm_{major}{minor}")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), image), "cuModuleLoadData")
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "cuModuleGetFunction")
    return function


_shared_allowed: dict[tuple[str, int], int] = {}
_shared_lock = threading.Lock()


def _allow_shared(kernel: str, device: int, bytes_wanted: int) -> None:
    """Allows dynamic shared memory beyond what a kernel has without a request: 48 KiB less its static memory. Never lowered."""
    if bytes_wanted <= _shared_allowed.get((kernel, device), 0):
        return
    function, static = _function(kernel, device), ctypes.c_int()
    _check(_driver().cuFuncGetAttribute(ctypes.byref(static), _STATIC_SHARED, function), "cuFuncGetAttribute")
    with _shared_lock:
        if bytes_wanted <= _shared_allowed.get((kernel, device), 0):
            return
        if bytes_wanted + static.value > 48 << 10:
            for attribute, value in ((_MAX_DYNAMIC_SHARED, bytes_wanted), (_SHARED_CARVEOUT, 100)):
                _check(_driver().cuFuncSetAttribute(function, attribute, value), "cuFuncSetAttribute")
        _shared_allowed[kernel, device] = bytes_wanted


def _zero(step: Zero) -> Callable[[list[int], int, int], None]:
    def run(addresses: list[int], device: int, stream: int) -> None:
        address = ctypes.c_uint64(addresses[step.target.index] + step.target.offset)
        size = ctypes.c_size_t(step.bytes)
        status = _driver().cuMemsetD8Async(address, ctypes.c_ubyte(0), size, ctypes.c_void_p(stream))
        _check(status, "cuMemsetD8Async")

    return run


def _launch(step: Launch) -> Callable[[list[int], int, int], None]:
    template, relocations = pack(step.parameters)
    attributes = (_Attribute * 2)()
    count = 0
    if step.cluster > 1:
        attributes[count].id = _CLUSTER_DIMENSION
        attributes[count].value[:3] = (step.cluster, 1, 1)
        count += 1
    if step.cooperative:
        attributes[count].id = _COOPERATIVE
        attributes[count].value[0] = 1
        count += 1
    grid, block = (ctypes.c_uint * 3)(*grid3(step.grid)), (ctypes.c_uint * 3)(step.block, 1, 1)

    def run(addresses: list[int], device: int, stream: int) -> None:
        parameters = bytearray(template)
        for slot, argument, offset in relocations:
            address = addresses[argument]
            parameters[8 * slot : 8 * slot + 8] = (address + offset if address else 0).to_bytes(8, "little")
        buffer = (ctypes.c_char * len(parameters)).from_buffer(parameters)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        function = _function(step.kernel, device)
        _allow_shared(step.kernel, device, step.shared_bytes)
        config = _Config(grid, block, step.shared_bytes, stream, attributes, count)
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), function, pointers, None), f"launch of {step.kernel}")

    return run


def program(steps: Sequence[Step], arguments: int) -> Callable[..., None]:
    """The steps as a callable on `arguments` tensors; kernels are compiled when it first runs."""
    runners = [_zero(step) if isinstance(step, Zero) else _launch(step) for step in steps]

    def run(*tensors: Tensor | None) -> None:
        if len(tensors) != arguments:
            raise TypeError(f"program takes {arguments} tensors, got {len(tensors)}")
        device = next(tensor.device.index for tensor in tensors if tensor is not None)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        with torch.cuda.device(device):
            _bind_context(device)
            stream = torch._C._cuda_getCurrentRawStream(device)
            for runner in runners:
                runner(addresses, device, stream)

    return run


@functools.cache
def unavailable() -> str | None:
    """Why this tier cannot run in this process, or None if it can."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed: pip install 'ltxkern[cuda13]' (or [cuda12])"
    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is false"
    try:
        include_directory()
        _nvrtc().getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        return f"NVRTC cannot be used: {error}"
    return None
