"""Tile layout, blending, the order in which frames come, audio length, the upsampler, and the checks that name a stage."""

import logging
from collections.abc import Iterator

import pytest
import torch
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from torch import Tensor, nn

from ltxkern.pipeline.model.decode import (
    decode_audio,
    decode_video,
    denormalize,
    normalize,
    resolve_tiling,
    upsample_latent,
)
from ltxkern.pipeline.model.tiling import VideoTiling
from ltxkern.pipeline.sampling import finite
from tests.pipeline.model.tiny_vae import repeating_vae, tiny_audio_vae, tiny_video_vae

SMALL = VideoTiling(height=128, width=128, frames=32, spatial_overlap=64, temporal_overlap=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(9, 5, 7), (5, 3, 3), (4, 4, 9), (11, 2, 5), (1, 9, 1)])
def test_tiled_equals_untiled_where_pixels_are_independent(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    vae = repeating_vae(dtype)
    latent = torch.randn(1, 3, *size).to(dtype)
    whole = torch.cat(list(decode_video(vae, latent, tiling=None)))
    assert vae.decoder.calls == [size]
    tiled = torch.cat(list(decode_video(vae, latent, tiling=SMALL)))
    assert whole.shape == tiled.shape == ((size[0] - 1) * 8 + 1, size[1] * 32, size[2] * 32, 3)
    assert tiled.dtype == dtype
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-6 if dtype == torch.float32 else 3e-2)


def test_output_mapping() -> None:
    latent = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0]).view(1, 1, 1, 1, 6).expand(1, 3, 1, 1, 6)
    (chunk,) = decode_video(repeating_vae(), latent)
    assert chunk[0, 0, ::32, 1].tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]


def test_frames_come_as_soon_as_they_are_finished() -> None:
    vae = repeating_vae()
    latent = torch.randn(1, 3, 16, 2, 2)
    events: list[tuple[str, int, int]] = []
    stream = decode_video(vae, latent, progress=lambda done, total: events.append(("tile", done, total)))
    assert events == []
    for chunk in stream:
        events.append(("frames", len(chunk), 0))
    assert events == [("tile", 1, 2), ("frames", 48, 0), ("tile", 2, 2), ("frames", 73, 0)]
    assert vae.decoder.calls == [(10, 2, 2), (10, 2, 2)]


def test_chunks_stay_as_they_were_yielded() -> None:
    """A consumer may keep a chunk while later tiles are blended."""
    chunks, copies = [], []
    for chunk in decode_video(repeating_vae(), torch.randn(1, 3, 9, 3, 5), tiling=SMALL):
        chunks.append(chunk)
        copies.append(chunk.clone())
    assert len(chunks) > 2
    assert all(torch.equal(chunk, copy) for chunk, copy in zip(chunks, copies, strict=True))


def test_real_decoder_agrees_far_from_tile_edges() -> None:
    vae = tiny_video_vae()
    latent = torch.randn(1, 8, 1, 3, 40)
    (whole,) = decode_video(vae, latent, tiling=None)
    (tiled,) = decode_video(vae, latent, tiling=VideoTiling(768, 768))
    assert resolve_tiling(vae, latent, VideoTiling(768, 768)).tiles == 2
    torch.testing.assert_close(tiled[:, :, : 14 * 32], whole[:, :, : 14 * 32], rtol=0, atol=1e-5)
    assert not torch.allclose(tiled[:, :, 22 * 32 : 24 * 32], whole[:, :, 22 * 32 : 24 * 32], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_decoder_without_tiles_is_the_decoder(dtype: torch.dtype) -> None:
    vae = tiny_video_vae(dtype=dtype)
    latent = torch.randn(1, 8, 2, 2, 3, dtype=dtype)
    (chunk,) = decode_video(vae, latent)
    expected = ((vae.decoder(denormalize(latent, vae))[0] + 1) * 0.5).clamp(0, 1).permute(1, 2, 3, 0)
    assert torch.equal(chunk, expected)
    assert chunk.shape == (9, 64, 96, 3)
    assert chunk.dtype == dtype
    assert not chunk.requires_grad


def test_decode_video_refuses() -> None:
    with pytest.raises(ValueError, match="latent must be"):
        decode_video(repeating_vae(), torch.zeros(2, 3, 1, 1, 1))
    with pytest.raises(ValueError, match=r"latent must be \(B, 3"):
        decode_video(repeating_vae(), torch.zeros(1, 4, 1, 1, 1))
    vae = repeating_vae()
    vae.config.timestep_conditioning = True
    with pytest.raises(ValueError, match="timestep_conditioning"):
        decode_video(vae, torch.zeros(1, 3, 1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_in_the_latents_dtype(dtype: torch.dtype) -> None:
    vae = tiny_video_vae()
    latent = torch.randn(1, 8, 2, 3, 5, dtype=dtype)
    raw = denormalize(latent, vae)
    mean, std = vae.latents_mean.to(dtype).view(-1, 1, 1, 1), vae.latents_std.to(dtype).view(-1, 1, 1, 1)
    assert torch.equal(raw[0], latent[0] * std + mean)
    assert raw.dtype == dtype
    torch.testing.assert_close(normalize(raw, vae), latent, rtol=0, atol=1e-6 if dtype == torch.float32 else 5e-2)


def test_upsampler_works_on_raw_latents() -> None:
    torch.manual_seed(0)
    vae = tiny_video_vae()
    upsampler = LTX2LatentUpsamplerModel(8, 32, 1, use_rational_resampler=False)
    latent = torch.randn(1, 8, 2, 3, 5, dtype=torch.bfloat16)
    result = upsample_latent(upsampler, vae, latent)
    assert result.shape == (1, 8, 2, 6, 10)
    assert result.dtype == torch.float32
    assert not result.requires_grad
    mean, std = vae.latents_mean.view(-1, 1, 1, 1), vae.latents_std.view(-1, 1, 1, 1)
    expected = (upsampler(latent.float() * std + mean) - mean) / std
    torch.testing.assert_close(result, expected)
    assert upsample_latent(upsampler.bfloat16(), vae, latent).dtype == torch.bfloat16


class Hum(nn.Module):
    """Stands for the vocoder: 480 samples per mel frame, each the mean of that frame."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.bfloat16))
        self.seen: Tensor | None = None

    def forward(self, mel: Tensor) -> Tensor:
        self.seen = mel
        return (mel.mean(-1) * self.weight).clamp(-1, 1).repeat_interleave(480, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_audio_length_and_precision(dtype: torch.dtype, frames: int) -> None:
    vocoder = Hum()
    waveform = decode_audio(tiny_audio_vae(dtype), vocoder, torch.randn(1, 2, frames, 16))
    assert waveform.shape == (2, 480 * (4 * frames - 3))
    assert waveform.dtype == torch.float32
    assert vocoder.seen is not None
    assert vocoder.seen.dtype == torch.float32
    assert vocoder.weight.dtype == torch.float32
    assert torch.equal(waveform, waveform.to(dtype).float())


def test_audio_statistics_run_over_packed_channels() -> None:
    vae = tiny_audio_vae()
    latent = torch.randn(1, 2, 3, 16)
    vocoder = Hum()
    decode_audio(vae, vocoder, latent)
    std, mean = (stat.view(1, 2, 1, 16) for stat in (vae.latents_std, vae.latents_mean))
    torch.testing.assert_close(vocoder.seen, vae.decoder(latent * std + mean))
    with pytest.raises(ValueError, match="C \\* M = 32"):
        decode_audio(vae, vocoder, torch.zeros(1, 2, 3, 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_decoders_name_their_stage(bad: float) -> None:
    vae = repeating_vae()
    vae.decoder.gain.data.fill_(bad)
    with pytest.raises(finite.NonFiniteError, match="video decoding: the video has"):
        list(decode_video(vae, torch.ones(1, 3, 1, 1, 1)))
    with pytest.raises(finite.NonFiniteError, match="audio decoding"):
        decode_audio(tiny_audio_vae(), Hum(), torch.full((1, 2, 2, 16), bad))


@pytest.mark.parametrize(("level", "words"), [(-1.0, "black"), (1.0, "white"), (0.2, "one constant colour")])
def test_flat_video_is_reported_once(caplog: pytest.LogCaptureFixture, level: float, words: str) -> None:
    with caplog.at_level(logging.WARNING):
        list(decode_video(repeating_vae(), torch.full((1, 3, 16, 2, 2), level)))
    assert [words in record.message for record in caplog.records] == [True]
    caplog.clear()
    list(decode_video(repeating_vae(), torch.randn(1, 3, 1, 2, 2)))
    assert not caplog.records


def test_peak_memory_is_one_group() -> None:
    """The stream must not hold the whole video: storage alive at any yield stays within two temporal groups."""

    def alive(stream: Iterator[Tensor]) -> int:
        return max(chunk.untyped_storage().nbytes() for chunk in stream)

    short = alive(decode_video(repeating_vae(), torch.randn(1, 3, 9, 2, 2), tiling=SMALL))
    long = alive(decode_video(repeating_vae(), torch.randn(1, 3, 33, 2, 2), tiling=SMALL))
    assert long == short
