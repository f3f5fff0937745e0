"""The benchmark harness: cases, bytes, timers, floors, wrong results, refusals, budgets."""

from dataclasses import replace
from pathlib import Path

import cases
import harness
import machine
import pytest
import timing
import torch
from cases import Case
from command_line import suites
from providers import WrongResultError
from report import full_report
from timing import CallTimer, Settings
from tiny import BRIEF, CPU, run_for, tiny_suite

import ltxkern
from ltxkern import dispatch

GROUP_NORM = next(suite for suite in suites() if suite.op == "group_norm_silu")


def ran(suite, *backends, cases="small", **more):
    """A run that went through a suite."""
    run = run_for(*backends, **more)
    harness.run_suite(run, suite, cases)
    return run


class Clock:
    """A clock that only the test moves."""

    now = 0.0

    def __call__(self):
        return self.now


def test_every_public_op_has_a_case():
    stems = {Path(op.reference.__code__.co_filename).stem for op in dispatch._registry.values()}
    assert stems == {suite.op for suite in suites()}
    for suite in suites():
        assert cases.select_cases(suite, "small"), suite.op
        assert len({case.name for case in suite.cases}) == len(suite.cases)


def test_case_sets_and_names():
    names = {kind: {case.name for case in cases.select_cases(GROUP_NORM, kind)} for kind in cases.CASE_SETS}
    assert names["small"] < names["all"]
    assert not names["all"] & names["large"]
    assert names["all-large"] == names["all"] | names["large"]
    chosen = [case.name for case in cases.select_cases(GROUP_NORM, "hunyuan_vae, ltx2_upsampler_small")]
    assert chosen == ["hunyuan_vae", "ltx2_upsampler_small"]
    with pytest.raises(ValueError, match="no case nonsense"):
        cases.select_cases(GROUP_NORM, "nonsense")


def test_bytes_count_expanded_dimensions_once():
    x = torch.zeros(4, 5, dtype=torch.bfloat16)
    assert cases.count_bytes([x, (x, 3)]) == 2 * 40
    assert cases.count_bytes(torch.zeros(1, 5).expand(7, 5)) == 20
    assert cases.count_bytes(x[:, ::2]) == 4 * 3 * 2


def test_floor_of_the_production_group_norm_is_two_units():
    call = GROUP_NORM.prepare(Case("x", (1, 64, 3, 5, 7)), torch.bfloat16, CPU, torch.Generator())
    unit = 64 * 3 * 5 * 7 * 2
    assert cases.floor_bytes(call, [call.args[0]]) == 2 * unit + 2 * 64 * 2


def test_timer_rotates_buffers_and_keeps_outputs():
    seen = []
    buffers = [(torch.zeros(1),) for _ in range(3)]
    timer = CallTimer(lambda x: seen.append(x.data_ptr()), buffers, CPU, BRIEF)
    timer.sample_round()
    assert seen[:6] == [b[0].data_ptr() for b in buffers] * 2


def test_summary_ranks():
    summary = timing.summarise([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (summary.minimum, summary.p20, summary.median, summary.p80) == (1.0, 2.0, 3.5, 5.0)


def test_measured_rows_carry_floor_and_ratios():
    run = ran(tiny_suite(ltxkern.gated_residual))
    eager, ours = run.results().records
    assert [eager.provider, ours.provider] == ["torch eager", "ltxkern torch"]
    assert ours.gb_per_s == pytest.approx(ours.bytes / ours.median_us / 1e3)
    assert ours.bytes == 3 * 48 * 2 + 8 * 2
    assert ours.floor_us == pytest.approx(ours.bytes / 1e9 * 1e6)
    assert ours.percent_of_roof == pytest.approx(100 * ours.floor_us / ours.median_us)
    assert ours.ratios["torch eager"] == pytest.approx(eager.median_us / ours.median_us)
    assert ours.contract == "rounded"
    assert eager.bit_equal
    report = full_report(run.results())
    assert "ltxkern torch" in report
    assert "Roof copy" in report


def twice(suite):
    """The suite with its tiny case again, under the name "next"."""
    return replace(suite, cases=(suite.cases[0], replace(suite.cases[0], name="next")))


def test_planted_wrong_result_stops_the_op_with_its_error():
    def wrong(x, y, gate):
        result = ltxkern.gated_residual(x, y, gate)
        result[0, 0, 0] += 1.0
        return result

    run = ran(twice(tiny_suite(wrong)))
    assert run.records == []
    (failure,) = run.failures
    assert "error against fp64" in failure["error"]
    assert failure["case"] == "tiny bf16"
    assert "FAILED" in full_report(run.results())


@pytest.mark.parametrize(
    ("planted", "words"),
    [(lambda x, y, g: x * float("nan"), "not finite"), (lambda x, y, g: (x + y * g)[:, :1], "shapes")],
)
def test_planted_nan_and_wrong_shape_are_wrong_results(planted, words):
    suite = tiny_suite(planted)
    with pytest.raises(WrongResultError, match=words):
        harness.measure_case(run_for(), suite, suite.cases[0], "bf16")


def test_a_case_that_does_not_fit_is_refused_with_its_bytes():
    run = ran(tiny_suite(ltxkern.gated_residual), cases="huge")
    assert run.records == []
    assert f"({cases.needed_bytes(Case('huge', (1, 1 << 45)), torch.bfloat16)} bytes)" in run.skipped[0]["reason"]


def test_missing_peers_are_left_out_with_a_line():
    def absent():
        raise ImportError("No module named 'absent'")

    run = ran(tiny_suite(ltxkern.gated_residual, peers={"absent": absent}), "torch eager", "absent")
    assert [s["reason"] for s in run.skipped] == ["not installed: No module named 'absent'"]


def test_a_crash_costs_its_case_and_no_other(capsys):
    def crashing(x, y, gate):
        raise RuntimeError("no kernel image")

    run = ran(twice(tiny_suite(crashing)))
    assert [f["case"] for f in run.failures] == ["tiny bf16", "next bf16"]
    assert "ltxkern torch: RuntimeError: no kernel image" in run.failures[0]["error"]
    assert [(r.case, r.provider) for r in run.records] == [("tiny", "torch eager"), ("next", "torch eager")]


def test_a_crash_while_timing_is_kept_as_a_failure(capsys):
    calls = []

    def later(x, y, gate):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("illegal memory access")
        return ltxkern.gated_residual(x, y, gate)

    error = "RuntimeError: illegal memory access"
    assert ran(tiny_suite(later)).failures == [{"op": "gated_residual", "case": "tiny bf16", "error": error}]
    assert error.split(": ")[1] in capsys.readouterr().err


def test_out_of_memory_leaves_the_case_out():
    def greedy(x, y, gate):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    run = ran(tiny_suite(greedy))
    assert run.failures == []
    assert "Tried to allocate 9 GiB" in run.skipped[0]["reason"]


@pytest.mark.parametrize("planted", [lambda x, y, g: x * float("nan"), lambda x, y, g: x[:, :1], lambda *args: 1 / 0])
def test_a_wrong_peer_is_left_out_and_ours_is_timed(planted):
    suite = tiny_suite(ltxkern.gated_residual, peers={"peer": lambda: planted})
    run = ran(suite, "torch eager", "torch", "peer")
    assert run.failures == []
    assert [r.provider for r in run.records] == ["torch eager", "ltxkern torch"]
    assert [s["provider"] for s in run.skipped] == ["peer"]


def test_budget_shares_what_is_left_and_shortens_the_samples():
    clock = Clock()
    budget = harness.Budget(10.0, 5, clock)
    settings = Settings(3, 25, 100)
    budget.begin_case()
    clock.now += 1.0
    assert budget.fit(settings, 2) == settings
    assert budget.fit(settings, 8).milliseconds(8) == pytest.approx(1000)
    clock.now += 0.999
    assert budget.fit(settings, 2) == settings.scaled(harness.SHORTEST)
    clock.now += 6.001
    budget.begin_case()
    assert budget.fit(settings, 4).milliseconds(4) == pytest.approx(500)


def test_a_spent_budget_leaves_cases_out_with_the_reason():
    run = ran(tiny_suite(ltxkern.gated_residual), budget=harness.Budget(-1.0, 1))
    assert run.records == []
    assert run.skipped[0]["reason"] == "the time budget of -1 s is spent"


def test_small_calls_get_enough_buffers_for_a_cold_cache(monkeypatch):
    monkeypatch.setattr(machine, "last_level_cache", lambda device: 60 << 20)
    monkeypatch.setattr(machine, "free_bytes", lambda device: 139 << 30)
    assert timing.buffer_count(129_000, CPU) * 129_000 >= 3 * (60 << 20)


def test_a_cache_that_stays_warm_is_said(monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1 << 20)
    assert {r.note for r in ran(tiny_suite(ltxkern.gated_residual), cases="tiny").records} == {harness.WARM}


def test_the_fastest_copy_of_the_run_is_the_roof_of_all_its_rows(monkeypatch):
    rates = iter([2e9, 1e9, 4e9])
    monkeypatch.setattr(timing, "copy_roof", lambda device, settings: next(rates))
    run = run_for()
    for _ in range(3):
        harness.run_suite(run, tiny_suite(ltxkern.gated_residual), "small")
    results = run.results()
    first = results.records[0]
    assert results.roofs == {"copy": 4e9}
    assert {r.floor_us for r in results.records} == {first.bytes / 4e9 * 1e6}
    assert first.percent_of_roof == pytest.approx(100 * first.floor_us / first.median_us)
    assert "CAUTION: the copy ran at 1 to 4 GB/s" in full_report(results)
