"""CUDA 12.8's compiler takes every template of the kernels: it has broken down over code that 13.0 takes."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from ltxkern.compiled import nvrtc
from tests.csrc import nvrtc_12
from tests.csrc.kernel_resources import kernels_by_header


@pytest.fixture(scope="module")
def library() -> Path:
    path = nvrtc_12.library()
    if path is None or nvrtc_12.release(path) != nvrtc_12.RELEASE:
        pytest.skip("CUDA 12 NOT TESTED: pip install 'nvidia-cuda-nvrtc-cu12==12.8.*'")
    return path


def _compile(library: Path, kernels: Mapping[str, Sequence[str]], folder: Path) -> subprocess.CompletedProcess[str]:
    return nvrtc_12.run(library, "sm_90", nvrtc.include_directory(), nvrtc.OPTIONS, kernels, folder)


def _kind(kernel: str) -> str:
    """Dtypes are like each other; of a kind the last is compiled, which is bf16 where there is one."""
    return kernel.replace("bf16", "T").replace("f16", "T").replace("float", "T")


def test_every_template_compiles(library: Path, tmp_path: Path) -> None:
    kinds = {
        header: [*{_kind(one): one for one in sorted(each, key=lambda name: "bf16" in name)}.values()]
        for header, each in kernels_by_header().items()
    }
    done = _compile(library, kinds, tmp_path)
    assert done.returncode == 0, f"{done.stdout.split()[-1]}: {done.returncode} {done.stderr}"
    assert done.stdout.split() == [*kinds]


def test_what_does_not_compile_is_told(library: Path, tmp_path: Path) -> None:
    done = _compile(library, {"switch_lora.cuh": ["ltxk::switch_lora<ltxk::no_such_type>"]}, tmp_path)
    assert done.returncode == 1
    assert "no_such_type" in done.stderr
