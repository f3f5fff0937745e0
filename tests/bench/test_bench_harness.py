"""The benchmark harness itself: cases, bytes, clocks, floors, wrong results, planted slow-downs, refusals."""

import json
import re
from dataclasses import replace

import bench_dit
import bench_gated_residual
import bench_hq
import cases
import compare
import counters
import harness
import machine
import pytest
import run_all
import timing
import torch
from accuracy import WrongResultError
from cases import Call, Case, Suite
from command_line import main
from harness import Run
from record import read_json, write_csv, write_json
from report import full_report
from suites import SUITES
from timing import CallTimer, Settings

import ltxkern

CPU = torch.device("cpu")
BRIEF = Settings(rounds=2, warmup_ms=0.01, rep_ms=0.01)
FACTS = {
    "cpu": "test",
    "threads": 1,
    "ltxkern": "0",
    "revision": "r",
    "torch": "t",
    "triton": None,
    "python": "p",
    "backends": ["torch"],
    "date": "d",
    "command": "c",
    "load_at_start": 0.0,
    "allocator": "default",
}


def tiny_suite(op, shape=(2, 3, 8)):
    def prepare(case, dtype, device, generator):
        x = torch.randn(case.shape, generator=generator).to(dtype)
        return Call(
            (x, x + 1, torch.ones(1, 1, case.shape[-1], dtype=dtype)), op=op, composition=lambda x, y, g: x + y * g
        )

    return Suite("gated_residual", (Case("tiny", shape, "small"), Case("huge", (1, 1 << 45), "large")), prepare)


def run_for(backends=("torch eager", "torch")):
    return Run(CPU, BRIEF, 1, backends=backends, facts=dict(FACTS), roof_values={"copy": 1e9})


@pytest.fixture(autouse=True)
def quick_roofs(monkeypatch):
    monkeypatch.setattr(harness.roofs, "copy_roof", lambda device, settings: 1e9)
    monkeypatch.setattr(harness.roofs, "gemm_roof", lambda device, dtype, settings: 1e12)


class Clock:
    """A clock that only the timed functions move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


def test_every_public_op_has_a_case():
    covered = {suite.op for suite in SUITES}
    stems = {"group_norm_silu", "pixel_norm_silu", "normalize_noise", "res2s", "combine_guidance", "merge_lora"}
    assert stems | {"dual_add", "rms_norm_modulate", "gated_residual", "qk_norm_rope"} == covered
    for suite in SUITES:
        assert cases.select_cases(suite, "small"), suite.op
        assert len({case.name for case in suite.cases}) == len(suite.cases)


def test_case_sets_and_names():
    suite = SUITES[0]
    names = {kind: {case.name for case in cases.select_cases(suite, kind)} for kind in cases.CASE_SETS}
    small, everything, large = names["small"], names["all"], names["large"]
    assert small < everything
    assert not everything & large
    assert names["all-large"] == everything | large
    assert [c.name for c in cases.select_cases(suite, "hunyuan_vae, ltx2_upsampler_small")] == [
        "hunyuan_vae",
        "ltx2_upsampler_small",
    ]
    with pytest.raises(ValueError, match="no case nonsense"):
        cases.select_cases(suite, "nonsense")


def test_bytes_count_expanded_dimensions_once():
    x = torch.zeros(4, 5, dtype=torch.bfloat16)
    assert cases.count_bytes([x, (x, 3)]) == 2 * 40
    assert cases.count_bytes(torch.zeros(1, 5).expand(7, 5)) == 20
    assert cases.count_bytes(x[:, ::2]) == 4 * 3 * 2


def test_floor_of_the_production_group_norm_is_two_units():
    call = SUITES[0].prepare(Case("x", (1, 64, 3, 5, 7)), torch.bfloat16, CPU, torch.Generator())
    unit = 64 * 3 * 5 * 7 * 2
    assert cases.floor_bytes(call, [call.args[0]]) == 2 * unit + 2 * 64 * 2


def test_timer_rotates_buffers_and_keeps_outputs():
    seen = []
    buffers = [(torch.zeros(1),) for _ in range(3)]
    timer = CallTimer(lambda x: seen.append(x.data_ptr()), buffers, CPU, BRIEF)
    timer.sample_round()
    expected = [b[0].data_ptr() for b in buffers]
    assert seen[:6] == expected * 2


def test_summary_ranks():
    summary = timing.summarise([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (summary.minimum, summary.p20, summary.median, summary.p80) == (1.0, 2.0, 3.5, 5.0)


def test_measured_rows_carry_floor_and_ratios():
    run = run_for()
    harness.run_suite(run, tiny_suite(ltxkern.gated_residual), "small")
    assert [r.provider for r in run.records] == ["torch eager", "ltxkern torch"]
    eager, ours = run.records
    assert ours.bytes == 3 * 48 * 2 + 8 * 2
    assert ours.floor_us == pytest.approx(ours.bytes / 1e9 * 1e6)
    assert ours.percent_of_roof == pytest.approx(100 * ours.floor_us / ours.median_us)
    assert ours.ratios["torch eager"] == pytest.approx(eager.median_us / ours.median_us)
    assert ours.contract == "rounded"
    assert eager.bit_equal
    report = full_report(run.results())
    assert "ltxkern torch" in report
    assert "Roof copy" in report


def test_planted_wrong_result_stops_the_op_with_its_error():
    def wrong(x, y, gate):
        result = ltxkern.gated_residual(x, y, gate)
        result[0, 0, 0] += 1.0
        return result

    suite = tiny_suite(wrong)
    run = run_for()
    harness.run_suite(run, replace(suite, cases=(suite.cases[0], replace(suite.cases[0], name="next"))), "small")
    assert run.records == []
    assert len(run.failures) == 1
    assert "error against fp64" in run.failures[0]["error"]
    assert run.failures[0]["case"] == "tiny bf16"
    assert "FAILED" in full_report(run.results())


def test_planted_nan_and_wrong_shape_are_wrong_results():
    for planted, words in (
        (lambda x, y, g: x * float("nan"), "not finite"),
        (lambda x, y, g: (x + y * g)[:, :1], "shapes"),
    ):
        run = run_for()
        with pytest.raises(WrongResultError, match=words):
            harness.measure_case(run, tiny_suite(planted), tiny_suite(planted).cases[0], "bf16")


def measured_with(monkeypatch, seconds):
    """Results of the real harness under a clock that the op moves by `seconds`, with 3 % of its own wobble."""
    clock = Clock()
    wobble = iter(range(10**9))

    def op(x, y, gate):
        clock.spend(seconds * (1 + 0.01 * (next(wobble) % 4)))
        return ltxkern.gated_residual(x, y, gate)

    original = CallTimer.__init__

    def with_clock(self, function, buffers, device, settings):
        original(self, function, buffers, device, settings, clock)

    monkeypatch.setattr(CallTimer, "__init__", with_clock)
    run = Run(CPU, Settings(2, 1, 10), 1, backends=("torch",), facts=dict(FACTS), roof_values={"copy": 1e9})
    harness.run_suite(run, tiny_suite(op), "small")
    monkeypatch.setattr(CallTimer, "__init__", original)
    return run.results()


def test_planted_slow_down_of_a_fifth_is_reported(monkeypatch, tmp_path, capsys):
    before, after = measured_with(monkeypatch, 100e-6), measured_with(monkeypatch, 120e-6)
    write_json(before, tmp_path / "a.json")
    write_json(after, tmp_path / "b.json")
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    text = capsys.readouterr().out
    assert "slower" in text
    assert "gated_residual" in text
    assert re.search(r"\+(19|20|21)\.\d %", text), text
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 0
    assert "nothing moved" in capsys.readouterr().out


def test_a_change_within_the_spread_is_unclear_and_no_failure():
    run = run_for()
    harness.run_suite(run, tiny_suite(ltxkern.gated_residual), "small")
    noisy = [replace(r, median_us=100.0, p20_us=80.0, p80_us=130.0) for r in run.records]
    before = replace(run.results(), records=noisy)
    after = replace(before, records=[replace(r, median_us=120.0) for r in noisy])
    text, slower = compare.report(before, after, 0.03)
    assert "nothing moved beyond its spread" in text
    assert text.count("| unclear |") == 2
    assert "+20.0 %" in text
    assert not slower
    after = replace(before, records=[replace(r, median_us=108.0) for r in noisy])
    assert "unclear" not in compare.report(before, after, 0.03)[0]


def test_a_row_says_how_far_eager_and_the_roofs_moved():
    run = run_for()
    harness.run_suite(run, tiny_suite(ltxkern.gated_residual), "small")
    quiet = [replace(r, median_us=100.0, p20_us=100.0, p80_us=100.0) for r in run.records]
    before = replace(run.results(), records=quiet)
    moved = [replace(r, median_us=130.0 if "ltxkern" in r.provider else 112.0) for r in quiet]
    text, slower = compare.report(before, replace(before, records=moved, roofs={"copy": 0.8e9}), 0.03)
    assert slower
    assert re.search(r"slower \| gated_residual .* ltxkern torch .*\+30.0 % .* \+12.0 %", text), text
    assert "the copy roof moved by -20 %" in text


@pytest.mark.parametrize("content", [None, "", "[1]", '{"schema": 0}'])
def test_files_that_are_no_results_are_usage_errors(tmp_path, capsys, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as status:
        compare.main([str(path), str(path)])
    assert status.value.code == 2
    assert "x.json" in capsys.readouterr().err


def test_other_machines_rows_and_failures_are_named():
    run = run_for()
    harness.run_suite(run, tiny_suite(ltxkern.gated_residual), "small")
    before = run.results()
    failure = {"op": "x", "case": "y", "error": "z"}
    after = replace(before, machine=before.machine | {"gpu": "H"}, records=before.records[:1], failures=[failure])
    text, bad = compare.report(before, after, 0.03)
    assert "gpu differs" in text
    assert "gone: gated_residual tiny bf16 ltxkern torch" in text
    assert "FAILED" in text
    assert bad


def test_results_files_round_trip(tmp_path):
    run = run_for()
    harness.run_suite(run, tiny_suite(ltxkern.gated_residual), "small")
    results = run.results()
    write_json(results, tmp_path / "r.json")
    assert read_json(tmp_path / "r.json") == results
    write_csv(results.records, tmp_path / "r.csv")
    lines = (tmp_path / "r.csv").read_text().splitlines()
    assert len(lines) == 1 + len(results.records)
    (tmp_path / "old.json").write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="schema"):
        read_json(tmp_path / "old.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would run them")
def test_large_cases_say_the_bytes_they_need(capsys):
    status = main(SUITES[0], ["--cases", "large", "--default-allocator"])
    out = capsys.readouterr().out
    assert status == 2
    assert f"({cases.needed_bytes(SUITES[0].cases[-1], torch.bfloat16)} bytes)" in out


def test_a_case_that_does_not_fit_is_refused_with_its_bytes():
    run = run_for()
    harness.run_suite(run, tiny_suite(ltxkern.gated_residual), "huge")
    assert run.records == []
    assert f"({cases.needed_bytes(Case('huge', (1, 1 << 45)), torch.bfloat16)} bytes)" in run.skipped[0]["reason"]


def test_check_mode_prints_errors_and_times_nothing(capsys):
    arguments = ["--check", "--default-allocator", "--backends", "torch eager,torch", "--cases", "audio"]
    assert main(bench_gated_residual.SUITE, arguments) == 0
    out = capsys.readouterr().out
    assert "gated_residual audio bf16 ltxkern torch: " in out
    assert "GB/s" not in out


def test_wrong_arguments_are_usage_errors(capsys):
    for arguments in (["--cases", "nonsense"], ["--dtypes", "int3"]):
        with pytest.raises(SystemExit):
            main(bench_gated_residual.SUITE, [*arguments, "--default-allocator"])
    with pytest.raises(SystemExit):
        run_all.main(["--ops", "nonsense"])
    assert "nonsense" in capsys.readouterr().err


def test_missing_peers_are_left_out_with_a_line():
    def absent():
        raise ImportError("No module named 'absent'")

    suite = tiny_suite(ltxkern.gated_residual)
    with_peer = replace(suite, prepare=lambda *args: replace(suite.prepare(*args), peers={"absent": absent}))
    run = run_for(backends=None)
    run.backends = ("torch eager", "absent")
    harness.run_suite(run, with_peer, "small")
    assert [s["reason"] for s in run.skipped] == ["not installed: No module named 'absent'"]


def test_a_crash_costs_its_case_and_no_other(capsys):
    def crashing(x, y, gate):
        raise RuntimeError("no kernel image")

    suite = tiny_suite(crashing)
    run = run_for()
    harness.run_suite(run, replace(suite, cases=(suite.cases[0], replace(suite.cases[0], name="next"))), "small")
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

    run = run_for()
    harness.run_suite(run, tiny_suite(later), "small")
    assert run.failures == [
        {"op": "gated_residual", "case": "tiny bf16", "error": "RuntimeError: illegal memory access"}
    ]
    assert "illegal memory access" in capsys.readouterr().err


def test_out_of_memory_leaves_the_case_out():
    def greedy(x, y, gate):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    run = run_for()
    harness.run_suite(run, tiny_suite(greedy), "small")
    assert run.failures == []
    assert "Tried to allocate 9 GiB" in run.skipped[0]["reason"]


@pytest.mark.parametrize("planted", [lambda x, y, g: x * float("nan"), lambda x, y, g: x[:, :1], lambda *args: 1 / 0])
def test_a_wrong_peer_is_left_out_and_ours_is_timed(planted):
    suite = tiny_suite(ltxkern.gated_residual)
    with_peer = replace(suite, prepare=lambda *args: replace(suite.prepare(*args), peers={"peer": lambda: planted}))
    run = run_for(("torch eager", "torch", "peer"))
    harness.run_suite(run, with_peer, "small")
    assert run.failures == []
    assert [r.provider for r in run.records] == ["torch eager", "ltxkern torch"]
    assert [s["provider"] for s in run.skipped] == ["peer"]


def test_budget_shares_what_is_left_and_shortens_the_samples():
    clock = Clock()
    budget = harness.Budget(10.0, 5, clock)
    settings = Settings(3, 25, 100)
    budget.begin_case()
    clock.spend(1.0)
    assert budget.fit(settings, 2) == settings
    short = budget.fit(settings, 8)
    assert short.milliseconds(8) == pytest.approx(1000)
    clock.spend(0.999)
    assert budget.fit(settings, 2) == settings.scaled(harness.SHORTEST)
    clock.spend(6.001)
    budget.begin_case()
    assert budget.fit(settings, 4).milliseconds(4) == pytest.approx(500)


def test_a_spent_budget_leaves_cases_out_with_the_reason():
    run = run_for()
    run.budget = harness.Budget(-1.0, 1)
    harness.run_suite(run, tiny_suite(ltxkern.gated_residual), "small")
    assert run.records == []
    assert run.skipped[0]["reason"] == "the time budget of -1 s is spent"


def test_an_interrupted_run_keeps_the_finished_ops(monkeypatch, tmp_path, capsys):
    first = tiny_suite(ltxkern.gated_residual)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_all, "SUITES", (first, replace(first, op="other", prepare=interrupt)))
    out = tmp_path / "r.json"
    arguments = [
        "--default-allocator",
        "--rounds",
        "1",
        "--rep",
        "1",
        "--warmup",
        "1",
        "--backends",
        "torch eager,torch",
    ]
    assert run_all.main([*arguments, "--output-json", str(out)]) == 130
    assert [r.provider for r in read_json(out).records] == ["torch eager", "ltxkern torch"]
    assert "interrupted" in capsys.readouterr().err


def test_a_run_of_some_ops_does_not_replace_the_machines_results_file(monkeypatch, tmp_path):
    monkeypatch.setattr(run_all, "SUITES", (tiny_suite(ltxkern.gated_residual),))
    monkeypatch.setattr(run_all, "RESULTS", tmp_path)
    arguments = [
        "--default-allocator",
        "--rounds",
        "1",
        "--rep",
        "1",
        "--warmup",
        "1",
        "--backends",
        "torch eager,torch",
    ]
    assert run_all.main([*arguments, "--ops", "gated_residual"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert run_all.main(arguments) == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_small_calls_get_enough_buffers_for_a_cold_cache(monkeypatch):
    monkeypatch.setattr(machine, "last_level_cache", lambda device: 60 << 20)
    monkeypatch.setattr(machine, "free_bytes", lambda device: 139 << 30)
    assert counters.buffer_count(129_000, CPU) * 129_000 >= 3 * (60 << 20)


def test_a_cache_that_stays_warm_is_said(monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1 << 20)
    run = run_for()
    harness.run_suite(run, tiny_suite(ltxkern.gated_residual), "tiny")
    assert {r.note for r in run.records} == {harness.WARM}


def test_the_fastest_copy_of_the_run_is_the_roof_of_all_its_rows(monkeypatch):
    rates = iter([2e9, 1e9, 4e9])
    monkeypatch.setattr(harness.roofs, "copy_roof", lambda device, settings: next(rates))
    run = run_for()
    run.roof_values = {}
    for _ in range(3):
        harness.run_suite(run, tiny_suite(ltxkern.gated_residual), "small")
    results = run.results()
    assert results.roofs == {"copy": 4e9}
    assert {r.floor_us for r in results.records} == {results.records[0].bytes / 4e9 * 1e6}
    assert results.records[0].percent_of_roof == pytest.approx(
        100 * results.records[0].floor_us / results.records[0].median_us
    )
    assert "CAUTION: the copy ran at 1 to 4 GB/s" in full_report(results)


def test_a_transformer_forward_is_held_to_diffusers():
    right = (torch.randn(2, 3), torch.randn(4))
    assert bench_dit.distance(right, right) == 0.0
    far = bench_dit.distance((right[0], right[1] * 1.5), right)
    assert far == pytest.approx(0.5)
    bench_dit.check_distance("x", 1e-3, torch.bfloat16, 48)
    for wrong in (far, float("nan")):
        with pytest.raises(WrongResultError, match="distance from diffusers"):
            bench_dit.check_distance("x", wrong, torch.bfloat16, 48)


def test_sizes_of_whole_runs_are_checked(capsys):
    assert bench_hq.size_of("512x768x25") == (512, 768, 25)
    for wrong in ("512x768", "axbxc", "512"):
        with pytest.raises(SystemExit):
            bench_hq.main(["--size", wrong, "--default-allocator"])
    assert "HEIGHTxWIDTHxFRAMES" in capsys.readouterr().err


def test_published_commands_hold_no_folders_of_the_machine(monkeypatch):
    given = ["bench/run_all.py", "--report", "/home/me/x.md", "--output-json=/home/me/y.json", "--cases", "small"]
    monkeypatch.setattr(machine.sys, "argv", [str(machine.ROOT / given[0]), *given[1:]])
    command = machine.describe(CPU, 1)["command"]
    assert command == "python bench/run_all.py --report x.md --output-json=y.json --cases small"
