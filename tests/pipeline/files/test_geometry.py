"""Geometry of a model from its configurations."""

from ltxkern.pipeline.files.geometry import geometry_from_configs
from ltxkern.pipeline.model.components import PRODUCTION_CONFIGS
from ltxkern.pipeline.sampling.latents import Geometry


def test_the_published_configurations_give_the_defaults() -> None:
    transformer, audio_vae = PRODUCTION_CONFIGS["transformer"], PRODUCTION_CONFIGS["audio_vae"]
    for given in ((transformer, audio_vae), (transformer, None), (None, audio_vae), (None, None)):
        assert geometry_from_configs(*given) == Geometry(32, 8, 128, 8, 16, 48)
