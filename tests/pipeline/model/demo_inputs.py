"""Inputs of the demo transformer, one set a seed, and the perturbations that a branch may have."""

import dataclasses
from typing import Any

import torch

from ltxkern.pipeline.model.inputs import ModalityInput

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
