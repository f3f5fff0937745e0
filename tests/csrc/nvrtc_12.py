"""NVRTC of CUDA 12.8, whose front end and code generator are those of its nvcc, by its C interface.

Run as a script it compiles what stands on its standard input: {"library", "options", "kernels" by header, "cubins": a folder for
them}. Each header is printed before its turn, so that one whose compiler takes the process with it is known. Imports nothing large.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RELEASE = (12, 8)


def library() -> Path | None:
    """The package nvidia-cuda-nvrtc-cu12 brings it."""
    try:
        spec = find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        return None
    folders = spec.submodule_search_locations if spec is not None else None
    found = [path for folder in folders or () for path in Path(folder).glob("lib/libnvrtc.so.12")]
    return found[0] if found else None


def release(path: Path) -> tuple[int, int]:
    """Of the library."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(str(path)).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _read(program: ctypes.c_void_p, size_of: Any, read: Any) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    read(program, text)
    return text.raw


def compile_kernels(compiler: ctypes.CDLL, header: str, kernels: Sequence[str], options: Sequence[str]) -> bytes:
    """The cubin.

    Raises:
        RuntimeError: it does not compile; with the log.
    """
    program = ctypes.c_void_p()
    source = f'#include "ltxkern/{header}"\n'.encode()
    assert compiler.nvrtcCreateProgram(ctypes.byref(program), source, b"ltxkern.cu", 0, None, None) == 0
    for kernel in kernels:
        assert compiler.nvrtcAddNameExpression(program, kernel.encode()) == 0
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = compiler.nvrtcCompileProgram(program, len(options), given)
    log = _read(program, compiler.nvrtcGetProgramLogSize, compiler.nvrtcGetProgramLog)
    cubin = b"" if failed else _read(program, compiler.nvrtcGetCUBINSize, compiler.nvrtcGetCUBIN)
    compiler.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(log.rstrip(b"\0").decode() or "failed without a word")
    return cubin


def run(
    path: Path,
    architecture: str,
    include: Path,
    options: Sequence[str],
    kernels: Mapping[str, Sequence[str]],
    cubins: Path,
) -> subprocess.CompletedProcess[str]:
    """Compile kernels by header in a process of its own, which the compiler may take with it; cubins have the headers' names."""
    every = [f"--gpu-architecture={architecture}", f"-I{include}", *options]
    work = {"library": str(path), "options": every, "kernels": kernels, "cubins": str(cubins)}
    command = [sys.executable, __file__]
    return subprocess.run(command, input=json.dumps(work), capture_output=True, text=True, check=False)


if __name__ == "__main__":
    work = json.load(sys.stdin)
    for name, expressions in work["kernels"].items():
        print(name, flush=True)
        try:
            compiled = compile_kernels(ctypes.CDLL(work["library"]), name, expressions, work["options"])
        except RuntimeError as error:
            sys.exit(str(error))
        (Path(work["cubins"]) / f"{name}.cubin").write_bytes(compiled)
