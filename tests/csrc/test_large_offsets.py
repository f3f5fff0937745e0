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
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ltxkern
from ltxkern.compiled import combine_guidance, merge_lora, normalize_noise
from ltxkern.compiled import group_norm_silu as group_norm
from ltxkern.compiled.steps import Launch, Step
from ltxkern.layout import ceil_div, round_up
from ltxkern.ops.float8 import stochastic_e4m3
from ltxkern.verify.cases import BF16, CASES, F32, F64, OpCase, Size
from tests.csrc.kernel_runs import exact_pixel_norm, forced
from tests.csrc.on_shim import H200, last_blocks, on_shim, run_step
from tests.csrc.shim_build import ROOT
from tests.ops.contract import assert_same, noise
from tests.serving import needs_cpu_kernels

HALF = 1 << 30
TOKENS = 16
# A block may be one token of one of two tensors, one of four heads, or an eighth of a row.
THREADS, BLOCKS = 32, 8 * TOKENS
VECTORS = pytest.mark.parametrize("channels", [8, 7], ids=["vectors", "scalars"])
# Rows of whole warps too.
ROWS = pytest.mark.parametrize("channels", [8, 7, 1024], ids=["vectors", "scalars", "warps"])
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


def blocks_of(step: Step) -> int:
    """Blocks of a launch."""
    assert isinstance(step, Launch)
    return step.grid[0]


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


@ROWS
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
    small = {name: end(value, *few[name]).clone(memory_format=torch.contiguous_format) for name, value in given.items()}
    with on_shim(THREADS), ltxkern.use_backend("cpu"):
        wanted = case.run(small)
    outs = [reserved(*given[name].shape, dtype=w.dtype) for name, w in zip(case.like, wanted, strict=True)]
    assert max(out.numel() for out in outs) > 1 << 31
    places = {value.data_ptr() for value in (*given.values(), *outs)}

    def run(steps: Sequence[Step], tensors: Sequence[Any]) -> None:
        for tensor in tensors:
            small_enough = tensor is None or tensor.numel() < 1 << 16
            assert small_enough or tensor.data_ptr() in places, "a huge operand was copied"
        last_blocks(BLOCKS)(steps, tensors)

    with on_shim(THREADS, run=run), ltxkern.use_backend("cpu"):
        case.run(given, outs)
    for out, value in zip(outs, wanted, strict=True):
        assert bool(value.isfinite().all())
        assert bool((value != 0).any())
        assert_same(end(out, *value.shape).clone(memory_format=torch.contiguous_format), value)


@ROWS
@pytest.mark.parametrize("case", [case for case in CASES if case.variant == "rows"], ids=str)
def test_tables_of_a_row_index(case: OpCase, channels: int) -> None:
    """The last rows of tables of more than 2^31 elements."""
    count = (1 << 31) // channels + 2 * TOKENS
    few, given = case.tensors(BF16, Size(1, TOKENS, channels)), {}
    for name, value in few.items():
        given[name] = value + (count - 3) if name.endswith("rows") else value
        if value.shape[0] == 3:
            given[name] = reserved(count, value.shape[1], dtype=value.dtype)
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
    rows, columns = (torch.arange(max(0, extent - TOKENS), extent) for extent in size)
    index = rows[:, None] * size[1] + columns
    wanted = summed.to(BF16) if dtype == BF16 else stochastic_e4m3(summed, index, seed)
    assert int(index.max()) > 1 << 32

    def run(steps: Sequence[Step], tensors: Sequence[Any]) -> None:
        (step,) = steps
        assert isinstance(step, Launch)
        assert ("tensor_cores" in step.kernel) == (small_rank == 0)
        last_blocks(2)(steps, tensors)

    with on_shim(run=run, small_rank=small_rank), ltxkern.use_backend("cpu"), pytest.MonkeyPatch.context() as patch:
        # So many that a block has one tile.
        patch.setattr(merge_lora, "limits_of", lambda tier, x: H200._replace(multiprocessors=1 << 31))
        ltxkern.merge_lora_(weight, *factors, 0.5, rounding=rounding, seed=seed)
    # Sums in another order may round to the neighbour.
    close = torch.finfo(dtype).eps
    torch.testing.assert_close(weight[part].float(), wanted.float(), rtol=close, atol=close / 8)
    if dtype != BF16:
        assert float((weight[part].view(torch.uint8) == wanted.view(torch.uint8)).float().mean()) > 0.9


def chunk_of(module: ModuleType, length: int) -> int:
    """Elements of a chunk of a reduction."""
    return module.CHUNK * ceil_div(ceil_div(length, module.CHUNK), module.PARTIALS)


@VECTORS
def test_combine_guidance(channels: int) -> None:
    size = (HALF // channels + 5) * 3 * channels
    cond, uncond = (huge(1, size // channels, channels, seed=seed) for seed in range(2))
    out, chunk = reserved(1, size // channels, channels), chunk_of(combine_guidance, size)

    def run(steps: Sequence[Step], tensors: Sequence[Any]) -> None:
        measure, apply = steps
        partials = tensors[-1].view(F64).view(-1, 4)
        assert blocks_of(measure) == blocks_of(apply) == len(partials) == ceil_div(size, chunk)
        run_step(measure, tensors, len(partials) - 1, 1)
        last = size - (len(partials) - 1) * chunk
        first, second = (x.view(-1)[-last:].double() for x in (cond, uncond))
        combined = first + 2 * (first - second)
        exact = [f for x in (first, combined) for f in (x.mean(), (x - x.mean()).square().sum())]
        torch.testing.assert_close(partials[-1], torch.stack(exact), rtol=1e-6, atol=0)
        partials[:] = torch.tensor([0.0, 4.0, 0.0, 1.0])
        run_step(apply, tensors, len(partials) - 1, 1)

    with on_shim(THREADS, run=run, small_chunks=False), ltxkern.use_backend("cpu"):
        ltxkern.combine_guidance(cond, uncond, cfg_scale=3.0, rescale_scale=0.5, out=out)
    wanted = tail(cond).float() + 2 * (tail(cond).float() - tail(uncond).float())
    torch.testing.assert_close(tail(out).float(), 1.5 * wanted, rtol=torch.finfo(BF16).eps, atol=0)


@VECTORS
def test_noise(channels: int) -> None:
    slices, length = 3, (HALF // channels + 5) * channels
    x, out = huge(slices, length // channels, channels), reserved(slices, length // channels, channels)
    chunk = chunk_of(normalize_noise, length)
    chunks = ceil_div(length, chunk)

    def partials_of(tensors: Sequence[Any]) -> Tensor:
        used: Tensor = tensors[-1].zero_()[: 16 * slices * chunks].view(F64).view(slices, chunks, 2)
        return used

    def set_statistics(partials: Tensor) -> None:
        """Mean 0.25 and M2 4 (length - 1): a deviation of 2 for every slice."""
        partials[:, :, 0], partials[:, :, 1] = 0.25, 0.0
        partials[:, 0, 1] = 4.0 * (length - 1)

    def standardise(steps: Sequence[Step], tensors: Sequence[Any]) -> None:
        measure, apply = steps
        partials = partials_of(tensors)
        run_step(measure, tensors, blocks_of(measure) - 1, 1)
        last = x.view(-1)[-(length - (chunks - 1) * chunk) :].double()
        exact = torch.stack([last.mean(), (last - last.mean()).square().sum()])
        torch.testing.assert_close(partials[-1, -1], exact, rtol=1e-6, atol=0)
        set_statistics(partials)
        # Its blocks begin with what was read last.
        run_step(apply, tensors, 0, 1)

    def merge(steps: Sequence[Step], tensors: Sequence[Any]) -> None:
        set_statistics(partials_of(tensors))
        run_step(steps[1], tensors)

    stats = torch.full((slices, 3), torch.nan, dtype=F64)
    for run, op, target in ((standardise, ltxkern.normalize_noise, out), (merge, ltxkern.noise_statistics, stats)):
        with on_shim(THREADS, run=run, small_chunks=False), ltxkern.use_backend("cpu"):
            op(x, out=target)
    wanted = (tail(x).double() - 0.25) / 2
    torch.testing.assert_close(tail(out).double(), wanted, rtol=torch.finfo(BF16).eps, atol=0)
    rows = torch.tensor([[length, 0.25, 4.0 * (length - 1)]], dtype=F64).expand(slices, 3)
    torch.testing.assert_close(stats, rows, rtol=1e-12, atol=0)


def positions_and_out(last: bool, count: int) -> tuple[Tensor, Tensor]:
    """x and its output of three channels; the last values of x are random numbers."""
    shape = (1, count, 3) if last else (1, 3, count)
    x, out = (reserved(*shape).movedim(-1, 1) if last else reserved(*shape) for _ in range(2))
    x[0, :, -64:] = noise(3, 64, dtype=BF16)
    return x, out


@LAST
def test_group_norm(last: bool) -> None:
    positions, channels, chunk = HALF + 24, 3, 1025 if last else 1024
    chunks = ceil_div(positions, chunk)
    x, out = positions_and_out(last, positions)

    def run(steps: Sequence[Step], tensors: Sequence[Any]) -> None:
        stats, _, apply = steps
        assert blocks_of(stats) == blocks_of(apply) == (chunks if last else channels * chunks)
        run_step(stats, tensors, blocks_of(stats) - 1, 1)
        # Channels-last, those of all channels of the group together.
        apart = 1 if last else channels
        cut = 8 * chunks * apart
        partials = tensors[-1][:cut].view(F32).view(apart, chunks, 2)
        wanted = x[0, 0 if last else -1 :, (chunks - 1) * chunk :].double()
        exact = torch.stack([wanted.mean(), (wanted - wanted.mean()).square().sum()])
        torch.testing.assert_close(partials[-1, -1].double(), exact, rtol=1e-4, atol=1e-6)
        # Every channel's mean, scale and offset, and what fills 16 bytes.
        tensors[-1][round_up(cut, 16) :].view(F32).view(channels, 4)[:] = torch.tensor([0.25, 2.0, 0.0, torch.nan])
        # Its blocks begin with what was read last.
        run_step(apply, tensors, 0, 1)

    planner = partial(group_norm.columns if last else group_norm.two_pass, threads=64)
    planner = partial(planner, blocks=1 << 20) if last else partial(planner, chunk_bytes=2048)
    with on_shim(run=run), forced(planner), ltxkern.use_backend("cpu"):
        ltxkern.group_norm_silu(x, None, None, 1, out=out)
    shown = min(64, positions - (chunks - 1) * chunk)
    exact = F.silu((x[0, -1, -shown:].double() - 0.25) * 2)
    torch.testing.assert_close(out[0, -1, -shown:].double(), exact, rtol=1e-2, atol=1e-3)
    assert bool((out[0, -1, -shown:] != 0).any())


@LAST
def test_pixel_norm(last: bool) -> None:
    x, out = positions_and_out(last, HALF + 24)
    with on_shim(64, run=last_blocks(1)), ltxkern.use_backend("cpu"):
        ltxkern.pixel_norm_silu(x, 1e-6, out=out)
    exact = exact_pixel_norm(x[..., -8:], 1e-6)
    torch.testing.assert_close(out[..., -8:].double(), exact, rtol=1e-2, atol=1e-3)


def test_group_norm_columns() -> None:
    """Each sample a tile; the blocks of the last sample alone are at work, and keep a half of what they read."""
    samples, channels, positions = (1 << 17) + 3, 256, 64
    x, out = (reserved(samples, positions, channels).movedim(-1, 1) for _ in range(2))
    x[-1] = noise(channels, positions, dtype=BF16)

    def run(steps: Sequence[Step], tensors: Sequence[Any]) -> None:
        zero, launch = steps
        assert isinstance(launch, Launch)
        assert launch.kernel.startswith("ltxk::group_norm_columns<")
        assert (launch.parameters["chunks"], launch.parameters["kept_rows"]) == (2, 16)
        run_step(zero, tensors)
        run_step(launch, tensors, blocks_of(launch) - 2, 2)

    # The numbers of 256 channels with a place free behind every eight, and 16 rows.
    memory = 16 * (256 + 32) + 16 * 512
    planner = partial(group_norm.columns_on_chip, blocks=2 * samples, block_bytes=memory, threads=64)
    with on_shim(run=run), forced(planner), ltxkern.use_backend("cpu"):
        ltxkern.group_norm_silu(x, None, None, 32, out=out)
    wide = x[-1].double().reshape(32, -1)
    exact = F.silu((wide - wide.mean(1, keepdim=True)) / (wide.var(1, correction=0, keepdim=True) + 1e-5).sqrt())
    torch.testing.assert_close(out[-1].double().reshape(32, -1), exact, rtol=1e-2, atol=1e-3)


@needs_cpu_kernels
def test_strides_of_rows_on_the_cpu() -> None:
    """The CPU kernels, on few rows that lie more than 2^31 elements apart."""
    width, apart = 24, (1 << 31) + 32
    base = reserved(3 * apart + 64)

    def spread(seed: int) -> Tensor:
        x = base[64 * seed :].as_strided((3, 2, width), (apart, 1 << 12, 1))
        x.copy_(noise(3, 2, width, dtype=BF16, seed=seed))
        return x

    x, y, gate, scale = (spread(seed) for seed in range(4))
    weight, table = noise(width, dtype=BF16), noise(3, 3, 2, 4)
    with ltxkern.use_backend("cpu"):
        for far, near in (
            (
                ltxkern.rms_norm_modulate(x, scale, gate),
                ltxkern.rms_norm_modulate(x.clone(), scale.clone(), gate.clone()),
            ),
            (ltxkern.gated_residual(x, y, gate), ltxkern.gated_residual(x.clone(), y.clone(), gate.clone())),
            (
                ltxkern.qk_norm_rope(x, y, weight, weight, table, table),
                ltxkern.qk_norm_rope(x.contiguous(), y.contiguous(), weight, weight, table, table),
            ),
        ):
            assert_same(far, near)


def test_no_cpu_kernel_narrows_an_index() -> None:
    """The compiler sees no 64-bit value that becomes a 32-bit one in csrc/cpu, whose kernels take whole tensors."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("INDEX WIDTHS OF CPU KERNELS NOT TESTED: needs g++ on x86-64")
    flags = ("-std=c++17", "-fsyntax-only", "-fopenmp", "-march=x86-64-v4", "-DLTXK_ISA=avx512", "-DLTXK_ISA_avx512=1")
    warnings = ("-Wconversion", "-Wno-sign-conversion", "-Wno-float-conversion")
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        includes = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}")
        command = [compiler, *flags, *warnings, *includes, str(source)]
        environment = os.environ | {"LC_ALL": "C"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        narrowed = [
            line
            for line in done.stderr.splitlines()
            if re.search(r"conversion from .*long.* to '(?!float|double)", line)
        ]
        assert narrowed == []
