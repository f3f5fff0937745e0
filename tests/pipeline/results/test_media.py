"""Output files: colours, mp4 contents, determinism, atomic writing, and one clear sentence for what cannot be written."""

import hashlib
import json
import wave
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from threading import Event

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from ltxkern.pipeline.results import media
from ltxkern.pipeline.results.media import (
    frame_rate,
    rgb_to_yuv420,
    to_int16,
    write_frames,
    write_latents,
    write_mp4,
)
from ltxkern.pipeline.results.probe import probe_mp4
from tests.pipeline.results.samples import leftovers, tone, video
from tests.processes import python


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_yuv_of_known_colours(dtype: torch.dtype) -> None:
    colours = {
        (0, 0, 0): (16, 128, 128),
        (1, 1, 1): (235, 128, 128),
        (1, 0, 0): (62, 102, 240),
        (0, 1, 0): (172, 41, 26),
        (0, 0, 1): (31, 240, 117),
    }
    for rgb, (y, u, v) in colours.items():
        packed = rgb_to_yuv420(torch.tensor(rgb, dtype=dtype).expand(2, 4, 6, 3))
        assert packed.shape == (2, 6, 6)
        assert packed.dtype == torch.uint8
        planes = packed[1].flatten().int()
        expected = torch.tensor([y] * 24 + [u] * 6 + [v] * 6)
        assert (planes - expected).abs().max() <= 1


def test_yuv_averages_chroma_and_truncates() -> None:
    chunk = torch.zeros(1, 2, 2, 3)
    chunk[0, 0, 0] = torch.tensor([1.0, 0.0, 0.0])
    packed = rgb_to_yuv420(chunk).flatten().tolist()
    assert packed == [int(0.2126 * 219 + 16), 16, 16, 16, int(128 - 0.1146 / 4 * 224), int(128 + 0.5 / 4 * 224)]


def test_yuv_refuses_odd_sides() -> None:
    for shape in ((1, 3, 4, 3), (1, 4, 3, 3), (1, 4, 4, 4), (4, 4, 3)):
        with pytest.raises(ValueError, match="chunk must be"):
            rgb_to_yuv420(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fps", [24.0, 23.976, 30000 / 1001, 12.5])
def test_mp4_holds_what_was_written(tmp_path: Path, dtype: torch.dtype, fps: float) -> None:
    path = tmp_path / "a.mp4"
    seen: list[int] = []
    source = video(17, dtype=dtype)
    write_mp4(path, source.split([5, 12]), tone(33120), fps, progress=seen.append)
    info = probe_mp4(path)
    assert (info.frames, info.height, info.width) == (17, 48, 64)
    assert (info.audio_rate, info.channels) == (48000, 2)
    assert abs(info.fps - fps) < 1e-3
    assert 33120 <= info.audio_samples < 33120 + 3 * 1024
    assert seen == list(range(1, 18))
    assert leftovers(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        *(((text, Fraction(whole * 1000, 1001))) for whole, text in ((24, "24000/1001"), (24, 23.976), (24, 23.98))),
        *(((text, Fraction(whole * 1000, 1001))) for whole, text in ((30, 29.97), (60, 59.94), (120, "119.88"))),
        (24000 / 1001, Fraction(24000, 1001)),
        (Fraction(30000, 1001), Fraction(30000, 1001)),
        (24, Fraction(24)),
        (" 25 ", Fraction(25)),
        (12.5, Fraction(25, 2)),
        (999, Fraction(999)),
    ],
)
def test_rates_reach_the_file_exactly(tmp_path: Path, given: str | float | Fraction, rate: Fraction) -> None:
    """Sound and picture of the same length in the file, and nothing lost on the way."""
    assert frame_rate(given) == rate
    path = tmp_path / "a.mp4"
    write_mp4(path, [video(60)], tone(round(48000 * 60 / rate)), given)
    with av.open(str(path)) as container:
        picture, sound = container.streams.video[0], container.streams.audio[0]
        assert picture.average_rate == rate
        assert picture.duration * picture.time_base == 60 / rate
        assert abs(sound.duration * sound.time_base - 60 / rate) <= Fraction(1024, 48000)


@pytest.mark.parametrize("given", ["24/0", "24:1", "abc", "", "-24", float("inf"), 1e-9])
def test_rates_that_are_none(given: str | float) -> None:
    with pytest.raises(ValueError, match="fps must be a positive number or a fraction such as 24000/1001"):
        frame_rate(given)


def test_mp4_index_comes_first(tmp_path: Path) -> None:
    """A browser plays while it loads; the frames lie where the index says."""
    path = tmp_path / "a.mp4"
    write_mp4(path, video(40, 96, 128).split(9), tone(66000), 24.0)
    content, position, boxes = path.read_bytes(), 0, []
    while position < len(content):
        boxes.append(content[position + 4 : position + 8])
        position += int.from_bytes(content[position : position + 4], "big")
    assert position == len(content)
    assert boxes.index(b"moov") < boxes.index(b"mdat")
    assert probe_mp4(path).frames == 40


def test_mp4_colours_and_sound_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    source = video(9)
    write_mp4(path, [source], tone(24000), 24.0)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        tags = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
        assert tags == (1, 1, 1, 1)
        assert context.pix_fmt == "yuv420p"
        frames = []
        for frame in container.decode(stream):
            assert frame.pts * stream.time_base == Fraction(len(frames), 24)
            y, u, v = (
                np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width].astype(int)
                for plane in frame.planes
            )
            frames.append(np.concatenate((y.ravel(), u.ravel(), v.ravel())))
    expected = rgb_to_yuv420(source).flatten(1).int().numpy()
    assert np.abs(np.stack(frames) - expected).mean() < 1.5
    with av.open(str(path)) as container:
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)[:, :24000]
    assert np.abs(heard - tone(24000).numpy())[:, 2048:-2048].mean() < 0.01


def test_a_chunk_is_encoded_while_the_next_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second chunk is not done before the first one's frames are in the file; at most one chunk waits, as bytes."""
    begun, encoded, waiting = Event(), Event(), []
    real = media._Mp4Writer.write

    def write(writer: media._Mp4Writer, frames: np.ndarray) -> range:
        assert begun.wait(60)
        assert frames.dtype == np.uint8
        done = real(writer, frames)
        if writer.frames >= 9:
            encoded.set()
        return done

    monkeypatch.setattr(media._Mp4Writer, "write", write)

    def chunks() -> Iterator[Tensor]:
        first = video(9)
        waiting.append(weakref.ref(first))
        yield first
        del first
        assert waiting[0]() is None, "the pictures are kept while the next chunk is made"
        begun.set()
        assert encoded.wait(60)
        yield video(4)

    seen: list[int] = []
    write_mp4(tmp_path / "a.mp4", chunks(), tone(24000), 24.0, progress=seen.append)
    assert seen == list(range(1, 14))
    assert probe_mp4(tmp_path / "a.mp4").frames == 13


def test_mp4_without_sound(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", [video(1)])
    info = probe_mp4(tmp_path / "a.mp4")
    assert (info.frames, info.audio_rate, info.channels, info.audio_samples) == (1, 0, 0, 0)


SCRIPT = """
import os, sys
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
from ltxkern.pipeline.results.media import write_mp4
from tests.pipeline.results.test_media import tone, video
write_mp4(sys.argv[1], video(33, 96, 128).split(9), tone(66000), 24.0)
"""


def test_same_input_same_bytes(tmp_path: Path) -> None:
    """Also in another process, on one core only, with another thread count."""
    first, second = tmp_path / "first.mp4", tmp_path / "second.mp4"
    write_mp4(first, video(33, 96, 128).split(9), tone(66000), 24.0)
    python("-c", SCRIPT, second)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("chunks", "audio", "fps", "words"),
    [
        ([], None, 24.0, "at least one frame"),
        ([video(1), video(1, 32)], None, 24.0, "chunks must all be"),
        ([video(1, 47)], None, 24.0, "even H and W"),
        ([video(1)], torch.zeros(1, 9), 24.0, r"audio must be \(2, samples\)"),
        ([video(1)], None, 0.0, "fps must be"),
        ([video(1)], None, float("nan"), "fps must be"),
    ],
)
def test_mp4_refuses(tmp_path: Path, chunks: list[Tensor], audio: Tensor | None, fps: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write_mp4(tmp_path / "a.mp4", chunks, audio, fps)
    assert leftovers(tmp_path) == []


def test_frames_and_wav(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    source = video(5, dtype=torch.bfloat16)
    for _ in range(2):  # the second run replaces the first
        write_frames(folder, source.split(2), tone(4801), 48000)
    assert leftovers(folder) == ["audio.wav", *(f"frame_{i:05d}.png" for i in range(5))]
    assert leftovers(tmp_path) == ["out"]
    picture = np.asarray(Image.open(folder / "frame_00003.png"))
    assert np.array_equal(picture, (source[3].float() * 255).round().numpy().astype(np.uint8))
    with wave.open(str(folder / "audio.wav")) as wav:
        assert (wav.getnchannels(), wav.getframerate(), wav.getsampwidth(), wav.getnframes()) == (2, 48000, 2, 4801)
        data = np.frombuffer(wav.readframes(4801), np.int16).reshape(-1, 2)
    assert np.array_equal(data, to_int16(tone(4801)))
    write_frames(folder, [source[:2]])
    assert leftovers(folder) == ["frame_00000.png", "frame_00001.png"]


def test_int16_clips_and_truncates() -> None:
    samples = to_int16(torch.tensor([[0.0, 1.0, -1.0, 2.0], [0.99999, -2.0, 0.5, -0.5]]))
    assert samples.dtype == np.int16
    assert samples.tolist() == [[0, 32766], [32767, -32767], [-32767, 16383], [32767, -16383]]


def test_latents_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    latents = {"video": torch.randn(1, 4, 2, 3, 5).bfloat16().transpose(3, 4), "audio": torch.randn(1, 2, 7, 16)}
    metadata = {"seed": 10, "frame_rate": 24.0, "prompt": "a cat"}
    write_latents(path, latents["video"], latents["audio"], metadata)
    with safe_open(str(path), framework="pt") as file:
        assert sorted(file.keys()) == ["audio", "video"]
        assert all(torch.equal(file.get_tensor(key), value) for key, value in latents.items())
        assert json.loads(file.metadata()["ltxkern"]) == metadata
    digests = set()
    for _ in range(8):
        write_latents(path, latents["video"], None, metadata)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1
    with pytest.raises(ValueError, match="neither"):
        write_latents(path, None, None)
