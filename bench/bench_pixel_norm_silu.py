"""Benchmark of pixel_norm_silu at the shapes of the LTX-2.3 video VAE (one tile, whole frame) and audio VAE."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import ltxkern
from cases import Call, Case, Suite, normal
from command_line import main


def composition(x: Tensor, eps: float) -> Tensor:
    """`silu(x / sqrt(mean_c(x^2) + eps))` as the VAE writes it."""
    return F.silu(x / torch.sqrt(x.square().mean(dim=1, keepdim=True) + eps))


def prepare(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """Random activations."""
    x = normal(dtype, device, generator)(*case.shape)
    if case.options.get("channels_last"):
        x = x.contiguous(memory_format=torch.channels_last_3d)
    return Call(args=(x, case.options.get("eps", 1e-8)), op=ltxkern.pixel_norm_silu, composition=composition)


LAST = {"channels_last": True}
SUITE = Suite(
    op="pixel_norm_silu",
    cases=(
        Case("vae_tile_1024", (1, 1024, 10, 14, 24), "small"),
        Case("vae_tile_512", (1, 512, 19, 28, 48), "small"),
        Case("vae_tile_512_channels_last", (1, 512, 19, 28, 48), "small", LAST),
        Case("audio_vae_512", (1, 512, 126, 16), options={"eps": 1e-6}),
        Case("vae_tile_512_up", (1, 512, 37, 56, 96)),
        Case("vae_tile_256", (1, 256, 73, 56, 96)),
        Case("vae_tile_256_channels_last", (1, 256, 73, 56, 96), options=LAST),
        Case("vae_tile_128", (1, 128, 73, 112, 192)),
        Case("vae_tile_128_channels_last", (1, 128, 73, 112, 192), options=LAST),
        Case("vae_frame_256", (1, 256, 121, 136, 240), "large"),
        Case("vae_frame_128", (1, 128, 121, 272, 480), "large"),
        Case("vae_frame_128_channels_last", (1, 128, 121, 272, 480), "large", LAST),
    ),
    prepare=prepare,
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
