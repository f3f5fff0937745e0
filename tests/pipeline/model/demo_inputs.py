"""Inputs of the demo transformer, one set a seed, and the perturbations that a branch may have."""

import dataclasses
from typing import Any

import torch

from ltxkern.pipeline.model.inputs import ModalityInput, device_tensors

ISOLATED = {"disable_a2v_cross_attn": True, "disable_v2a_cross_attn": True}


VIDEO_TOKENS, AUDIO_TOKENS, TEXT_ROWS = 7, 5, 3


def inputs(seed: int = 0, batch: int = 1, sigma: float = 0.5, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    positions = [
        torch.rand(batch, axes, n, 2, generator=generator) * 10 for axes, n in ((3, VIDEO_TOKENS), (1, AUDIO_TOKENS))
    ]
    video = ModalityInput(normal(batch, VIDEO_TOKENS, 16), sigma, None, positions[0], normal(batch, TEXT_ROWS, 64))
    audio = ModalityInput(normal(batch, AUDIO_TOKENS, 32), sigma, None, positions[1], normal(batch, TEXT_ROWS, 32))
    return {"video": video, "audio": audio}


def with_mask(item: ModalityInput, kept: int = 2) -> ModalityInput:
    mask = torch.ones(*item.latent.shape[:2], 1)
    mask[:, :kept] = 0
    mask[:, kept] = 0.25
    return dataclasses.replace(item, mask=mask)


@torch.no_grad()
def of_diffusers(stock: Any, pair: dict[str, ModalityInput], **options: Any) -> tuple[torch.Tensor, ...]:
    """The velocities of diffusers' own model."""
    video, audio = (device_tensors(item, 1000.0) for item in pair.values())
    velocities: tuple[torch.Tensor, ...] = stock(
        video.tokens,
        audio.tokens,
        video.contexts[0],
        audio.contexts[0],
        timestep=video.timestep.expand(video.tokens.shape[:2]),
        audio_timestep=audio.timestep.expand(audio.tokens.shape[:2]),
        sigma=video.sigma,
        audio_sigma=audio.sigma,
        encoder_attention_mask=torch.ones(video.contexts[0].shape[:2]),
        audio_encoder_attention_mask=torch.ones(audio.contexts[0].shape[:2]),
        video_coords=video.positions,
        audio_coords=audio.positions,
        return_dict=False,
        **options,
    )
    return velocities


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool((first - second).abs().max() > 1e-3)


FLAGS: list[dict[str, Any]] = [
    {},
    {"skip_video_self_attn_blocks": [1]},
    {"skip_audio_self_attn_blocks": (0, 1)},
    {"skip_video_self_attn_blocks": [0], "skip_audio_self_attn_blocks": [1], "disable_v2a_cross_attn": True},
    {"disable_a2v_cross_attn": True},
    ISOLATED,
]
