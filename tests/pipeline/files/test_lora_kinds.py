"""Changes that are no plain low-rank product: what each adds, and that every device mode gives the same bits."""

import math

import pytest
import torch
from safetensors.torch import save_file

from ltxkern.pipeline.files.lora import NO_LORA, LoRA, LoRAPhase
from ltxkern.pipeline.files.lora_layout import parameter_shapes, target_of
from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.memory.merge import merge_phase
from ltxkern.pipeline.memory.modes import MODES
from tests.pipeline.memory.lora_models import small_model

MODULE = "transformer_blocks.1.0"
SHAPE = (80, 48)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / 8


A, B = draw(3, 48), draw(80, 3)
HADA = {f"hada_w{k}_{side}": draw(*shape, seed=k) for k in (1, 2) for side, shape in (("a", (80, 3)), ("b", (3, 48)))}
HADA_DELTA = (HADA["hada_w1_a"] @ HADA["hada_w1_b"]) * (HADA["hada_w2_a"] @ HADA["hada_w2_b"])
W1, W2A, W2B = draw(4, 3), draw(20, 2), draw(2, 16)
W2, W1A, W1B = draw(20, 16), draw(4, 2), draw(2, 3)
ROWS, COLUMNS = 1 + draw(80, 1), 1 + draw(1, 48)
FACTORS = {"lora_A.weight": A, "lora_B.weight": B}
ALPHA = {"alpha": torch.tensor(6.0)}


def decomposed(delta: torch.Tensor, magnitude: torch.Tensor):
    """What DoRA adds to a weight."""

    def change(weight: torch.Tensor) -> torch.Tensor:
        changed = weight + delta
        return magnitude * changed / changed.norm(dim=1 if magnitude.shape[1] == 1 else 0, keepdim=True) - weight

    return change


# Parts of one module, and what they add at strength 1: a difference, or a function of the weight.
KINDS = {
    "difference": ({"diff": draw(*SHAPE) / 16}, draw(*SHAPE) / 16),
    "kernels of a difference": ({"diff": draw(*SHAPE)[..., None] / 16}, draw(*SHAPE) / 16),
    "factors beside a difference": (
        FACTORS | {"alpha": torch.tensor(1.5), "diff": draw(*SHAPE) / 16}, B @ A / 2 + draw(*SHAPE) / 16,
    ),
    "loha beside a difference": (HADA | {"w_norm": draw(*SHAPE) / 16}, HADA_DELTA + draw(*SHAPE) / 16),
    "loha": (HADA, HADA_DELTA),
    "loha with alpha": (HADA | ALPHA, HADA_DELTA * 2),
    "lokr, whole": ({"lokr_w1": W1, "lokr_w2": W2} | ALPHA, torch.kron(W1, W2)),
    "lokr, second factorised": ({"lokr_w1": W1, "lokr_w2_a": W2A, "lokr_w2_b": W2B} | ALPHA, 3 * torch.kron(W1, W2A @ W2B)),
    "lokr, first factorised": ({"lokr_w1_a": W1A, "lokr_w1_b": W1B, "lokr_w2": W2}, torch.kron(W1A @ W1B, W2)),
    "lokr, both factorised": (
        {"lokr_w1_a": W1A, "lokr_w1_b": W1B, "lokr_w2_a": W2A, "lokr_w2_b": W2B} | ALPHA,
        3 * torch.kron(W1A @ W1B, W2A @ W2B),
    ),
    "dora of rows": (FACTORS | ALPHA | {"dora_scale": ROWS}, decomposed(2 * B @ A, ROWS)),
    "dora of columns": (FACTORS | {"dora_scale": COLUMNS}, decomposed(B @ A, COLUMNS)),
    "dora of PEFT": (FACTORS | {"lora_magnitude_vector": ROWS[:, 0]}, decomposed(B @ A, ROWS)),
    "dora of PEFT, with adapter": (
        {"lora_A.default.weight": A, "lora_B.default.weight": B, "lora_magnitude_vector.default.weight": ROWS[:, 0]},
        decomposed(B @ A, ROWS),
    ),
    "dora of loha": (HADA | {"dora_scale": ROWS}, decomposed(HADA_DELTA, ROWS)),
}  # fmt: skip


def lora_of(path, parts, transformer, **more) -> LoRA:
    tensors = {f"diffusion_model.{MODULE}.{part}": tensor.clone().contiguous() for part, tensor in parts.items()}
    save_file(tensors | more, path / "lora.safetensors")
    return LoRA.from_file(path / "lora.safetensors", transformer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_what_each_kind_adds(tmp_path, kind, strength):
    parts, delta = KINDS[kind]
    model = small_model(dtype=torch.float64)
    weight = model.get_submodule(MODULE).weight.detach()
    phase = LoRAPhase(((lora_of(tmp_path, parts, model), strength),))
    added = merge_phase(weight.clone(), MODULE, phase, rounding="single") - weight
    expected = delta(weight) if callable(delta) else delta.double()
    torch.testing.assert_close(added, strength * expected, rtol=1e-5, atol=1e-7)
    # Rounded once to the weight's dtype, then added as any LoRA.
    low = weight.to(torch.bfloat16)
    merged = merge_phase(low.clone(), MODULE, phase)
    exact = (delta(low.float()) if callable(delta) else delta) * strength
    if strength == 1.0:
        assert (merged == low + exact.to(torch.bfloat16)).float().mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_every_device_mode_gives_the_bits_of_a_fresh_merge(tmp_path, caplog, kind, mode):
    model = small_model()
    bias = {f"diffusion_model.{MODULE}.diff_b": draw(80), "diffusion_model.proj_out.lora_A.weight": draw(2, 48),
            "diffusion_model.proj_out.lora_B.weight": draw(3, 2), "diffusion_model.proj_out.lora_B.bias": draw(3)}  # fmt: skip
    lora = lora_of(tmp_path, KINDS[kind][0], model, **bias)
    assert {MODULE, f"{MODULE}.bias", "proj_out", "proj_out.bias"} == set(lora.factors)
    phases = LoRAPhase(((lora, 0.25),)), LoRAPhase(((lora, 0.5),)), NO_LORA
    pristine = {target_of(name): p.detach().clone() for name, p in model.named_parameters()}
    manager = TwoStageDeviceManager(mode, device="cpu")
    manager.attach(model)
    manager.prepare(*phases[:2])
    for phase in (phases[1], phases[0], phases[2], phases[1]):
        manager.switch_lora_phase(phase)
        for name, parameter in model.named_parameters():
            target = target_of(name)
            expected = merge_phase(pristine[target].clone(), target, phase)
            assert torch.equal(parameter, expected), (phase, name)
            assert torch.equal(parameter, pristine[target]) == (target not in phase.modules)
    # Weight decomposition cannot be subtracted from a merged weight: another mode takes over, and says so.
    assert (manager.mode == mode) == (mode != "inplace" or not kind.startswith("dora"))
    assert ("weight decomposition" in caplog.text) == (manager.mode != mode)
    manager.close()
    assert all(torch.equal(p, pristine[target_of(name)]) for name, p in model.named_parameters())


def test_biases_and_other_parameters_fit_by_their_whole_names():
    shapes = parameter_shapes(small_model())
    assert shapes[MODULE] == SHAPE
    assert shapes[f"{MODULE}.bias"] == SHAPE[:1]
    assert math.prod(SHAPE) == 3840


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"hada_w1_a": HADA["hada_w1_a"]}, r"transformer_blocks\.1\.0 \(has only hada_w1_a\)"),
        (FACTORS | HADA, "has only a, b, hada_w1_a"),
        (HADA | {"hada_w2_b": draw(3, 47)}, r"products \(80, 48\) and \(80, 47\)"),
        ({"lokr_w1": W1, "lokr_w2": draw(20, 15)}, r"expected \(80, 48\), got \(80, 45\)"),
        (FACTORS | {"dora_scale": draw(79, 1)}, r"weight \(80, 48\), magnitude \(79, 1\)"),
        (FACTORS | {"diff": draw(48, 80)}, r"pairs that .*changes \(80, 48\) and \(48, 80\)"),
        (FACTORS | {"diff": draw(*SHAPE), "dora_scale": ROWS}, "1 modules whose parts make no change: .*a, b, diff, magnitude"),
        (FACTORS | {"lora_magnitude_vector": ROWS[None, :, :, None]}, r"magnitude \(1, 80, 1, 1\)"),
        ({"lora_A.weight": draw(3, 48, 3, 3), "lora_B.weight": B}, r"A \(3, 48, 3, 3\)"),
        ({"alpha": torch.tensor(1.0)}, "1 modules whose parts make no change: .*has only alpha"),
        ({"diff": draw(48, 80)}, r"expected \(80, 48\), got \(48, 80\)"),
        ({"diff_b": draw(79)}, r"1\.0\.bias \(expected \(80,\), got \(79,\)\)"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(tmp_path, parts, message):
    with pytest.raises(ValueError, match=message):
        lora_of(tmp_path, parts, small_model())


def test_two_changes_of_one_bias_are_added(tmp_path):
    model = small_model(dtype=torch.float64)
    parts = FACTORS | ALPHA | {"lora_B.bias": draw(80), "diff_b": draw(80, seed=1)}
    phase = LoRAPhase(((lora_of(tmp_path, parts, model), 0.5),))
    bias = model.get_submodule(MODULE).bias.detach()
    added = merge_phase(bias.clone(), f"{MODULE}.bias", phase, rounding="single") - bias
    torch.testing.assert_close(added, draw(80).double() + 0.5 * draw(80, seed=1), rtol=1e-5, atol=1e-7)
