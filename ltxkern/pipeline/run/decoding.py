"""From the latents of a run to pictures and sound: the sound is decoded beside the first pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.model.components import Components
from ltxkern.pipeline.model.decode import Tiling, decode_audio, decode_video, smaller_tiling
from ltxkern.pipeline.run.device_memory import vacate, with_room
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
    def sound() -> list[Tensor]:
        with (
            manager.component("audio_vae", components.audio_vae) as audio_vae,
            manager.component("vocoder", components.vocoder) as vocoder,
        ):
            return [decode_audio(audio_vae, vocoder, one[None], stage=STAGE, check=False) for one in latents]

    report(progress, "audio", 0, 1)
    waveforms = with_room(STAGE, sound, lambda: vacate(manager))
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

    def decoded(skip: int) -> Iterator[Tensor]:
        with (
            explained("decode", components, ["video_vae"]),
            manager.component("video_vae", components.video_vae) as vae,
        ):
            yield from decode_video(vae, latent, tiling=tiling, skip=skip, progress=tell)

    def make_room() -> str | None:
        nonlocal tiling
        if (done := vacate(manager)) is not None:
            return done
        smaller = smaller_tiling(components.video_vae, latent, tiling)
        if smaller is None:
            return None
        tiling = smaller
        return f"tiles of {smaller.height}x{smaller.width} from here on, whose seams may round otherwise"

    def decode_from(number: int) -> Iterator[Tensor]:
        chunks: Iterator[Tensor] | None = None

        def following() -> Tensor | None:
            nonlocal chunks
            running, chunks = chunks or decoded(number), None
            found = next(running, None)
            chunks = running
            return found

        while (chunk := with_room("video decoding", following, make_room)) is not None:
            yield chunk
            number += 1
            del chunk

    return VideoChunks(decode_from, work, name)
