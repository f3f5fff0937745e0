"""The last part of one generation: latents become videos and waveforms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.model.components import Components
from ltxkern.pipeline.model.decode import Tiling, decode_audio, decode_video
from ltxkern.pipeline.run.denoising import Progress, report
from ltxkern.pipeline.run.health import explained
from ltxkern.pipeline.work.chunks import VideoChunks
from ltxkern.pipeline.work.kept import KeptWork


@dataclass(frozen=True)
class Decoding:
    """How the latents of one call are decoded."""

    components: Components
    manager: TwoStageDeviceManager
    tiling: Tiling
    progress: Progress | None
    work: KeptWork

    def __call__(self, latents: Mapping[str, Tensor], *, stream: bool) -> tuple[list[Any], list[Tensor]]:
        """Videos, as iterators of chunks where they are streamed, and waveforms; one a prompt."""
        streams = [self._chunks(one[None], str(index)) for index, one in enumerate(latents["video"])]
        if stream:
            self.work.waiting = len(streams)
            return streams, self._waveforms(latents["audio"])
        waveforms, videos = self.manager.side_by_side(
            lambda: self._waveforms(latents["audio"]),
            lambda: [torch.cat([chunk.cpu() for chunk in chunks]) for chunks in streams],
        )
        return videos, waveforms

    def _waveforms(self, latents: Tensor) -> list[Tensor]:
        return list(self.work.once("decode-audio", lambda: self._decode_audio(latents)).values())

    def _decode_audio(self, latents: Tensor) -> dict[str, Tensor]:
        report(self.progress, "audio", 0, 1)
        with (
            self.manager.component("audio_vae", self.components.audio_vae) as audio_vae,
            self.manager.component("vocoder", self.components.vocoder) as vocoder,
            explained("decode", self.components, ["audio_vae", "vocoder"]),
        ):
            waveforms = [decode_audio(audio_vae, vocoder, one[None]) for one in latents]
        report(self.progress, "audio", 1, 1)
        return {f"{index:05d}": waveform for index, waveform in enumerate(waveforms)}

    def _chunks(self, latent: Tensor, name: str) -> VideoChunks:
        def decode(skip: int) -> Iterator[Tensor]:
            with (
                explained("decode", self.components, ["video_vae"]),
                self.manager.component("video_vae", self.components.video_vae) as vae,
            ):
                yield from decode_video(
                    vae,
                    latent,
                    tiling=self.tiling,
                    skip=skip,
                    progress=lambda done, total: report(self.progress, "video", done, total),
                )

        return VideoChunks(decode, self.work, name)
