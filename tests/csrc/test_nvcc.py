"""nvcc builds the whole extension for all architectures, spills being errors; the build is kept under build/."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, not_optimised, python

LIMIT = 8 << 20

pytestmark = [
    pytest.mark.nvcc,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="CUDA BUILD NOT TESTED: there is no nvcc on PATH"),
]


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension built for every architecture, as setup.py builds it; the CPU's kernels, which others test, not optimised."""
    target = tmp_path_factory.mktemp("built")
    # In one place, as the build is kept.
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LTXKERN_BUILD": "cuda",
        "LTXKERN_BUILD_DIR": str(build / f"test-nvcc-{sys.implementation.cache_tag}"),
        "MAX_JOBS": "2",
        **not_optimised(build),
    }
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(target)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return next((target / "ltxkern").glob("_C*.so"))


def shown(extension: Path, what: str) -> str:
    """What a process prints of the extension's module `m`."""
    load = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('_C', sys.argv[1]); m = u.module_from_spec(s)"
    )
    return python("-c", f"{load}; s.loader.exec_module(m); print({what})", extension).stdout


def test_size(extension: Path) -> None:
    assert extension.stat().st_size < LIMIT


def test_it_needs_no_driver_and_no_torch_library(extension: Path) -> None:
    needed = subprocess.check_output(["readelf", "-d", str(extension)], text=True)
    names = [line for line in needed.splitlines() if "NEEDED" in line]
    assert names
    assert not [line for line in names if any(word in line for word in ("torch", "c10", "libcuda", "cudart"))]


def test_it_loads_without_a_device_and_says_so(extension: Path) -> None:
    ctypes.CDLL(str(extension))
    assert shown(extension, "len(m.kernels()) > 0, m.cuda_unavailable()").startswith("True ")


def test_registered_kernels_are_those_of_the_shim(extension: Path) -> None:
    from tests.csrc.shim_build import shim

    assert shown(extension, "*m.kernels(), sep='\\n'").splitlines() == list(shim().kernels())


OTHER_NVCC = """#!/usr/bin/env bash
if [ "$*" = "--version" ]; then echo "Cuda compilation tools, release {release}, V{release}.131"; exit; fi
case "$*" in {unknown}) echo "nvcc fatal: Unsupported gpu architecture" >&2; exit 1;; esac
exec {nvcc} "$@"
"""


@pytest.mark.parametrize(
    ("release", "unknown", "processor", "architectures"),
    [
        ("12.4", "*_1[0-9][0-9]*", "x86_64", "80-real;90-real;90-virtual"),
        ("13.0", "*_101*", "aarch64", "110-real;87-real;80-real;90-real;100-real;120-real;120-virtual"),
    ],
)
def test_an_nvcc_builds_for_what_it_knows(
    tmp_path: Path, release: str, unknown: str, processor: str, architectures: str
) -> None:
    import pybind11

    other = tmp_path / "bin" / "nvcc"
    other.parent.mkdir()
    other.write_text(OTHER_NVCC.format(release=release, unknown=unknown, nvcc=shutil.which("nvcc")))
    other.chmod(0o755)
    folders = (str(other.parent), str(Path(sys.executable).parent), os.environ["PATH"])
    environment = os.environ | {"PATH": os.pathsep.join(folders)}
    environment.pop("CUDACXX", None)
    command = [
        *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-DLTXKERN_CUDA=ON"),
        *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"),
        # An override of the processor goes with one of the system.
        *(f"-DCMAKE_SYSTEM_PROCESSOR={processor}", "-DCMAKE_SYSTEM_NAME=Linux"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"CUDA ON {architectures}, OpenMP" in done.stdout
