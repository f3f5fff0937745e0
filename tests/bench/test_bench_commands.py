"""The commands of bench/: results files, what compare.py says of two, run_all.py, one op's script, whole models."""

import json
import re
from dataclasses import replace

import bench_dit
import bench_gated_residual
import bench_hq
import bench_patch
import cases
import compare
import harness
import machine
import pytest
import run_all
import torch
from command_line import main, suites
from providers import WrongResultError
from report import read_json, write_csv, write_json
from timing import CallTimer, Settings
from tiny import CPU, record, results, run_for, tiny_suite

import ltxkern

QUICK = ["--default-allocator", "--rounds", "1", "--rep", "1", "--warmup", "1", "--backends", "torch eager,torch"]


def measured_with(monkeypatch, seconds):
    """Results of the real harness under a clock that the op moves by `seconds`, with 3 % of its own wobble."""
    now, calls = 0.0, 0

    def op(x, y, gate):
        nonlocal now, calls
        now += seconds * (1 + 0.01 * (calls % 4))
        calls += 1
        return ltxkern.gated_residual(x, y, gate)

    original = CallTimer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(CallTimer, "__init__", lambda self, *args: original(self, *args, lambda: now))
        run = run_for("torch", settings=Settings(2, 1, 10))
        harness.run_suite(run, tiny_suite(op), "small")
    return run.results()


def test_planted_slow_down_of_a_fifth_is_reported(monkeypatch, tmp_path, capsys):
    one, other = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    for path, seconds in ((one, 100e-6), (other, 120e-6)):
        write_json(measured_with(monkeypatch, seconds), tmp_path / path)
    assert compare.main([one, other]) == 1
    text = capsys.readouterr().out
    assert "slower" in text
    assert "gated_residual" in text
    assert re.search(r"\+(19|20|21)\.\d %", text), text
    assert compare.main([one, one]) == 0
    assert "nothing moved" in capsys.readouterr().out


def pair(eager, ours, **times):
    """Results of two providers with these medians, their other times alike or as given."""
    return results(record("torch eager", eager, **times), record("ltxkern torch", ours, **times))


def test_a_change_within_the_spread_is_unclear_and_no_failure():
    noisy = {"p20_us": 80.0, "p80_us": 130.0}
    before = pair(100.0, 100.0, **noisy)
    text, slower = compare.report(before, pair(120.0, 120.0, **noisy), 0.03)
    assert "nothing moved beyond its spread" in text
    assert text.count("| unclear |") == 2
    assert "+20.0 %" in text
    assert not slower
    assert "unclear" not in compare.report(before, pair(108.0, 108.0, **noisy), 0.03)[0]


def test_a_row_says_how_far_eager_and_the_roofs_moved():
    after = replace(pair(112.0, 130.0), roofs={"copy": 0.8e9})
    text, slower = compare.report(pair(100.0, 100.0), after, 0.03)
    assert slower
    assert re.search(r"slower \| group_norm_silu .* ltxkern torch .*\+30.0 % .* \+12.0 %", text), text
    assert "the copy roof moved by -20 %" in text


def test_other_machines_rows_and_failures_are_named():
    before = pair(100.0, 100.0)
    failure = {"op": "x", "case": "y", "error": "z"}
    machine = before.machine | {"gpu": "H"}
    after = replace(before, machine=machine, records=before.records[:1], failures=[failure])
    text, bad = compare.report(before, after, 0.03)
    assert "gpu differs" in text
    assert "gone: group_norm_silu tiny bf16 ltxkern torch" in text
    assert "FAILED" in text
    assert bad


@pytest.mark.parametrize("content", [None, "", "[1]", '{"schema": 0}'])
def test_files_that_are_no_results_are_usage_errors(tmp_path, capsys, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as status:
        compare.main([str(path), str(path)])
    assert status.value.code == 2
    assert "x.json" in capsys.readouterr().err


def test_results_files_round_trip(tmp_path):
    run = run_for()
    harness.run_suite(run, tiny_suite(ltxkern.gated_residual), "small")
    measured = run.results()
    write_json(measured, tmp_path / "r.json")
    assert read_json(tmp_path / "r.json") == measured
    write_csv(measured.records, tmp_path / "r.csv")
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 1 + len(measured.records) == 3
    (tmp_path / "old.json").write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="schema"):
        read_json(tmp_path / "old.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would run them")
def test_large_cases_say_the_bytes_they_need(capsys):
    suite = next(suite for suite in suites() if suite.op == "group_norm_silu")
    status = main(suite, ["--cases", "large", "--default-allocator"])
    out = capsys.readouterr().out
    assert status == 2
    assert f"({cases.needed_bytes(suite.cases[-1], torch.bfloat16)} bytes)" in out


def test_check_mode_prints_errors_and_times_nothing(capsys):
    assert main(bench_gated_residual.SUITE, [*QUICK, "--check", "--cases", "audio"]) == 0
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


def test_an_interrupted_run_keeps_the_finished_ops(monkeypatch, tmp_path, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    first = tiny_suite(ltxkern.gated_residual)
    monkeypatch.setattr(run_all, "suites", lambda: (first, replace(first, op="other", prepare=interrupt)))
    out = tmp_path / "r.json"
    assert run_all.main([*QUICK, "--output-json", str(out)]) == 130
    assert [r.provider for r in read_json(out).records] == ["torch eager", "ltxkern torch"]
    assert "interrupted" in capsys.readouterr().err


def test_a_run_of_some_ops_does_not_replace_the_machines_results_file(monkeypatch, tmp_path):
    monkeypatch.setattr(run_all, "suites", lambda: (tiny_suite(ltxkern.gated_residual),))
    monkeypatch.setattr(run_all, "RESULTS", tmp_path)
    assert run_all.main([*QUICK, "--ops", "gated_residual"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert run_all.main(QUICK) == 0
    assert len(list(tmp_path.iterdir())) == 1


NO_NUMBER = "expected a whole number from 1 on, got"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            "--count --output-json {file}/x.json",
            "argument --output-json: '{file}/x.json' cannot be written (Not a directory)",
        ),
        (
            "--sites --output-json {file}/new/x.json",
            "cannot be written (Not a directory): name a file in a folder that can be",
        ),
        ("--output-csv {folder}", "argument --output-csv: '{folder}' cannot be written (Is a directory)"),
        ("--sites --dtypes int8", "--dtypes: unknown int8; known are bf16, fp16, fp32"),
        ("--dtypes bf16,fp64", "--dtypes: unknown fp64; known are"),
        ("--blocks -1", f"argument --blocks: {NO_NUMBER} '-1'"),
        ("--sites --blocks 0", f"argument --blocks: {NO_NUMBER} '0'"),
        ("--rounds 0", f"argument --rounds: {NO_NUMBER} '0'"),
        ("--threads x", f"argument --threads: {NO_NUMBER} 'x'"),
        (
            "--cases small,nope",
            "--cases: dit has no case nope; it has small, wide256, wide512, calls, stage1, stage2, or use small",
        ),
        ("--cases ,", "--cases: dit has no case ','; it has small"),
        ("--count --cases nope", "--cases: --count has no case nope; it has stage1, stage2, or use small, all"),
        ("--count --cases stage1,small", "--cases: --count has no case small; it has stage1, stage2"),
        (
            "--backends nope",
            "--backends: unknown nope; known are torch eager, torch eager by row, torch.compile, ltxkern",
        ),
    ],
)
def test_wrong_options_of_a_forward_are_usage_errors(monkeypatch, tmp_path, capsys, given, words):
    monkeypatch.setattr(bench_dit, "without_data", None)
    names = {"file": tmp_path / "file", "folder": tmp_path}
    names["file"].touch()
    with pytest.raises(SystemExit) as status:
        bench_dit.main([*given.format(**names).split(), "--default-allocator"])
    assert status.value.code == 2
    assert words.format(**names) in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [names["file"]]


@pytest.mark.parametrize("more", [[], ["--sites"]])
def test_a_forward_that_memory_does_not_hold_is_left_out(monkeypatch, tmp_path, capsys, more):
    monkeypatch.setattr(bench_dit, "build", None)
    monkeypatch.setattr(machine, "free_bytes", lambda device: 7)
    path = tmp_path / "x.json"
    options = ["--default-allocator", "--device", "cpu", "--cases", "stage1", "--output-json", str(path)]
    assert bench_dit.main([*options, *more]) == 2
    said = "".join(capsys.readouterr())
    assert re.search(
        r"stage1 fp32.*: wants .* with 48 blocks, 7 B are free on cpu: use --cases small, or fewer --blocks", said
    )
    assert not path.exists()


def test_a_transformer_forward_is_held_to_diffusers():
    right = (torch.randn(2, 3), torch.randn(4))
    assert bench_dit.distance(right, right) == 0.0
    far = bench_dit.distance((right[0], right[1] * 1.5), right)
    assert far == pytest.approx(0.5)
    bench_dit.check_distance("x", 1e-3, torch.bfloat16, 48)
    for wrong in (far, float("nan")):
        with pytest.raises(WrongResultError, match="distance from diffusers"):
            bench_dit.check_distance("x", wrong, torch.bfloat16, 48)


def test_patched_pipelines_are_measured_beside_stock_ones(tmp_path):
    output = tmp_path / "patch.json"
    options = ["--default-allocator", "--device", "cpu", "--threads", "1", "--rounds", "1"]
    assert bench_patch.main([*options, "--output-json", str(output)]) == 0
    rows = read_json(output).records
    assert [row.provider for row in rows] == ["torch eager", "ltxkern patch"] * 3
    assert all("torch eager" in row.ratios for row in rows[1::2])
    with pytest.raises(SystemExit):
        bench_patch.main([*options, "--cases", "none"])


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
