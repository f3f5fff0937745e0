"""Registers and local memory of every registered CUDA kernel, read from cubins that NVRTC makes; no GPU, no nvcc.

`python -m tests.csrc.kernel_resources` writes the baseline that test_nvrtc.py holds the kernels to, with the digest of their
sources; look at the difference before committing it. It writes none where a kernel has local memory on any architecture: with the
others of its header, by CUDA 12.8's compiler too, or compiled alone, as the NVRTC tier does it. Some minutes on two cores.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from ltxkern.compiled import nvrtc
from tests.csrc import nvrtc_12
from tests.csrc.shim_build import shim

BASELINE = Path(__file__).with_name("kernel_resources.json")
ARCHITECTURE = "sm_90"
ARCHITECTURES = (ARCHITECTURE, "sm_80", "sm_100", "sm_120")
_ROW = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def tool(name: str = "cuobjdump") -> Path | None:
    """One that Triton brings, or None."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    return path if path.is_file() else None


def told(cubin: bytes, *options: str, by: str = "cuobjdump") -> str:
    """What a tool says of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.check_output([str(tool(by)), *options, file.name], text=True)


def require_nvrtc(what: str, *, read: bool = True) -> None:
    """Skips where there is no NVRTC, or no tool to `read` what it makes; `what` is then not tested."""
    try:
        nvrtc._nvrtc().getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"{what} NOT TESTED: {error}")
    if read and tool() is None:
        pytest.skip(f"{what} NOT TESTED: no cuobjdump; triton brings one")


def kernels_by_header() -> dict[str, list[str]]:
    """Every kernel that a csrc/cuda/*.cu registers."""
    result: dict[str, list[str]] = defaultdict(list)
    for kernel in shim().kernels():
        result[nvrtc.header_of(kernel)].append(kernel)
    return dict(result)


def measure(kernels: list[str], architecture: str = ARCHITECTURE) -> dict[str, dict[str, int]]:
    """Registers, stack and local bytes of kernels of one header."""
    cubin, names = nvrtc.compile_cubin(kernels, architecture)
    text = told(cubin, "--dump-resource-usage")
    rows = {name: (int(r), int(stack), int(local)) for name, r, stack, _, local in _ROW.findall(text)}
    return {
        kernel: {"registers": rows[name][0], "stack": rows[name][1], "local": rows[name][2]}
        for kernel, name in zip(kernels, names, strict=True)
    }


def _told_of_spills(kernels: list[str], architecture: str) -> list[str]:
    rows = measure(kernels, architecture)
    return [f"{kernel} on {architecture}: {row}" for kernel, row in rows.items() if row["stack"] or row["local"]]


def _spills_of_12(architecture: str) -> list[str]:
    library = nvrtc_12.library()
    assert library is not None, "pip install 'nvidia-cuda-nvrtc-cu12==12.8.*'"
    with tempfile.TemporaryDirectory() as folder:
        done = nvrtc_12.run(
            *(library, architecture, nvrtc.include_directory(), nvrtc.OPTIONS, kernels_by_header(), Path(folder))
        )
        found = [f"CUDA 12.8 on {architecture}: {done.stderr or done.stdout}"] if done.returncode else []
        for path in Path(folder).iterdir():
            rows = _ROW.findall(told(path.read_bytes(), "--dump-resource-usage"))
            found += [
                f"{name} by CUDA 12.8 on {architecture}: {stack} bytes of stack, {local} local"
                for name, _, stack, _, local in rows
                if int(stack) or int(local)
            ]
    return found


def spills() -> list[str]:
    """In words, every kernel that has local memory on an architecture, among those of its header or alone."""
    by_header = kernels_by_header()
    alone = [[kernel] for kernels in by_header.values() for kernel in kernels]
    work = [*itertools.product([*by_header.values(), *alone], ARCHITECTURES)]
    # In threads one of them may look for the compiler before it is loaded.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        found = [
            *pool.map(_spills_of_12, ARCHITECTURES),
            *pool.map(_told_of_spills, *zip(*work, strict=True), chunksize=8),
        ]
    return [*itertools.chain.from_iterable(found)]


def sources() -> str:
    """Digest of the kernels' sources and of how they are compiled."""
    return hashlib.sha256("\0".join((nvrtc.sources_hash(), *nvrtc.OPTIONS)).encode()).hexdigest()


def main() -> int:
    """Writes the baseline, or says why not."""
    if found := spills():
        print(*found, sep="\n", file=sys.stderr)
        return 1
    measured = {name: row for kernels in kernels_by_header().values() for name, row in measure(kernels).items()}
    registers = {name: row["registers"] for name, row in sorted(measured.items())}
    BASELINE.write_text(json.dumps({"sources": sources(), "registers": registers}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
