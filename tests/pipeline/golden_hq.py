"""Golden checks of complete HQ two-stage runs through the public pipeline; collected through test_golden.py."""

from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ltxkern
from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.model.conditioning import ImageCondition
from ltxkern.pipeline.run.request import GenerationRequest, find_preset
from ltxkern.pipeline.sampling.latents import Geometry
from ltxkern.verify.report import device_of
from tests.golden import open_golden as golden
from tests.pipeline.golden_transformer import transformer, upsampler

COVERS = ("hq/",)
TOLERANCE = 5e-5
FRAME_RATE = 24.0


def runs() -> list[str]:
    found = sorted({key.split("/")[1] for key in golden().keys("hq/")})
    for kind in ("t2v", "i2v"):
        assert any(name.startswith(kind) for name in found), f"{golden().path} holds no hq run {kind}*"
    return found


@cache
def pipeline(device: str = "cpu") -> HQTwoStagePipeline:
    """The golden transformer and upsampler; without a video VAE the latent statistics are the identity, as in the data."""
    first = golden()[f"hq/{runs()[0]}/stage1/a_out"]
    config = golden().metadata["meta"]["transformer/config"]
    geometry = Geometry(
        video_channels=config["in_channels"],
        audio_channels=first.shape[1],
        mel_bins=first.shape[3],
        blocks=config["num_layers"],
    )
    # Copies: other tests hold the same modules.
    modules = {"transformer": transformer(), "upsampler": upsampler()}
    moved = {name: deepcopy(module).to(device) for name, module in modules.items()}
    return HQTwoStagePipeline.from_components(**moved, geometry=geometry)


def arguments(data: dict[str, Tensor], contexts: dict[str, Tensor]) -> dict[str, Any]:
    """What a recorded run was asked for, but for the noise of its samplers."""
    final = data["stage2/v_out"]
    return {
        "embeddings": (contexts["v_ctx_pos"], contexts["a_ctx_pos"]),
        "negative_embeddings": (contexts["v_ctx_neg"], contexts["a_ctx_neg"]),
        "image_latents": [[data["cond_stage1"]], [data["cond_stage2"]]] if "cond_stage1" in data else None,
        "height": 32 * final.shape[3],
        "width": 32 * final.shape[4],
        "num_frames": 8 * (final.shape[2] - 1) + 1,
        "steps": len(data["stage1/sigmas"]) - 1,
        "initial_noise": [data[f"init_noise/{i}"] for i in range(4)],
        "output_type": "latents",
    }


def check(name: str, actual: Tensor, expected: Tensor) -> None:
    actual, expected = actual.cpu(), expected.cpu()
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("name", runs())
@pytest.mark.parametrize("backend", ["default", *(name for name in ltxkern.backends() if device_of(name) == "cpu")])
def test_whole_run(name: str, backend: str) -> None:
    with nullcontext() if backend == "default" else ltxkern.use_backend(backend, "torch"):
        whole_run(name, "cpu")


def whole_run(name: str, device: str) -> None:
    """One recorded run on a device, every stage against the official one."""
    data = {key: value.to(device) for key, value in golden().group(f"hq/{name}/").items()}
    contexts = {key: value.to(device) for key, value in golden().group("transformer/").items()}
    seen: dict[str, int] = {}
    output = pipeline(device)(
        **arguments(data, contexts),
        images=[ImageCondition(Path("given as latents"), 0, 1.0)] if "cond_stage1" in data else [],
        frame_rate=FRAME_RATE,
        sde_noise=[
            {"video": data[f"{stage}/sde_noise_v"].unbind(0), "audio": data[f"{stage}/sde_noise_a"].unbind(0)}
            for stage in ("stage1", "stage2")
        ],
        callback=lambda stage, done, total, latents: seen.__setitem__(stage, total),
    )
    check("sigmas", torch.tensor(output.stages[0].sigmas), data["stage1/sigmas"])
    check("stage 1 video", output.latents["stage1_video"], data["stage1/v_out"])
    check("stage 1 audio", output.latents["stage1_audio"], data["stage1/a_out"])
    check("upsampled", output.latents["upsampled_video"], data["upsampled"])
    check("stage 2 video", output.latents["video"], data["stage2/v_out"])
    assert set(seen) == {"stage 1", "stage 2"}


@pytest.mark.parametrize("name", runs())
def test_noised_states(name: str) -> None:
    """The states that each stage starts from, seen by the transformer's first forward."""
    data = golden().group(f"hq/{name}/")
    contexts = golden().group("transformer/")
    final = data["stage2/v_out"]
    starts: dict[str, dict[str, Tensor]] = {}

    def factory(policy: object, forward: object) -> object:
        states = forward.states  # type: ignore[attr-defined]
        stage = "stage1" if "stage1" not in starts else "stage2"
        starts[stage] = {key: state.latent for key, state in states.items()}
        audio = data["stage1/a_out"].transpose(1, 2).flatten(2)
        video = (data["stage1/v_out"] if stage == "stage1" else final).flatten(2).transpose(1, 2)
        return lambda latents, sigma, *, step, substep: {"video": video.contiguous(), "audio": audio.contiguous()}

    pipeline().denoiser_factory = factory
    try:
        output = pipeline()(**arguments(data, contexts))
    finally:
        pipeline().denoiser_factory = None
    check("upsampled", output.latents["upsampled_video"], data["upsampled"])
    for stage in ("stage1", "stage2"):
        check(f"{stage} noised video", starts[stage]["video"], data[f"{stage}/v_noised"])
        check(f"{stage} noised audio", starts[stage]["audio"], data[f"{stage}/a_noised"])


def test_defaults_are_the_official_ones() -> None:
    official = golden().metadata["hq_params"]
    preset = find_preset("hq")
    for name, scales in preset.guidance.present.items():
        wanted = official[name]
        found = {
            "cfg_scale": scales.cfg,
            "stg_scale": scales.stg,
            "modality_scale": scales.modality,
            "rescale_scale": scales.rescale,
            "skip_step": scales.skip_step,
            "stg_blocks": list(scales.stg_blocks),
        }
        assert found == wanted, name
    assert list(preset.distilled_strengths) == official["distilled_lora_strengths"]
    assert preset.steps == official["num_inference_steps"]
    request = GenerationRequest()
    first = request.stages()[0]
    assert (first.height, first.width) == (official["stage_1_height"], official["stage_1_width"])
    assert (request.num_frames, request.frame_rate) == (official["num_frames"], official["frame_rate"])
