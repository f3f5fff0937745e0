"""What each mode merges, keeps and takes at a switch, and where "inplace" gives up."""

import itertools

import pytest
from safetensors.torch import save_file

from ltxkern.pipeline.files.lora import NO_LORA, TWO_STAGE_STRENGTHS, LoRAPhase, lora_phases
from ltxkern.pipeline.memory import inplace, stores
from ltxkern.pipeline.memory import manager as manager_module
from ltxkern.pipeline.memory.host_memory import HostBudget
from ltxkern.pipeline.memory.inplace import bit_pattern
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.memory.modes import MODES
from ltxkern.pipeline.memory.stores import OriginalStore
from ltxkern.pipeline.memory.table import CheckpointPristine, LoRAPhaseError
from ltxkern.pipeline.planning.meta_trace import AllocationTrace
from tests.pipeline.memory.lora_models import (
    assert_switches,
    assert_weights,
    fresh_merges,
    linear_weights,
    prepared,
    random_lora,
    small_model,
)


@pytest.mark.parametrize("mode", MODES)
def test_equal_and_empty_phases_are_free(model, mode, monkeypatch):
    lora = random_lora("distilled", model, seed=1)
    merges = []
    for name in ("merge_phase", "merge_phase_beside"):
        monkeypatch.setattr(stores, name, lambda *args, **kwargs: merges.append(1))
    with prepared(model, (NO_LORA, LoRAPhase(((lora, 0.0),))), mode) as manager:
        manager.switch_lora_phase(NO_LORA)
        assert merges == []
        manager.switch_lora_phase(LoRAPhase(((lora, 0.5),)))
        assert len(merges) >= len(lora.factors)


@pytest.mark.parametrize("mode", MODES)
def test_peak_extra_memory_of_a_switch(mode):
    block = 2 * 256 * 512 * 2
    # The trace holds the weights from the start: a switch that replaces them frees what it replaces.
    with AllocationTrace() as trace, TwoStageDeviceManager(mode) as manager:
        model = small_model(width=256, hidden=512, blocks=6)
        phases = lora_phases([], random_lora("distilled", model, seed=1, rank=2))
        weights = sum(w.nbytes for w in linear_weights(model).values())
        manager.attach(model)
        manager.prepare(*phases)
        # What the manager keeps beside one copy, on the device: a second copy, two blocks, a correction, nothing.
        kept = {"resident": weights, "snapshot": 2 * block, "inplace": weights, "original": 0}[mode]
        assert manager.store.extra_device_bytes <= kept
        limit = {"resident": 0, "snapshot": 0, "inplace": 2 * block, "original": block}[mode]
        for phase in (phases[1], phases[0], phases[1]):
            before = trace.peak = trace.live
            manager.switch_lora_phase(phase)
            assert trace.peak - before <= limit + 64 * 1024
            # And a switch leaves nothing behind; both ways take the same.
            assert trace.live == before
        if mode == "inplace":
            assert manager.store.host_bytes == 0


def test_inplace_takes_one_product_where_the_strengths_differ_by_a_power_of_two(model, monkeypatch):
    lora = random_lora("distilled", model, seed=1)
    calls = []

    def counted(real):
        return lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1]

    for place, name in ((stores, "merge_phase"), (inplace, "phase_deltas")):
        monkeypatch.setattr(place, name, counted(getattr(place, name)))
    for strengths, products in (((0.25, 0.5), 1), ((0.3, 0.7), 2), ((0.5, -0.125), 1)):
        phases = lora_phases([], lora, strengths)
        expected = fresh_merges(linear_weights(model), phases)
        with prepared(model, phases, "inplace") as manager:
            calls.clear()
            manager.switch_lora_phase(phases[1])
            assert len(calls) == products * len(lora.factors)
            assert_weights(model, expected[phases[1]])


def test_inplace_takes_two_products_where_one_does_not_give_the_bits(model, phases, expected, monkeypatch):
    with prepared(model, phases, "inplace") as manager:
        monkeypatch.setattr(inplace, "binary_ratio", lambda *_: 1.0)
        assert_switches(manager, model, expected, phases[1], phases[0])


@pytest.mark.parametrize("mode", MODES)
def test_preparing_the_same_phases_again_merges_nothing(model, phases, mode, monkeypatch):
    with prepared(model, phases, mode) as manager:

        def refuse(*_, **__):
            raise AssertionError("merged again")

        with monkeypatch.context() as patch:
            for name in ("merge_phase", "merge_phase_beside", "merge_phase_pair"):
                patch.setattr(stores, name, refuse)
            patch.setattr(inplace, "phase_deltas", refuse)
            manager.prepare(*phases)
            if mode in ("resident", "snapshot"):
                manager.switch_lora_phase(phases[1])
                manager.prepare(*phases)
        assert manager.phase == phases[0]


def test_inplace_falls_back_where_the_correction_would_be_too_large(model, pristine):
    lora = random_lora("violent", model, seed=1, size=2000.0)
    phases = lora_phases([], lora)
    expected = fresh_merges(pristine, phases)
    with prepared(model, phases, "inplace") as manager:
        assert manager.mode == "snapshot"
        assert "bytes per weight" in manager.describe()
        assert_switches(manager, model, expected, phases[1], phases[0])
    assert_weights(model, pristine)


def test_inplace_falls_back_where_the_product_is_not_repeatable(model, pristine, phases, expected, monkeypatch):
    calls = itertools.count()
    real = stores.merge_phase

    def unstable(weight, module, phase, **kwargs):
        real(weight, module, phase, **kwargs)
        if kwargs.get("sign") == -1 and next(calls) % 2:
            bit_pattern(weight)[3] += 1
        return weight

    monkeypatch.setattr(stores, "merge_phase", unstable)
    with prepared(model, phases, "inplace") as manager:
        assert manager.mode == "snapshot"
        assert "not repeatable" in manager.describe()
        assert_weights(model, expected[phases[0]])
    assert_weights(model, pristine)


@pytest.mark.parametrize("rounding", ["reference", "single"])
def test_resident_makes_the_other_phase_from_the_pristine_weights_at_hand(
    model, pristine, rounding, tmp_path, monkeypatch
):
    """Strengths 0 and 1: nothing is read from the files, and one pass makes the second copy."""
    save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
    lora, user = random_lora("distilled", model, seed=1), random_lora("user", model, seed=2)
    phases = lora_phases([], lora, TWO_STAGE_STRENGTHS)
    third = LoRAPhase(((user, 0.7),))
    expected = fresh_merges(pristine, [*phases, third], rounding)
    with TwoStageDeviceManager("resident", rounding=rounding) as manager:
        manager.attach(model, pristine=tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointPristine, "fetch", lambda *_: pytest.fail("read again"))
            manager.prepare(*phases)
            assert_switches(manager, model, expected, phases[1], phases[0], third)
        manager.switch_lora_phase(NO_LORA)
        model.proj_in.weight[3, 4] += 1
        with pytest.raises(LoRAPhaseError, match=r"proj_in\.weight does not have the bits"):
            manager.switch_lora_phase(phases[1])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_original_brings_pristine_weights_from_page_locked_memory_within_the_budget(
    model, pristine, phases, expected, share, tmp_path, monkeypatch
):
    """What has no room is read again from the files; a first merge reads nothing, for the weights are pristine."""
    save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
    budget = HostBudget(int(share * sum(weight.nbytes for weight in pristine.values())))
    monkeypatch.setattr(manager_module, "build_store", lambda mode, context, *_, **__: OriginalStore(context, budget))
    fetched, real = [], CheckpointPristine.fetch
    monkeypatch.setattr(CheckpointPristine, "fetch", lambda self, name: (fetched.append(name), real(self, name))[1])
    with TwoStageDeviceManager("original") as manager:
        manager.attach(model, pristine=tmp_path)
        manager.prepare(*phases)
        assert not fetched
        assert_weights(model, expected[phases[0]])
        kept = budget.used
        assert_switches(manager, model, expected, phases[1], phases[0])
        assert len(set(fetched)) == {0.0: len(pristine), 1.0: 0}.get(share, len(set(fetched)))
        assert (0 < len(set(fetched)) < len(pristine)) == (share == 0.5)
        assert kept == manager.store.host_bytes == budget.used
        manager.prepare(*phases)
        assert budget.used == kept
    assert budget.used == 0
    assert_weights(model, pristine)


def test_one_phase_page_locks_nothing(model, phases, monkeypatch):
    budget = HostBudget(1 << 30)
    monkeypatch.setattr(manager_module, "build_store", lambda mode, context, *_, **__: OriginalStore(context, budget))
    with prepared(model, phases[:1], "original"):
        assert budget.used == 0
