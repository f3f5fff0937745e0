"""The proof on a GPU: fake stages that fail, hang or find no time; later ones run all the same, and the files are there."""

import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_dit
import command_line
import deciding
import gpu_proof
import pytest
import torch
from command_line import suites
from gpu_proof import Outcome, Stage, prove, stages

from ltxkern.compiled import driver
from ltxkern.compiled import group_norm_silu as group_norm
from ltxkern.compiled.tensors import DeviceLimits
from ltxkern.ops.group_norm_silu import Arguments

WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{}')"
# Goes on until it is asked to end, and writes what it has then.
KEEPS = f"""
import signal, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    time.sleep(60)
except KeyboardInterrupt:
    {WRITES}
"""


def stage(name: str, code: str, seconds: float = 60.0, **more: Any) -> Stage:
    return Stage(name, (sys.executable, "-c", code, "{file}", "{seconds}"), seconds, **more)


def run(tmp_path: Path, planned: list[Stage], budget: float = 540.0, **more: Any) -> dict[str, Outcome]:
    outcomes = prove(planned, budget, lambda name: tmp_path / f"card-{name}.json", {"gpu": "none"}, **more)
    return {outcome.stage: outcome for outcome in outcomes}


def test_later_stages_run_whatever_comes_of_earlier_ones(tmp_path: Path) -> None:
    lingering = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    )
    planned = [
        stage("writes", WRITES),
        stage("fails", "print('broken'); raise SystemExit(3)"),
        stage("hangs", f"print('begun', flush=True); {lingering} time.sleep(60)", seconds=1.0),
        stage("keeps", KEEPS, seconds=2.0),
        stage("absent", WRITES, needs="no-such-program"),
        stage("last", WRITES),
    ]
    stale = tmp_path / "card-fails.json"
    stale.write_text("of an earlier run")
    said: list[str] = []
    found = run(tmp_path, planned, say=said.append)
    assert {name: (outcome.status, outcome.reason) for name, outcome in found.items()} == {
        "writes": ("done", ""),
        "fails": ("failed", "exit status 3"),
        "hangs": ("out of time", "ended after 1 s"),
        "keeps": ("out of time", "ended after 2 s"),
        "absent": ("left out", "no-such-program is not on PATH"),
        "last": ("done", ""),
    }
    files = {path.name.removeprefix("card-").removesuffix(".json") for path in tmp_path.iterdir()}
    assert files == {"writes", "fails", "hangs", "keeps", "last", "proof"}
    assert [json.loads((tmp_path / f"card-{name}.json").read_text()) for name in ("writes", "keeps")] == [{}, {}]
    assert json.loads(stale.read_text())["output"] == "broken\n"
    assert json.loads((tmp_path / "card-hangs.json").read_text())["output"] == "begun\n"
    listed = json.loads((tmp_path / "card-proof.json").read_text())["outcomes"]
    assert [entry["stage"] for entry in listed] == [s.name for s in planned]
    assert "hangs: out of time, ended after 1 s" in said


def test_stages_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """A clock of its own: 40 seconds go by in each stage."""
    at = [0.0]

    def clock() -> float:
        at[0] += 20.0
        return at[0]

    planned = [stage(name, "", least=least) for name, least in (("first", 10.0), ("second", 70.0), ("third", 10.0))]
    found = run(tmp_path, planned, budget=100.0, clock=clock)
    assert {name: outcome.status for name, outcome in found.items()} == {
        "first": "done",
        "second": "left out",
        "third": "done",
    }
    assert found["second"].reason == "60 s left, 70 s needed"


def test_what_is_done_is_listed_before_the_next_stage_begins(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def say(line: str) -> None:
        proof = tmp_path / "card-proof.json"
        if line.endswith("at most") and proof.is_file():
            seen.append([entry["stage"] for entry in json.loads(proof.read_text())["outcomes"]])

    run(tmp_path, [stage(name, "") for name in ("first", "second", "third")], say=say)
    assert seen == [["first"], ["first", "second"]]


def test_the_stages_are_those_of_this_repository() -> None:
    planned = stages("9.0")
    assert len({s.name for s in planned}) == len(planned)
    assert sum(s.seconds for s in planned[:11]) <= gpu_proof.BUDGET
    order = [s.name for s in planned]
    assert order.index("dit") < min(order.index("ops"), order.index("lora"))
    assert next(case.name for case in bench_dit.CASES if case.size == "large") == "stage1"
    (sanitizer,) = (s for s in planned if s.needs == "compute-sanitizer")
    assert sanitizer.command[0] == sanitizer.needs
    assert sanitizer.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    named = [word for s in planned for word in s.command if word.endswith(".py")]
    assert [word for word in named if not (gpu_proof.machine.ROOT / word).is_file()] == []


def test_every_test_that_needs_a_gpu_is_in_a_stage() -> None:
    root = gpu_proof.machine.ROOT
    marked = {
        str(path.relative_to(root))
        for path in (root / "tests").rglob("test_*.py")
        if path != Path(__file__) and "mark.gpu" in path.read_text()
    }
    assert marked
    assert marked - {word for stage in stages("9.0") for word in stage.command} == set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_ends_the_stage_and_is_listed(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends = f"import os, time; print(os.getpid(), flush=True); os.kill(os.getppid(), {int(number)}); time.sleep(60)"
    planned = (stage("writes", WRITES), stage("hangs", sends), stage("later", WRITES))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_proof, "stages", lambda capability: planned)
    monkeypatch.setattr(gpu_proof, "RESULTS", tmp_path)
    for name, made in (("best_device", None), ("describe", {}), ("slug", "card")):
        monkeypatch.setattr(gpu_proof.machine, name, lambda *_, made=made: made)
    assert gpu_proof.main([]) == gpu_proof.INTERRUPTED
    written, hung = json.loads((tmp_path / "card-proof.json").read_text())["outcomes"]
    assert (written["status"], hung["status"]) == ("done", "interrupted")
    with pytest.raises(ProcessLookupError):
        os.kill(int(hung["output"]), 0)


def test_what_was_measured_is_kept_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, seen = tmp_path / "rows.json", []

    def part(run: Any) -> None:
        deciding.timed(run, "block", "small", [1], {"first": functools.partial(sum, [1])})
        seen.append(len(json.loads(file.read_text())["records"]))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(deciding.PARTS, "block", part)
    monkeypatch.setattr(deciding, "relaunch_warm", lambda parsed: None)
    given = ["block", "--device", "cpu", "--rounds", "1", "--warmup", "0", "--rep", "1", "--output-json", str(file)]
    assert deciding.main(given) == command_line.INTERRUPTED
    assert seen == [1]
    assert [row["provider"] for row in json.loads(file.read_text())["records"]] == ["first"]


def test_without_torch_it_says_what_to_do() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-E", gpu_proof.__file__], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu-proof needs the module torch")
    assert "`make setup-dev` first, or `make gpu-proof PYTHON=" in line


def test_without_a_gpu_it_says_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_proof.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (driver.no_device() or "") in line
    assert gpu_proof.main(["--dry-run", "--budget", "1080"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(stages("9.0"))
    assert lines[0].split()[:3] == ["build", "240", "s"]
    with pytest.raises(SystemExit):
        gpu_proof.main(["--dry-run", "--budget", "0"])
    assert "argument --budget: expected a number of seconds above 0, got '0'" in capsys.readouterr().err


def test_each_kernel_of_group_norm_is_forced() -> None:
    x = torch.empty(1, 8, 45, 80, 512, dtype=torch.bfloat16, device="meta").movedim(-1, 1)
    limits = DeviceLimits(132, 232448)
    case = group_norm.describe(x, Arguments(x, None, None, 32, 1e-5, None, None), limits)
    kernels = {}
    for name, rule in deciding.KERNELS.items():
        with deciding.forced(**rule):
            kernels[name] = group_norm.device_steps(case)[-1].kernel.partition("<")[0]
    assert kernels == {"one launch": "ltxk::group_norm_columns", "two passes": "ltxk::group_norm_apply_columns"}
    assert group_norm.device_steps(case)[-1].kernel.startswith("ltxk::group_norm_columns<")


def test_pieces_of_tritons_norms_are_as_long_as_they_are_called() -> None:
    pytest.importorskip("triton")
    from ltxkern.triton import group_norm_silu, pixel_norm_silu

    cases = {(suite.op, case.name): case for suite in suites() for case in suite.cases}
    long = []
    for op, (names, limits) in deciding.PIECES.items():
        for name, (words, changed) in itertools.product(names, limits.items()):
            batch, channels, *space = cases[op, name].shape
            positions = math.prod(space)
            with deciding.limited(op, **changed):
                if op == "pixel_norm_silu":
                    rows, _ = pixel_norm_silu.tile_positions(channels, positions, False)
                    long.append((f"{2 * rows * channels >> 10} KiB a program", words))
                else:
                    tile = group_norm_silu.walking_tile(batch, 32, channels // 32, positions, True)
                    programs = positions / tile.span * 32 / tile.groups
                    assert 0.97 * group_norm_silu.LIMITS.programs <= programs <= group_norm_silu.LIMITS.programs
                    long.append((f"{2 * tile.groups * tile.channels} bytes of a position", words))
    assert [found for found, words in long] == [words for found, words in long]
    assert len(long) == 9
    assert group_norm_silu.Limits() == group_norm_silu.LIMITS
