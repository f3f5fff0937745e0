"""The baselines of the phase-switch benchmark do what they are named after."""

import copy

import pytest
import torch
from bench_lora_switch import (
    BASELINES,
    BOTH_PHASES,
    STRENGTHS,
    add_dynamic,
    linear_bytes,
    linears,
    on_device,
    random_lora,
)
from torch import nn

from ltxkern.ops.merge_lora import merge_lora_
from ltxkern.pipeline.files.lora import LoRAPhase
from ltxkern.pipeline.memory.merge import merge_phase


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)).double().requires_grad_(False)


def merged(model, factors, strength):
    made = copy.deepcopy(model)
    for name, module in linears(made).items():
        merge_lora_(module.weight, *factors[name], strength)
    return made


@pytest.mark.parametrize("provider", BASELINES)
def test_a_switch_reaches_the_other_strength(provider, model):
    factors = on_device(random_lora(model, 3), torch.device("cpu"), torch.float64)
    changed = merged(model, factors, STRENGTHS[0])
    for name, module in linears(changed).items():
        BASELINES[provider](module.weight, *factors[name], *STRENGTHS)
    expected = merged(model, factors, STRENGTHS[1])
    for name, module in linears(changed).items():
        torch.testing.assert_close(module.weight, expected.get_submodule(name).weight, rtol=1e-12, atol=1e-14)
        assert not torch.equal(module.weight, model.get_submodule(name).weight)


def test_a_dynamic_lora_gives_the_merged_output(model):
    factors = on_device(random_lora(model, 3), torch.device("cpu"), torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected, plain = merged(model, factors, 0.5)(x), model(x)
    hooks = add_dynamic(linears(model), factors, 0.5)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-13)
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("provider", BOTH_PHASES)
def test_both_phases_are_made_from_one_weight(provider, model):
    lora = random_lora(model, 3)
    phases = tuple(LoRAPhase(((lora, strength),)) for strength in STRENGTHS)
    for name, module in linears(model).items():
        expected = [merge_phase(module.weight.clone(), name, phase) for phase in phases]
        other = torch.full_like(module.weight, float("nan"))
        BOTH_PHASES[provider](module.weight, other, name, phases)
        assert torch.equal(module.weight, expected[0])
        assert torch.equal(other, expected[1])


def test_the_bytes_are_those_of_the_patched_weights(model):
    assert linear_bytes(model) == (6 * 8 + 8 * 5) * 8
