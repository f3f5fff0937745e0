"""Tiny 2.3-shaped autoencoders and a decoder with receptive field one, for tests of the code around them."""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
from torch import Tensor, nn

from examples.patch_vae import small_vae


def tiny_video_vae(dtype: torch.dtype = torch.float32) -> AutoencoderKLLTX2Video:
    """The production graph with few channels: 32x32x8 compression, random weights, statistics that are not the identity."""
    vae = small_vae()
    vae.latents_mean.copy_(torch.linspace(-0.5, 0.5, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 1.5, 8))
    return vae.to(dtype)


def tiny_audio_vae(dtype: torch.dtype = torch.float32) -> AutoencoderKLLTX2Audio:
    """Latents (1, 2, T, 16) to mel (1, 2, 4T-3, 64)."""
    torch.manual_seed(1)
    vae = AutoencoderKLLTX2Audio(base_channels=32, num_res_blocks=1, latent_channels=2)
    vae.latents_mean.copy_(torch.linspace(-1, 1, 32))
    vae.latents_std.copy_(torch.linspace(0.5, 1.5, 32))
    return vae.to(dtype).eval()


class Repeat(nn.Module):
    """Decodes by repeating: every pixel depends on one latent only, so tiling must not change anything."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.calls: list[tuple[int, ...]] = []

    def forward(self, latent: Tensor) -> Tensor:
        self.calls.append(tuple(latent.shape[2:]))
        frames = latent.repeat_interleave(8, 2)[:, :, 7:]  # the first latent is one frame
        return frames.repeat_interleave(32, 3).repeat_interleave(32, 4) * self.gain


def repeating_vae(dtype: torch.dtype = torch.float32) -> Any:
    """What `decode_video` needs of a VAE, around `Repeat`; three channels, identity statistics."""
    return SimpleNamespace(
        decoder=Repeat().to(dtype),
        latents_mean=torch.zeros(3),
        latents_std=torch.ones(3),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
        config=SimpleNamespace(timestep_conditioning=False, out_channels=3),
    )
