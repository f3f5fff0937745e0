"""Every Triton kernel compiles for sm_80, 90, 100 and 120, and needs no more than the recorded registers and stack.

The baseline is written anew by `python -m tests.triton.aot_compile tests/triton/aot_baseline.json`; look at what changed first.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import python

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

HERE = Path(__file__).resolve().parent
# Compiler releases differ by a few registers; 16 more on a 256-thread program is where occupancy begins to change.
REGISTER_SLACK = 16


def _run(module: str, *arguments: object) -> str:
    return python("-m", f"tests.triton.{module}", *arguments, TRITON_INTERPRET="0").stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    path = tmp_path_factory.mktemp("aot") / "report.json"
    _run("aot_compile", path)
    return json.loads(path.read_text(encoding="utf-8"))


BASELINE = json.loads((HERE / "aot_baseline.json").read_text(encoding="utf-8"))


def test_every_launch_has_a_baseline(measured: dict[str, dict[str, int]]) -> None:
    assert measured.keys() == BASELINE.keys()


def test_nothing_spills() -> None:
    assert [name for name, row in BASELINE.items() if row["stack"]] == []


@pytest.mark.parametrize("name", BASELINE)
def test_resources_stay_within_the_baseline(name: str, measured: dict[str, dict[str, int]]) -> None:
    got, limit = measured[name], BASELINE[name]
    assert got["registers"] <= limit["registers"] + REGISTER_SLACK
    assert got["stack"] <= limit["stack"]
    for key in ("loads128", "stores128"):
        assert got.get(key, 0) >= limit.get(key, 0), f"fewer 128-bit accesses ({key})"


def test_small_cases_compile_as_a_device_would_specialise_them() -> None:
    assert int(_run("compile_small_cases", "90")) >= 60
