"""Dynamic shared memory is asked for where it must be, and what one program was allowed no later program takes away.

The prebuilt tier's runtime source runs against a stand-in for the CUDA runtime, the NVRTC tier against one for the driver.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ltxkern.compiled import nvrtc

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
KIB = 1 << 10
# Static bytes of a kernel, and the dynamic bytes of its programs, each made before any is launched.
PROGRAMS = {
    "a smaller program after a larger one": (400, [200 * KIB, 60 * KIB]),
    "48 KiB beside static memory": (8 * KIB, [48 * KIB]),
    "just what needs no request": (8 * KIB, [40 * KIB]),
    "all of a block's memory": (1 * KIB, [226 * KIB]),
    "small, large, small": (0, [16 * KIB, 100 * KIB, 0]),
}
over_programs = pytest.mark.parametrize(("static", "programs"), PROGRAMS.values(), ids=PROGRAMS)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("LAUNCHING ON CUDA NOT TESTED: no C++ compiler")
    target = tmp_path_factory.mktemp("runtime") / "shared_memory"
    sources = [str(HERE / "fake_cuda" / "shared_memory.cpp"), str(CSRC / "runtime_cuda.cu")]
    command = [compiler, "-std=c++17", f"-I{HERE / 'fake_cuda'}", f"-I{CSRC}", "-x", "c++", *sources, "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


@over_programs
def test_prebuilt(program: Path, static: int, programs: list[int]) -> None:
    words = [word for kind in ("prepare", "launch") for size in programs for word in (kind, str(size))]
    assert subprocess.check_output([program, str(static), *words], text=True).strip() == "ok"


def test_the_stand_in_refuses_what_was_not_asked_for(program: Path) -> None:
    told = subprocess.check_output([program, "8192", "launch", str(48 * KIB)], text=True).strip()
    assert told == "kernel launch: invalid argument"


class Driver:
    """The driver's rule: a launch may have no more dynamic shared memory than its function was last set to."""

    def __init__(self, static: int) -> None:
        self.static = static
        self.dynamic = 48 * KIB - static

    def cuFuncGetAttribute(self, value: Any, attribute: int, function: Any) -> int:  # noqa: N802
        assert attribute == nvrtc._STATIC_SHARED
        value._obj.value = self.static
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:  # noqa: N802
        if attribute == nvrtc._MAX_DYNAMIC_SHARED:
            assert value + self.static <= 227 * KIB
            self.dynamic = value
        return 0


@over_programs
def test_nvrtc(static: int, programs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(static)
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(nvrtc, "_function", lambda kernel, device: None)
    monkeypatch.setattr(nvrtc, "_shared_allowed", {})
    for size in [*programs, *programs]:
        nvrtc._allow_shared("kernel", 0, size)
        assert size <= driver.dynamic
    assert driver.dynamic >= max(programs)
