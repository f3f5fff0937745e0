"""Every case as a pytest-benchmark test: checked against fp64, then timed; `--benchmark-compare` works on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ltxkern
from cases import CASE_SETS, DTYPES, Case, Suite, clone_args, floor_bytes
from harness import Run, refusal
from providers import BASELINES, check, is_wanted, providers_of, reference_of
from timing import CallTimer, buffer_count

NAMES = [*BASELINES, *(f"ltxkern {backend}" for backend in ltxkern.backends())]


@pytest.mark.parametrize("provider", NAMES)
def test_op(
    request: pytest.FixtureRequest, benchmark: Any, bench_run: Run, suite: Suite, case: Case, dtype: str, provider: str
) -> None:
    """One provider on one case. The table holds wall times up to the end of each call; device times stand in extra_info."""
    if not is_wanted(provider, bench_run.backends):
        pytest.skip(f"{provider} is not among --backends")
    reason = refusal(bench_run, case, dtype, by_name=request.config.getoption("--cases") not in CASE_SETS)
    if reason is not None:
        pytest.skip(f"{case.name} {reason}")
    device = bench_run.device
    with torch.no_grad():
        call = suite.prepare(case, DTYPES[dtype], device, torch.Generator(device).manual_seed(0))
        found, skipped = providers_of(call, device, [provider])
        if not found:
            reasons = "; ".join(skip.reason for skip in skipped)
            (pytest.fail if any(skip.crashed for skip in skipped) else pytest.skip)(reasons)
        reference = reference_of(call)
        function = found[0].function
        check(provider, call, function, reference, bounded=found[0].ours)
        moved = floor_bytes(call, reference.composed)
        del reference
        buffers = [call.args, *[clone_args(call.args) for _ in range(buffer_count(moved, device) - 1)]]
        benchmark.group = f"{suite.op} {case.name} {dtype}"
        benchmark.extra_info.update(bytes=moved, flops=call.flops, shape=list(case.shape))
        timer = CallTimer(function, buffers, device, bench_run.settings)
        benchmark.extra_info["timer"] = timer.kind
        benchmark.pedantic(timer.call_once, rounds=20, iterations=1, warmup_rounds=2)
        if device.type == "cuda":
            samples = timer.sample_rounds()
            benchmark.extra_info["device_median_s"] = sorted(samples)[len(samples) // 2]
