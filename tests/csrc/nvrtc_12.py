"""NVRTC of CUDA 12.8, whose front end and code generator are those of its nvcc, by its C interface.

Run as a script it compiles what stands on its standard input: {"library", "options", "kernels" by header}. Each header is printed
before its turn, so that one whose compiler takes the process with it is known. Imports nothing large.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

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


def compile_kernels(compiler: ctypes.CDLL, header: str, kernels: Sequence[str], options: Sequence[str]) -> str:
    """The log of a compilation that failed, else an empty string."""
    program = ctypes.c_void_p()
    source = f'#include "ltxkern/{header}"\n'.encode()
    assert compiler.nvrtcCreateProgram(ctypes.byref(program), source, b"ltxkern.cu", 0, None, None) == 0
    for kernel in kernels:
        assert compiler.nvrtcAddNameExpression(program, kernel.encode()) == 0
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = compiler.nvrtcCompileProgram(program, len(options), given)
    size = ctypes.c_size_t()
    compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    compiler.nvrtcGetProgramLog(program, log)
    compiler.nvrtcDestroyProgram(ctypes.byref(program))
    return (log.value.decode() or "failed without a word") if failed else ""


if __name__ == "__main__":
    work = json.load(sys.stdin)
    for name, expressions in work["kernels"].items():
        print(name, flush=True)
        if said := compile_kernels(ctypes.CDLL(work["library"]), name, expressions, work["options"]):
            sys.exit(said)
