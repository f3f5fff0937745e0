"""Where the video decoder's tiles lie and how they are blended: overlapping intervals and trapezoid masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

AUTO_LONG_SIDE = 768
AUTO_SPATIAL_OVERLAP = 64
AUTO_FRAMES = 80
AUTO_TEMPORAL_OVERLAP = 24


@dataclass(frozen=True)
class VideoTiling:
    """Tile sizes and overlaps for decoding, in pixels and frames (multiples of 32 and 8 for LTX-2.3)."""

    height: int
    width: int
    frames: int = AUTO_FRAMES
    spatial_overlap: int = AUTO_SPATIAL_OVERLAP
    temporal_overlap: int = AUTO_TEMPORAL_OVERLAP


@dataclass(frozen=True)
class Interval:
    """Latents [start, end) of one axis, and how many of them at either end fade into the neighbour."""

    start: int
    end: int
    left_ramp: int
    right_ramp: int


@dataclass(frozen=True)
class TileLayout:
    """The tiles of one video: every combination of a temporal, a vertical and a horizontal interval."""

    time: tuple[Interval, ...]
    height: tuple[Interval, ...]
    width: tuple[Interval, ...]

    @property
    def tiles(self) -> int:
        """Number of decoder calls."""
        return len(self.time) * len(self.height) * len(self.width)


def auto_tiling(latent_height: int, latent_width: int, *, spatial_ratio: int = 32) -> VideoTiling:
    """The official choice: 768 px on the long side, the short side by aspect ratio rounded to whole latents.

    A very narrow picture gets a short side of at least two overlaps, which the official rule leaves open.
    """
    long_tile = AUTO_LONG_SIDE // spatial_ratio
    narrowest = 2 * AUTO_SPATIAL_OVERLAP // spatial_ratio
    short_side, long_side = sorted((latent_height, latent_width))
    short_tile = max(round(long_tile * short_side / long_side), narrowest)
    height, width = (short_tile, long_tile) if latent_height <= latent_width else (long_tile, short_tile)
    return VideoTiling(height * spatial_ratio, width * spatial_ratio)


def split(length: int, size: int, overlap: int) -> tuple[Interval, ...]:
    """Cover [0, length) by intervals of `size` latents, each sharing `overlap` latents with the next.

    The last interval is cut at `length`; one interval without ramps where `size` covers everything.
    """
    if length <= size:
        return (Interval(0, length, 0, 0),)
    stride = size - overlap
    count = -((overlap - length) // stride)
    return tuple(
        Interval(
            start=i * stride,
            end=length if i == count - 1 else i * stride + size,
            left_ramp=overlap if i else 0,
            right_ramp=0 if i == count - 1 else overlap,
        )
        for i in range(count)
    )


def split_time(length: int, size: int, overlap: int) -> tuple[Interval, ...]:
    """`split` for latent frames: later tiles start one latent earlier.

    The first latent of any decode stands for a single frame, so that extra latent only warms the tile up: its frame
    gets weight 0 in the blend.
    """
    return tuple(
        Interval(t.start - 1, t.end, t.left_ramp + 1, t.right_ramp) if t.start else t
        for t in split(length, size, overlap)
    )


def tile_layout(
    tiling: VideoTiling | None,
    latent_frames: int,
    latent_height: int,
    latent_width: int,
    *,
    spatial_ratio: int = 32,
    temporal_ratio: int = 8,
) -> TileLayout:
    """The tiles for a latent of the given size; None for `tiling` is one tile.

    Raises:
        ValueError: a tile size or overlap that is no multiple of the compression ratio, or an overlap above half a tile.
    """
    if tiling is None:
        whole = [(Interval(0, n, 0, 0),) for n in (latent_frames, latent_height, latent_width)]
        return TileLayout(*whole)
    overlap = _latents("spatial_overlap", tiling.spatial_overlap, spatial_ratio)
    height = _tile("height", tiling.height, overlap, spatial_ratio)
    width = _tile("width", tiling.width, overlap, spatial_ratio)
    frame_overlap = _latents("temporal_overlap", tiling.temporal_overlap, temporal_ratio)
    frames = _tile("frames", tiling.frames, frame_overlap, temporal_ratio)
    return TileLayout(
        split_time(latent_frames, frames, frame_overlap),
        split(latent_height, height, overlap),
        split(latent_width, width, overlap),
    )


def _latents(name: str, value: int, ratio: int) -> int:
    if value < 0 or value % ratio:
        raise ValueError(
            f"tiling {name} {value} is not a multiple of {ratio}: use {max(round(value / ratio), 0) * ratio}"
        )
    return value // ratio


def _tile(name: str, value: int, overlap: int, ratio: int) -> int:
    latents = _latents(name, value, ratio)
    if latents < max(2 * overlap, 1):
        raise ValueError(
            f"tiling {name} {value} is below twice its overlap: use at least {max(2 * overlap, 1) * ratio}"
        )
    return latents


def spatial_mask(interval: Interval, ratio: int) -> Tensor:
    """Weights of one interval's pixels, fp32: ramps linspace(0, 1, n + 2)[1:-1] over n pixels, and the mirror image."""
    mask = torch.ones((interval.end - interval.start) * ratio)
    left, right = interval.left_ramp * ratio, interval.right_ramp * ratio
    if left:
        mask[:left] = torch.linspace(0, 1, left + 2)[1:-1]
    if right:
        mask[-right:] = torch.linspace(0, 1, right + 2)[1:-1].flip(0)
    return mask


def time_mask(interval: Interval, ratio: int) -> Tensor:
    """Weights of one interval's frames, fp32: the left ramp starts at 0 (the warm-up frame), the right one mirrors it."""
    mask = torch.ones(frame_count(interval, ratio))
    if interval.left_ramp:
        left = 1 + (interval.left_ramp - 1) * ratio
        mask[:left] = torch.linspace(0, 1, left + 1)[:-1]
    if interval.right_ramp:
        right = interval.right_ramp * ratio
        mask[-right:] = torch.linspace(0, 1, right + 2)[1:-1].flip(0)
    return mask


def frame_count(interval: Interval, ratio: int) -> int:
    """Frames that a decode of the interval's latents gives: 8 * (latents - 1) + 1."""
    return (interval.end - interval.start - 1) * ratio + 1
