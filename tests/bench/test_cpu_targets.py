"""The CPU targets: each names a case that exists, and a missed or absent figure counts as missed."""

import cpu_targets
import pytest
from cases import DTYPES, select_cases
from command_line import suites
from report import Record


@pytest.mark.parametrize("target", cpu_targets.TARGETS, ids=lambda t: f"{t.case}-{t.dtype}-{t.baseline}")
def test_a_target_names_a_case_that_exists(target: cpu_targets.Target) -> None:
    suite = next(suite for suite in suites() if suite.op == target.op)
    assert [case.name for case in select_cases(suite, target.case)] == [target.case]
    assert target.dtype in DTYPES
    assert target.dtype in (*suite.allowed_dtypes, *suite.dtypes)


def record(provider: str, minimum: float, target: cpu_targets.Target = cpu_targets.TARGETS[0]) -> Record:
    # The rounds of either side vary by 2 %.
    times = {"min_us": minimum, "median_us": 100.0, "p20_us": 98.0, "p80_us": 102.0}
    return Record(target.op, target.case, [], target.dtype, provider, **times, samples=5)


@pytest.mark.parametrize(("baseline", "verdict", "missed"), [(231.0, "met", 0), (229.0, "missed", 1)])
def test_ratios_are_of_the_best_calls(baseline: float, verdict: str, missed: int) -> None:
    target = cpu_targets.TARGETS[0]
    assert target.ratio == 2.3
    rows, count = cpu_targets.rows_of([target], [record(cpu_targets.OURS, 100.0), record(target.baseline, baseline)])
    assert rows[0][-1] == verdict
    assert count == missed


@pytest.mark.parametrize(
    ("target", "baseline", "verdict"),
    [(1.0, 97.0, "a tie: the rounds vary by 4 %"), (1.0, 95.0, "missed"), (1.0, 101.0, "met"), (2.0, 199.0, "missed")],
)
def test_not_slower_allows_for_the_spread_and_nothing_else_does(target: float, baseline: float, verdict: str) -> None:
    parity = cpu_targets.Target("merge_lora", "video_attn_r384", "bf16", cpu_targets.ADDMM, target)
    records = [record(cpu_targets.OURS, 100.0, parity), record(parity.baseline, baseline, parity)]
    rows, count = cpu_targets.rows_of([parity], records)
    assert rows[0][-1] == verdict
    assert count == (verdict == "missed")


def test_what_was_not_measured_is_missed() -> None:
    rows, count = cpu_targets.rows_of(cpu_targets.TARGETS, [record(cpu_targets.OURS, 100.0)])
    assert {row[-1] for row in rows} == {"not measured"}
    assert count == len(cpu_targets.TARGETS)
