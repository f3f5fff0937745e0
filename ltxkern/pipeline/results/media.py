"""Writes results: mp4 (H.264 and AAC), PNG frames with wav, latents."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import re
import wave
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ltxkern.pipeline.results.atomic import AUDIO_FILE, replacing_file, replacing_folder, writable_output

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import OutputContainer
    from av.video.stream import VideoStream

__all__ = [
    "frame_rate",
    "rgb_to_yuv420",
    "writable_output",
    "write_frames",
    "write_latents",
    "write_mp4",
]

# Rows Y, U, V of BT.709 for full-range R'G'B' in [0, 1]
_BT709 = ((0.2126, 0.7152, 0.0722), (-0.1146, -0.3854, 0.5), (0.5, -0.4542, -0.0458))
_TAG_BT709 = 1  # the code point of BT.709 in every H.264 colour field
_TAG_LIMITED = 1  # AVCOL_RANGE_MPEG
_X264_THREADS = 8  # fixed: x264 writes its thread count into the file, and frame threads change decisions
_AAC_FRAME = 1024
_BROADCAST = Fraction(1000, 1001)  # of a whole rate, since colour came to television
_ROUNDED = Fraction(1, 200)  # people write such a rate to two decimals
_CONVERTED_AT_ONCE = 8  # frames; bounds the memory of the conversion

Progress = Callable[[int], None]


def rgb_to_yuv420(chunk: Tensor) -> Tensor:
    """Convert frames to BT.709 limited-range YUV 4:2:0, planes packed as I420.

    (Y, U, V) = M @ (R, G, B); U and V averaged over 2x2; Y * 219 + 16, UV * 224 + 128, clamped to 0..255, truncated.

    Args:
        chunk: (F, H, W, 3) in [0, 1], any floating dtype, H and W even.

    Returns:
        uint8 (F, 3H/2, W): the rows of Y, then of U, then of V.

    Raises:
        ValueError: another shape, or odd sides.

    Numerical contract: every step rounded to the chunk's dtype, as the official code does (bf16 costs up to one level).
    """
    if chunk.ndim != 4 or chunk.shape[3] != 3 or chunk.shape[1] % 2 or chunk.shape[2] % 2:
        raise ValueError(f"chunk must be (F, H, W, 3) with even H and W, got {tuple(chunk.shape)}")
    frames, height, width = chunk.shape[:3]
    matrix = torch.tensor(_BT709, dtype=chunk.dtype, device=chunk.device)
    yuv = (chunk @ matrix.T).permute(0, 3, 1, 2)
    luma = (yuv[:, 0] * 219 + 16).clamp(0, 255).to(torch.uint8)
    chroma = torch.nn.functional.avg_pool2d(yuv[:, 1:], 2)
    chroma = (chroma * 224 + 128).clamp(0, 255).to(torch.uint8)
    return torch.cat((luma.flatten(1), chroma.flatten(1)), dim=1).view(frames, height * 3 // 2, width)


def to_planes(chunk: Tensor) -> Tensor:
    """What `write_mp4` encodes of a chunk, on the host: `rgb_to_yuv420` of a few frames at a time; of planes, themselves."""
    return chunk if chunk.dtype == torch.uint8 else torch.cat([*_parts(chunk)])


def _parts(chunk: Tensor) -> Iterator[Tensor]:
    for part in chunk.split(_CONVERTED_AT_ONCE):
        yield part if part.dtype == torch.uint8 else rgb_to_yuv420(part).cpu()


def to_pictures(chunk: Tensor) -> Tensor:
    """What `write_frames` writes of a chunk, on the host: 8-bit sRGB, rounded; of 8-bit pictures, themselves."""
    return (chunk if chunk.dtype == torch.uint8 else (chunk.float() * 255).round().to(torch.uint8)).cpu()


def frame_rate(value: str | float | Fraction) -> Fraction:
    """Frames per second as a fraction: "24000/1001", 29.97 and 23.98 are the broadcast rates that people write like this.

    Raises:
        ValueError: not a positive number or fraction.
    """
    try:
        rate = Fraction(re.sub(r"\s*/\s*", "/", value.strip()) if isinstance(value, str) else value)
    except (ValueError, OverflowError, ZeroDivisionError):
        rate = Fraction(0)
    broadcast = round(rate / _BROADCAST) * _BROADCAST
    if rate.denominator > 1 and broadcast > 0 and abs(rate - broadcast) < _ROUNDED:
        return broadcast
    rate = rate.limit_denominator(_BROADCAST.denominator)
    if rate <= 0:
        raise ValueError(f"fps must be a positive number or a fraction such as 24000/1001, got {value}")
    return rate


def to_int16(waveform: Tensor) -> np.ndarray:
    """(C, N) samples in [-1, 1] -> int16 (N, C): clip(x) * 32767, truncated."""
    samples = waveform.detach().float().cpu().clamp(-1, 1) * 32767.0
    return np.ascontiguousarray(samples.to(torch.int16).numpy().T)


def write_mp4(
    path: str | Path,
    chunks: Iterable[Tensor],
    audio: Tensor | None = None,
    fps: str | float | Fraction = 24.0,
    sample_rate: int = 48000,
    *,
    crf: int = 19,
    progress: Progress | None = None,
) -> None:
    """Encode frames as they arrive to an mp4: H.264 (crf 19, veryfast, yuv420p, BT.709 limited) and stereo AAC.

    While the next chunk is made, a thread encodes the one before. Frames become YUV where they lie: of a chunk on a GPU the host
    gets, and keeps until it is encoded, 1.5 bytes a pixel.

    Args:
        path: written beside itself first and renamed when complete, so no half file ever bears this name.
        chunks: (F, H, W, 3) in [0, 1] each, any floating dtype and device, all of one even size; or what `to_planes` makes of them.
        audio: (2, N) samples in [-1, 1], or None for no sound.
        fps: frames per second, as `frame_rate` takes them.
        sample_rate: of `audio`, in Hz.
        crf: H.264 quality, lower is better.
        progress: called with the number of frames encoded so far.

    Raises:
        ValueError: wrong shapes, or no frame at all.
        OSError: one sentence where the disk is full or the encoder gave up.

    Numerical contract: the same input gives the same bytes, on any number of cores.
    """
    _require_stereo(audio)
    rate = frame_rate(fps)
    with replacing_file(path) as temporary, _open_mp4(temporary) as container, ThreadPoolExecutor(1) as encoder:
        writer: _Mp4Writer | None = None
        pending: list[Future[range]] = []

        def finish() -> None:
            while pending:
                for count in pending.pop(0).result():
                    if progress is not None:
                        progress(count)

        try:
            for chunk in chunks:
                if writer is None:
                    writer = _Mp4Writer.open(container, chunk, audio, rate, sample_rate, crf)
                finish()
                pending += [encoder.submit(writer.write, planes) for planes in writer.planes_of(chunk)]
                # Its memory is free for the next one.
                del chunk
            if writer is None:
                raise ValueError("chunks must hold at least one frame, got none")
            finish()
            writer.finish()
        finally:
            for future in pending:
                future.cancel()


def _require_stereo(audio: Tensor | None) -> None:
    if audio is not None and (audio.ndim != 2 or audio.shape[0] != 2):
        raise ValueError(f"audio must be (2, samples), got {tuple(audio.shape)}")


def _size(chunk: Tensor) -> tuple[int, int]:
    """Height and width of a chunk's frames."""
    rows, width = chunk.shape[1:3]
    return (rows * 2 // 3 if chunk.dtype == torch.uint8 else rows), width


class _Sink:
    """The file that the muxer writes to; keeps the first error, which the muxer replaces by one of its own or swallows."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        written = 0
        try:
            while written < len(view):  # an unbuffered file may take a part only
                written += self._file.write(view[written:])
        except OSError as error:
            self.error = self.error or error
            raise
        return written

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


@contextlib.contextmanager
def _open_mp4(temporary: Path) -> Iterator[OutputContainer]:
    import av

    # The index goes before the pictures once they are all there: players and browsers start before they have the whole file.
    index_first = {"movflags": "+faststart"}

    def read_back(*_: object) -> IO[bytes]:
        return temporary.open("rb")

    with temporary.open("wb", buffering=0) as file:
        sink = _Sink(file)
        try:
            with av.open(sink, "w", format="mp4", container_options=index_first, io_open=read_back) as container:
                yield container
        except av.error.FFmpegError as error:
            if sink.error is None:
                raise OSError(errno.EIO, f"the encoder gave up ({error})") from error
        if sink.error is not None:
            raise sink.error


@dataclass
class _Mp4Writer:
    """One open mp4: video frames go in as they come, audio keeps pace with them."""

    container: OutputContainer
    video: VideoStream
    sound: AudioStream | None
    samples: np.ndarray
    rate: Fraction
    size: tuple[int, int]
    frames: int = 0
    sent: int = 0  # audio samples
    failed: bool = False

    @classmethod
    def open(
        cls, container: OutputContainer, chunk: Tensor, audio: Tensor | None, rate: Fraction, sample_rate: int, crf: int
    ) -> _Mp4Writer:
        height, width = _size(chunk)
        video = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "preset": "veryfast"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        context = video.codec_context
        context.thread_count, context.thread_type = _X264_THREADS, "FRAME"
        context.color_primaries = context.color_trc = context.colorspace = _TAG_BT709
        context.color_range = _TAG_LIMITED
        sound = None
        samples = np.zeros((0, 2), dtype=np.int16)
        if audio is not None:
            sound = container.add_stream("aac", rate=sample_rate, layout="stereo")
            samples = to_int16(audio)
        return cls(container, video, sound, samples, rate, (height, width))

    def planes_of(self, chunk: Tensor) -> Iterator[np.ndarray]:
        """A chunk's frames as packed YUV on the host, some at a time."""
        if _size(chunk) != self.size:
            raise ValueError(f"chunks must all be {self.size} (height, width), got {_size(chunk)}")
        for part in _parts(chunk):
            yield part.numpy()

    def write(self, frames: np.ndarray) -> range:
        """Encodes packed YUV frames and the audio that goes with them; returns the numbers of frames there are after each."""
        import av

        if (
            self.failed
        ):  # what was handed over already; a muxer that could not write its header crashes when asked again
            return range(0)
        first, self.failed = self.frames, True
        for planes in frames:
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = self.frames, 1 / self.rate
            self.container.mux(self.video.encode(frame))
            self.frames += 1
            self._write_audio(until=math.ceil(self.frames / self.rate * (self.sound.rate if self.sound else 0)))
        self.failed = False
        return range(first + 1, self.frames + 1)

    def _write_audio(self, until: int) -> None:
        import av

        while self.sound is not None and self.sent < min(until, len(self.samples)):
            part = self.samples[self.sent : self.sent + _AAC_FRAME]
            frame = av.AudioFrame.from_ndarray(part.reshape(1, -1), format="s16", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = self.sound.rate, self.sent, Fraction(1, self.sound.rate)
            self.container.mux(self.sound.encode(frame))
            self.sent += len(part)

    def finish(self) -> None:
        self._write_audio(until=len(self.samples))
        self.container.mux(self.video.encode())
        if self.sound is not None:
            self.container.mux(self.sound.encode())


def write_frames(
    folder: str | Path,
    chunks: Iterable[Tensor],
    audio: Tensor | None = None,
    sample_rate: int = 48000,
    *,
    progress: Progress | None = None,
) -> None:
    """Write frame_00000.png, frame_00001.png, ... (8-bit sRGB, rounded) and audio.wav (16-bit stereo) into a folder.

    The folder appears under its name only when complete; an earlier result there is replaced, any other content is an
    error. Arguments as for `write_mp4`.
    """
    _require_stereo(audio)
    writable_output(str(folder).rstrip("/") + "/")
    with replacing_folder(folder) as temporary:
        count = 0
        for chunk in chunks:
            for picture in to_pictures(chunk).numpy():
                Image.fromarray(picture).save(temporary / f"frame_{count:05d}.png")
                count += 1
                if progress is not None:
                    progress(count)
        if count == 0:
            raise ValueError("chunks must hold at least one frame, got none")
        if audio is not None:
            _write_wav(temporary / AUDIO_FILE, audio, sample_rate)


def _write_wav(file: Path, audio: Tensor, sample_rate: int) -> None:
    with wave.open(str(file), "wb") as wav:
        wav.setnchannels(2)
        wav.setsampwidth(2)
        wav.setframerate(sample_rate)
        wav.writeframes(to_int16(audio).tobytes())


def write_latents(
    path: str | Path,
    video: Tensor | None,
    audio: Tensor | None,
    metadata: Mapping[str, str | int | float] | None = None,
) -> None:
    """Write the final latents as safetensors under the keys "video" (B, C, F, H, W) and "audio" (B, C, T, M).

    Args:
        metadata: what to keep in the header, e.g. seed and frame rate; stored as one JSON text under "ltxkern", because
            the format does not fix the order of several entries and equal runs shall give equal files.
    """
    from safetensors.torch import save

    latents = {"video": video, "audio": audio}
    tensors = {key: value.detach().cpu().contiguous() for key, value in latents.items() if value is not None}
    if not tensors:
        raise ValueError("latents must hold video or audio, got neither")
    header = {"ltxkern": json.dumps(dict(metadata), sort_keys=True)} if metadata else None
    with replacing_file(path) as temporary:
        temporary.write_bytes(save(tensors, metadata=header))
