"""Pictures of a run at work: a linear map from latents to colours, fitted to whatever VAE there is, and the PNG files it gives."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ltxkern.pipeline.model.decode import decode_video
from ltxkern.pipeline.results.atomic import replacing_file
from ltxkern.pipeline.sampling.latents import VideoLatentShape, unpatchify

logger = logging.getLogger(__name__)

# Drawn latents hold still over so many places each way, as those of pictures do.
_PATCH = 2
# Draws a channel: fewer leave the fit to chance.
_DRAWS = 3
_RIDGE = 1e-3
# Sides of a picture, a latent; the VAE's own would be a picture at full size.
_ENLARGED = 8


@dataclass(frozen=True)
class LatentColors:
    """Colour of a place as a linear function of its latent.

    Attributes:
        weights: (C + 1, 3), the constant last; fp32.
    """

    weights: Tensor

    @classmethod
    @torch.no_grad()
    def fit(cls, vae: Any, *, seed: int = 0) -> LatentColors:
        """Least squares over one frame that the VAE decodes of random latents, which touches no generator but its own.

        Cost: one decoded frame of 12 C places at most: 40 x 40 of them, 1280 x 1280 pixels, with 128 channels, a twentieth of
        what a video of 121 frames at 1088 x 1920 takes.
        """
        channels = int(vae.config.latent_channels)
        side = math.ceil(math.sqrt(_DRAWS * (channels + 1)))
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(1, channels, 1, side, side, generator=generator)
        latent = drawn.repeat_interleave(_PATCH, 3).repeat_interleave(_PATCH, 4)
        place = next(vae.decoder.parameters())
        frame = torch.cat(list(decode_video(vae, latent.to(place.device), stage="preview")))[:1].float().cpu()
        pooled = torch.nn.functional.adaptive_avg_pool2d(frame.permute(0, 3, 1, 2), side)
        known = _with_one(drawn[0, :, 0].flatten(1).T).double()
        wanted = pooled[0].flatten(1).T.double()
        ridge = _RIDGE * known.shape[0] * torch.eye(channels + 1, dtype=torch.float64)
        return cls(torch.linalg.solve(known.T @ known + ridge, known.T @ wanted).float())

    def picture(self, latent: Tensor) -> Tensor:
        """(C, H, W), normalised, to (H, W, 3) bytes on the host."""
        places = latent.detach().float().cpu().movedim(0, -1)
        colors = _with_one(places.flatten(0, 1)) @ self.weights
        return colors.nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8).view(*places.shape[:2], 3)


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)


class Previews:
    """The `callback` of a run that writes its middle frame as a PNG file after every so many steps.

    Args:
        colors: of the run's VAE.
        shapes: of the video latent by stage name.
        folder: where files go, as `stage-1-step-003.png`; made where it is not there.
        every: steps from one picture to the next; the last step of a stage has one.
    """

    def __init__(
        self, colors: LatentColors, shapes: Mapping[str, VideoLatentShape], folder: str | Path, every: int = 1
    ) -> None:
        if every < 1:
            raise ValueError(f"preview-every must be at least 1, got {every}: use 1")
        self.colors = colors
        self._shapes = shapes
        self._every = every
        self.folder = Path(os.path.expanduser(folder))
        self.folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of(
        cls, pipeline: Any, request: Any, folder: str | Path, every: int = 1, colors: LatentColors | None = None
    ) -> Previews:
        """Of a request that a pipeline is about to run; without colours its VAE is lent to the device once to fit them."""
        if colors is None:
            with pipeline.manager.component("video_vae", pipeline.components.video_vae) as vae:
                colors = LatentColors.fit(vae)
        return cls(colors, {stage.name: stage.video for stage in request.stages(pipeline.geometry)}, folder, every)

    def __call__(self, stage: str, done: int, total: int, latents: Mapping[str, Tensor]) -> None:
        """After a step: the prediction of the clean video, of the first of several."""
        if done % self._every and done != total:
            return
        shape = self._shapes[stage]
        latent = unpatchify(latents["video_x0"][:, : shape.tokens], shape)[0]
        picture = Image.fromarray(self.colors.picture(latent[:, shape.frames // 2]).numpy())
        larger = picture.resize((picture.width * _ENLARGED, picture.height * _ENLARGED), Image.Resampling.BICUBIC)
        file = self.folder / f"{stage.replace(' ', '-')}-step-{done:03d}.png"
        try:
            with replacing_file(file) as temporary:
                larger.save(temporary, format="PNG")
        except OSError as error:
            logger.warning("the run goes on, but %s is not written: %s", file, error.strerror or error)
