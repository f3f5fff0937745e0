"""LoRA phases: order and strengths, equality by name, and LoRAs that do not fit a model."""

import pytest

from ltxkern.pipeline.files.lora import NO_LORA, LoRA, LoRAFactors, LoRAPhase, lora_phases
from tests.pipeline.memory.lora_models import one_lora, random_lora, small_model


def test_user_loras_come_before_the_distilled_one_and_zero_strengths_drop_out():
    user, muted, distilled = one_lora("user"), one_lora("muted"), one_lora("distilled")
    first, second = lora_phases([(user, 0.7), (muted, 0.0)], distilled, (0.0, 1.0))
    assert [(lora.name, s) for lora, s in first.entries] == [("user", 0.7)]
    assert [(lora.name, s) for lora, s in second.entries] == [("user", 0.7), ("distilled", 1.0)]


def test_default_strengths_are_those_of_the_hq_generator():
    distilled = one_lora()
    first, second = lora_phases([], distilled)
    assert (first.entries[0][1], second.entries[0][1]) == (0.25, 0.5)
    assert lora_phases([], None) == (NO_LORA, NO_LORA)


def test_phases_are_equal_by_name_and_strength():
    assert LoRAPhase(((one_lora("a"), 0.5),)) == LoRAPhase(((one_lora("a", seed=1), 0.5),))
    assert LoRAPhase(((one_lora("a"), 0.5),)) != LoRAPhase(((one_lora("a"), 0.25),))
    assert LoRAPhase(((one_lora("a"), 0.5),)) != LoRAPhase(((one_lora("b"), 0.5),))
    assert LoRAPhase(((one_lora("a"), 0.0),)) == NO_LORA
    pair = (one_lora("a"), 1.0), (one_lora("b"), 1.0)
    assert LoRAPhase(pair) != LoRAPhase(pair[::-1])
    assert len({LoRAPhase(pair), LoRAPhase(pair), NO_LORA}) == 2


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_is_a_finite_number(strength):
    with pytest.raises(ValueError, match="strength of LoRA a must be a finite number"):
        LoRAPhase(((one_lora("a"), strength),))


def test_two_different_loras_of_one_name_are_refused():
    with pytest.raises(ValueError, match="is given twice"):
        lora_phases([(one_lora("same"), 1.0)], one_lora("same", seed=1))


def test_misfits_name_the_lora_and_the_modules():
    model = small_model()
    lora = random_lora("mine", model, seed=1)
    factors = dict(lora.factors)
    wrong = factors["proj_in"]
    factors["proj_in"] = LoRAFactors(wrong.a[:, 1:], wrong.b)
    factors["nowhere"] = wrong
    with pytest.raises(ValueError, match=r"LoRA mine.*nowhere.*proj_in"):
        LoRA("mine", factors).check(model)
