"""Element offsets beyond 2^31 in the norm kernels: the last blocks of huge grids; test_large_offsets_of_ops.py has the others."""

import pytest
import torch
import torch.nn.functional as F

from ltxkern.compiled import group_norm_silu as group_norm
from ltxkern.compiled import pixel_norm_silu as pixel_norm
from ltxkern.compiled.steps import Launch
from tests.csrc.reserved import only_blocks, reserved, run
from tests.ops.contract import noise

POSITIONS = (1 << 30) + 24
CHANNELS = 3
TAIL = 64


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_group_norm(last: bool) -> None:
    x, out = (reserved(*((1, POSITIONS, CHANNELS) if last else (1, CHANNELS, POSITIONS))) for _ in range(2))
    x, out = (x.movedim(-1, 1), out.movedim(-1, 1)) if last else (x, out)
    x[0, :, -TAIL:] = noise(CHANNELS, TAIL, dtype=torch.bfloat16)
    case = group_norm.describe(out, x, None, None, 1, 1e-5, None, None)
    assert case.channels_last == last
    steps, size = group_norm.columns(case, 1 << 20, 64) if last else group_norm.two_pass(case, 2048, 64)
    stats, _, apply = steps
    assert isinstance(stats, Launch)
    assert isinstance(apply, Launch)
    workspace = torch.zeros(size, dtype=torch.uint8)
    chunk, chunks = stats.parameters["chunk"], stats.parameters["chunks"]
    assert isinstance(chunk, int)
    assert isinstance(chunks, int)
    with only_blocks(stats.grid[0] - 1):
        run(stats, out, x, None, None, None, None, workspace)
    partials = workspace[: 8 * chunks * CHANNELS].view(torch.float32).view(CHANNELS, chunks, 2)
    wanted = x[0, -1, (chunks - 1) * chunk :].double()
    torch.testing.assert_close(partials[-1, -1, 0].double(), wanted.mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        partials[-1, -1, 1].double(), (wanted - wanted.mean()).square().sum(), rtol=1e-4, atol=1e-6
    )
    workspace[8 * chunks * CHANNELS :].view(torch.float32)[:] = torch.tensor([0.25, 2.0])
    with only_blocks(0):
        run(apply, out, x, None, None, None, None, workspace)
    shown = min(TAIL, POSITIONS - (chunks - 1) * chunk)
    exact = F.silu((x[0, -1, -shown:].double() - 0.25) * 2)
    torch.testing.assert_close(out[0, -1, -shown:].double(), exact, rtol=1e-2, atol=1e-3)
    assert bool((out[0, -1, -shown:] != 0).any())


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_pixel_norm(last: bool) -> None:
    x, out = (reserved(*((1, POSITIONS, CHANNELS) if last else (1, CHANNELS, POSITIONS))) for _ in range(2))
    x, out = (x.movedim(-1, 1), out.movedim(-1, 1)) if last else (x, out)
    x[0, :, -TAIL:] = noise(CHANNELS, TAIL, dtype=torch.bfloat16)
    case = pixel_norm.describe(out, x, 1e-6, None)
    launch = pixel_norm.columns(case, 64) if last else pixel_norm.rows(case, 100 << 10, 64)
    assert launch.grid[0] < 1 << 31
    with only_blocks(launch.grid[0] - 1):
        run(launch, out, x, None)
    wide = x[0, :, -8:].double()
    exact = F.silu(wide * torch.rsqrt(wide.square().mean(0) + 1e-6))
    torch.testing.assert_close(out[0, :, -8:].double(), exact, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kernel", ["resident", "resident_cluster", "pipeline"])
def test_group_norm_on_chip(kernel: str) -> None:
    groups, length = (1 << 20) + 3, 2048
    x, out = (reserved(1, groups, length) for _ in range(2))
    x[0, -1] = noise(length, dtype=torch.bfloat16)
    case = group_norm.describe(out, x, None, None, groups, 1e-5, None, None)
    if kernel == "pipeline":
        # A team a group: the last team alone is at work.
        (_, launch), size = group_norm.pipeline(case, 2, groups, kept_bytes=1024, threads=64)
    else:
        (launch,), size = group_norm.resident(case, 2 if kernel == "resident_cluster" else 1, threads=64)
    assert isinstance(launch, Launch)
    blocks = launch.grid[0] // groups
    with only_blocks(launch.grid[0] - blocks, blocks):
        run(launch, out, x, None, None, None, None, torch.zeros(size, dtype=torch.uint8))
    wide = x[0, -1].double()
    exact = F.silu((wide - wide.mean()) / (wide.var(correction=0) + 1e-5).sqrt())
    torch.testing.assert_close(out[0, -1].double(), exact, rtol=1e-2, atol=1e-3)
