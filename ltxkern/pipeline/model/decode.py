"""From latents to pictures and sound: tiled video decoding, audio decoding, and the latent upsampler between stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ltxkern.pipeline.model.decoder_layout import lay_out
from ltxkern.pipeline.model.tiling import (
    AUTO_TEMPORAL_OVERLAP,
    Interval,
    TileLayout,
    VideoTiling,
    auto_tiling,
    frame_count,
    spatial_mask,
    tile_layout,
    time_mask,
)
from ltxkern.pipeline.sampling import finite
from ltxkern.pipeline.sampling.latents import AudioLatentShape, patchify, unpatchify

if TYPE_CHECKING:
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from torch import nn

Tiling = VideoTiling | Literal["auto"] | None


def denormalize(latent: Tensor, vae: AutoencoderKLLTX2Video) -> Tensor:
    """latent * std + mean per channel of (B, C, F, H, W), in the latent's dtype."""
    mean, std = _statistics(latent, vae)
    return latent * std + mean


def normalize(latent: Tensor, vae: AutoencoderKLLTX2Video) -> Tensor:
    """(latent - mean) / std per channel of (B, C, F, H, W), in the latent's dtype."""
    mean, std = _statistics(latent, vae)
    return (latent - mean) / std


def _statistics(latent: Tensor, vae: AutoencoderKLLTX2Video) -> tuple[Tensor, Tensor]:
    mean, std = vae.latents_mean, vae.latents_std
    if latent.ndim != 5 or latent.shape[1] != mean.numel():
        raise ValueError(f"latent must be (B, {mean.numel()}, F, H, W), got {tuple(latent.shape)}")
    return mean.to(latent).view(1, -1, 1, 1, 1), std.to(latent).view(1, -1, 1, 1, 1)


@torch.no_grad()
def upsample_latent(upsampler: nn.Module, vae: AutoencoderKLLTX2Video, latent: Tensor) -> Tensor:
    """Double height and width of a normalised video latent: normalize(upsampler(denormalize(latent))).

    Args:
        upsampler: the spatial latent upsampler; it works on latents as the VAE encodes them.
        vae: whose per-channel statistics apply (its weights are not used).
        latent: (B, C, F, H, W), normalised.

    Returns:
        (B, C, F, 2H, 2W), normalised, in the upsampler's dtype.
    """
    latent = latent.to(next(upsampler.parameters()).dtype)
    return normalize(upsampler(denormalize(latent, vae)), vae)


def resolve_tiling(vae: AutoencoderKLLTX2Video, latent: Tensor, tiling: Tiling = "auto") -> TileLayout:
    """The tiles that `decode_video` would use for this latent."""
    frames, height, width = latent.shape[2:]
    if tiling == "auto":
        tiling = auto_tiling(height, width, spatial_ratio=vae.spatial_compression_ratio)
    return tile_layout(
        tiling,
        frames,
        height,
        width,
        spatial_ratio=vae.spatial_compression_ratio,
        temporal_ratio=vae.temporal_compression_ratio,
    )


def smaller_tiling(vae: AutoencoderKLLTX2Video, latent: Tensor, tiling: Tiling = "auto") -> VideoTiling | None:
    """Tiles with half the longer side, cut alike in time; None where they are as small as their overlaps allow."""
    frames, height, width = latent.shape[2:]
    ratio = vae.spatial_compression_ratio
    if tiling == "auto":
        tiling = auto_tiling(height, width, spatial_ratio=ratio)
    elif tiling is None:
        in_time = max(frames * vae.temporal_compression_ratio, 2 * AUTO_TEMPORAL_OVERLAP)
        tiling = VideoTiling(height * ratio, width * ratio, in_time)
    sides = {"height": min(tiling.height, height * ratio), "width": min(tiling.width, width * ratio)}
    longer = max(sides, key=sides.__getitem__)
    half = max(sides[longer] // 2 // ratio * ratio, 2 * tiling.spatial_overlap, ratio)
    return replace(tiling, **{longer: half}) if half < sides[longer] else None


def decode_video(
    vae: AutoencoderKLLTX2Video,
    latent: Tensor,
    *,
    tiling: Tiling = "auto",
    skip: int = 0,
    progress: Callable[[int, int], None] | None = None,
    stage: str = "video decoding",
) -> Iterator[Tensor]:
    """Decode a normalised video latent tile by tile and yield frames as soon as no later tile touches them.

    Tiles are decoded with zero padding at their edges, multiplied by their fp32 masks, and summed in the VAE's dtype;
    then clamp((x + 1) / 2, 0, 1). At 1088x1920x121 "auto" gives 18 tiles and chunks of 48 and 73 frames.

    Args:
        vae: video VAE without timestep conditioning.
        latent: (1, C, F, H, W), normalised.
        tiling: "auto", the official layout; None, one tile; or sizes of your own.
        skip: chunks at the start that are not wanted; at most one of them is decoded for the frames it shares with the next.
        progress: called with (tiles decoded, tiles in all).
        stage: what errors and warnings call this stage.

    Yields:
        (frames, height, width, 3) in [0, 1], VAE dtype, 8(F-1)+1 frames in all.

    Raises:
        ValueError: a batch above 1, a wrong channel count, a tiling that does not fit, a VAE with timestep conditioning, or a
            layout that the variable LTXKERN_DECODER_LAYOUT should not name.
        NonFiniteError: the decoder produced NaN or infinity.

    Memory: one temporal group of frames in the VAE's dtype, one decoded tile, and that tile in fp32.
    """
    if latent.ndim != 5 or latent.shape[0] != 1:
        raise ValueError(f"latent must be (1, C, F, H, W), got {tuple(latent.shape)}")
    if vae.config.timestep_conditioning:
        raise ValueError("vae must have timestep_conditioning=False: LTX-2.3 decodes without noise")
    layout = resolve_tiling(vae, latent, tiling)
    lay_out(vae.decoder)
    raw = denormalize(latent.to(next(vae.decoder.parameters()).dtype), vae)
    if layout.tiles == 1:
        groups = _decode_whole(vae, raw, skip, progress)
    else:
        groups = _decode_tiles(vae, raw, layout, skip, progress)
    return _to_pictures(groups, stage, whole=skip == 0)


@torch.no_grad()
def _to_pictures(groups: Iterator[Tensor], stage: str, *, whole: bool) -> Iterator[Tensor]:
    watch = finite.VideoWatch(stage)
    for group in groups:
        watch.chunk(group)
        pictures = group[0].add_(1).mul_(0.5).clamp_(0, 1).permute(1, 2, 3, 0)
        yield pictures
        # Whoever keeps the chunk holds it; the next group needs the room.
        del group, pictures
    if whole:
        watch.end()


@torch.no_grad()
def _decode_whole(
    vae: AutoencoderKLLTX2Video, raw: Tensor, skip: int, progress: Callable[[int, int], None] | None
) -> Iterator[Tensor]:
    if skip:
        return
    video = vae.decoder(raw)
    if progress is not None:
        progress(1, 1)
    yield video


@torch.no_grad()
def _decode_tiles(
    vae: AutoencoderKLLTX2Video,
    raw: Tensor,
    layout: TileLayout,
    skip: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Tensor]:
    if skip >= len(layout.time):
        return
    ratio = vae.temporal_compression_ratio
    pending: Tensor | None = None  # blended frames that the next temporal group adds to
    first = _first_needed(layout.time, skip)
    done = first * len(layout.height) * len(layout.width)

    def tile_done() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, layout.tiles)

    for index, time in enumerate(layout.time[first:], first):
        group = _decode_group(vae, raw, time, layout, tile_done)
        if pending is not None:
            group[:, :, : pending.shape[2]] += pending
        if index + 1 == len(layout.time):
            yield group
            return
        finished = (layout.time[index + 1].start - time.start) * ratio
        pending = group[:, :, finished:].clone()  # a copy, so that the group itself can be freed
        if index >= skip:
            yield group[:, :, :finished]
        del group


def _first_needed(times: Sequence[Interval], skip: int) -> int:
    """The temporal group to begin with for the bits of the groups from `skip` on."""
    first = max(skip - 1, 0)
    # What a group hands on begins with its own frames alone where nothing that it was handed reaches that far.
    while first > 0 and times[first - 1].end > times[first + 1].start:
        first -= 1
    return first


def _decode_group(
    vae: AutoencoderKLLTX2Video, raw: Tensor, time: Interval, layout: TileLayout, tile_done: Callable[[], None]
) -> Tensor:
    """Decode and sum all tiles of one temporal interval: (1, 3, frames, height, width)."""
    ratio, side = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    frames, height, width = frame_count(time, ratio), raw.shape[3] * side, raw.shape[4] * side
    buffer = raw.new_zeros(1, vae.config.out_channels, frames, height, width)
    weight_t = time_mask(time, ratio).to(raw.device).view(-1, 1, 1)
    for y in layout.height:
        weight_y = spatial_mask(y, side).to(raw.device).view(-1, 1)
        for x in layout.width:
            weight_x = spatial_mask(x, side).to(raw.device)
            tile = vae.decoder(raw[:, :, time.start : time.end, y.start : y.end, x.start : x.end])
            weighted = tile * weight_t
            del tile
            weighted *= weight_y
            weighted *= weight_x
            buffer[..., y.start * side : y.end * side, x.start * side : x.end * side] += weighted
            tile_done()
    return buffer


@torch.no_grad()
def decode_audio(
    audio_vae: AutoencoderKLLTX2Audio,
    vocoder: nn.Module,
    latent: Tensor,
    *,
    stage: str = "audio decoding",
    check: bool = True,
) -> Tensor:
    """Decode a normalised audio latent to a waveform: audio VAE, vocoder, bandwidth extension to 48 kHz.

    Args:
        audio_vae: runs in its own dtype; its statistics run over the packed channels c * 16 + mel bin.
        vocoder: runs in fp32; weights of another dtype are widened in place, which loses nothing.
        latent: (1, 8, T, 16), normalised.
        stage: what errors and warnings call this stage.
        check: look at the result, for which the host waits; False leaves that to the caller (`finite.check_audio`).

    Returns:
        (2, 480 * (4T - 3)) fp32 samples in [-1, 1], rounded to the audio VAE's dtype on the way as the official code does.

    Raises:
        ValueError: `latent` has another shape.
        NonFiniteError: NaN or infinity in the result.
    """
    mean, std = audio_vae.latents_mean, audio_vae.latents_std
    if latent.ndim != 4 or latent.shape[0] != 1 or latent.shape[1] * latent.shape[3] != mean.numel():
        raise ValueError(f"latent must be (1, C, T, M) with C * M = {mean.numel()}, got {tuple(latent.shape)}")
    dtype = next(audio_vae.decoder.parameters()).dtype
    packed = patchify(latent.to(dtype))
    shape = AudioLatentShape(latent.shape[2], latent.shape[1], latent.shape[3])
    mel = audio_vae.decoder(unpatchify(packed * std.to(packed) + mean.to(packed), shape))
    vocoder.float()
    waveform = vocoder(mel.float())[0].to(mel.dtype).float()
    if check:
        finite.check_audio(stage, waveform)
    return waveform
