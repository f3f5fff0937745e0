"""Which device mode fits where, and what is said about it."""

import pytest

from ltxkern.pipeline.memory import modes
from ltxkern.pipeline.memory.modes import MODES, OFFLOADED, ModeNeeds, choose_mode, smaller_mode
from tests.pipeline.memory.lora_models import prepared

NEEDS = {
    "resident": ModeNeeds("resident", 100, 0),
    "inplace": ModeNeeds("inplace", 70, 0),
    "snapshot": ModeNeeds("snapshot", 60, 80),
    "original": ModeNeeds("original", 50, 40),
}


@pytest.mark.parametrize(
    ("device", "host", "expected"),
    [
        (100, 0, "resident"),
        (99, 0, "inplace"),
        (69, 80, "snapshot"),
        (69, 79, "original"),
        (40, 100, "original"),
    ],
)
def test_auto_takes_the_first_mode_that_fits(device, host, expected):
    mode, reason = choose_mode(NEEDS, device, host)
    assert mode == expected
    assert ("no mode fits" in reason) == (device == 40)


@pytest.mark.parametrize(
    ("device", "host", "begins"), [(20, 60, "chosen: only block"), (19, 60, "no mode"), (20, 59, "no mode")]
)
def test_auto_offloads_where_only_that_fits(device, host, begins):
    mode, reason = choose_mode(NEEDS | {OFFLOADED: ModeNeeds(OFFLOADED, 20, 60)}, device, host)
    assert mode == "original"
    assert reason.startswith(begins)


def test_auto_counts_device_and_host_together_where_they_are_one():
    assert choose_mode(NEEDS, 100, 100, unified=True)[0] == "resident"
    assert choose_mode(NEEDS, 69, 69, unified=True)[1].startswith("no mode fits")


def test_describe_says_what_each_mode_needs(model, phases, monkeypatch):
    with prepared(model, phases, "auto") as manager:
        text = manager.describe()
    assert "device mode resident: chosen" in text
    assert all(f"{mode}: " in text for mode in MODES)
    monkeypatch.setattr(modes, "device_available", lambda device: 0)
    with prepared(model, phases, "auto") as manager:
        assert manager.mode == "original"
        assert "no mode fits" in manager.describe()


@pytest.mark.parametrize(
    ("offloaded", "chain"),
    [
        (20, ["resident", "inplace", "snapshot", "original", OFFLOADED]),
        (50, ["resident", "inplace", "snapshot", "original"]),
    ],
)
def test_the_next_mode_needs_less_of_the_device(offloaded, chain):
    needs = {**NEEDS, OFFLOADED: ModeNeeds(OFFLOADED, offloaded, 60)}
    found = [MODES[0]]
    while (following := smaller_mode(needs, found[-1])) is not None:
        found.append(following)
    assert found == chain
    assert smaller_mode(dict.fromkeys(needs, needs["original"]), "resident") is None
