"""Builds the CPU shim, every csrc/cuda/*.cu as a Python module that runs on fibers; kept under build/, so a second run is quick."""

from __future__ import annotations

import fcntl
import filecmp
import functools
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def build(*, sanitize: bool = False) -> Path:
    """The built module's path; skips, with the reason, where there is no compiler, CMake or pybind11."""
    pybind11 = pytest.importorskip("pybind11")
    beside = str(Path(sys.executable).parent)
    cmake = shutil.which("cmake", path=beside) or shutil.which("cmake")
    ninja = shutil.which("ninja", path=beside) or shutil.which("ninja")
    if cmake is None or ninja is None or shutil.which("c++") is None:
        pytest.skip("CUDA KERNELS NOT TESTED: the CPU shim needs cmake, ninja and a C++ compiler")
    folder = ROOT / "build" / f"shim-{sys.implementation.cache_tag}{'-san' if sanitize else ''}"
    configure = [
        *(
            cmake,
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-S",
            str(ROOT / "tests/csrc/shim"),
            "-B",
            str(folder),
        ),
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DLTXK_SANITIZE={'ON' if sanitize else 'OFF'}",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        # Of several processes that start together one builds, and the others find everything done.
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [cmake, "--build", str(folder), "--parallel", "2"]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return published(next(folder.glob("_shim*.so")))


def published(made: Path) -> Path:
    """A copy that takes its place whole: the linker writes over its own output, which another process may have loaded."""
    place, fresh = (made.parent / folder / made.name for folder in ("whole", "fresh"))
    if not place.exists() or not filecmp.cmp(made, place, shallow=False):
        for path in (place, fresh):
            path.parent.mkdir(exist_ok=True)
        shutil.copy2(made, fresh)
        fresh.replace(place)
    return place


def load(path: Path) -> ModuleType:
    """The shim module at a path."""
    spec = importlib.util.spec_from_file_location("_shim", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.use_exchange_api(torch.Tensor.__dlpack_c_exchange_api__)
    return module


@functools.cache
def shim() -> ModuleType:
    """The shim module, built once a session."""
    return load(build())
