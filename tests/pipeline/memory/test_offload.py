"""Offloading: blocks that visit the device merge on arrival and leave as they came; modules that are lent."""

import copy

import pytest
import torch

from ltxkern.pipeline.files.lora import NO_LORA, lora_phases
from ltxkern.pipeline.memory import offload, stores
from ltxkern.pipeline.memory.host_copy import HostCopy, module_tensors, storages
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from tests.pipeline.memory.lora_models import (
    Shared,
    assert_weights,
    fresh,
    prepared,
    random_lora,
    small_model,
)
from tests.pipeline.memory.simulated_clock import SimulatedClock


def merged_copy(model, weights):
    merged = copy.deepcopy(model)
    for name, weight in weights.items():
        merged.get_submodule(name).weight.copy_(weight)
    return merged


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_offloaded_blocks_compute_with_the_merged_weights(blocks):
    model, pristine, phases, expected = fresh(NO_LORA, blocks=blocks)
    reference = {phase: merged_copy(model, weights) for phase, weights in expected.items()}
    x = torch.randn(2, 48).bfloat16()
    with prepared(model, phases, "original", offload=True) as manager:
        assert manager.mode == "original"
        assert "one by one" in manager.describe()
        seen = {}
        for index, block in enumerate(model.transformer_blocks):
            block[1].register_forward_pre_hook(
                lambda *_, index=index, block=block: seen.__setitem__(index, block[0].weight.clone())
            )
        for phase in (phases[0], phases[1], phases[0], NO_LORA, phases[1]):
            manager.switch_lora_phase(phase)
            for _ in range(2):
                assert torch.equal(model(x), reference[phase](x))
                for index, weight in seen.items():
                    assert torch.equal(weight, expected[phase][f"transformer_blocks.{index}.0"])
        # Two blocks at most are on the device beside the weights outside of them.
        block_bytes = sum(p.nbytes for p in model.transformer_blocks[0].parameters())
        assert manager.store.extra_device_bytes <= 2 * block_bytes
    assert_weights(model, pristine)


def test_a_failure_while_blocks_are_settled_is_undone(model, pristine, phases, monkeypatch):
    closed = []
    real, calls = HostCopy.__init__, iter(range(10))

    def init(self, *args, **kwargs):
        if next(calls) == 2:
            raise MemoryError
        real(self, *args, **kwargs)

    monkeypatch.setattr(HostCopy, "close", lambda self: closed.append(self))
    with TwoStageDeviceManager("original", offload=True) as manager:
        manager.attach(model)
        with monkeypatch.context() as patch:
            patch.setattr(HostCopy, "__init__", init)
            with pytest.raises(MemoryError):
                manager.prepare(*phases)
        assert len(closed) == 2
        assert_weights(model, pristine)
        manager.prepare(*phases)
    assert_weights(model, pristine)


def test_an_offloaded_forward_that_fails_can_be_repeated(model, pristine, phases, expected, monkeypatch):
    reference = merged_copy(model, expected[phases[0]])
    x = torch.randn(2, 48).bfloat16()
    with prepared(model, phases, "original", offload=True):
        for failing in range(6):
            calls = iter(range(100))
            real = stores.merge_phase

            def merge(*args, calls=calls, failing=failing, real=real, **kwargs):
                if next(calls) == failing:
                    raise KeyboardInterrupt
                return real(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(stores, "merge_phase", merge)
                with pytest.raises(KeyboardInterrupt):
                    model(model(x) @ torch.ones(3, 48).bfloat16())
            assert torch.equal(model(x), reference(x))
    assert_weights(model, pristine)


def test_the_next_block_travels_while_one_computes():
    clock = SimulatedClock()
    model = small_model(blocks=4)
    with TwoStageDeviceManager("original", offload=True, clock=clock) as manager:
        manager.attach(model)
        manager.prepare(*lora_phases([], random_lora("distilled", model, seed=1)))
        for index, block in enumerate(model.transformer_blocks):
            block.register_forward_pre_hook(lambda *_, index=index: clock.run(f"compute block {index}", 10.0))
        model(torch.randn(1, 48).bfloat16())
    for index in range(1, 4):
        fetched, before = clock.first(f"fetch transformer_blocks.{index}"), clock.first(f"compute block {index - 1}")
        assert fetched.stream == "side"
        assert fetched.start < before.end
        assert clock.first(f"compute block {index}").start >= fetched.end


def test_offloading_brings_the_weights_outside_the_blocks_home_again():
    model = small_model(blocks=2)
    with prepared(model, lora_phases([], random_lora("distilled", model, seed=1)), "original", offload=True) as manager:
        outer = manager.store._outer
        found = {id(tensor) for tensor, place in outer if place.type == "cpu"}
        assert found == {id(t) for t in (*model.proj_in.parameters(), *model.proj_out.parameters(), model.table)}
        # Another place on the same machine: "cpu:0" differs from "cpu", so that the storages are really copied.
        manager.store._outer = [(tensor, torch.device("cpu", 0)) for tensor, _ in outer]
        there = {id(tensor): tensor.data_ptr() for tensor, _ in outer}
    assert all(tensor.data_ptr() != there[id(tensor)] for tensor in (*model.proj_in.parameters(), model.table))


def test_tensors_that_share_memory_go_on_sharing_it_when_they_are_moved():
    module = Shared()
    before = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    home = module.first.data_ptr()
    offload._move((tensor, torch.device("cpu", 0)) for tensor in module_tensors(module))
    assert module.first.data_ptr() != home
    assert len(storages(module)) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.fixture
def elsewhere(monkeypatch):
    """Blocks and other weights seem to lie on a GPU; what is moved there is written down, and may find no room."""
    state = {"full": False, "moved": {}}
    real = offload._move

    def move(tensors):
        for tensor, place in tensors:
            if state["full"] and place.type == "cuda":
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.\nMore words.")
            real([(tensor, torch.device("cpu"))])
            state["moved"][id(tensor)] = place

    monkeypatch.setattr(offload, "_place", lambda tensor: torch.device("cuda", 0))
    monkeypatch.setattr(offload, "_move", move)
    return state


def attach_and_close(model):
    """One offloaded request, and what the table of places says after `prepare`."""
    with prepared(model, lora_phases([], random_lora("distilled", model, seed=1)), "original", offload=True):
        inside = {id(t) for t in module_tensors(model.transformer_blocks)}
        model(torch.randn(2, 48).bfloat16())
        return inside


def test_blocks_that_were_on_the_gpu_return_there(model, pristine, elsewhere):
    attach_and_close(model)
    assert set(elsewhere["moved"]) == {id(tensor) for tensor in module_tensors(model)}
    assert set(elsewhere["moved"].values()) == {torch.device("cuda", 0)}
    assert_weights(model, pristine)


def test_blocks_that_find_no_room_stay_on_the_host_together(model, pristine, elsewhere, monkeypatch, caplog):
    real = offload.OffloadStore._take_back

    def take_back(self):
        # The last block finds no room.
        elsewhere["full"] = True
        tensors = [tensor for tensor, _ in self._away]
        self._away = [(t, torch.device("cuda" if t is tensors[-1] else "meta")) for t in tensors]
        real(self)

    monkeypatch.setattr(offload.OffloadStore, "_take_back", take_back)
    inside = attach_and_close(model)
    assert {elsewhere["moved"][key] for key in inside} == {torch.device("cpu")}
    assert caplog.messages == [
        "the transformer's blocks stay on the host: CUDA out of memory. Tried to allocate 2 MiB."
    ]
    assert_weights(model, pristine)
