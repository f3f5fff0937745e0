"""The CUDA sources through NVRTC, for machines without nvcc: CuPy compiles the packaged headers at first use, the driver launches.

Cubins are kept on disk in the user's cache folder, keyed by the sources, the architecture, the kernel and
the compiler; a damaged file is compiled again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltxkern import sources
from ltxkern.compiled import driver
from ltxkern.compiled.steps import Launch, Step, Zero
from ltxkern.whole_files import cache_folder, replacing

logger = logging.getLogger("ltxkern")

OPTIONS = ("-std=c++17", "--device-as-default-execution-space")
_MAGIC = b"ltxkern-cubin-1\n"


@functools.cache
def include_directory() -> Path:
    """Folder that holds ltxkern/*.cuh: package data of an installed wheel, csrc/include of a source tree."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc" / "include"):
        if (folder / "ltxkern" / "platform.cuh").is_file():
            return folder
    raise FileNotFoundError("the CUDA headers of ltxkern are not installed: reinstall the package")


@functools.cache
def sources_hash() -> str:
    """Digest of the headers that kernels are compiled from."""
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
    return cache_folder() / "cubin"


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
    key = "\0".join((sources_hash(), kernel, architecture, version, *OPTIONS))
    path = cache_directory() / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    if (cached := _read_cached(path)) is not None:
        return cached
    compiled, (name,) = compile_cubin([kernel], architecture)
    body = name.encode() + b"\n" + compiled
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(_MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    except OSError as error:
        logger.warning("cubin cache %s cannot be written: %s", path.parent, error)
    return compiled, name


_functions: dict[tuple[str, int], ctypes.c_void_p] = {}
_loading = threading.Lock()


def _function(kernel: str, device: int) -> ctypes.c_void_p:
    """A kernel on the current device, `device`: compiled and loaded by the first that asks.

    Raises:
        RuntimeError: it is not loaded, and the current stream is being captured.
    """
    if (found := _functions.get((kernel, device))) is not None:
        return found
    with _loading:
        if (found := _functions.get((kernel, device))) is None:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{kernel} is not loaded yet, and a CUDA graph capture is no time to compile and load it: "
                    "make the same call once before the capture"
                )
            major, minor = torch.cuda.get_device_capability(device)
            found = _functions[kernel, device] = driver.load(*cubin(kernel, f"sm_{major}{minor}"))
    return found


def held(kernel: str, block: int, shared_bytes: int, cooperative: bool, device: int) -> int:
    """Blocks of a launch that a device holds at once; 0 where it cannot run it."""
    with driver.on_device(device):
        return driver.held(_function(kernel, device), block, shared_bytes, cooperative, device)


def program(steps: Sequence[Step], arguments: int) -> Callable[..., None]:
    """The steps as a callable on `arguments` tensors; kernels are compiled and loaded when it first runs on a device."""
    runners = [driver.zeroing(step) if isinstance(step, Zero) else driver.launching(step) for step in steps]
    prepared: dict[int, list[ctypes.c_void_p | None]] = {}

    def prepare(device: int) -> list[ctypes.c_void_p | None]:
        # All before the first launch: a step that cannot be loaded leaves no part of the call in a captured graph.
        functions = [None if isinstance(step, Zero) else _function(step.kernel, device) for step in steps]
        for step, function in zip(steps, functions, strict=True):
            if isinstance(step, Launch) and function is not None:
                driver.allow_shared(function, step.shared_bytes)
        prepared[device] = functions
        return functions

    def run(*tensors: Tensor | None) -> None:
        if len(tensors) != arguments:
            raise TypeError(f"program takes {arguments} tensors, got {len(tensors)}")
        device = next(tensor.device.index for tensor in tensors if tensor is not None)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        with driver.on_device(device):
            functions = prepared.get(device) or prepare(device)
            stream = torch._C._cuda_getCurrentRawStream(device)
            for runner, function in zip(runners, functions, strict=True):
                runner(function, addresses, stream)

    return run


def unavailable() -> str | None:
    """Why this tier cannot run in this process as it is now, or None if it can."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed: pip install 'ltxkern[cuda13]' (or [cuda12])"
    if (reason := driver.no_device()) is not None:
        return reason
    try:
        include_directory()
        _nvrtc().getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        return f"NVRTC cannot be used: {error}"
    return None
