"""Latent geometry of a model from its configurations, so that a request can be checked before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ltxkern.pipeline.sampling.latents import Geometry


def geometry_from_configs(transformer: Mapping[str, Any] | None, audio_vae: Mapping[str, Any] | None) -> Geometry:
    """Geometry that the modules' configurations describe; LTX-2.3's where one is not given."""
    geometry = Geometry()
    if transformer is not None:
        ratios = transformer.get("vae_scale_factors", (geometry.temporal_ratio, geometry.spatial_ratio))
        geometry = replace(
            geometry,
            temporal_ratio=ratios[0],
            spatial_ratio=ratios[1],
            video_channels=transformer["in_channels"],
            audio_channels=max(1, transformer["audio_in_channels"] // geometry.mel_bins),
            blocks=transformer["num_layers"],
        )
    if audio_vae is not None:
        # The audio VAE halves the mel axis twice.
        geometry = replace(geometry, audio_channels=audio_vae["latent_channels"], mel_bins=audio_vae["mel_bins"] // 4)
    return geometry
