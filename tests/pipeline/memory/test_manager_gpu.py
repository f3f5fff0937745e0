"""The device manager on a GPU: bit-equal phases, peak memory by the allocator, order of events by CUDA events."""

import gc
import random

import pytest
import torch
from safetensors.torch import save_file

from ltxkern import use_backend
from ltxkern.pipeline.files.lora import NO_LORA, lora_phases
from ltxkern.pipeline.memory import inplace
from ltxkern.pipeline.memory.factors import FactorCache
from ltxkern.pipeline.memory.host_memory import HostBudget
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.memory.merge import merge_phase, merge_phase_pair
from ltxkern.pipeline.memory.modes import MODES
from ltxkern.pipeline.memory.streams import CudaClock
from tests.pipeline.memory.lora_models import (
    Touched,
    assert_weights,
    linear_weights,
    prepared,
    random_lora,
    small_model,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

WIDTH, HIDDEN, BLOCKS = 2048, 8192, 6


@pytest.fixture
def model():
    return small_model(width=WIDTH, hidden=HIDDEN, blocks=BLOCKS)


@pytest.fixture
def phases(model):
    return lora_phases([], random_lora("distilled", model, seed=1, rank=64))


def merged_on_device(model, phases):
    """Weights of a fresh merge of every phase on the GPU, copied to the host."""
    found = {}
    with prepared(model, phases, "original", device="cuda") as manager:
        for phase in phases:
            manager.switch_lora_phase(phase)
            found[phase] = {name: weight.cpu() for name, weight in linear_weights(model).items()}
    return found


def on_host(model):
    torch.cuda.synchronize()
    return {name: weight.cpu() for name, weight in linear_weights(model).items()}


@pytest.mark.parametrize("mode", MODES)
def test_random_switches_equal_fresh_merges(model, pristine, mode):
    phases = lora_phases([], random_lora("distilled", model, seed=1, rank=384))
    expected = merged_on_device(model, phases) | {NO_LORA: pristine}
    assert_weights(model, pristine)
    choose = random.Random(0)
    with prepared(model, phases, mode, device="cuda") as manager:
        assert manager.mode == mode
        for _ in range(20):
            phase = choose.choice([*phases, NO_LORA])
            manager.switch_lora_phase(phase)
            manager.store.settle()
            found = on_host(model)
            assert all(torch.equal(found[name], weight) for name, weight in expected[phase].items())
    found = on_host(model)
    assert all(torch.equal(found[name], weight) for name, weight in pristine.items())


@pytest.mark.parametrize("mode", MODES)
def test_peak_memory_of_a_switch(model, mode):
    lora = random_lora("distilled", model, seed=1, rank=64)
    phases = lora_phases([], lora)
    weights = sum(weight.nbytes for weight in linear_weights(model).values())
    block = 2 * WIDTH * HIDDEN * 2
    # cuBLAS takes its workspace with the first product; what earlier tests left is none of the manager's.
    torch.ones(64, 64, device="cuda", dtype=torch.bfloat16) @ torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    gc.collect()
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    with prepared(model, phases, mode, device="cuda") as manager:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for phase in (phases[1], phases[0]):
            manager.switch_lora_phase(phase)
        torch.cuda.synchronize()
        # merge_lora_ takes temporaries of 32 MiB beside the blocks.
        assert torch.cuda.max_memory_allocated() - before <= 2 * block + (64 << 20)
        # Factors stay on the device where there is room; a correction of at most one byte per weight is half of them.
        kept = {"resident": 2 * weights, "snapshot": weights + 2 * block, "inplace": 1.5 * weights, "original": weights}
        assert before - start <= kept[mode] + lora.nbytes + (64 << 20)


@pytest.mark.parametrize("offload", [True, False])
def test_forwards_are_identical_to_resident_ones(model, phases, offload):
    x = torch.randn(64, WIDTH, device="cuda", dtype=torch.bfloat16)
    results = []
    for settings in ({"mode": "resident"}, {"mode": "original", "offload": offload}):
        with prepared(model, phases, device="cuda", **settings) as manager:
            for phase in phases:
                manager.switch_lora_phase(phase)
                results.append(model(x).clone())
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_inplace_goes_by_one_product_and_one_kernel_a_chunk(model, phases, monkeypatch):
    weight = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
    if inplace.switch_tier(weight) is None:
        pytest.skip("SWITCH KERNEL NOT TESTED: neither a CUDA build nor NVRTC is here")
    calls, real = [], inplace.run_switch
    monkeypatch.setattr(
        inplace, "run_switch", lambda tier, case, *tensors: (calls.append(case), real(tier, case, *tensors))[1]
    )
    expected = merged_on_device(model, phases)
    with prepared(model, phases, "inplace", device="cuda") as manager:
        for phase in (phases[1], phases[0]):
            calls.clear()
            manager.switch_lora_phase(phase)
            # No case restores alone or adds alone: that would be the long way.
            assert calls
            assert all(case.subtract and case.add for case in calls)
            found = on_host(model)
            assert all(torch.equal(found[name], weight) for name, weight in expected[phase].items())


def test_pristine_weights_of_original_are_page_locked(model, phases):
    with prepared(model, phases, "original", device="cuda") as manager:
        assert len(manager.store._near) == len(linear_weights(model))
        assert all(weight.is_pinned() for weight in manager.store._near.values())
    assert manager.budget.used == 0


def test_snapshots_and_lent_components_are_page_locked(model, phases):
    component = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64))
    before = {name: tensor.clone() for name, tensor in component.state_dict().items()}
    with prepared(model, phases, "snapshot", device="cuda") as manager:
        assert all(snapshot.is_pinned() for snapshot in manager.store._snapshots.values())
        for _ in range(2):
            with manager.component("part", component):
                assert all(tensor.is_cuda for tensor in component.state_dict().values())
            assert all(tensor.is_pinned() for tensor in component.state_dict().values())
        assert manager.budget.used > 0
    assert manager.budget.used == 0
    for name, tensor in component.state_dict().items():
        assert not tensor.is_pinned()
        assert torch.equal(tensor, before[name])


def test_everything_is_on_the_host_again_after_offloading(model, pristine, phases):
    with prepared(model, phases, "original", device="cuda", offload=True):
        model(torch.randn(64, WIDTH, device="cuda", dtype=torch.bfloat16))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert_weights(model, pristine)


def test_offloaded_weights_return_to_the_gpu_they_came_from(model, pristine, phases):
    model.to("cuda")
    with prepared(model, phases, "original", device="cuda", offload=True):
        assert {weight.device.type for weight in model.transformer_blocks.parameters()} == {"cpu"}
        model(torch.randn(64, WIDTH, device="cuda", dtype=torch.bfloat16))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
    assert_weights(model.cpu(), pristine)


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_weights_return_to_the_host_they_came_from(model, pristine, phases, mode, from_file, tmp_path):
    save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
    with prepared(model, phases, mode, device="cuda", pristine=tmp_path if from_file else None):
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert_weights(model, pristine)


def test_factors_without_room_are_page_locked_and_travel_without_a_wait(model):
    lora = random_lora("distilled", model, seed=1, rank=64)
    budget, device = HostBudget(), torch.device("cuda", torch.cuda.current_device())
    cache = FactorCache(0, budget)
    cache.page_lock(lora_phases([], lora), device)
    assert cache.locked_bytes == lora.nbytes
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [cache.on(device, factors) for factors in lora.factors.values()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (a, b), factors in zip(found, lora.factors.values(), strict=True):
        assert torch.equal(a.cpu(), factors.a)
        assert torch.equal(b.cpu(), factors.b)
    cache.keep_only(())
    assert budget.used == 0


def test_resident_reads_each_weight_once(model):
    """Both phases come from one call a chunk, of a kernel, bit-equal to two merges."""
    weight = small_model(width=WIDTH, hidden=HIDDEN, blocks=1).transformer_blocks[0][0].weight.detach().cuda()
    name = "transformer_blocks.0.0"
    phases = lora_phases([], random_lora("distilled", model, seed=1, rank=384))
    expected = [merge_phase(weight.clone(), name, phase) for phase in phases]
    other = torch.full_like(weight, torch.nan)
    with torch.no_grad(), use_backend("cuda", "nvrtc", "triton"), Touched(weight) as touched:
        merge_phase_pair(weight, other, name, phases)
    assert touched.kernel_calls() > 0
    assert torch.equal(weight, expected[0])
    assert torch.equal(other, expected[1])


def test_a_switch_between_prepared_phases_waits_for_nothing(model, phases):
    """The host only enqueues; "warn" and "error" of torch's sync debug mode see every blocking call."""
    for mode in ("resident", "snapshot"):
        with prepared(model, phases, mode, device="cuda") as manager:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for phase in (phases[1], phases[0]) * 2:
                    with manager.stage("stage"):
                        pass
                    manager.switch_lora_phase(phase)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_results_of_the_side_stream_outlive_their_handing_over():
    manager = TwoStageDeviceManager("original", device="cuda")
    x = torch.randn(1 << 20, device="cuda")
    expected = (x * 2 + 1).sum()
    for _ in range(20):
        made, _ = manager.side_by_side(lambda: x * 2, lambda: x @ x)
        total = (made + 1).sum()
        del made
        # Without record_stream the side stream would write over what is still being read.
        manager.side_by_side(lambda: torch.full_like(x, float("nan")), lambda: None)
        assert torch.equal(total, expected)


class TimedClock(CudaClock):
    """Records a timed event wherever something is noted."""

    def __init__(self, device):
        super().__init__(device)
        self.events = {}

    def note(self, label, nbytes=0):
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream())
        self.events.setdefault(label, event)


def test_prefetch_starts_before_stage_1_ends(model, phases):
    clock = TimedClock(torch.device("cuda", 0))
    x = torch.randn(8192, WIDTH, device="cuda", dtype=torch.bfloat16)
    with prepared(model, phases, "snapshot", device="cuda", clock=clock) as manager:
        torch.cuda.synchronize()
        clock.events.clear()
        with manager.stage("stage 1", forwards=5):
            for _ in range(5):
                model(x)
        manager.switch_lora_phase(phases[1])
        with manager.stage("stage 2"):
            model(x)
        torch.cuda.synchronize()
        end = clock.events["stage 1 ends"]
        assert clock.events["prefetch transformer_blocks.0"].elapsed_time(end) > 0
        # Blocks that no spare buffer waits for come during the last forward, one by one.
        for index in range(1, BLOCKS - 1):
            earlier, later = (clock.events[f"fetch transformer_blocks.{n}"] for n in (index, index + 1))
            assert earlier.elapsed_time(later) >= 0
        assert clock.events["fetch transformer_blocks.1"].elapsed_time(end) > 0
