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
from cases import CASE_SETS, Case, Suite, select_cases
from command_line import suites
from compare import SAME_MACHINE
from harness import Run, wanted_dtypes
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


def _run(config: pytest.Config) -> Run:
    """Device, threads, dtypes and backends of the session."""
    dtypes, backends = config.getoption("--dtypes"), config.getoption("--backends")
    return Run(
        machine.best_device(),
        Settings(),
        torch.get_num_threads(),
        dtypes=tuple(dtypes.split(",")) if dtypes else None,
        backends=tuple(part.strip() for part in backends.split(",")) if backends else None,
    )


def _wanted(config: pytest.Config) -> list[tuple[Suite, Case, str]]:
    """Every suite, case and dtype that --cases and --dtypes name; a name that no suite has is a usage error."""
    names, run = config.getoption("--cases"), _run(config)
    listed = set() if names in CASE_SETS else {name.strip() for name in names.split(",")}
    if unknown := listed - {case.name for suite in suites() for case in suite.cases}:
        raise pytest.UsageError(f"--cases: no op has {', '.join(sorted(unknown))}; or use {', '.join(CASE_SETS)}")
    triples = []
    for suite in suites():
        try:
            kept = wanted_dtypes(run, suite)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
        cases = [case for case in suite.cases if case.name in listed] if listed else select_cases(suite, names)
        triples += [(suite, case, dtype) for case in cases for dtype in kept]
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
    return _run(request.config)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What must be the same for two files to be comparable; `--benchmark-compare` warns where it is not."""
    facts = machine.describe(machine.best_device(), torch.get_num_threads())
    machine_info["ltxkern"] = {key: facts[key] for key in SAME_MACHINE if key in facts}
    # The frequency of this moment would make every file look like another machine's.
    for moving in ("hz_actual", "hz_actual_friendly", "hz_advertised", "hz_advertised_friendly"):
        machine_info.get("cpu", {}).pop(moving, None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """The rest of the facts of the scripts' results files: revision, command, load."""
    output_json["ltxkern"] = machine.describe(machine.best_device(), torch.get_num_threads())
