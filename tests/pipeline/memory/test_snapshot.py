"""Order of events in mode "snapshot", on simulated streams: what travels while what computes, and who waits for whom."""

import pytest
import torch

from ltxkern.pipeline.files.lora import lora_phases
from ltxkern.pipeline.memory.host_memory import HostBudgetError
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from tests.pipeline.memory.lora_models import assert_switches, assert_weights, prepared, random_lora, small_model
from tests.pipeline.memory.simulated_clock import SimulatedClock

BLOCK_TIME = 10.0  # what a block computes


@pytest.fixture
def run():
    """Two stages of three forwards over eight blocks, with an upsampler between; the clock and the manager afterwards."""

    def two_stages(spare_blocks, forwards):
        clock = SimulatedClock()
        model = small_model(blocks=8)
        phases = lora_phases([], random_lora("distilled", model, seed=1))
        manager = TwoStageDeviceManager("snapshot", clock=clock, spare_blocks=spare_blocks)
        manager.attach(model)
        manager.prepare(*phases)
        for index, block in enumerate(model.transformer_blocks):
            block.register_forward_pre_hook(lambda *_, index=index: clock.run(f"compute block {index}", BLOCK_TIME))
        # The weights of stage 1 have arrived when the run begins.
        manager.store.settle()
        clock.busy_until.update(compute=0.0, side=0.0)
        clock.log.clear()
        clock.waits.clear()
        x = torch.randn(1, 48).bfloat16()
        with manager.stage("stage 1", forwards=forwards):
            for _ in range(3):
                model(x)
        clock.run("upsampler", 5.0)
        manager.switch_lora_phase(phases[1])
        with manager.stage("stage 2", forwards=forwards and 1):
            model(x)
        assert clock.host_waits == 0
        manager.close()
        return clock

    return two_stages


@pytest.mark.parametrize("forwards", [None, 3])
def test_prefetch_starts_before_stage_1_computes(run, forwards):
    clock = run(2, forwards)
    prefetches = [entry for entry in clock.log if entry.label.startswith("prefetch")]
    assert [entry.label for entry in prefetches[:2]] == ["prefetch outer", "prefetch transformer_blocks.0"]
    assert all(entry.stream == "side" for entry in prefetches)
    stage_1_ends = clock.first("stage 1 ends").start
    assert all(entry.end < stage_1_ends for entry in prefetches[:2])
    assert prefetches[0].start <= clock.first("compute block 0").start


def test_without_a_count_of_forwards_the_other_blocks_follow_when_stage_1_has_ended(run):
    clock = run(2, None)
    fetches = [entry for entry in clock.log if entry.label.startswith("fetch")]
    assert [entry.label for entry in fetches] == [f"fetch transformer_blocks.{index}" for index in range(1, 8)]
    assert all(entry.start >= clock.first("stage 1 ends").end for entry in fetches)


def test_with_a_count_of_forwards_blocks_follow_one_by_one_during_the_last(run):
    clock = run(2, 3)
    stage_1_ends = clock.first("stage 1 ends").start
    last_forward = [entry for entry in clock.log if entry.label == "compute block 1"][2]
    first_fetch = clock.first("fetch transformer_blocks.1")
    assert last_forward.end <= first_fetch.start < stage_1_ends
    for index in range(1, 8):
        computed = [entry for entry in clock.log if entry.label == f"compute block {index}"][2]
        assert clock.first(f"fetch transformer_blocks.{index}").start >= computed.end


@pytest.mark.parametrize("forwards", [None, 3])
def test_the_compute_stream_waits_for_each_block_at_its_first_use_only(run, forwards):
    clock = run(2, forwards)
    compute_waits = [wait for wait in clock.waits if wait[0] == "compute"]
    # One wait per block and one for the weights outside of them, none during stage 1.
    assert len([w for w in compute_waits if w[1] >= clock.first("upsampler").end]) >= 9
    assert not [w for w in compute_waits if w[1] < clock.first("stage 1 ends").start]
    for index in range(1, 8):
        arrived = clock.first(f"fetch transformer_blocks.{index}").end
        used = [entry for entry in clock.log if entry.label == f"compute block {index}"][3]
        assert used.start >= arrived


def test_stage_2_starts_before_its_last_block_has_arrived(run):
    clock = run(2, None)
    starts = [entry for entry in clock.log if entry.label == "compute block 0"][3].start
    assert starts < clock.first("fetch transformer_blocks.7").end


def test_a_full_host_in_snapshot_is_refused(model, pristine, phases, expected):
    with TwoStageDeviceManager("snapshot", host_budget_bytes=1000) as manager:
        manager.attach(model)
        with pytest.raises(HostBudgetError, match=r"snapshot of .* needs .* bytes of host memory"):
            manager.prepare(*phases)
        assert manager.budget.used == 0
        assert manager.phase == phases[0]
        assert_weights(model, expected[phases[0]])
        assert_switches(manager, model, expected, phases[1])
    assert_weights(model, pristine)


def test_room_for_one_snapshot_keeps_that_of_stage_2(model, pristine, phases, expected):
    size = sum(weight.nbytes for weight in pristine.values())
    with prepared(model, phases, "snapshot", host_budget_bytes=size + 100) as manager:
        assert manager.store.snapshot_bytes == manager.budget.used == size
        assert_switches(manager, model, expected, phases[1], phases[0], phases[1])
    assert manager.budget.used == 0


def test_more_forwards_than_announced_still_see_their_own_phase(model, phases, expected):
    x = torch.randn(1, 48).bfloat16()
    with prepared(model, phases, "snapshot") as manager:
        manager.begin_stage("stage 1", forwards=1)
        first = model(x)
        assert manager.phase is None
        assert torch.equal(model(x), first)
        assert_weights(model, expected[phases[0]])
