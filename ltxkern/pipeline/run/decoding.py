"""From the latents of a run to pictures and sound: the sound is decoded beside the first pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.model.components import Components
from ltxkern.pipeline.model.decode import Tiling, decode_audio, decode_video
from ltxkern.pipeline.run.health import explained
from ltxkern.pipeline.run.progress import Report, report
from ltxkern.pipeline.sampling import finite
from ltxkern.pipeline.work.chunks import VideoChunks
from ltxkern.pipeline.work.kept import KeptWork

STAGE = "audio decoding"
_KEPT = "decode-audio"


def decode(
    components: Components,
    manager: TwoStageDeviceManager,
    latents: Mapping[str, Tensor],
    tiling: Tiling,
    progress: Report | None,
    *,
    streamed: bool,
    work: KeptWork | None = None,
) -> tuple[list[Any], list[Tensor]]:
    """Videos and waveforms, one a prompt.

    Args:
        components: of which the VAEs and the vocoder are used.
        manager: lends them to the device.
        latents: "video" and "audio", normalised.
        tiling: as `decode_video`.
        progress: called with (stage, done, total).
        streamed: videos are iterators of chunks, decoded while they are consumed, the first chunk of the first one at once; else
            they lie on the host.
        work: has what an earlier process decoded.
    Raises:
        NonFiniteError: the sound, or what is decoded of the pictures, has NaN or infinity.
    """
    work = work or KeptWork()
    streams = [
        _chunks(components, manager, one[None], tiling, progress, work, str(index))
        for index, one in enumerate(latents["video"])
    ]

    def pictures() -> list[Any]:
        if streamed:
            streams[0].begin()
            return list(streams)
        return [torch.cat([chunk.cpu() for chunk in chunks]) for chunks in streams]

    work.waiting += len(streams)
    kept = work.take(_KEPT)
    if kept is not None:
        return pictures(), list(kept.values())
    waveforms, videos = manager.side_by_side(
        lambda: _waveforms(components, manager, latents["audio"], progress), pictures
    )
    # Only now: to look at the sound any earlier would have kept the pictures waiting for it.
    with explained("decode", components, ["audio_vae", "vocoder"]):
        for waveform in waveforms:
            finite.check_audio(STAGE, waveform)
    work.leave(_KEPT, {f"{index:05d}": waveform for index, waveform in enumerate(waveforms)})
    return videos, waveforms


def _waveforms(
    components: Components, manager: TwoStageDeviceManager, latents: Tensor, progress: Report | None
) -> list[Tensor]:
    report(progress, "audio", 0, 1)
    with (
        manager.component("audio_vae", components.audio_vae) as audio_vae,
        manager.component("vocoder", components.vocoder) as vocoder,
    ):
        waveforms = [decode_audio(audio_vae, vocoder, one[None], stage=STAGE, check=False) for one in latents]
    report(progress, "audio", 1, 1)
    return waveforms


def _chunks(
    components: Components,
    manager: TwoStageDeviceManager,
    latent: Tensor,
    tiling: Tiling,
    progress: Report | None,
    work: KeptWork,
    name: str,
) -> VideoChunks:
    def tell(done: int, total: int) -> None:
        report(progress, "video", done, total)

    def decode_from(skip: int) -> Iterator[Tensor]:
        with (
            explained("decode", components, ["video_vae"]),
            manager.component("video_vae", components.video_vae) as vae,
        ):
            yield from decode_video(vae, latent, tiling=tiling, skip=skip, progress=tell)

    return VideoChunks(decode_from, work, name)
