"""No mode of the device manager reads or frees anything that another stream may still be writing or reading."""

import contextlib
import functools

import pytest
import torch

from ltxkern.pipeline.files.lora import NO_LORA, lora_phases
from ltxkern.pipeline.memory import host_memory
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.memory.modes import MODES
from ltxkern.pipeline.memory.streams import in_turn, side_by_side
from tests.pipeline.memory.lora_models import random_lora, small_model
from tests.pipeline.memory.simulated_clock import SimulatedClock
from tests.pipeline.memory.stream_races import RaceClock


def run(clock, monkeypatch, *, forwards=3, requests=3, host_budget_bytes=None, discard=False, **settings):
    """Requests of two stages with three forwards each, the last one with other strengths; returns the races."""

    def allocate(shape, dtype):
        made = torch.empty(shape, dtype=dtype)
        clock.host.add(id(made.untyped_storage()))
        return made

    monkeypatch.setattr(host_memory, "_allocate_pinned", allocate)
    model = small_model(blocks=4)
    lora = random_lora("distilled", model, seed=1)
    x = torch.randn(1, 48).bfloat16()
    with clock:
        manager = TwoStageDeviceManager(clock=clock, host_budget_bytes=host_budget_bytes, **settings)
        manager.attach(model)
        for request in range(requests):
            phases = lora_phases([], lora, (0.25, 0.5) if request < 2 else (0.3, 0.7))
            manager.prepare(*phases)
            for number, phase in enumerate(phases):
                manager.switch_lora_phase(phase)
                with manager.stage("stage", forwards=forwards):
                    for _ in range(3):
                        model(x)
                if number == 0:
                    manager.side_by_side(lambda: x * 2, lambda: x * 3)
            manager.switch_lora_phase(NO_LORA)
            model(x)
        if discard:
            # The next phase is on its way while the transformer is let go of.
            manager.switch_lora_phase(phases[0])
            manager.begin_stage("stage", forwards=1)
            model(x)
        manager.close(discard=discard)
    return clock.races


@pytest.mark.parametrize("forwards", [None, 3])
@pytest.mark.parametrize(
    "settings",
    [
        *({"mode": mode} for mode in MODES),
        {"mode": "snapshot", "spare_blocks": 0},
        {"mode": "snapshot", "spare_blocks": 9},
        {"mode": "snapshot", "host_budget_bytes": 80_000},
        {"mode": "original", "offload": True},
        {"mode": "original", "offload": True, "rounding": "single"},
    ],
    ids=str,
)
def test_no_races(settings, forwards, monkeypatch):
    assert run(RaceClock(), monkeypatch, forwards=forwards, **settings) == []


@pytest.mark.parametrize(
    "settings", [*({"mode": mode} for mode in MODES), {"mode": "original", "offload": True}], ids=str
)
def test_no_races_where_the_transformer_is_discarded(settings, monkeypatch):
    assert run(RaceClock(), monkeypatch, requests=1, discard=True, **settings) == []


class Deaf(RaceClock):
    """Forgets one of the waits."""

    def __init__(self, forgotten):
        super().__init__()
        self.forgotten, self.waits = forgotten, 0

    def wait(self, event):
        self.waits += 1
        if self.waits != self.forgotten:
            super().wait(event)


@pytest.mark.parametrize("settings", [{"mode": "snapshot"}, {"mode": "original", "offload": True}], ids=str)
def test_most_forgotten_waits_are_noticed(settings, monkeypatch):
    """Not all: two events in a row may order the same. But a clock that never waits must be noticed at once."""
    whole = Deaf(0)
    assert run(whole, monkeypatch, requests=1, **settings) == []
    noticed = sum(bool(run(Deaf(n), monkeypatch, requests=1, **settings)) for n in range(1, whole.waits + 1))
    assert noticed > whole.waits / 2


def test_a_second_request_swaps_back_to_spare_buffers_that_need_no_event(model, pristine, phases):
    """The spare buffers of stage 2 hold stage 1 afterwards: nothing is on its way to them."""
    clock = RaceClock()
    with clock, TwoStageDeviceManager("snapshot", clock=clock) as manager:
        manager.attach(model)
        manager.prepare(*phases)
        buffers = {weight.tensor.data_ptr() for weight in manager.store._spare.values()}
        for phase in (phases[1], phases[0]) * 2:
            with manager.stage("stage"):
                pass
            manager.switch_lora_phase(phase)
            manager.store.settle()
        manager.prepare(*phases)
        assert buffers == {weight.tensor.data_ptr() for weight in manager.store._spare.values()}
    assert clock.races == []
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in pristine.items())


@pytest.mark.parametrize("fails", ["first", "second"])
def test_the_current_stream_waits_for_the_side_even_after_an_error(fails):
    clock = RaceClock()
    x = torch.zeros(3)

    def first():
        made = x + 1
        if fails == "first":
            raise MemoryError
        return made

    def second():
        raise MemoryError

    with clock:
        with pytest.raises(MemoryError):
            side_by_side(clock, first, second)
        x.add_(1)
    assert clock.races == []


def test_what_the_side_stream_made_is_handed_over():
    clock = RaceClock()
    with clock:
        made, _ = side_by_side(clock, lambda: {"audio": torch.ones(3) + 1}, lambda: None)
        made["audio"] * 2
        del made
    assert clock.races == []


@pytest.mark.parametrize("fails", [None, 0, 3])
def test_jobs_in_turn_race_with_nothing_before_or_after_them(fails):
    clock = RaceClock()
    given = [torch.zeros(3) for _ in range(5)]

    def job(index):
        if index == fails:
            raise MemoryError
        return given[index].add_(1) * 2

    with clock:
        for x in given:
            x.add_(1)
        with pytest.raises(MemoryError) if fails is not None else contextlib.nullcontext():
            made = in_turn(clock, [functools.partial(job, index) for index in range(5)])
            assert [x.mul_(2).tolist() for x in made] == [[8.0] * 3] * 5
            del made
        for x in given:
            x.add_(1)
    assert clock.races == []


def test_jobs_in_turn_take_half_the_time_on_two_streams():
    clock = SimulatedClock()
    clock.run("before", 3.0)
    in_turn(clock, [functools.partial(clock.run, f"job {i}", 2.0) for i in range(5)])
    assert [clock.first(f"job {i}").stream for i in range(5)] == ["compute", "side"] * 2 + ["compute"]
    assert clock.first("job 1").start == clock.first("job 0").start == 3.0
    assert clock.busy_until["compute"] == 9.0
