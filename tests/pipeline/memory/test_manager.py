"""The device manager: bit-equal phases in every mode, what each mode may cost, how it is chosen and undone."""

import random
import weakref

import pytest
import torch
from torch import nn

from ltxkern.compiled.merge_lora import cpu_has_bfloat16_products
from ltxkern.pipeline.files.demo import build_demo, demo_distilled_lora
from ltxkern.pipeline.files.lora import NO_LORA, LoRA, LoRAFactors, LoRAPhase, lora_phases
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.memory.modes import MODES
from ltxkern.pipeline.memory.table import LoRAPhaseError
from tests.pipeline.memory.lora_models import (
    assert_switches,
    assert_weights,
    fresh_merges,
    linear_weights,
    prepared,
    random_lora,
    small_model,
)


def demo_with_lora(dtype, seed=0):
    transformer = build_demo(dtype=dtype).transformer
    return transformer, [demo_distilled_lora(number, f"demo {number}") for number in (seed, seed + 1)]


def four_phases(distilled, user):
    return [*lora_phases([], distilled), LoRAPhase(((user, 0.7), (distilled, 0.25))), NO_LORA]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_fifty_random_switches_equal_fresh_merges(mode, dtype):
    transformer, (distilled, user) = demo_with_lora(dtype)
    pristine = linear_weights(transformer)
    others = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    phases = four_phases(distilled, user)
    expected = fresh_merges(pristine, phases)
    choose = random.Random(0)
    with prepared(transformer, phases[:2], mode) as manager:
        assert manager.mode == mode
        assert manager.phase == phases[0]
        assert_weights(transformer, expected[phases[0]])
        for _ in range(50):
            phase = choose.choice(phases)
            manager.switch_lora_phase(phase)
            assert manager.phase == phase
            assert_weights(transformer, expected[phase])
    for name, parameter in transformer.named_parameters():
        assert torch.equal(parameter, others[name]), name
    assert not transformer._forward_pre_hooks


@pytest.mark.parametrize("mode", MODES)
def test_single_rounding_and_a_second_request_with_other_strengths(model, pristine, mode):
    distilled, user = random_lora("distilled", model, seed=1), random_lora("user", model, seed=2)
    with TwoStageDeviceManager(mode, rounding="single") as manager:
        manager.attach(model)
        for strengths, users in (((0.25, 0.5), ()), ((0.0, 1.0), ((user, 0.5),)), ((0.3, 0.3), ())):
            phases = lora_phases(users, distilled, strengths)
            expected = fresh_merges(pristine, phases, "single")
            manager.prepare(*phases)
            assert_switches(manager, model, expected, *phases, *phases)
    assert_weights(model, pristine)


@pytest.fixture
def quick_product(monkeypatch):
    """Where the processor has no bf16 products torch's take minutes here: then fp32 ones that are rounded stand for them."""
    if cpu_has_bfloat16_products():
        return
    product = torch.matmul

    def matmul(a, b, **kwargs):
        return (
            product(a.float(), b.float(), **kwargs).to(a.dtype)
            if a.dtype == torch.bfloat16
            else product(a, b, **kwargs)
        )

    monkeypatch.setattr(torch, "matmul", matmul)


def real_layers():
    """Two blocks of one Linear each, 4096 x 4096 and 16384 x 4096 in bf16, and a LoRA of rank 384."""
    model = nn.Module()
    model.transformer_blocks = nn.ModuleList([nn.Module(), nn.Module()])
    torch.manual_seed(0)
    factors = {}
    for index, (out_features, in_features) in enumerate(((4096, 4096), (16384, 4096))):
        linear = nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        linear.weight.copy_(torch.randn(linear.weight.shape) * 0.02)
        model.transformer_blocks[index].to_q = linear
        b = (torch.randn(out_features, 384) * (0.05 * 0.02 / 0.25 / 384**0.5)).bfloat16()
        factors[f"transformer_blocks.{index}.to_q"] = LoRAFactors(torch.randn(384, in_features).bfloat16(), b)
    return model, LoRA("distilled", factors)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_product")
def test_three_switches_on_real_layer_shapes_in_every_mode():
    model, lora = real_layers()
    pristine = linear_weights(model)
    phases = lora_phases([], lora)
    expected = fresh_merges(pristine, phases)
    for mode in MODES:
        with prepared(model, phases, mode) as manager:
            assert_switches(manager, model, expected, phases[1], phases[0], phases[1])
            if mode == "inplace":
                assert manager.store.bytes_per_weight <= 0.5
        assert_weights(model, pristine)


@pytest.mark.parametrize("mode", MODES)
def test_forwards_are_identical_across_modes(mode):
    model = small_model(dtype=torch.float32)
    phases = lora_phases([], random_lora("distilled", model, seed=1))
    x = torch.randn(2, 48, generator=torch.Generator().manual_seed(3))
    expected = {}
    for phase, weights in fresh_merges(linear_weights(model), phases).items():
        merged = small_model(dtype=torch.float32)
        for name, weight in weights.items():
            merged.get_submodule(name).weight.copy_(weight)
        expected[phase] = merged(x)
    with prepared(model, phases, mode) as manager:
        for _ in range(2):
            with manager.stage("stage 1", forwards=3):
                for _ in range(3):
                    assert torch.equal(model(x), expected[phases[0]])
            manager.switch_lora_phase(phases[1])
            with manager.stage("stage 2", forwards=1):
                assert torch.equal(model(x), expected[phases[1]])
            manager.switch_lora_phase(phases[0])


def test_the_latents_of_the_whole_pipeline_are_identical_across_modes():
    """And a second run in the same pipeline gives them again."""
    from ltxkern.pipeline.generator import HQTwoStagePipeline

    results = []
    for mode in MODES:
        settings = {"dtype": torch.float32, "device_mode": mode}
        with HQTwoStagePipeline.from_pretrained("demo-random", device="cpu", **settings) as pipeline:
            for _ in range(2 if mode == "snapshot" else 1):
                size = {"height": 64, "width": 64, "num_frames": 9, "steps": 2}
                results.append(pipeline("a cat", **size, output_type="latents").latents)
            assert pipeline.manager.mode == mode
    for latents in results[1:]:
        assert latents.keys() == results[0].keys()
        for name, latent in latents.items():
            assert torch.equal(latent, results[0][name]), name


def test_the_environment_names_the_mode(monkeypatch):
    monkeypatch.setenv("LTXKERN_DEVICE_MODE", "inplace")
    assert TwoStageDeviceManager().requested_mode == "inplace"
    assert TwoStageDeviceManager("original").requested_mode == "original"
    monkeypatch.setenv("LTXKERN_DEVICE_MODE", "fast")
    with pytest.raises(ValueError, match="mode must be one of auto, resident"):
        TwoStageDeviceManager()


def test_close_twice_and_what_comes_before_attach(model):
    manager = TwoStageDeviceManager("original")
    manager.close()
    with pytest.raises(LoRAPhaseError, match="no transformer is attached"):
        manager.prepare(NO_LORA)
    manager.attach(model)
    with pytest.raises(ValueError, match="attached already"):
        manager.attach(model)
    manager.close()
    manager.close()
    manager.attach(model)
    manager.close()


def test_weights_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="meta device"):
        TwoStageDeviceManager("original").attach(model)


def test_a_closed_manager_lets_go_of_the_weights(model):
    manager = TwoStageDeviceManager("resident")
    manager.attach(model)
    manager.prepare(*lora_phases([], random_lora("distilled", model, seed=1)))
    merged = weakref.ref(model.proj_in.weight.data.untyped_storage())
    manager.close()
    assert merged() is None
