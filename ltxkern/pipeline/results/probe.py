"""Reads back what an mp4 holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mp4Info:
    """What a decoded mp4 holds; audio fields are 0 without sound."""

    frames: int
    height: int
    width: int
    fps: float
    audio_rate: int
    channels: int
    audio_samples: int


def probe_mp4(path: str | Path) -> Mp4Info:
    """Decode an mp4 from start to end and count what is in it.

    Raises:
        ValueError: the file is no video that can be decoded.
    """
    import av

    try:
        with Path(os.path.expanduser(path)).open("rb") as file, av.open(file) as container:
            video = container.streams.video[0]
            sound = container.streams.audio[0] if container.streams.audio else None
            frames = samples = 0
            for frame in container.decode([video, sound] if sound else [video]):
                if isinstance(frame, av.VideoFrame):
                    frames += 1
                else:
                    samples += frame.samples
            fps = float(video.average_rate or 0)
            audio = (sound.rate, sound.channels, samples) if sound else (0, 0, 0)
            return Mp4Info(frames, video.height, video.width, fps, *audio)
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{str(path)!r} is not a video that can be decoded") from error
