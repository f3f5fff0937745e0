"""LoRA phases: merge order, strengths, alpha, stored dtypes, and what does not fit."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ltxkern.pipeline.files.checkpoint import CheckpointError
from ltxkern.pipeline.files.demo import build_demo, demo_lora
from ltxkern.pipeline.files.lora import NO_LORA, LoRA, LoRAFactors, LoRAPhase, lora_phases
from ltxkern.pipeline.files.lora_file import dequantise
from ltxkern.pipeline.memory.merge import merge_phase
from tests.pipeline.memory.lora_models import random_lora, small_model


def one_lora(name="a", *, rank=3, alpha=None, seed=0, size=(5, 4), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, size[1], generator=generator).to(dtype)
    b = torch.randn(size[0], rank, generator=generator).to(dtype)
    return LoRA(name, {"m": LoRAFactors(a, b, alpha)})


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


@pytest.mark.parametrize(("alpha", "expected"), [(None, 0.5), (1.5, 0.5 * 1.5 / 3), (3.0, 0.5), (0.3, 0.05)])
def test_fractional_alpha_scales_and_no_alpha_does_not(alpha, expected):
    lora = one_lora(alpha=alpha)
    weight = torch.zeros(5, 4)
    merge_phase(weight, "m", LoRAPhase(((lora, 0.5),)), rounding="single")
    torch.testing.assert_close(weight, expected * lora.factors["m"].b @ lora.factors["m"].a)


def test_stacked_loras_follow_the_official_rule():
    user, distilled = one_lora("user", dtype=torch.bfloat16), one_lora("distilled", seed=1, dtype=torch.bfloat16)
    weight = torch.randn(5, 4).bfloat16()
    u, d = user.factors["m"], distilled.factors["m"]
    delta = torch.matmul(u.b * 0.7, u.a)
    delta.addmm_(d.b, d.a, alpha=0.25)
    merged = merge_phase(weight.clone(), "m", LoRAPhase(((user, 0.7), (distilled, 0.25))))
    assert torch.equal(merged, delta + weight)


def test_a_module_without_factors_and_a_phase_without_loras_change_nothing():
    weight = torch.randn(5, 4)
    assert torch.equal(merge_phase(weight.clone(), "other", LoRAPhase(((one_lora(), 1.0),))), weight)
    assert torch.equal(merge_phase(weight.clone(), "m", NO_LORA), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_floating_factors_are_taken_as_they_are(dtype):
    factor = torch.randn(3, 4).to(dtype)
    assert dequantise(factor) is factor


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_factors_are_dequantised(dtype):
    values = torch.tensor([[0.5, -1.75, 0.015625], [2.0, -0.0, 96.0]])
    stored = values.to(dtype)
    plain = dequantise(stored)
    assert plain.dtype == torch.bfloat16
    assert torch.equal(plain.float(), stored.float())
    assert torch.equal(dequantise(stored, 0.37), stored.float() * 0.37)
    rows = torch.tensor([0.5, 3.0])
    assert torch.equal(dequantise(stored, rows), stored.float() * rows[:, None])


def test_an_fp8_lora_merges_like_its_dequantised_values():
    a, b = torch.randn(3, 4).to(torch.float8_e4m3fn), torch.randn(5, 3).to(torch.float8_e4m3fn)
    lora = LoRA.from_tensors("a", {"m": (a, b, None)})
    merged = merge_phase(torch.zeros(5, 4), "m", LoRAPhase(((lora, 1.0),)), rounding="single")
    torch.testing.assert_close(merged, b.float() @ a.float())


def test_a_file_with_official_names_fits_the_demo(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(demo_lora(), str(path))
    transformer = build_demo().transformer
    lora = LoRA.from_file(path, transformer)
    linears = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    assert set(lora.factors) == linears
    assert all(factors.alpha is None for factors in lora.factors.values())
    lora.check(transformer)


@pytest.mark.parametrize("suffix", ["weight_scale", "scale_weight"])
def test_an_fp8_file_with_scales_and_alpha(tmp_path, suffix):
    path = tmp_path / "fp8.safetensors"
    key = "diffusion_model.transformer_blocks.0.attn1.to_q"
    a, b = torch.randn(3, 4).to(torch.float8_e4m3fn), torch.randn(5, 3).to(torch.float8_e4m3fn)
    tensors = {
        f"{key}.lora_A.weight": a,
        f"{key}.lora_B.weight": b,
        f"{key}.lora_A.{suffix}": torch.tensor(0.25),
        f"{key}.lora_B.{suffix}": torch.arange(1.0, 6.0),
        f"{key}.alpha": torch.tensor(1.5),
    }
    save_file(tensors, str(path))
    factors = LoRA.from_file(path).factors["transformer_blocks.0.attn1.to_q"]
    assert torch.equal(factors.a, a.float() * 0.25)
    assert torch.equal(factors.b, b.float() * torch.arange(1.0, 6.0)[:, None])
    assert factors.scale(1.0) == 0.5


def test_a_file_that_is_no_lora_names_file_and_keys(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"something.weight": torch.zeros(2)}, str(path))
    with pytest.raises(CheckpointError, match=r"other\.safetensors.*something\.weight"):
        LoRA.from_file(path)


def test_misfits_name_the_lora_and_the_modules():
    model = small_model()
    lora = random_lora("mine", model, seed=1)
    factors = dict(lora.factors)
    wrong = factors["proj_in"]
    factors["proj_in"] = LoRAFactors(wrong.a[:, 1:], wrong.b)
    factors["nowhere"] = wrong
    with pytest.raises(ValueError, match=r"LoRA mine.*nowhere.*proj_in"):
        LoRA("mine", factors).check(model)
