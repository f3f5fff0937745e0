"""Latent geometry: ratios of a model, shapes from pixels, packing into tokens, RoPE positions, the state a stage denoises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from ltxkern.pipeline.sampling.coordinates import Coordinates
from ltxkern.pipeline.sampling.state import fill_normal

VIDEO_CHANNELS = 128
SPATIAL_RATIO = 32
TEMPORAL_RATIO = 8
AUDIO_CHANNELS = 8
AUDIO_MEL_BINS = 16
AUDIO_SAMPLE_RATE = 16000
AUDIO_HOP_LENGTH = 160
AUDIO_MEL_RATIO = 4  # mel frames per audio latent
PRODUCTION_BLOCKS = 48


@dataclass(frozen=True)
class Geometry:
    """How a model's latents relate to pixels, and its depth; the defaults are LTX-2.3's."""

    spatial_ratio: int = SPATIAL_RATIO
    temporal_ratio: int = TEMPORAL_RATIO
    video_channels: int = VIDEO_CHANNELS
    audio_channels: int = AUDIO_CHANNELS
    mel_bins: int = AUDIO_MEL_BINS
    blocks: int = PRODUCTION_BLOCKS


@dataclass(frozen=True)
class VideoLatentShape:
    """Sizes of a video latent (B, C, F, H, W), counted in latents."""

    frames: int
    height: int
    width: int
    channels: int = VIDEO_CHANNELS
    batch: int = 1

    @classmethod
    def from_pixels(
        cls,
        num_frames: int,
        height: int,
        width: int,
        *,
        channels: int = VIDEO_CHANNELS,
        batch: int = 1,
        spatial_ratio: int = SPATIAL_RATIO,
        temporal_ratio: int = TEMPORAL_RATIO,
    ) -> VideoLatentShape:
        """The latent shape of `num_frames` frames of `height` x `width` pixels: ((F-1)/8 + 1, H/32, W/32).

        Raises:
            ValueError: frames not 8k+1, or a side that is not a positive multiple of the compression ratio.
        """
        require_frame_count(num_frames, temporal_ratio)
        for name, side in (("height", height), ("width", width)):
            if side < spatial_ratio or side % spatial_ratio:
                raise ValueError(f"{name} {side} is not a multiple of {spatial_ratio}: {_nearest(side, spatial_ratio)}")
        return cls(
            (num_frames - 1) // temporal_ratio + 1, height // spatial_ratio, width // spatial_ratio, channels, batch
        )

    @property
    def tokens(self) -> int:
        """Number of tokens: one per latent position."""
        return self.frames * self.height * self.width

    def dims(self) -> tuple[int, int, int, int, int]:
        """(B, C, F, H, W)."""
        return self.batch, self.channels, self.frames, self.height, self.width


@dataclass(frozen=True)
class AudioLatentShape:
    """Sizes of an audio latent (B, C, T, M): T latent frames of M mel bins."""

    frames: int
    channels: int = AUDIO_CHANNELS
    mel_bins: int = AUDIO_MEL_BINS
    batch: int = 1

    @classmethod
    def from_pixels(
        cls,
        num_frames: int,
        fps: float,
        *,
        channels: int = AUDIO_CHANNELS,
        mel_bins: int = AUDIO_MEL_BINS,
        batch: int = 1,
    ) -> AudioLatentShape:
        """The audio latent that lasts as long as `num_frames` frames: round(25 * num_frames / fps) latents."""
        if not fps > 0:
            raise ValueError(f"fps must be above 0, got {fps}")
        rate = AUDIO_SAMPLE_RATE / AUDIO_HOP_LENGTH / AUDIO_MEL_RATIO
        return cls(round(num_frames / fps * rate), channels, mel_bins, batch)

    @property
    def tokens(self) -> int:
        """Number of tokens: one per latent frame."""
        return self.frames

    def dims(self) -> tuple[int, int, int, int]:
        """(B, C, T, M)."""
        return self.batch, self.channels, self.frames, self.mel_bins


LatentShape = VideoLatentShape | AudioLatentShape


def require_frame_count(num_frames: int, temporal_ratio: int = TEMPORAL_RATIO) -> None:
    """Raise ValueError with the nearest legal counts unless `num_frames` is 8k+1."""
    if num_frames >= 1 and (num_frames - 1) % temporal_ratio == 0:
        return
    below = max((num_frames - 1) // temporal_ratio, 0) * temporal_ratio + 1
    choices = f"{below}" if num_frames < 1 else f"{below} or {below + temporal_ratio}"
    raise ValueError(f"num_frames {num_frames} is not {temporal_ratio}k+1: use {choices}")


def _nearest(value: int, multiple: int) -> str:
    below = value // multiple * multiple
    return f"use {below + multiple} or {below}" if below > 0 else f"use {multiple}"


def patchify(latent: Tensor) -> Tensor:
    """Pack a latent into tokens: (B, C, F, H, W) -> (B, F*H*W, C), or audio (B, C, T, M) -> (B, T, C*M), channel-major.

    Numerical contract: exact, a rearrangement. The result is contiguous.
    """
    if latent.ndim == 5:
        return latent.flatten(2).transpose(1, 2).contiguous()
    if latent.ndim == 4:
        return latent.transpose(1, 2).flatten(2).contiguous()
    raise ValueError(f"latent must be (B, C, F, H, W) or (B, C, T, M), got shape {tuple(latent.shape)}")


def unpatchify(tokens: Tensor, shape: LatentShape) -> Tensor:
    """Undo `patchify`: (B, T, C) tokens -> the latent of `shape`. Exact, contiguous.

    Raises:
        ValueError: the token or channel count does not belong to `shape` (clear conditioning tokens first).
    """
    video = isinstance(shape, VideoLatentShape)
    channels = shape.channels if video else shape.channels * shape.mel_bins  # type: ignore[union-attr]
    if tokens.ndim != 3 or tuple(tokens.shape[1:]) != (shape.tokens, channels):
        raise ValueError(f"tokens must be (B, {shape.tokens}, {channels}) for {shape}, got {tuple(tokens.shape)}")
    if isinstance(shape, VideoLatentShape):
        grid = (shape.frames, shape.height, shape.width)
        return tokens.transpose(1, 2).unflatten(2, grid).contiguous()
    return tokens.unflatten(2, (shape.channels, shape.mel_bins)).transpose(1, 2).contiguous()


def video_positions(
    shape: VideoLatentShape,
    fps: float,
    *,
    device: torch.device | str = "cpu",
    spatial_ratio: int = SPATIAL_RATIO,
    temporal_ratio: int = TEMPORAL_RATIO,
) -> Tensor:
    """Start and end of every video token: seconds for time, pixels for height and width.

    time: [max(8f-7, 0), 8f+1) / fps (the first latent covers one frame); height: [32y, 32y+32); width: [32x, 32x+32).

    Args:
        shape: latent sizes; tokens are ordered (f, h, w).
        fps: frames per second, may be fractional.

    Returns:
        fp32 (B, 3, T, 2), axis 1 = time, height, width; the last axis = start, end.

    Numerical contract: exact to the official rounding (integers in fp32, one fp32 division).
    """
    return _video_coordinates(shape, fps, device, spatial_ratio, temporal_ratio).positions(shape.batch)


def _video_coordinates(
    shape: VideoLatentShape, fps: float, device: torch.device | str, spatial_ratio: int, temporal_ratio: int
) -> Coordinates:
    frames = torch.arange(shape.frames + 1, dtype=torch.float32, device=device)
    times = (frames * temporal_ratio + (1 - temporal_ratio)).clamp(min=0) / fps
    return Coordinates.on_grid(_bounds(times), *_sides(shape, spatial_ratio, device))


def keyframe_coordinates(
    shape: VideoLatentShape,
    frame: int,
    fps: float,
    *,
    device: torch.device | str = "cpu",
    spatial_ratio: int = SPATIAL_RATIO,
) -> Coordinates:
    """Of one image that stands at pixel frame `frame`: time [frame, frame+1) / fps, no causal shift."""
    times = torch.tensor([[frame, frame + 1]], dtype=torch.float32, device=device) / fps
    return Coordinates.on_grid(times, *_sides(shape, spatial_ratio, device))


def audio_positions(shape: AudioLatentShape, *, device: torch.device | str = "cpu") -> Tensor:
    """Start and end of every audio token in seconds: [max(4i-3, 0), 4i+1) * 160 / 16000.

    Returns:
        fp32 (B, 1, T, 2). Numerical contract: exact to the official rounding.
    """
    return _audio_coordinates(shape, device).positions(shape.batch)


def _audio_coordinates(shape: AudioLatentShape, device: torch.device | str) -> Coordinates:
    index = torch.arange(shape.frames + 1, dtype=torch.float32, device=device)
    mel = (index * AUDIO_MEL_RATIO + (1 - AUDIO_MEL_RATIO)).clamp(min=0)
    return Coordinates.on_grid(_bounds(mel * AUDIO_HOP_LENGTH / AUDIO_SAMPLE_RATE))


def keyframes_mask(shape: VideoLatentShape, *, appended: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """fp32 (B, T + appended, 1): 1 for the tokens of the first latent frame, 0 elsewhere.

    LTX-2.3 has no parameter that reads it; transformers that embed key frames do.
    """
    mask = torch.zeros(shape.batch, shape.tokens + appended, 1, dtype=torch.float32, device=device)
    mask[:, : shape.height * shape.width] = 1
    return mask


def _bounds(edges: Tensor) -> Tensor:
    return torch.stack((edges[:-1], edges[1:]), dim=-1)


def _sides(shape: VideoLatentShape, spatial_ratio: int, device: torch.device | str) -> list[Tensor]:
    """Bounds of rows and of columns in pixels."""
    return [
        _bounds(torch.arange(side + 1, dtype=torch.float32, device=device) * spatial_ratio)
        for side in (shape.height, shape.width)
    ]


@dataclass(frozen=True)
class LatentState:
    """What one stage denoises for one modality, packed into tokens.

    latent (B, T, C) in the model dtype; clean (B, T, C), what masked tokens return to; mask (B, T, 1) fp32, 1 = denoise
    fully, 0 = keep clean; positions (B, 3 | 1, T, 2) fp32, and what they are made of by axis, or None where that is not known.
    T may exceed `shape.tokens` by appended conditioning tokens.
    levels: the distinct values of the mask as host floats, so that the transformer embeds a timestep once per value
    and not once per token; None where they are not known.
    """

    latent: Tensor
    clean: Tensor
    mask: Tensor
    positions: Tensor
    shape: LatentShape
    levels: tuple[float, ...] | None = None
    coordinates: Coordinates | None = None

    @classmethod
    def create(
        cls,
        shape: LatentShape,
        *,
        fps: float | Fraction = 24.0,
        latent: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        spatial_ratio: int = SPATIAL_RATIO,
        temporal_ratio: int = TEMPORAL_RATIO,
    ) -> LatentState:
        """The state before conditioning and noise: `latent` (unpacked, of `shape`) or zeros, clean = latent, mask = 1.

        Raises:
            ValueError: `latent` is not of `shape`.
        """
        if latent is None:
            latent = torch.zeros(shape.dims(), dtype=dtype, device=device)
        elif tuple(latent.shape) != shape.dims():
            raise ValueError(f"latent must have shape {shape.dims()}, got {tuple(latent.shape)}")
        tokens = patchify(latent.to(device=device, dtype=dtype))
        if isinstance(shape, VideoLatentShape):
            coordinates = _video_coordinates(shape, float(fps), device, spatial_ratio, temporal_ratio)
        else:
            coordinates = _audio_coordinates(shape, device)
        positions = coordinates.positions(shape.batch)
        mask = torch.ones(*tokens.shape[:2], 1, dtype=torch.float32, device=device)
        return cls(tokens, tokens.clone(), mask, positions, shape, levels=(1.0,), coordinates=coordinates)

    def noise(
        self,
        scale: float = 1.0,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: Tensor | None = None,
    ) -> LatentState:
        """Mix noise in: lerp(clean, lerp(latent, n, scale), mask), both in fp32, then back to the model dtype.

        Args:
            scale: the sigma to start from; 1 replaces the latent by noise.
            generator: source of n, drawn in the model dtype over all tokens, appended ones included; several: one per sample.
            noise: a ready n (B, T, C) instead of a draw.

        Raises:
            ValueError: `noise` has another shape than the packed latent.
        """
        if noise is None:
            generators = generator if isinstance(generator, Sequence) else [generator]
            noise = fill_normal(torch.empty_like(self.latent, memory_format=torch.contiguous_format), generators)
        elif noise.shape != self.latent.shape:
            raise ValueError(f"noise must have shape {tuple(self.latent.shape)}, got {tuple(noise.shape)}")
        noise = noise.to(self.latent)
        mixed = torch.lerp(self.latent.float(), noise.float(), scale)
        mixed = torch.lerp(self.clean.float(), mixed, self.mask)
        return replace(self, latent=mixed.to(self.latent.dtype))

    def append(
        self,
        latent: Tensor,
        clean: Tensor,
        mask: Tensor,
        at: Tensor | Coordinates,
        *,
        levels: tuple[float, ...] | None = None,
    ) -> LatentState:
        """The state with further tokens at the end, `levels` those of `mask`; `clear_conditioning` takes them off again.

        Args:
            at: their positions (B, 3 | 1, T, 2), or better the coordinates of them.
        """
        coordinates = None
        if isinstance(at, Coordinates):
            coordinates = self.coordinates and self.coordinates.joined(at)
            at = at.positions(self.shape.batch)
        return replace(
            self,
            latent=torch.cat((self.latent, latent), dim=1),
            clean=torch.cat((self.clean, clean), dim=1),
            mask=torch.cat((self.mask, mask), dim=1),
            positions=torch.cat((self.positions, at), dim=2),
            levels=self.levels_with(levels),
            coordinates=coordinates,
        )

    def levels_with(self, levels: tuple[float, ...] | None) -> tuple[float, ...] | None:
        """The distinct mask values once tokens of `levels` join; None where either side is not known."""
        return None if self.levels is None or levels is None else tuple(dict.fromkeys((*self.levels, *levels)))

    def clear_conditioning(self) -> LatentState:
        """Drop appended tokens and reset the mask to ones."""
        count = self.shape.tokens
        return replace(
            self,
            latent=self.latent[:, :count],
            clean=self.clean[:, :count],
            mask=torch.ones_like(self.mask[:, :count]),
            positions=self.positions[:, :, :count],
            levels=(1.0,),
            coordinates=self.coordinates and self.coordinates.part(slice(count)),
        )

    def unpack(self) -> Tensor:
        """The latent (B, C, F, H, W) or (B, C, T, M) without appended tokens."""
        return unpatchify(self.latent[:, : self.shape.tokens], self.shape)


def timesteps_from_mask(mask: Tensor, sigma: float) -> Tensor:
    """Per-token timesteps mask * sigma, (B, T, 1) fp32: a token that is kept has timestep 0."""
    return mask * sigma


def to_velocity(latent: Tensor, x0: Tensor, sigma: float) -> Tensor:
    """Velocity (latent - x0) / sigma in fp32, returned in the dtype of `latent`.

    Raises:
        ValueError: sigma is 0, where the velocity is not defined.
    """
    if sigma == 0:
        raise ValueError("sigma must not be 0: the velocity (latent - x0) / sigma is not defined there")
    return ((latent.float() - x0.float()) / sigma).to(latent.dtype)


def to_denoised(latent: Tensor, velocity: Tensor, timesteps: float | Tensor) -> Tensor:
    """Denoised prediction x0 = latent - velocity * timesteps in fp32, returned in the dtype of `latent`.

    Args:
        timesteps: sigma, or (B, T, 1) per-token timesteps from `timesteps_from_mask`.
    """
    if isinstance(timesteps, Tensor):
        timesteps = timesteps.float()
    return (latent.float() - velocity.float() * timesteps).to(latent.dtype)
