"""The choice between the GroupNorm kernels, and what every launch must keep within a device's limits; needs no GPU."""

import math

import pytest
import torch

from ltxkern.compiled import group_norm_silu as launch
from ltxkern.compiled import pixel_norm_silu as pixel
from ltxkern.compiled.steps import Launch, pack
from ltxkern.compiled.tensors import DeviceLimits

H200 = DeviceLimits(132, 232448)
DEVICES = {
    "A100": DeviceLimits(108, 166912),
    "H200": H200,
    "B200": DeviceLimits(148, 232448),
    "RTX 5090": DeviceLimits(170, 101376),
    "RTX 4060": DeviceLimits(24, 101376),
}
SHAPES = {
    "small": (1, 512, 8, 45, 80),
    "production": (1, 1024, 16, 17, 30),
    "production_x2": (1, 1024, 16, 34, 60),
    "pre_720p": (1, 512, 16, 90, 160),
    "post_720p": (1, 512, 16, 180, 320),
    "hunyuan_vae": (1, 128, 20, 256, 256),
    "odd": (3, 96, 7, 11, 13),
    "tiny": (1, 32, 1, 1, 1),
    "beyond_int32": (1, 512, 64, 360, 640),
    "one_huge_group": (1, 32, 1 << 27),
}


def case_of(shape: tuple[int, ...], *, dtype: torch.dtype = torch.bfloat16, last: bool = False) -> launch.Case:
    samples, channels, *rest = shape
    return launch.Case(
        dtype=dtype,
        samples=samples,
        channels=channels,
        positions=torch.Size(rest).numel(),
        groups=1 if shape == SHAPES["one_huge_group"] else 32,
        eps=1e-5,
        channels_last=last,
        aligned=True,
        weight_code=0,
        bias_code=0,
        conv_bias_code=0,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_contiguous_groups_take_two_passes_at_every_size(shape: str) -> None:
    steps, _ = launch.choose(case_of(SHAPES[shape]), H200)
    assert [step.kernel.split("<")[0] for step in steps if isinstance(step, Launch)] == [
        "ltxk::group_norm_stats",
        "ltxk::group_norm_finalize",
        "ltxk::group_norm_apply",
    ]


@pytest.mark.parametrize(("shape", "threads"), [("tiny", 32), ("production", 128), ("small", 256), ("post_720p", 256)])
def test_threads_of_a_short_chunk_have_eight_accesses_or_more(shape: str, threads: int) -> None:
    steps, _ = launch.choose(case_of(SHAPES[shape]), H200)
    assert {step.block for step in steps if isinstance(step, Launch) and "finalize" not in step.kernel} == {threads}


@pytest.mark.parametrize(
    ("shape", "kernel", "kept"),
    [
        ("production", "columns", 1.0),
        ("production_x2", "columns", 0.4),
        ("post_720p", "columns", 0.02),
        # Four channels of a group: no access of its own.
        ("hunyuan_vae", "stats_columns", None),
        ("odd", "stats_columns", None),
    ],
)
def test_choice_of_channels_last_on_an_h200(shape: str, kernel: str, kept: float | None) -> None:
    """And what a block keeps of what it reads, at least."""
    steps, _ = launch.choose(case_of(SHAPES[shape], last=True), H200)
    first = next(step for step in steps if isinstance(step, Launch))
    assert first.kernel.startswith(f"ltxk::group_norm_{kernel}<")
    assert first.cooperative == (kept is not None)
    if kept is not None:
        assert first.parameters["kept_rows"] >= kept * first.parameters["chunk"]  # type: ignore[operator]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_limits_are_kept(device: str, shape: str, dtype: torch.dtype, last: bool) -> None:
    limits = DEVICES[device]
    case = case_of(SHAPES[shape], dtype=dtype, last=last)
    steps, workspace = launch.choose(case, limits)
    for step in steps:
        if not isinstance(step, Launch):
            assert step.target.offset + step.bytes <= workspace
            continue
        assert 0 < step.grid[0] < 1 << 31
        assert all(extent < 1 << 16 for extent in step.grid[1:])
        assert step.block % 32 == 0
        assert step.shared_bytes + launch.STATIC_SHARED <= limits.shared_bytes
        packed, relocations = pack(step.parameters)
        assert len(packed) < 4096
        assert all(offset < max(workspace, 1) for _, index, offset in relocations if index == launch.WORKSPACE.index)
        if step.cooperative:
            per_processor = (limits.shared_bytes + 1024) // (step.shared_bytes + launch.STATIC_SHARED + 1024)
            assert math.prod(step.grid) <= limits.multiprocessors * min(per_processor, 2)
            # What a block takes and keeps, and how many share it.
            chunk, kept, chunks = (step.parameters[name] for name in ("chunk", "kept_rows", "chunks"))
            assert isinstance(chunk, int)
            assert isinstance(kept, int)
            assert isinstance(chunks, int)
            assert kept <= chunk
            assert chunk * chunks >= case.positions


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [1, 3, 128, 512, 1024, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pixel_norm_limits(device: str, channels: int, dtype: torch.dtype) -> None:
    limits = DEVICES[device]
    assert channels <= pixel.most_channels(limits.shared_bytes)
    case = pixel.Case(dtype, 2, channels, 480 * 272 * 121, 1e-6, False, True, 0)
    for step in (pixel.rows(case, limits.shared_bytes), pixel.columns(case)):
        assert 0 < step.grid[0] < 1 << 31
        assert step.shared_bytes + pixel.STATIC_SHARED <= limits.shared_bytes
