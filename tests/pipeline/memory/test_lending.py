"""Components lent to the device, and two of them side by side."""

from torch import nn

from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from tests.pipeline.memory.simulated_clock import SimulatedClock


def test_side_by_side_joins_on_the_compute_stream():
    clock = SimulatedClock()
    manager = TwoStageDeviceManager("original", clock=clock)
    clock.run("before", 3.0)
    manager.side_by_side(lambda: clock.run("audio", 4.0), lambda: clock.run("video", 10.0))
    assert clock.first("audio").stream == "side"
    assert clock.first("audio").start == clock.first("video").start == 3.0
    assert clock.waits[-1] == ("compute", 13.0, 7.0)


def test_a_component_without_parameters_or_on_the_device_is_left_alone():
    manager = TwoStageDeviceManager("original")
    for module in (nn.Identity(), nn.Linear(2, 2)):
        with manager.component("part", module) as lent:
            assert lent is module


def test_side_by_side_gives_both_results():
    assert TwoStageDeviceManager("original").side_by_side(lambda: 1, lambda: "a") == (1, "a")
