"""LTXKERN_DEBUG: what a call says of itself, by either way into it, and that it says nothing where it is off."""

import functools
import os
import re
import subprocess
import sys

import pytest

from ltxkern import debug
from ltxkern.compiled.steps import Argument, Call, Launch, Zero
from tests.processes import ROOT
from tests.serving import needs_cpu_kernels

CALLS = """
import sys, torch, ltxkern
def say(what): print(what, file=sys.stderr, flush=True)
x, gate = torch.ones(1, 3, 8, dtype=torch.bfloat16), torch.ones(1, 1, 8, dtype=torch.bfloat16)
say("# eager"); ltxkern.gated_residual(x, x, gate)
say("# out"); ltxkern.gated_residual(x, x, gate, out=torch.empty_like(x))
say("# compiled"); torch.compile(ltxkern.gated_residual, backend="eager", fullgraph=True)(x, x, gate)
say("# in place"); ltxkern.merge_lora_(torch.ones(4, 4), torch.ones(2, 4), torch.ones(4, 2), 0.5)
with ltxkern.use_backend("torch"):
    say("# torch"); ltxkern.gated_residual(x, x, gate)
say("# copies"); y = x.mT; ltxkern.gated_residual(y, y, y)
"""


@functools.cache
def ran(level: str | None, script: str = CALLS, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LTXKERN_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | more
    if level is not None:
        environment["LTXKERN_DEBUG"] = level
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def lines(level: str) -> dict[str, list[str]]:
    """What each kind of call said."""
    done = ran(level)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = re.split(r"^# (.*)\n", done.stderr, flags=re.MULTILINE)
    assert parts[0] == ""
    said = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {name: [line.removeprefix("ltxkern: ") for line in text.splitlines()] for name, text in said.items()}


GIVEN = "gated_residual(x bfloat16 1x3x8, y bfloat16 1x3x8, gate bfloat16 1x1x8) by"


@needs_cpu_kernels
@pytest.mark.parametrize("way", ["eager", "out", "compiled"])
def test_a_call_is_one_line(way: str) -> None:
    (line,) = lines("1")[way]
    # x and y are one tensor and count once.
    assert line.startswith(f"{GIVEN} cpu: 1 call, {48 + 16} bytes read, 48 bytes written; not cuda (")
    # What is missing is said without the remedy.
    assert re.search(r"; not cuda \([^()]+\), nvrtc \([^()]+\), triton \([^()]+\)$", line)


@needs_cpu_kernels
def test_an_op_that_works_in_place_reads_and_writes_its_first_argument() -> None:
    (line,) = lines("1")["in place"]
    assert "merge_lora_(weight float32 4x4, lora_a [float32 2x4], lora_b [float32 4x2], scale [0.5], " in line
    assert f" by cpu: 2 calls, {64 + 32 + 32} bytes read, 64 bytes written; " in line


@needs_cpu_kernels
def test_a_backend_that_refuses_the_case_is_named_with_its_reason() -> None:
    pytest.importorskip("triton")
    script = """
import torch, ltxkern
with ltxkern.use_backend("nvrtc", "triton", "cpu"):
    ltxkern.merge_lora_(torch.ones(4, 4), torch.ones(2, 4), torch.ones(4, 2), 0.5, rounding="reference")
"""
    (line,) = ran("1", script, TRITON_INTERPRET="1", LTXKERN_DISABLE="merge_lora_:nvrtc").stderr.splitlines()
    reason = "reference rounding must be bit-equal to torch's own matrix product, whose order of sums the kernel does not follow"
    assert line.endswith(f"; not nvrtc (merge_lora_:nvrtc is switched off by LTXKERN_DISABLE), triton ({reason})")


def test_the_reference_is_told_by_what_torch_runs() -> None:
    assert lines("1")["torch"] == [f"{GIVEN} torch: 6 calls, 64 bytes read, 48 bytes written"]
    steps = sorted(line.strip() for line in lines("2")["torch"][1:])
    assert steps == [*["torch _to_copy"] * 4, "torch add", "torch mul"]


@needs_cpu_kernels
def test_level_2_adds_the_steps() -> None:
    assert [line for line in lines("2")["eager"] if not line.startswith("gated")] == ["  gated_residual_rows"]
    assert lines("2")["in place"][1:] == ["  torch mm", "  torch add_"]
    assert {name: said[0] for name, said in lines("2").items()} == {name: said[0] for name, said in lines("1").items()}


@needs_cpu_kernels
def test_copies_around_a_kernel_are_steps() -> None:
    first, *steps = lines("2")["copies"]
    assert "x bfloat16 1x8x3 strides 24x1x8, " in first
    assert steps[-1] == "  gated_residual_rows"
    assert set(steps[:-1]) == {"  torch clone"}


@needs_cpu_kernels
def test_triton_launches_note_themselves() -> None:
    pytest.importorskip("triton")
    script = "import torch, ltxkern\nwith ltxkern.use_backend('triton'): ltxkern.pixel_norm_silu(torch.ones(1, 3, 8))"
    first, step = ran("2", script, TRITON_INTERPRET="1").stderr.splitlines()
    assert " by triton: 1 call, 96 bytes read, 96 bytes written" in first
    assert step == "ltxkern:   _pixel_norm_kernel, grid 1"


def test_steps_in_words() -> None:
    launch = Launch("ltxk::kernel<float, 4>", (7, 2), 256, {}, 1024)
    assert str(launch) == "ltxk::kernel<float, 4>, grid 7x2, block 256, shared 1024 bytes"
    assert str(Launch("k", (1,), 32, {}, cooperative=True)).endswith("bytes, cooperative")
    assert str(Zero(Argument(0), 24)) == "zero 24 bytes"
    assert str(Call("kernel<f32>", {})) == "kernel<f32>"


@pytest.mark.parametrize("level", [None, "0"])
def test_nothing_is_said_where_it_is_off(level: str | None) -> None:
    done = ran(level)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stderr.splitlines() if line.startswith("ltxkern: ")] == []


def test_off_means_that_a_call_meets_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debug, "level", lambda: 0)
    assert debug.watch(None, "cpu", len) is len  # type: ignore[arg-type]
    assert debug.recorded([], len) is len  # type: ignore[arg-type]


def test_another_value_is_refused_in_a_sentence() -> None:
    done = ran("3")
    assert done.returncode == 1
    error = "ValueError: LTXKERN_DEBUG=3: expected 0 (off), 1 (a line a call) or 2 (with its steps)"
    assert done.stderr.splitlines()[-1] == error
