"""Where tiles lie, and masks that sum to one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltxkern.pipeline.model.tiling import (
    Interval,
    VideoTiling,
    auto_tiling,
    frame_count,
    spatial_mask,
    split,
    split_time,
    tile_layout,
    time_mask,
)


def intervals(parts: tuple[Interval, ...]) -> list[tuple[int, int, int, int]]:
    return [(part.start, part.end, part.left_ramp, part.right_ramp) for part in parts]


def test_reference_layout() -> None:
    layout = tile_layout(auto_tiling(34, 60), 16, 34, 60)
    assert intervals(layout.time) == [(0, 10, 0, 3), (6, 16, 4, 0)]
    assert intervals(layout.height) == [(0, 14, 0, 2), (12, 26, 2, 2), (24, 34, 2, 0)]
    assert intervals(layout.width) == [(0, 24, 0, 2), (22, 46, 2, 2), (44, 60, 2, 0)]
    assert layout.tiles == 18
    assert [frame_count(part, 8) for part in layout.time] == [73, 73]


def test_reference_masks() -> None:
    left, right = Interval(0, 10, 0, 3), Interval(6, 16, 4, 0)
    ramp = time_mask(right, 8)[:25]
    torch.testing.assert_close(ramp, torch.arange(25) * 0.04)
    torch.testing.assert_close(time_mask(left, 8)[48:], torch.cat((torch.ones(1), 1 - ramp[1:])))
    mask = spatial_mask(Interval(22, 46, 2, 2), 32)
    assert torch.equal(mask[:64], torch.linspace(0, 1, 66)[1:-1])
    assert torch.equal(mask, mask.flip(0))


@pytest.mark.parametrize(
    ("height", "width", "tile"),
    [(60, 34, (768, 448)), (34, 34, (768, 768)), (17, 30, (448, 768)), (2, 60, (128, 768)), (1, 1, (768, 768))],
)
def test_auto_follows_the_aspect(height: int, width: int, tile: tuple[int, int]) -> None:
    tiling = auto_tiling(height, width)
    assert (tiling.height, tiling.width) == tile
    assert (tiling.frames, tiling.spatial_overlap, tiling.temporal_overlap) == (80, 64, 24)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 70), st.integers(1, 24), st.integers(0, 5))
def test_masks_sum_to_one(length: int, size: int, overlap: int) -> None:
    size = max(size, 2 * overlap, 1)
    total = torch.zeros(length * 4)
    for part in split(length, size, overlap):
        assert 0 <= part.start < part.end <= length
        assert part.end - part.start <= size
        total[part.start * 4 : part.end * 4] += spatial_mask(part, 4)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    total = torch.zeros((length - 1) * 8 + 1)
    for part in split_time(length, size, overlap):
        mask = time_mask(part, 8)
        total[part.start * 8 : part.start * 8 + len(mask)] += mask
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tiling", "words"),
    [
        (VideoTiling(100, 128), "tiling height 100 is not a multiple of 32: use 96"),
        (VideoTiling(128, 96), "tiling width 96 is below twice its overlap: use at least 128"),
        (VideoTiling(128, 128, frames=40), "tiling frames 40 is below twice its overlap: use at least 48"),
        (VideoTiling(128, 128, temporal_overlap=9), "temporal_overlap 9 is not a multiple of 8: use 8"),
        (VideoTiling(128, 128, spatial_overlap=-32), "spatial_overlap -32 is not a multiple of 32: use 0"),
    ],
)
def test_layouts_that_do_not_fit(tiling: VideoTiling, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tile_layout(tiling, 9, 9, 9)
