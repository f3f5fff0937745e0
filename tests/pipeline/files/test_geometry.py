"""Geometry of a model from its headers and configuration files, no weight read."""

from pathlib import Path

import pytest

from ltxkern.pipeline.files.geometry import geometry_from_configs, geometry_of
from ltxkern.pipeline.files.headers import CheckpointError
from ltxkern.pipeline.model.components import PRODUCTION_CONFIGS
from ltxkern.pipeline.sampling.latents import Geometry

DEMO = Geometry(video_channels=16, audio_channels=2, blocks=2)


def test_the_published_configurations_give_the_defaults() -> None:
    transformer, audio_vae = PRODUCTION_CONFIGS["transformer"], PRODUCTION_CONFIGS["audio_vae"]
    for given in ((transformer, audio_vae), (transformer, None), (None, audio_vae), (None, None)):
        assert geometry_from_configs(*given) == Geometry(32, 8, 128, 8, 16, 48)


def test_every_layout_of_the_demo_says_the_same(official: dict[str, Path], folder: Path) -> None:
    for model in ("demo", official["checkpoint"], folder):
        assert geometry_of(model) == DEMO


def test_a_hub_id_counts_as_published_and_a_missing_file_is_an_error() -> None:
    assert geometry_of("some/repository") == Geometry()
    with pytest.raises(CheckpointError, match="no such file"):
        geometry_of("some/where.safetensors")
