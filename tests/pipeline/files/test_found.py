"""A model looked up once: what each kind of name stands for, and that nothing is read or downloaded before its time."""

from pathlib import Path

import pytest
import torch

from ltxkern.pipeline.files import hub
from ltxkern.pipeline.files.checkpoint import load_components
from ltxkern.pipeline.files.found import FoundModel, geometry_from_configs
from ltxkern.pipeline.files.headers import CheckpointError
from ltxkern.pipeline.files.hub import DEMO_NAMES
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
    assert (found.is_demo, found.is_random, found.is_here, found.path) == (False, False, True, folder)
    demo, hub = FoundModel.of("demo-random"), FoundModel.of("some/repository")
    assert (demo.is_demo, demo.is_random, demo.is_here, demo.path) == (True, True, True, None)
    assert (hub.is_demo, hub.is_here, hub.path, hub.config("transformer")) == (False, False, None, None)


def demo_folder(folder: Path, official: dict[str, Path]) -> Path:
    """The random demo's files under the names of the trained one's."""
    for part, name in DEMO_NAMES._asdict().items():
        (folder / name).symlink_to(official.get(part, official["checkpoint"]))
    return folder


def test_the_trained_demo_is_a_model_from_files(
    official: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "DEMO_FOLDER", demo_folder(tmp_path, official))
    found = FoundModel.of("demo")
    assert (found.is_demo, found.is_random, found.is_here, found.path) == (True, False, True, None)
    assert found.geometry == DEMO
    assert found.distilled_lora == tmp_path / DEMO_NAMES.distilled_lora
    assert found.files.upsampler == tmp_path / DEMO_NAMES.upsampler
    assert load_components("demo", dtype=torch.float32).transformer is not None
    (tmp_path / DEMO_NAMES.text_encoder).unlink()
    with pytest.raises(
        CheckpointError, match=r"lacks gemma of the demo model: install ltxkern again, or use demo-random"
    ):
        FoundModel.of("demo")
    assert FoundModel.of("demo", transformer=official["checkpoint"]).own is not None


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
