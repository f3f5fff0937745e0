"""Fused norms inside a VAE of another stack: `python examples/patch_vae.py`.

The VAE is diffusers' own class, built from a small configuration with random weights; a loaded one is patched the same way.
"""

import torch
from diffusers import AutoencoderKLLTX2Video

import ltxkern


def small_vae() -> AutoencoderKLLTX2Video:
    """The graph of the published video VAE with few channels."""
    torch.manual_seed(0)
    return AutoencoderKLLTX2Video(
        latent_channels=8,
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
    ).eval()


def main() -> None:
    vae, latent = small_vae(), torch.randn(1, 8, 2, 2, 2)
    with torch.no_grad():
        plain = vae.decode(latent).sample
        keys = list(vae.state_dict())
        with ltxkern.patch(vae) as report:
            sites, fused = report.sites, vae.decode(latent).sample
            assert list(vae.state_dict()) == keys, "parameters and state-dict keys stay as they are"
    difference = (fused - plain).abs().max().item()
    print(f"{len(sites)} norms fused, largest difference {difference:.1e}; outside the block the VAE is as before")


if __name__ == "__main__":
    main()
