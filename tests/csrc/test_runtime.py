"""Launching on a device, without one: shared memory is asked for, what the device holds is asked, captures and drivers are heeded.

The prebuilt tier's runtime source runs against a stand-in for the CUDA runtime, the NVRTC tier against one for the driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import ltxkern
from ltxkern.compiled import driver, extension, nvrtc
from ltxkern.compiled.steps import Launch
from tests.csrc.on_shim import on_shim
from tests.csrc.shim_build import shim
from tests.ops.contract import noise

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
# Of a kernel with 400 static bytes: what the device is, the launch, and how many it holds at once.
HELD = [
    ({}, ("held", 1000), 2 * 132),
    ({"blocks": 1}, ("held", 100 * KIB), 132),
    ({"blocks": 0}, ("held", 0), 0),
    ({}, ("held", 227 * KIB), 0),
    ({}, ("cooperative", 100 * KIB), 2 * 132),
    ({"sees_cooperative": 0}, ("cooperative", 0), 0),
]
over_held = pytest.mark.parametrize(("planted", "asked", "wanted"), HELD, ids=str)


def built(folder: Path, *options: str) -> Path:
    """The stand-in's program."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("LAUNCHING ON CUDA NOT TESTED: no C++ compiler")
    target = folder / "runtime"
    sources = [str(HERE / "fake_cuda" / "runtime.cpp"), str(CSRC / "runtime_cuda.cu")]
    flags = ["-std=c++17", f"-I{HERE / 'fake_cuda'}", f"-I{CSRC}", *options]
    done = subprocess.run(
        [compiler, *flags, "-x", "c++", *sources, "-o", target], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return target


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("runtime"))


def told(program: Path, *words: Any, static: int = 400) -> list[str]:
    """What the stand-in's program prints."""
    return subprocess.check_output([program, str(static), *map(str, words)], text=True).splitlines()


def planting(planted: dict[str, int]) -> list[Any]:
    return [word for name, value in planted.items() for word in (f"plant:{name}", value)]


@over_programs
def test_prebuilt(program: Path, static: int, programs: list[int]) -> None:
    words = [word for kind in ("prepare", "launch") for size in programs for word in (kind, size)]
    assert told(program, *words, static=static) == ["ok"]


def test_the_stand_in_refuses_what_was_not_asked_for(program: Path) -> None:
    assert told(program, "launch", 48 * KIB, static=8192) == ["kernel launch: invalid argument"]


def test_prebuilt_launches_together_what_waits_for_one_another(program: Path) -> None:
    plain, together = ("launch", 0), ("plant:asks_cooperative", 1, "together", 0)
    assert told(program, *plain, *together) == ["ok"]
    for wrong in (("together", 0), ("plant:asks_cooperative", 1, "launch", 0)):
        assert told(program, *wrong) == ["kernel launch: invalid argument"]


@over_held
def test_prebuilt_asks_what_the_device_holds(
    program: Path, planted: dict[str, int], asked: tuple[str, int], wanted: int
) -> None:
    assert told(program, *planting(planted), *asked) == [str(wanted), "ok"]


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ({}, ""),
        ({"devices": 0}, "no CUDA device: no CUDA-capable device is detected"),
        ({"driver": 0}, "no CUDA device: there is no NVIDIA driver"),
        (
            {"driver": 12040},
            "the NVIDIA driver supports CUDA 12.4, this build needs 13.0: update the driver to 580 or newer, "
            "or install the wheel for CUDA 12.8, whose version ends in +cu128",
        ),
    ],
)
def test_prebuilt_names_an_old_driver(program: Path, planted: dict[str, int], words: str) -> None:
    assert told(program, *planting(planted), "unavailable", 0) == [words, "ok"]


def test_a_build_for_cuda_12_needs_no_other_wheel(tmp_path: Path) -> None:
    older = built(tmp_path, "-DCUDART_VERSION=12080")
    assert told(older, "plant:driver", 12000, "unavailable", 0, "plant:driver", 11080, "unavailable", 0) == [
        "",
        "the NVIDIA driver supports CUDA 11.8, this build needs 12.8: update the driver to 525 or newer",
        "ok",
    ]


def test_prebuilt_names_a_device_it_has_no_code_for(program: Path) -> None:
    words = "this build has no code for compute capability 11.0: rebuild it with TORCH_CUDA_ARCH_LIST=11.0"
    assert told(program, "unserved", 0, "plant:load", 209, "unserved", 0) == ["", words, "ok"]
    assert told(program, "plant:load", 222, "unserved", 0)[0].startswith("the kernels of this build do not load: ")


class Driver:
    """The driver's rules: no more dynamic shared memory than a function was set to, nothing loaded while a thread captures."""

    def __init__(self, static: int, **planted: int) -> None:
        self.static, self.dynamic, self.mode = static, 48 * KIB - static, 0
        self.planted = {"blocks": 2, "sees_cooperative": 1, "version": 13000} | planted
        self.loads = self.launches = self.together = 0

    def cuFuncGetAttribute(self, value: Any, attribute: int, function: Any) -> int:  # noqa: N802
        value._obj.value = {0: 512, 1: self.static, 8: self.dynamic}[attribute]
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:  # noqa: N802
        if attribute == 8:
            assert value + self.static <= 227 * KIB
            self.dynamic = value
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:  # noqa: N802
        value._obj.value = {16: 132, 95: self.planted["sees_cooperative"], 97: 227 * KIB}[attribute]
        return 0

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(  # noqa: N802
        self, found: Any, function: Any, block: int, shared: ctypes.c_size_t
    ) -> int:
        found._obj.value = self.planted["blocks"] if shared.value <= self.dynamic else 0
        return 0

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:  # noqa: N802
        self.mode, mode._obj.value = mode._obj.value, self.mode
        return 0

    def cuModuleLoadData(self, module: Any, image: bytes) -> int:  # noqa: N802
        assert self.mode == 2
        self.loads += 1
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:  # noqa: N802
        function._obj.value = self.loads
        return 0

    def cuLaunchKernelEx(self, config: Any, function: Any, pointers: Any, extra: Any) -> int:  # noqa: N802
        assert function.value
        given = config._obj
        assert given.shared_bytes <= self.dynamic
        self.launches += 1
        self.together += given.attribute_count and (given.attributes[0].id, given.attributes[0].value[0]) == (2, 1)
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self.planted["version"]
        return 0


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a `Driver` of the given kind below the NVRTC tier, with nothing loaded."""

    def planted(static: int = 400, **more: int) -> Driver:
        fake = Driver(static, **more)
        monkeypatch.setattr(driver, "library", lambda: fake)
        monkeypatch.setattr(driver, "on_device", lambda index: contextlib.nullcontext())
        monkeypatch.setattr(nvrtc, "cubin", lambda kernel, architecture: (b"cubin", kernel))
        monkeypatch.setattr(nvrtc, "_functions", {})
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
        return fake

    return planted


@over_programs
def test_nvrtc(static: int, programs: list[int], plant: Any) -> None:
    fake = plant(static)
    for size in [*programs, *programs]:
        driver.allow_shared(ctypes.c_void_p(1), size)
        assert size <= fake.dynamic
    assert fake.dynamic >= max(programs)


@over_held
def test_nvrtc_asks_what_the_device_holds(
    planted: dict[str, int], asked: tuple[str, int], wanted: int, plant: Any
) -> None:
    fake, (word, size) = plant(**planted), asked
    for _ in range(2):
        assert nvrtc.held("kernel", 256, size, word == "cooperative", 0) == wanted
    assert fake.loads == 1


def test_the_device_is_asked_once_for_a_kernel_and_configuration(plant: Any) -> None:
    fake = plant()
    for size in (0, 1000, 0, 1000):
        assert extension.held("nvrtc", 0, "a kernel asked for here", 256, size, False) == 2 * 132
        fake.planted["blocks"] = 2 if size == 0 else 7
    extension.held.cache_clear()


class OnDevice:
    """A tensor of a device, as far as a program looks."""

    device = torch.device("cuda", 0)

    def data_ptr(self) -> int:
        return 256


def test_nvrtc_refuses_to_load_within_a_capture(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a step is launched; a program whose kernels are loaded is captured without a further look."""
    fake, capturing = plant(), True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    first, second = (
        Launch(name, (1,), 32, {"size": 1}, shared_bytes=60 * KIB, cooperative=name == "second")
        for name in ("first", "second")
    )
    given: Any = OnDevice()
    both, one = nvrtc.program([first, second], 1), nvrtc.program([first], 1)
    words = "is not loaded yet, and a CUDA graph capture is no time .*: make the same call once before the capture"
    with pytest.raises(RuntimeError, match=f"^first {words}"):
        both(given)
    with pytest.raises(RuntimeError, match=f"^first {words}"):
        nvrtc.held("first", 256, 0, False, 0)
    capturing = False
    one(given)
    capturing = True
    with pytest.raises(RuntimeError, match=f"^second {words}"):
        both(given)
    assert fake.launches == 1
    capturing = False
    both(given)
    capturing = True
    both(given)
    assert (fake.launches, fake.loads, fake.together) == (5, 2, 2)


@pytest.mark.parametrize(
    ("cuda", "version", "words"),
    [
        (None, 12040, "no CUDA device: torch .* is a build for CPUs"),
        ("13.0", None, "no CUDA device: there is no NVIDIA driver"),
        (
            "13.0",
            12040,
            "supports CUDA 12.4, torch .* needs 13.0: update the driver to 580 or newer, or install torch for",
        ),
        ("12.8", 12000, r"no CUDA device: torch.cuda.is_available\(\) is false, CUDA_VISIBLE_DEVICES=7$"),
    ],
)
def test_why_torch_sees_no_device(
    cuda: str | None, version: int | None, words: str, plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(version=version or 0)
    if version is None:
        monkeypatch.setattr(driver, "library", lambda: ctypes.CDLL("libcuda.so.of-no-machine"))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert re.search(words, driver.no_device() or "")
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(extension, "_extension_missing", lambda: None)
    monkeypatch.setattr(extension, "module", shim)
    for tier in ("cuda", "nvrtc"):
        assert extension.unavailable(tier) == driver.no_device()


def test_a_process_forked_from_one_that_used_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert re.search("forked from another: start it by the method spawn", driver.no_device() or "")


def test_other_threads_run_during_a_launch() -> None:
    """A launch that waits until another thread has run: with the interpreter's lock held it would wait in vain."""
    x = noise(4, 16)

    def open_gate() -> None:
        while not shim().gate_is_awaited():
            time.sleep(0.001)
        shim().shut_gate(False)

    other = threading.Thread(target=open_gate, daemon=True)
    shim().shut_gate(True)
    other.start()
    with on_shim(), ltxkern.use_backend("cpu"):
        out = ltxkern.gated_residual(x, x, torch.ones(16))
    other.join()
    torch.testing.assert_close(out, x + x)
