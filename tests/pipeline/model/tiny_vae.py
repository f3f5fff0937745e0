"""Tiny 2.3-shaped autoencoders and a decoder with receptive field one, for tests of the code around them."""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
from torch import Tensor, nn


def tiny_video_vae(channels: int = 8, dtype: torch.dtype = torch.float32) -> AutoencoderKLLTX2Video:
    """The production graph with few channels: 32x32x8 compression, random weights, statistics that are not the identity."""
    torch.manual_seed(0)
    vae = AutoencoderKLLTX2Video(
        latent_channels=channels,
        block_out_channels=(8, 16, 32, 32),
        down_block_types=("LTX2VideoDownBlock3D",) * 4,
        decoder_block_out_channels=(8, 16, 16, 32),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True,) * 4,
        decoder_spatio_temporal_scaling=(True,) * 4,
        decoder_inject_noise=(False,) * 5,
        downsample_type=("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        upsample_type=("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
        upsample_residual=(False,) * 4,
        upsample_factor=(2, 2, 1, 2),
        decoder_causal=False,
        decoder_spatial_padding_mode="zeros",
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    vae.latents_mean.copy_(torch.linspace(-0.5, 0.5, channels))
    vae.latents_std.copy_(torch.linspace(0.5, 1.5, channels))
    return vae.to(dtype).eval()


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
