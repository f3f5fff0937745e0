"""Previews: the map finds the colours of a VAE that is linear, files appear whole, and a run has the bits it has without them."""

import errno
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ltxkern.pipeline.generator import HQTwoStagePipeline
from ltxkern.pipeline.results import preview
from ltxkern.pipeline.results.preview import LatentColors, Previews
from ltxkern.pipeline.run.request import GenerationRequest
from ltxkern.pipeline.sampling.latents import VideoLatentShape
from tests.pipeline.demo_runs import SMALL, latents, same

CHANNELS, RATIO = 5, 4


class Linear(torch.nn.Module):
    """A decoder whose pixels are a linear map of the latent below them, in [-1, 1] for what is drawn."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.colors = torch.nn.Parameter(torch.randn(3, CHANNELS, generator=generator) / 30)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        pixels = torch.einsum("kc,bcfhw->bkfhw", self.colors, latent) + 0.1
        return pixels.repeat_interleave(RATIO, 3).repeat_interleave(RATIO, 4)


@pytest.fixture
def vae() -> Any:
    config = SimpleNamespace(latent_channels=CHANNELS, out_channels=3, timestep_conditioning=False, scaling_factor=1.0)
    statistics = {"latents_mean": torch.zeros(CHANNELS), "latents_std": torch.ones(CHANNELS)}
    ratios = {"spatial_compression_ratio": RATIO, "temporal_compression_ratio": 8}
    return SimpleNamespace(decoder=Linear(), config=config, **statistics, **ratios)


def test_the_colours_of_a_linear_decoder_are_found(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "_RIDGE", 1e-9)
    before = torch.random.get_rng_state()
    colors = LatentColors.fit(vae)
    assert before.equal(torch.random.get_rng_state())
    latent = torch.randn(CHANNELS, 6, 7)
    expected = (vae.decoder.colors @ latent.flatten(1) + 0.1).T.view(6, 7, 3) / 2 + 0.5
    assert (colors.picture(latent) - expected.mul(255).clamp(0, 255)).abs().max() <= 0.51
    assert colors.picture(torch.full((CHANNELS, 1, 1), torch.nan)).tolist() == [[[0, 0, 0]]]


def test_a_full_disk_costs_the_picture_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    shown = Previews(
        LatentColors(torch.zeros(CHANNELS + 1, 3)), {"stage 1": VideoLatentShape(1, 1, 1, CHANNELS)}, tmp_path
    )
    monkeypatch.setattr(preview, "replacing_file", full)
    with caplog.at_level(logging.WARNING):
        shown("stage 1", 1, 1, {"video_x0": torch.zeros(1, 1, CHANNELS)})
    assert "the run goes on, but" in caplog.text
    with pytest.raises(ValueError, match="preview-every must be at least 1, got 0: use 1"):
        Previews(shown.colors, {}, tmp_path, 0)


def test_a_run_with_previews_has_the_bits_of_one_without(tmp_path: Path) -> None:
    with HQTwoStagePipeline.from_pretrained("demo-random", device="cpu", dtype=torch.float32) as pipe:
        plain = latents(pipe)
        request = GenerationRequest("a kite", **SMALL)
        shown = Previews.of(pipe, request, tmp_path / "seen", every=2)
        assert same(plain, latents(pipe, callback=shown))
    names = sorted(path.name for path in (tmp_path / "seen").iterdir())
    # Two steps and the clean last evaluation; three and one.
    assert names == [f"stage-{stage}-step-{step:03d}.png" for stage, step in ((1, 2), (1, 3), (2, 2), (2, 4))]
    with Image.open(tmp_path / "seen" / names[-1]) as picture:
        assert picture.size == (4 * 8, 2 * 8)
        assert np.asarray(picture).std() > 0
