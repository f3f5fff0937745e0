"""The last part of a run: latents become video and sound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.model.components import Components
from ltxkern.pipeline.model.decode import Tiling, decode_audio, decode_video
from ltxkern.pipeline.run.denoising import Progress, report


class Decoder:
    """Decodes with a model's VAEs and vocoder.

    Args:
        components: where they come from.
        manager: moves them to the device and back.
    """

    def __init__(self, components: Components, manager: TwoStageDeviceManager) -> None:
        self._components = components
        self._manager = manager

    def decode(
        self, video: Tensor, audio: Tensor, tiling: Tiling, *, stream: bool, progress: Progress | None = None
    ) -> tuple[list[Any], list[Tensor]]:
        """Videos (F, H, W, 3), as iterators of chunks where they are streamed, and waveforms (2, samples); one a latent."""
        streams = [self._chunks(one[None], tiling, progress) for one in video]
        if stream:
            return streams, self._waveforms(audio, progress)
        waveforms, videos = self._manager.side_by_side(
            lambda: self._waveforms(audio, progress),
            lambda: [torch.cat([chunk.cpu() for chunk in chunks]) for chunks in streams],
        )
        return videos, waveforms

    def _waveforms(self, latents: Tensor, progress: Progress | None) -> list[Tensor]:
        parts = self._components
        report(progress, "audio", 0, 1)
        with (
            self._manager.component("audio_vae", parts.audio_vae) as audio_vae,
            self._manager.component("vocoder", parts.vocoder) as vocoder,
        ):
            waveforms = [decode_audio(audio_vae, vocoder, one[None]) for one in latents]
        report(progress, "audio", 1, 1)
        return waveforms

    def _chunks(self, latent: Tensor, tiling: Tiling, progress: Progress | None) -> Iterator[Tensor]:
        with self._manager.component("video_vae", self._components.video_vae) as vae:
            yield from decode_video(
                vae, latent, tiling=tiling, progress=lambda done, total: report(progress, "video", done, total)
            )
