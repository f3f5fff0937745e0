"""Options and machine facts of the pytest-benchmark form: `pytest bench --cases small --benchmark-json F`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import machine
from cases import Case, Suite, select_cases
from harness import Run
from suites import SUITES
from timing import Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options that the scripts have too."""
    parser.addoption("--cases", default="small", help="small, all, large, all-large, or case names")
    parser.addoption("--dtypes", default=None, help="of bf16,fp16,fp32,fp64")
    parser.addoption("--backends", default=None, help="providers, e.g. 'torch eager,cpu'")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say when the allocator returns pages, which shows in every CPU figure."""
    if not torch.cuda.is_available() and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        return (
            "bench: glibc's default allocator; set MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=68719476736"
        )
    return None


def _wanted(config: pytest.Config) -> list[tuple[Suite, Case, str]]:
    chosen = config.getoption("--dtypes")
    triples = []
    names = config.getoption("--cases")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for suite in SUITES:
        dtypes = [
            d for d in (chosen.split(",") if chosen else suite.default_dtypes(device)) if d in suite.allowed_dtypes
        ]
        if names in ("small", "all", "large", "all-large"):
            cases = select_cases(suite, names)
        else:
            cases = [case for case in suite.cases if case.name in names.split(",")]
        triples += [(suite, case, dtype) for case in cases for dtype in dtypes]
    return triples


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per case, dtype and provider."""
    if {"suite", "case", "dtype"} <= set(metafunc.fixturenames):
        wanted = _wanted(metafunc.config)
        ids = [f"{suite.op}-{case.name}-{dtype}" for suite, case, dtype in wanted]
        metafunc.parametrize(("suite", "case", "dtype"), wanted, ids=ids)


@pytest.fixture(scope="session")
def bench_run(request: pytest.FixtureRequest) -> Run:
    """Device and threads of the session."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    backends = request.config.getoption("--backends")
    wanted = tuple(part.strip() for part in backends.split(",")) if backends else None
    return Run(device, Settings(), torch.get_num_threads(), backends=wanted)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The same facts as in the scripts' results files."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    machine_info["ltxkern"] = machine.describe(device, torch.get_num_threads())
