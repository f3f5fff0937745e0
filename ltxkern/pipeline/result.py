"""What a generation gives, and how it is saved."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ltxkern.pipeline.results import media
from ltxkern.pipeline.results.atomic import output_kind
from ltxkern.pipeline.run.request import Stage
from ltxkern.pipeline.work.chunks import VideoChunks


@dataclass
class HQOutput:
    """What one generation gives.

    Attributes:
        video: (F, H, W, 3) in [0, 1]; a list of them for several prompts; an iterator of chunks for "stream"; None for "latents".
        audio: (2, samples) fp32 in [-1, 1] at `sample_rate`; a list for several prompts; None for "latents".
        latents: "video" (B, C, F, h, w) and "audio" (B, C, T, M), the ones that are decoded; and what lies before them:
            "stage1_video", "stage1_audio", and with two stages "upsampled_video" and "stage2_audio".
        frame_rate, sample_rate: of video and audio.
        seed: the seed of all videos, or theirs in order.
        stages: sizes, schedule and forwards of each.
        backends: which backend served each op, and which kernels attention.
    """

    video: Any
    audio: Any
    latents: dict[str, Tensor]
    frame_rate: float
    sample_rate: int
    seed: int | Sequence[int]
    stages: list[Stage]
    backends: dict[str, list[str]] = field(default_factory=dict)

    def save(self, path: str | Path, *, progress: Callable[[int], None] | None = None) -> Path:
        """Write to `path`: .mp4, .safetensors (latents) or a folder (PNG frames and wav), as its suffix says.

        Raises:
            ValueError: unknown suffix, or pictures asked for where only latents were made.
            OSError: the disk is full or the path cannot be written; nothing half-written stays.
        """
        kind = output_kind(path)
        if kind == "latents":
            media.write_latents(path, self.latents["video"], self.latents["audio"])
            return Path(os.path.expanduser(path))
        if self.video is None:
            raise ValueError(
                f'{path}: this output holds latents only: save to .safetensors, or use output_type="video"'
            )
        if isinstance(self.video, list):
            raise ValueError(f"{path}: this output holds {len(self.video)} videos: save them one by one")
        chunks = [self.video] if isinstance(self.video, Tensor) else self.video
        if isinstance(chunks, VideoChunks):
            chunks = chunks.written(kind, media.to_planes if kind == "mp4" else media.to_pictures)
        if kind == "mp4":
            media.write_mp4(path, chunks, self.audio, self.frame_rate, self.sample_rate, progress=progress)
        else:
            media.write_frames(path, chunks, self.audio, self.sample_rate, progress=progress)
        return Path(os.path.expanduser(path))
