"""The stages of a run and what lies between them: noise, pictures, the LoRA of each, NaN by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.run.request import DEFAULT_NEGATIVE_PROMPT, GenerationRequest
from ltxkern.pipeline.sampling.finite import NonFiniteError
from tests.pipeline.demo_runs import SMALL, latents, same


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (80, 150, 3), dtype=np.uint8)
    path = tmp_path / "first:frame.png"
    Image.fromarray(pixels).save(path)
    return path


def test_pictures_at_any_frame(pipeline: HQTwoStagePipeline, picture: Path) -> None:
    base = latents(pipeline)
    seen = [latents(pipeline, images=[f"{picture}{suffix}"]) for suffix in ("", ":8", ":8:0.5", ":0:0.5")]
    for index, result in enumerate(seen):
        assert result["video"].shape == base["video"].shape
        assert not torch.allclose(result["video"], base["video"], atol=1e-3)
        for other in seen[:index]:
            assert not torch.equal(result["video"], other["video"])


def test_a_held_first_frame_is_the_picture(pipeline: HQTwoStagePipeline, picture: Path) -> None:
    from ltxkern.pipeline.model.conditioning import ImageCondition, encode_conditions

    held = latents(pipeline, images=[picture])["video"][:, :, :1]
    wanted = encode_conditions(pipeline.components.video_vae, [ImageCondition(picture)], 64, 128)[0]
    torch.testing.assert_close(held, wanted, atol=1e-5, rtol=1e-5)


def test_replay_of_noise_and_embeddings(pipeline: HQTwoStagePipeline) -> None:
    """A run given everything that it would draw or compute equals the run that drew and computed it."""
    drawn: list[torch.Tensor] = []
    stages = GenerationRequest(prompt="a kite", **SMALL).stages(pipeline.geometry)
    generator = torch.Generator().manual_seed(10)
    for stage in stages:
        for shape in ((1, stage.video.tokens, 16), (1, stage.audio.tokens, 32)):
            drawn.append(torch.randn(shape, generator=generator))
    sde = []
    for stage in stages:
        step, sub = (torch.Generator().manual_seed(seed) for seed in (-1, 9999))
        noise: dict[str, list[torch.Tensor]] = {"video": [], "audio": []}
        for _ in stage.sigmas[:-1]:
            for source in (sub, step):
                for name, tokens, width in (("video", stage.video.tokens, 16), ("audio", stage.audio.tokens, 32)):
                    raw = torch.randn(1, tokens, width, generator=source, dtype=torch.float64)
                    noise[name].append((raw - raw.mean()) / raw.std())
        sde.append(noise)
    encoded = pipeline.prompts.encode(["a kite", DEFAULT_NEGATIVE_PROMPT])
    replayed = latents(
        pipeline,
        prompt="",
        embeddings=encoded[0],
        negative_embeddings=(encoded[1].video, encoded[1].audio),
        initial_noise=drawn,
        sde_noise=sde,
    )
    for name, tensor in latents(pipeline).items():
        torch.testing.assert_close(replayed[name], tensor, atol=1e-5, rtol=1e-5)


def test_audio_source(pipeline: HQTwoStagePipeline) -> None:
    first, second = (pipeline("a kite", **SMALL, audio_source=source) for source in ("stage1", "stage2"))
    assert torch.equal(first.latents["video"], second.latents["video"])
    assert torch.equal(first.latents["audio"], first.latents["stage1_audio"])
    assert torch.equal(second.latents["audio"], second.latents["stage2_audio"])
    assert first.audio.shape == second.audio.shape
    assert not torch.equal(first.audio, second.audio)


def test_distilled_strengths_matter_and_merge_from_clean_weights(pipeline: HQTwoStagePipeline) -> None:
    base = latents(pipeline)
    stronger = latents(pipeline, distilled_strengths=(0.25, 1.0))
    assert torch.equal(stronger["stage1_video"], base["stage1_video"])
    assert not torch.allclose(stronger["video"], base["video"], atol=1e-3)
    assert same(latents(pipeline), base)


def test_non_finite_weights_name_the_stage() -> None:
    components = build_demo()
    with torch.no_grad():
        components.upsampler.final_conv.weight.fill_(float("nan"))
    pipe = HQTwoStagePipeline(components)
    with pytest.raises(NonFiniteError, match="upsampling"):
        latents(pipe)
