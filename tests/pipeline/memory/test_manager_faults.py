"""Faults in the middle of a switch: the manager is in a defined phase or refuses to run, and can be brought back."""

import contextlib
import itertools
import sys

import pytest
import torch
from safetensors.torch import save_file

from ltxkern.pipeline.files.lora import NO_LORA, LoRA, LoRAPhase, lora_phases
from ltxkern.pipeline.memory import inplace, stores
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.memory.modes import MODES
from ltxkern.pipeline.memory.table import LoRAPhaseError
from tests.pipeline.memory.lora_models import (
    assert_switches,
    assert_weights,
    fresh,
    fresh_merges,
    linear_weights,
    prepared,
    random_lora,
    small_model,
)


class MidwayError(Exception):
    """Raised by the tests in the middle of something."""


@pytest.fixture
def fail_at(monkeypatch):
    """Lets the n-th merge from now on change half of its weight and then raise."""
    real = stores.merge_phase
    state = {"left": None, "error": MidwayError}

    def merge(weight, module, phase, **kwargs):
        if state["left"] is not None:
            state["left"] -= 1
            if state["left"] < 0:
                state["left"] = None
                weight[: weight.shape[0] // 2] = 7
                raise state["error"]
        return real(weight, module, phase, **kwargs)

    real_pair = stores.merge_phase_pair

    def merge_pair(weight, other, module, phases, *, ratio, **kwargs):
        merge(other.copy_(weight), module, phases[1], **kwargs)
        merge(weight.clone(), module, phases[0], **kwargs)
        real_pair(weight, other, module, phases, ratio=ratio, **kwargs)

    real_beside = stores.merge_phase_beside

    def merge_beside(weight, other, module, phase, **kwargs):
        merge(other.copy_(weight), module, phase, **kwargs)
        real_beside(weight, other, module, phase, **kwargs)

    real_deltas = inplace.phase_deltas

    def deltas(weight, module, phase, cache):
        merge(torch.empty_like(weight), module, phase)
        return real_deltas(weight, module, phase, cache)

    monkeypatch.setattr(stores, "merge_phase", merge)
    monkeypatch.setattr(stores, "merge_phase_pair", merge_pair)
    monkeypatch.setattr(stores, "merge_phase_beside", merge_beside)
    monkeypatch.setattr(inplace, "phase_deltas", deltas)

    def arm(count, error=MidwayError):
        state["left"], state["error"] = count, error

    return arm


def is_one_of(model, expected):
    """The phases whose fresh merge the weights equal."""
    found = []
    for phase, weights in expected.items():
        if all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in weights.items()):
            found.append(phase)
    return found


@pytest.mark.parametrize("error", [MidwayError, KeyboardInterrupt, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("mode", MODES)
def test_an_exception_anywhere_in_a_switch(mode, error, fail_at):
    """Every merge of a switch fails once; afterwards the phase is true or the model does not run, and a switch mends it."""
    for count in itertools.count():
        model, pristine, (*phases, third), expected = fresh(user=True, blocks=2)
        x = torch.randn(1, 48).bfloat16()
        with prepared(model, phases, mode) as manager:
            fail_at(count, error)
            try:
                manager.switch_lora_phase(third)
            except error:
                pass
            else:
                fail_at(10**6)
                assert count > 4
                return
            if manager.phase is None:
                with pytest.raises(LoRAPhaseError, match="call switch_lora_phase"):
                    model(x)
            else:
                assert is_one_of(model, expected) == [manager.phase]
                model(x)
            assert_switches(manager, model, expected, phases[1])
            model(x)
        assert_weights(model, pristine)


@pytest.mark.parametrize("mode", MODES)
def test_an_exception_anywhere_in_prepare(mode, fail_at):
    for count in itertools.count():
        model, pristine, phases, expected = fresh(NO_LORA, blocks=1)
        with TwoStageDeviceManager(mode) as manager:
            manager.attach(model)
            fail_at(count)
            try:
                manager.prepare(*phases)
            except MidwayError:
                assert manager.phase is None or is_one_of(model, expected) == [manager.phase]
            else:
                fail_at(10**6)
                assert count > 3
                return
            manager.prepare(*phases)
            assert_weights(model, expected[phases[0]])
            assert_switches(manager, model, expected, phases[1])
        assert_weights(model, pristine)


def test_one_product_is_taken_only_where_a_checksum_can_prove_it(fail_at, monkeypatch):
    """After a failure in `prepare` there may be a correction and no checksum yet: a wrong ratio would go unnoticed."""
    monkeypatch.setattr(inplace, "binary_ratio", lambda *_: 1.0)
    for count in range(30):
        model, _, phases, expected = fresh(blocks=1)
        with TwoStageDeviceManager("inplace") as manager:
            manager.attach(model)
            fail_at(count)
            with contextlib.suppress(MidwayError):
                manager.prepare(*phases)
            fail_at(10**6)
            manager.prepare(*phases)
            assert_switches(manager, model, expected, phases[0], phases[1], phases[0])


class InterruptAtLine:
    """Raises KeyboardInterrupt before the n-th line that runs in the manager's own files."""

    STEMS = ("stores", "merge", "snapshot", "offload", "table", "inplace", "factors", "manager", "origin")
    FILES = (*(f"memory/{stem}.py" for stem in STEMS), "files/lora.py")

    def __init__(self, line):
        self.left = line

    def __enter__(self):
        sys.settrace(self._call)

    def __exit__(self, *_):
        sys.settrace(None)

    def _call(self, frame, event, argument):
        return self._line if frame.f_code.co_filename.endswith(self.FILES) else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.left -= 1
            if self.left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


@pytest.mark.parametrize("mode", MODES)
def test_ctrl_c_at_any_line_of_a_switch(mode):
    model, pristine, (*phases, third), expected = fresh(user=True, blocks=1)
    with prepared(model, phases, mode) as manager:
        # A prime step, so that every place of the loops is met by and by.
        for line in itertools.count(0, 3):
            target = (third, phases[1])[line % 2]
            try:
                with InterruptAtLine(line):
                    manager.switch_lora_phase(target)
            except KeyboardInterrupt:
                if manager.phase is None:
                    with pytest.raises(LoRAPhaseError, match="between two LoRA phases"):
                        model(torch.randn(1, 48).bfloat16())
                else:
                    assert manager.phase in is_one_of(model, expected)
            else:
                assert line > 100
                break
            assert_switches(manager, model, expected, phases[1], phases[0])
    assert_weights(model, pristine)


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "offload"])
def test_ctrl_c_at_any_line_of_close(mode, from_file, tmp_path):
    """The weights are in the manager's phase, or pristine, or no forward runs; `close` once more brings them back."""
    settings = {"mode": "original", "offload": True} if mode == "offload" else {"mode": mode}
    x = torch.randn(1, 16).bfloat16()
    for line in itertools.count(0, 7):
        model, pristine, phases, expected = fresh(blocks=1, width=16, hidden=24)
        if not line:
            save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
        manager = prepared(model, phases, pristine=tmp_path if from_file else None, **settings)
        try:
            with InterruptAtLine(line):
                manager.close()
        except KeyboardInterrupt:
            if manager._table is None:
                assert_weights(model, pristine)
            elif manager.phase is None:
                with pytest.raises(LoRAPhaseError, match="between two LoRA phases"):
                    model(x)
            elif mode != "offload":
                assert_weights(model, expected[manager.phase])
            manager.close()
        else:
            assert line > 10
            break
        assert_weights(model, pristine)
        model(x)
    assert not model._forward_pre_hooks


def test_a_failed_switch_leaves_the_former_phase_where_nothing_was_written(fail_at):
    for mode in ("resident", "inplace"):
        model = small_model(blocks=2)
        lora = random_lora("distilled", model, seed=1)
        phases = lora_phases([], lora)
        with prepared(model, phases, mode) as manager:
            fail_at(0)
            with pytest.raises(MidwayError):
                manager.switch_lora_phase(LoRAPhase(((lora, 0.9),)))
            assert manager.phase == phases[0]


def test_inplace_goes_on_to_original_where_the_host_has_no_room_for_snapshots(model, pristine):
    phases = lora_phases([], random_lora("violent", model, seed=1, size=2000.0))
    expected = fresh_merges(pristine, phases)
    with prepared(model, phases, "inplace", host_budget_bytes=1000) as manager:
        assert manager.mode == "original"
        assert_switches(manager, model, expected, phases[1], phases[0])
    assert_weights(model, pristine)


def test_a_lora_that_does_not_fit_changes_nothing(model):
    lora = random_lora("distilled", model, seed=1)
    phases = lora_phases([], lora)
    foreign = LoRA("foreign", {"transformer_blocks.9.0": lora.factors["proj_in"]})
    with prepared(model, phases, "resident") as manager:
        before = linear_weights(model)
        with pytest.raises(ValueError, match=r"LoRA foreign does not fit.*transformer_blocks\.9\.0"):
            manager.switch_lora_phase(LoRAPhase(((foreign, 1.0),)))
        assert manager.phase == phases[0]
        assert_weights(model, before)
        manager.switch_lora_phase(phases[1])
