"""Geometry of a model from its headers and configuration files, no weight read."""

from pathlib import Path

import pytest

from ltxkern.pipeline.files.demo import build_demo
from ltxkern.pipeline.files.geometry import geometry_from_configs, geometry_of
from ltxkern.pipeline.files.headers import CheckpointError
from ltxkern.pipeline.model.components import PRODUCTION_CONFIGS
from ltxkern.pipeline.sampling.latents import Geometry
from tests.official_files import write_diffusers_demo, write_official_demo

DEMO = Geometry(video_channels=16, audio_channels=2, blocks=2)


def test_the_published_configurations_give_the_defaults() -> None:
    transformer, audio_vae = PRODUCTION_CONFIGS["transformer"], PRODUCTION_CONFIGS["audio_vae"]
    for given in ((transformer, audio_vae), (transformer, None), (None, audio_vae), (None, None)):
        assert geometry_from_configs(*given) == Geometry(32, 8, 128, 8, 16, 48)


def test_every_layout_of_the_demo_says_the_same(tmp_path: Path) -> None:
    demo = build_demo()
    official = write_official_demo(tmp_path, demo)["checkpoint"]
    for model in ("demo", official, write_diffusers_demo(tmp_path / "folder", demo)):
        assert geometry_of(model) == DEMO


def test_a_hub_id_counts_as_published_and_a_missing_file_is_an_error() -> None:
    assert geometry_of("some/repository") == Geometry()
    with pytest.raises(CheckpointError, match="no such file"):
        geometry_of("some/where.safetensors")
