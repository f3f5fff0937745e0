"""LoRA factors that a device has no room for: page-locked within the host budget, given back, and nothing on a CPU.

Another place on the same machine stands for the GPU: "cpu:0" differs from "cpu", so that factors are really copied.
"""

import pytest
import torch

from ltxkern.pipeline.files.lora import LoRA, LoRAFactors, LoRAPhase, lora_phases
from ltxkern.pipeline.memory import factors, host_memory
from ltxkern.pipeline.memory.factors import FactorCache
from ltxkern.pipeline.memory.host_memory import HostBudget
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.memory.modes import MODES
from tests.pipeline.memory.lora_models import assert_switches, assert_weights, fresh_merges, prepared, random_lora

DEVICE = torch.device("cpu", 0)


class Host:
    """Page-locked memory as a GPU's runtime would give it: where it is, and how much was taken."""

    def __init__(self):
        self.taken = []
        self.fail_at = None

    def allocate(self, shape, dtype):
        if len(self.taken) == self.fail_at:
            raise KeyboardInterrupt
        self.taken.append(torch.empty(shape, dtype=dtype))
        return self.taken[-1]

    def holds(self, tensor):
        return any(tensor.untyped_storage().data_ptr() == piece.untyped_storage().data_ptr() for piece in self.taken)


@pytest.fixture
def host(monkeypatch):
    """As on a machine with a GPU."""
    made = Host()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self, device="cuda": made.holds(self))
    monkeypatch.setattr(torch.UntypedStorage, "is_pinned", lambda self, device="cuda": False)
    monkeypatch.setattr(host_memory, "_allocate_pinned", made.allocate)
    return made


def lora_of(name="lora", ranks=(3, 5, 0, 7), dtype=torch.bfloat16):
    """Factors of several sizes, none of them a multiple of the alignment."""
    factors = {
        f"m{k}": LoRAFactors(torch.randn(rank, 11 + k).to(dtype), torch.randn(9 + k, rank).to(torch.float32))
        for k, rank in enumerate(ranks)
    }
    return LoRA(name, factors)


def phase_of(*loras):
    return LoRAPhase(tuple((lora, 0.5) for lora in loras))


def check(cache, lora):
    """Every pair arrives whole."""
    for pair in lora.factors.values():
        a, b = cache.on(DEVICE, pair)
        assert torch.equal(a, pair.a)
        assert torch.equal(b, pair.b)
        assert a.dtype == pair.a.dtype
        assert b.dtype == pair.b.dtype


def test_what_the_device_has_no_room_for_is_page_locked_once(host):
    budget, lora = HostBudget(1 << 20), lora_of()
    cache = FactorCache(0, budget)
    for _ in range(2):
        cache.page_lock([phase_of(lora)], DEVICE)
        assert len(host.taken) == 1
        assert cache.locked_bytes == lora.nbytes
        assert lora.nbytes <= budget.used <= 2 * (lora.nbytes + 8 * 256)
        check(cache, lora)
    assert cache.nbytes == 0
    starts = [tensor.data_ptr() - host.taken[0].data_ptr() for pair in cache._locked.values() for tensor in pair]
    assert all(start % 256 == 0 for start in starts)
    assert all(host.holds(tensor) for pair in cache._locked.values() for tensor in pair)
    cache.page_lock((), DEVICE)
    assert budget.used == cache.locked_bytes == 0
    check(cache, lora)


def test_copies_from_page_locked_memory_do_not_block(host, monkeypatch):
    lora = lora_of(ranks=(3, 5, 7))
    cache = FactorCache(0, HostBudget(1 << 20))
    cache.page_lock([phase_of(lora)], DEVICE)
    real, seen = torch.Tensor.to, []

    def to(self, *args, **kwargs):
        seen.append((host.holds(self), kwargs.get("non_blocking", False)))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    for pair in lora.factors.values():
        cache.on(DEVICE, pair)
    assert seen == [(True, True)] * 6
    # What stays on the device may be read by another stream than the one it came on.
    seen.clear()
    cache = FactorCache(1 << 20, HostBudget(1 << 20))
    for pair in lora.factors.values():
        cache.on(DEVICE, pair)
    assert seen == [(False, False)] * 6


def test_factors_that_fit_on_the_device_are_kept_there(host):
    lora = lora_of()
    sizes = [factors.nbytes for factors in lora.factors.values()]
    room = sizes[0] + sizes[1]
    cache = FactorCache(room, HostBudget(1 << 20))
    cache.page_lock([phase_of(lora)], DEVICE)
    assert cache.locked_bytes == sum(sizes) - room
    for _ in range(2):
        check(cache, lora)
        assert cache.nbytes == room
    whole = FactorCache(sum(sizes), HostBudget(1 << 20))
    whole.page_lock([phase_of(lora)], DEVICE)
    assert whole.locked_bytes == 0


def test_large_sets_come_in_several_pieces(host, monkeypatch):
    monkeypatch.setattr(factors, "PIECE_BYTES", 600)
    budget, lora = HostBudget(1 << 20), lora_of(ranks=(3, 5, 2, 7, 90))
    cache = FactorCache(0, budget)
    cache.page_lock([phase_of(lora)], DEVICE)
    # One pair is larger than a piece.
    assert len(host.taken) > 3
    assert max(piece.nbytes for piece in host.taken) > 600
    check(cache, lora)
    cache.keep_only(())
    assert budget.used == cache.locked_bytes == 0


def test_a_lora_that_is_not_merged_any_more_is_given_back(host):
    budget, one, other = HostBudget(1 << 20), lora_of("one"), lora_of("other")
    cache = FactorCache(0, budget)
    cache.page_lock([phase_of(one, other), phase_of(other)], DEVICE)
    both = budget.used
    assert cache.locked_bytes == one.nbytes + other.nbytes
    cache.keep_only([phase_of(other)])
    assert cache.locked_bytes == other.nbytes
    assert budget.used == both // 2
    check(cache, one)
    check(cache, other)


def test_a_full_host_leaves_the_rest_pageable(host, monkeypatch):
    monkeypatch.setattr(factors, "PIECE_BYTES", 600)
    budget, lora = HostBudget(2048), lora_of(ranks=(3, 5, 2, 7))
    cache = FactorCache(0, budget)
    cache.page_lock([phase_of(lora)], DEVICE)
    assert 0 < cache.locked_bytes < lora.nbytes
    assert budget.used <= 2048
    check(cache, lora)
    nothing = FactorCache(0, HostBudget(0))
    nothing.page_lock([phase_of(lora)], DEVICE)
    assert nothing.locked_bytes == 0
    check(nothing, lora)


def test_an_interruption_leaves_nothing_that_cannot_be_given_back(host, monkeypatch):
    monkeypatch.setattr(factors, "PIECE_BYTES", 600)
    budget, lora = HostBudget(1 << 20), lora_of(ranks=(3, 5, 2, 7))
    cache = FactorCache(0, budget)
    host.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        cache.page_lock([phase_of(lora)], DEVICE)
    assert budget.used > 0
    check(cache, lora)
    cache.keep_only(())
    assert budget.used == 0


def test_page_locked_factors_of_the_user_are_not_copied_again(host):
    host.taken += [torch.randn(3, 4), torch.randn(5, 3)]
    lora = LoRA("pinned", {"m": LoRAFactors(*host.taken)})
    cache = FactorCache(0, HostBudget(1 << 20))
    cache.page_lock([phase_of(lora)], DEVICE)
    assert len(host.taken) == 2
    check(cache, lora)


def test_nothing_happens_without_a_gpu_or_where_the_factors_are(host, monkeypatch):
    lora = lora_of()
    cache = FactorCache(0, HostBudget(1 << 20))
    cache.page_lock([phase_of(lora)], torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cache.page_lock([phase_of(lora)], DEVICE)
    assert host.taken == []
    factors = lora.factors["m0"]
    assert cache.on(torch.device("cpu"), factors)[0] is factors.a


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_modes_that_merge_again_page_lock_their_factors(model, pristine, mode, offload, host):
    user, distilled = random_lora("user", model, seed=1), random_lora("distilled", model, seed=2)
    first = lora_phases([(user, 0.7)], distilled)
    second = lora_phases([], distilled)
    expected = fresh_merges(pristine, [*first, *second])
    with TwoStageDeviceManager(mode, device=DEVICE, offload=offload) as manager:
        manager.attach(model)
        for phases, loras in ((first, (user, distilled)), (second, (distilled,))):
            manager.prepare(*phases)
            again = mode in ("inplace", "original")
            locked = sum(lora.nbytes for lora in loras) if again else 0
            assert manager.store.factors.locked_bytes == locked
            assert ("page-locked on the host" in manager.describe()) == again
            if mode != "original" or not offload:
                assert_switches(manager, model, expected, phases[1], phases[0])
    assert manager.budget.used == 0
    assert_weights(model, pristine)


def test_a_mode_that_is_given_up_leaves_its_room_to_the_next(model, host):
    phases = lora_phases([], random_lora("violent", model, seed=1, size=2000.0))
    with prepared(model, phases, "inplace", device=DEVICE) as manager:
        assert manager.mode == "snapshot"
        assert manager.store.factors.locked_bytes == 0
    assert manager.budget.used == 0
