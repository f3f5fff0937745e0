"""Element offsets beyond 2^31: the last blocks of huge grids, on tensors over memory that is reserved but never touched.

What lies at the end of a huge launch must be the very bits that the same kernel gives on a small copy of what it sees there.
"""

import mmap
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ltxkern
from ltxkern.compiled import combine_guidance, extension, normalize_noise
from ltxkern.compiled import group_norm_silu as group_norm
from ltxkern.compiled.steps import Launch, Step
from ltxkern.ops.float8 import stochastic_e4m3
from tests.csrc.kernel_runs import Planner, exact_pixel_norm, forced, forced_threads
from tests.csrc.on_shim import last_blocks, on_shim, run_step
from tests.csrc.shim_build import ROOT
from tests.ops.contract import assert_same, noise
from tests.ops.op_cases import BF16, BY_NAME, CASES, F32, F64, OpCase, Size

HALF = 1 << 30
TOKENS = 16
# A block may be one token of one of two tensors.
THREADS, BLOCKS = 32, 2 * TOKENS
VECTORS = pytest.mark.parametrize("channels", [8, 7], ids=["vectors", "scalars"])
LAST = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])


def reserved(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor of zeros over untouched pages: no memory is used until an element is written."""
    size = dtype.itemsize * torch.Size(shape).numel()
    try:
        pages = mmap.mmap(
            -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        )
    except OSError as error:
        pytest.skip(f"LARGE OFFSETS NOT TESTED: cannot reserve {size >> 30} GiB of address space: {error}")
    return torch.frombuffer(pages, dtype=torch.uint8 if dtype.itemsize == 1 else dtype).view(dtype).view(shape)


def end(x: Tensor, *extents: int) -> Tensor:
    """A view of the last elements along each dim."""
    return x[tuple(slice(-extent, None) for extent in extents)]


def huge(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    """A reserved tensor whose last rows are random numbers."""
    x = reserved(*shape, dtype=dtype)
    last = x.view(-1, shape[-1])[-TOKENS:]
    last.copy_(noise(*last.shape, seed=seed))
    return x


def tail(x: Tensor) -> Tensor:
    """A small copy of the last rows, (1, rows, width)."""
    return x.view(-1, x.shape[-1])[-TOKENS:].clone()[None]


def blocks_of(*steps: tuple[int, int, int]) -> "list[tuple[int, int, int]]":
    return list(steps)


@VECTORS
@pytest.mark.parametrize("case", [case for case in CASES if case.by_row and not case.arguments.endswith("N")], ids=str)
def test_rows(case: OpCase, channels: int) -> None:
    small_size = Size(1, TOKENS, channels)
    few, given = case.shapes(small_size), {}
    for seed, (name, shape) in enumerate(case.shapes(Size(3, HALF // channels + 5, channels)).items()):
        if torch.Size(shape).numel() < 1 << 16:
            given[name] = case.drawn(name, shape, BF16, seed)
            continue
        last = case.drawn(name, few[name], BF16, seed)
        given[name] = reserved(*shape, dtype=last.dtype)
        end(given[name], *last.shape).copy_(last)
    small = {name: end(value, *few[name]).clone() for name, value in given.items()}
    with ltxkern.use_backend("cpu"):
        with on_shim(THREADS):
            wanted = case.run(small)
        outs = [reserved(*given[name].shape, dtype=w.dtype) for name, w in zip(case.like, wanted, strict=True)]
        assert max(out.numel() for out in outs) > 1 << 31
        places = {value.data_ptr() for value in (*given.values(), *outs)}

        def run(steps: Sequence[Step], tensors: Sequence[Tensor | None]) -> None:
            for tensor in tensors:
                small_enough = tensor is None or tensor.numel() < 1 << 16
                assert small_enough or tensor.data_ptr() in places, "a huge operand was copied"
            last_blocks(BLOCKS)(steps, tensors)

        with on_shim(THREADS, run=run):
            case.run(given, outs)
    for out, value in zip(outs, wanted, strict=True):
        assert bool(value.isfinite().all())
        assert bool((value != 0).any())
        assert_same(end(out, *value.shape).clone(), value)


@VECTORS
@pytest.mark.parametrize("case", [case for case in CASES if case.variant == "rows"], ids=str)
def test_tables_of_a_row_index(case: OpCase, channels: int) -> None:
    """The last rows of tables of more than 2^31 elements."""
    count = (1 << 31) // channels + 2 * TOKENS
    few = case.tensors(BF16, Size(1, TOKENS, channels))
    given = few | {"rows": few["rows"] + (count - 3)}
    for name, value in few.items():
        if value.shape == (3, channels):
            given[name] = reserved(count, channels)
            given[name][-3:] = value
    with on_shim(THREADS), ltxkern.use_backend("cpu"):
        wanted = case.run(few)
        assert_same(case.run(given), wanted)
    assert all(bool(value.isfinite().all()) for value in wanted)


@pytest.mark.parametrize("tall", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [BF16, torch.float8_e4m3fn], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("small_rank", [16, 0], ids=["plain_cores", "tensor_cores"])
def test_merge_lora(tall: bool, dtype: torch.dtype, small_rank: int) -> None:
    rank, long, short = 16, (1 << 29) + 70, 9
    size, seed = (long, short) if tall else (short, long), 1 << 40
    weight = reserved(*size, dtype=dtype)
    factors = reserved(rank, size[1]), reserved(size[0], rank)
    part = (slice(-TOKENS, None), slice(None)) if tall else (slice(None), slice(-TOKENS, None))
    weight[part] = noise(*weight[part].shape).to(dtype)
    for index, factor in enumerate(factors):
        place = (..., slice(-TOKENS, None)) if index == 0 else (slice(-TOKENS, None), ...)
        factor[place] = noise(*factor[place].shape, seed=index + 1).to(BF16)
    a, b = (x.float() for x in (factors[0][:, part[1]], factors[1][part[0]]))
    rounding = "single" if dtype == BF16 else "stochastic"
    summed = weight[part].float() + 0.5 * (b @ a)
    index = torch.arange(size[0])[part[0], None] * size[1] + torch.arange(size[1])[None, part[1]]
    wanted = summed.to(BF16) if dtype == BF16 else stochastic_e4m3(summed, index, seed)
    assert int(index.max()) > 1 << 32

    def run(steps: Sequence[Step], tensors: Sequence[Tensor | None]) -> None:
        (step,) = steps
        assert isinstance(step, Launch)
        assert ("tensor_cores" in step.kernel) == (small_rank == 0)
        last_blocks(2)(steps, tensors)

    with on_shim(run=run, small_rank=small_rank), ltxkern.use_backend("cpu"):
        ltxkern.merge_lora_(weight, *factors, 0.5, rounding=rounding, seed=seed)
    # Sums in another order may round to the neighbour.
    close = torch.finfo(dtype).eps
    torch.testing.assert_close(weight[part].float(), wanted.float(), rtol=close, atol=close / 8)
    if dtype != BF16:
        assert float((weight[part].view(torch.uint8) == wanted.view(torch.uint8)).float().mean()) > 0.9


@VECTORS
def test_combine_guidance(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (HALF // channels + 5) * 3 * channels
    cond, uncond = (huge(1, size // channels, channels, seed=seed) for seed in range(2))
    out = reserved(1, size // channels, channels)

    def run(steps: Sequence[Step], tensors: Sequence[Tensor | None]) -> None:
        measure, apply = steps
        workspace = tensors[-1]
        assert isinstance(measure, Launch)
        assert isinstance(apply, Launch)
        assert workspace is not None
        run_step(measure, tensors, measure.grid[0] - 1, 1)
        partials = workspace.view(F64).view(-1, 4)
        chunk = combine_guidance.CHUNK * -(-size // combine_guidance.CHUNK // combine_guidance.PARTIALS)
        assert len(partials) == measure.grid[0] == -(-size // chunk)
        count = size - (len(partials) - 1) * chunk
        first, second = (x.view(-1)[-count:].double() for x in (cond, uncond))
        combined = first + 2 * (first - second)
        exact = [f for x in (first, combined) for f in (x.mean(), (x - x.mean()).square().sum())]
        torch.testing.assert_close(partials[-1], torch.stack(exact), rtol=1e-6, atol=0)
        partials[:] = torch.tensor([0.0, 4.0, 0.0, 1.0])
        run_step(apply, tensors, apply.grid[0] - 1, 1)

    with on_shim(THREADS, run=run), large_chunks(), ltxkern.use_backend("cpu"):
        ltxkern.combine_guidance(cond, uncond, cfg_scale=3.0, rescale_scale=0.5, out=out)
    wanted = tail(cond).float() + 2 * (tail(cond).float() - tail(uncond).float())
    torch.testing.assert_close(tail(out).float(), 1.5 * wanted, rtol=torch.finfo(BF16).eps, atol=0)
