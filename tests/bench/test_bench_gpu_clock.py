"""The timer's GPU path on a GPU of two clocks: graphs, events, launch gaps, what cannot be captured; readings of the clocks."""

import sys

import pytest
import timing
import torch
from fake_cuda import REPLAY, FakeGPU
from machine import ClockSampler, parse_clocks
from timing import CallTimer, Settings

GPU = torch.device("cuda", 0)
BRIEF = Settings(rounds=2, warmup_ms=1, rep_ms=5)


def timer_of(monkeypatch, launches, buffers=10, sync=False):
    """A timer of a call with the given (host, device) seconds per launch, and its GPU."""
    gpu = FakeGPU().install(monkeypatch)

    def call(x):
        for host, device in launches:
            gpu.launch(host, device)
        if sync:
            gpu.wait()
        return x.clone()

    tensors = [(torch.zeros(4),) for _ in range(buffers)]
    return CallTimer(call, tensors, GPU, BRIEF, gpu.clock), gpu


def median(timer):
    return timing.summarise(timer.sample_rounds()).median


def test_a_short_call_is_a_graph_over_all_buffers(monkeypatch):
    timer, gpu = timer_of(monkeypatch, [(8e-6, 20e-6)])
    assert timer.kind == "graph"
    assert median(timer) == pytest.approx(20e-6, abs=REPLAY / 10)
    assert gpu.captures == 1
    assert len(timer._captured) == 10
    assert len({output.data_ptr() for output in timer._captured}) == 10


def test_a_long_call_is_timed_by_events(monkeypatch):
    timer, gpu = timer_of(monkeypatch, [(8e-6, 300e-6)])
    assert (timer.kind, gpu.captures) == ("events", 0)
    assert median(timer) == pytest.approx(300e-6)


def test_launches_that_starve_the_gpu_are_a_graph_where_the_gpu_needs_less_than_100_us(monkeypatch):
    timer, _ = timer_of(monkeypatch, [(8e-6, 2e-6)] * 40)
    assert timer.kind == "graph"
    assert median(timer) == pytest.approx(80e-6, rel=0.1)


def test_launches_that_starve_a_gpu_for_longer_stay_with_events(monkeypatch):
    timer, gpu = timer_of(monkeypatch, [(8e-6, 5e-6)] * 40)
    assert (timer.kind, gpu.captures) == ("events", 1)
    assert timer._captured == []
    assert median(timer) == pytest.approx(40 * 8e-6, rel=0.1)


def test_a_call_that_waits_for_the_gpu_is_not_captured_and_says_so(monkeypatch):
    timer, gpu = timer_of(monkeypatch, [(8e-6, 20e-6)], sync=True)
    assert (timer.kind, gpu.captures) == ("events", 0)
    assert "synchronizing" in timer.note
    assert (gpu.stream, gpu.syncs_are_errors) == ("main", False)
    assert median(timer) > 0


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    gpu = FakeGPU().install(monkeypatch)

    def call():
        gpu.launch(1e-6, 1e-6)
        if gpu.captured is not None:
            raise RuntimeError("cannot be captured")

    timer = CallTimer(call, [()], GPU, BRIEF, gpu.clock)
    assert (timer.kind, gpu.stream) == ("events", "main")
    assert "cannot be captured" in timer.note


def test_very_slow_calls_are_not_repeated_to_be_estimated(monkeypatch):
    calls = []
    gpu = FakeGPU().install(monkeypatch)
    timer = CallTimer(lambda: (calls.append(1), gpu.launch(1e-3, 3.0)), [()], GPU, BRIEF, gpu.clock)
    assert len(calls) == 2
    assert timer.sample_round() == [pytest.approx(3.0, abs=2e-3)]
    assert len(calls) == 3


def test_results_are_let_go_between_rounds():
    timer = CallTimer(lambda x: x + 1, [(torch.zeros(4),)] * 3, torch.device("cpu"), BRIEF)
    assert timer._kept == [None] * 3
    timer.sample_round()
    assert timer._kept == [None] * 3


def test_clock_readings_are_not_waited_for(tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nassert sys.argv[-1] == 'GPU-7'\nprint('1980, 3201, 41, [N/A]')\n"
    )
    program.chmod(0o755)
    now = [0.0]
    sampler = ClockSampler("GPU-7", str(program), lambda: now[0])
    assert sampler.poll() == {}
    assert sampler.finish() == {"clocks.sm": 1980.0, "clocks.mem": 3201.0, "temperature.gpu": 41.0}
    now[0] = 1.0
    assert sampler.poll() == {}
    assert sampler.finish() == {}
    now[0] = 2.5
    sampler.poll()
    assert sampler.finish()["clocks.sm"] == 1980.0
    assert ClockSampler("0", str(tmp_path / "absent")).poll() == {}
    assert parse_clocks("\n") == {}
