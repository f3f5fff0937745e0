"""A model looked up once: what each kind of name stands for, and that nothing is read or downloaded before its time."""

from pathlib import Path

import pytest

from ltxkern.pipeline.files.found import FoundModel, geometry_from_configs
from ltxkern.pipeline.files.headers import CheckpointError
from ltxkern.pipeline.model.components import PRODUCTION_CONFIGS
from ltxkern.pipeline.sampling.latents import Geometry

DEMO = Geometry(video_channels=16, audio_channels=2, blocks=2)


def test_every_layout_of_the_demo_says_the_same(official: dict[str, Path], folder: Path) -> None:
    for model in ("demo-random", official["checkpoint"], folder):
        assert FoundModel.of(model).geometry == DEMO


def test_a_hub_id_counts_as_published_and_a_missing_file_is_an_error() -> None:
    assert FoundModel.of("some/repository").geometry == Geometry()
    with pytest.raises(CheckpointError, match="no such file"):
        FoundModel.of("some/where.safetensors")


def test_a_found_model_is_handed_through(folder: Path) -> None:
    found = FoundModel.of(folder)
    assert FoundModel.of(found) is found
    assert (found.is_demo, found.is_here, found.path) == (False, True, folder)
    demo, hub = FoundModel.of("demo-random"), FoundModel.of("some/repository")
    assert (demo.is_demo, demo.is_here, demo.path) == (True, True, None)
    assert (hub.is_demo, hub.is_here, hub.path, hub.config("transformer")) == (False, False, None, None)


def test_parts_from_elsewhere_are_looked_up_when_files_are_read(official: dict[str, Path], tmp_path: Path) -> None:
    found = FoundModel.of(official["checkpoint"], upsampler=tmp_path / "nowhere.safetensors")
    assert found.geometry == DEMO
    with pytest.raises(CheckpointError, match="nowhere"):
        found.files  # noqa: B018 (reading it is what looks the parts up)
    whole = FoundModel.of(official["checkpoint"], upsampler=official["upsampler"]).files
    assert (whole.checkpoint, whole.upsampler) == (official["checkpoint"], official["upsampler"])


def test_the_published_configurations_give_the_defaults() -> None:
    transformer, audio_vae = PRODUCTION_CONFIGS["transformer"], PRODUCTION_CONFIGS["audio_vae"]
    for given in ((transformer, audio_vae), (transformer, None), (None, audio_vae), (None, None)):
        assert geometry_from_configs(*given) == Geometry(32, 8, 128, 8, 16, 48)
