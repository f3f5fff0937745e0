"""LoRA files: official names, stored dtypes and scales, what fits, and what is said when it does not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ltxkern.pipeline.files.checkpoint import CheckpointError, load_lora
from ltxkern.pipeline.files.demo import demo_lora
from ltxkern.pipeline.files.lora import LoRA
from ltxkern.pipeline.files.lora_file import check_lora_file, dequantise
from ltxkern.pipeline.model.components import Components


def lora_file(path: Path, change: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None) -> Path:
    tensors = {key: value.contiguous() for key, value in demo_lora().items()}
    change(tensors)
    save_file(tensors, path / "lora.safetensors")
    return path / "lora.safetensors"


def test_lora_fits_every_linear(demo: Components, tmp_path: Path) -> None:
    transformer = demo.transformer
    assert transformer is not None
    path = lora_file(tmp_path)
    lora = load_lora(path, transformer=transformer)
    linears = {name for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    whole = LoRA.from_file(path, transformer)
    whole.check(transformer)
    assert set(lora) == set(whole.factors) == linears
    for name, (a, b, alpha) in lora.items():
        assert (b @ a).shape == transformer.get_submodule(name).weight.shape
        assert alpha is whole.factors[name].alpha is None
    assert "time_embed.linear" in lora
    assert "audio_time_embed.emb.timestep_embedder.linear_1" in lora
    assert "av_cross_attn_video_a2v_gate.linear" in lora


def test_lora_alpha_and_connector_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["diffusion_model.proj_out.alpha"] = torch.tensor(8.0)
        tensors["diffusion_model.video_embeddings_connector.x.lora_A.weight"] = torch.ones(4, 3)

    lora = load_lora(lora_file(tmp_path, change))
    assert lora["proj_out"][2] == 8.0
    assert not any("connector" in name for name in lora)
    assert "1 keys of the text connectors or a text encoder are left out" in caplog.text


def test_lora_with_diffusers_names(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({f"transformer.proj_in.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}, path)
    assert set(load_lora(path)) == {"proj_in"}


A, B = "diffusion_model.proj_out.lora_A.weight", "diffusion_model.proj_out.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(B), r"1 modules without lora_A or lora_B: proj_out"),
        (lambda t: t.pop(A), r"1 modules without lora_A or lora_B: proj_out"),
        (lambda t: t.update({A: torch.ones(3, 64)}), r"1 pairs that are not \(R, in\) and \(out, R\): proj_out"),
        (
            lambda t: t.update({A: torch.ones(4, 65)}),
            r"1 of the wrong shape: proj_out \(expected \(16, 64\), got \(16, 65\)\)",
        ),
        (
            lambda t: t.update(
                {A.replace("proj_out", "nothing"): t[A] + 1, B.replace("proj_out", "nothing"): t[B] + 1}
            ),
            "1 modules the transformer does not have: nothing",
        ),
        (lambda t: t.update({"weight": torch.ones(1)}), "expected keys diffusion_model.*got weight"),
        (lambda t: t.clear(), "expected keys diffusion_model.*got none"),
    ],
    ids=["no-B", "no-A", "rank", "shape", "module", "keys", "empty"],
)
def test_lora_misfit(demo: Components, tmp_path: Path, change: Callable, message: str) -> None:
    path = lora_file(tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_lora(path, transformer=demo.transformer)
    assert str(path) in str(error.value)


def test_lora_that_fits_nothing(demo: Components, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({f"diffusion_model.double_blocks.0.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}, path)
    with pytest.raises(CheckpointError, match=r"does not have: double_blocks\.0"):
        load_lora(path, transformer=demo.transformer)


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


def _only_foreign(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()
    tensors["text_encoder.layers.0.lora_A.weight"] = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t.update({"diffusion_model.proj_out.alpha": torch.ones(2)}),
            r"alpha of proj_out must be one finite",
        ),
        (lambda t: t.update({"diffusion_model.proj_out.alpha": torch.tensor(float("nan"))}), r"finite number, got nan"),
        (
            lambda t: t.update({k: v.to(torch.int8) for k, v in t.items() if "proj_out.lora_A" in k}),
            r"got 2 others: .*I8",
        ),
        (_only_foreign, r"changes nothing of the transformer, all 1 keys are of the text"),
    ],
    ids=["alphas", "nan", "integers", "text encoder alone"],
)
def test_what_cannot_be_merged_is_told_from_the_header(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], sentence: str
) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        check_lora_file(lora_file(tmp_path, change))


def test_a_header_entry_nested_without_end_is_text(tmp_path: Path) -> None:
    path = lora_file(tmp_path)
    save_file({key: value.contiguous() for key, value in demo_lora().items()}, path, {"note": "[" * 100_000})
    assert all(alpha is None for _, _, alpha in load_lora(path).values())
