"""NVRTC compiles every kernel from the packaged headers; registers stay at the baseline; the cubin cache heals itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from ltxkern.compiled import nvrtc
from tests.csrc import kernel_resources

pytest.importorskip("cupy", reason="NVRTC TIER NOT TESTED: pip install 'ltxkern[cuda13]'")

# A few registers more are noise of the compiler's version; a step towards fewer resident blocks is not.
SLACK = 8
HEADERS = sorted(
    path.name for path in (nvrtc.include_directory() / "ltxkern").glob("*.cuh") if "__global__" in path.read_text()
)


@pytest.fixture(autouse=True)
def nvrtc_works() -> None:
    kernel_resources.require_nvrtc("NVRTC TIER", read=False)


@pytest.mark.slow
@pytest.mark.parametrize("header", HEADERS)
def test_every_kernel_compiles_within_its_registers(header: str) -> None:
    kernel_resources.require_nvrtc("KERNEL RESOURCES")
    baseline = json.loads(kernel_resources.BASELINE.read_text())["registers"]
    for kernel, row in kernel_resources.measure(kernel_resources.kernels_by_header()[header]).items():
        assert row["stack"] == row["local"] == 0, f"{kernel} uses local memory: {row}"
        assert kernel in baseline, f"{kernel} is not in the baseline: run python -m tests.csrc.kernel_resources"
        assert row["registers"] <= baseline[kernel] + SLACK, f"{kernel}: {row} against {baseline[kernel]} registers"


def test_no_kernel_has_local_memory_on_any_architecture() -> None:
    """Of the sources that the baseline was written from none has, or it would not have been written."""
    if json.loads(kernel_resources.BASELINE.read_text())["sources"] != kernel_resources.sources():
        pytest.fail("the kernels are not those of the baseline: run python -m tests.csrc.kernel_resources")


def test_a_spill_leaves_no_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    none, spilled = {"registers": 64, "stack": 0, "local": 0}, {"registers": 64, "stack": 8, "local": 0}
    monkeypatch.setattr(kernel_resources, "measure", lambda kernels, architecture: {"good": none, "bad": spilled})
    found = kernel_resources._told_of_spills(["good", "bad"], "sm_80")
    assert [line.partition(":")[0] for line in found] == ["bad on sm_80"]
    monkeypatch.setattr(kernel_resources, "spills", lambda: found)
    monkeypatch.setattr(kernel_resources, "BASELINE", tmp_path / "baseline.json")
    assert kernel_resources.main() == 1
    assert capsys.readouterr().err.startswith("bad on sm_80")
    assert not [*tmp_path.iterdir()]


def test_cubins_are_cached_and_damage_is_healed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTXKERN_CACHE", str(tmp_path))
    first = nvrtc.cubin("ltxk::group_norm_finalize", "sm_90")
    (path,) = (tmp_path / "cubin").iterdir()
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.cubin("ltxk::group_norm_finalize", "sm_90") == first
    monkeypatch.undo()
    monkeypatch.setenv("LTXKERN_CACHE", str(tmp_path))
    content = path.read_bytes()
    path.write_bytes(content[:-7] + b"garbage")
    assert nvrtc.cubin("ltxk::group_norm_finalize", "sm_90")[1] == first[1]
    assert path.read_bytes() != content[:-7] + b"garbage"
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name]


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(KeyError, match="no packaged header defines the kernel"):
        nvrtc.header_of("ltxk::no_such_kernel<float>")


def test_a_bad_instantiation_shows_the_compilers_log() -> None:
    with pytest.raises(RuntimeError, match="NVRTC could not compile"):
        nvrtc.compile_cubin(["ltxk::group_norm_stats<ltxk::no_such_type, 8>"], "sm_90")
