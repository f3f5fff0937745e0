"""Triton kernels of noise standardisation and its statistics: fp64, fixed chunks, at most two launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltxkern.layout import ceil_div, dense, hand_back, power_of_two
from ltxkern.triton.numerics import chunk_moments_count, merge_moments, narrow, slot_update

if TYPE_CHECKING:
    from ltxkern.ops.normalize_noise import Arguments, NoiseArguments


@dataclass(frozen=True)
class Limits:
    """Bounds of the launch heuristic; chunks depend on the size of a slice alone, so that results never vary.

    Attributes:
        block: elements of a tile at 4 warps: 8 a thread, each three fp64 register pairs; 16 a thread took 203 registers on sm_90.
        partials: most chunks of a slice, since each program of the second launch merges them all.
        single: largest slice that one program keeps in registers at 8 warps: 16 fp64 values a thread.
        flags: programs of the first launch at most where every program of the second reads one flag of each.
    """

    block: int = 1024
    partials: int = 256
    single: int = 4096
    flags: int = 1024


LIMITS = Limits()


@triton.jit
def _chunk(x_ptr, task, exists, length, chunks, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """(mean, its low part, M2) of one chunk of one slice."""
    first = (task % chunks) * (BLOCK * TILES)
    base = x_ptr + (task // chunks) * length
    mean = tl.zeros([BLOCK], tl.float64)
    m2 = tl.zeros([BLOCK], tl.float64)
    for i in range(TILES):
        offset = first + i * BLOCK + tl.arange(0, BLOCK)
        valid = exists & (offset < length)
        value = tl.load(base + offset, mask=valid, other=0.0).to(tl.float64)
        mean, m2 = slot_update(value, valid, mean, m2, (i + tl.zeros([1], tl.int32)).to(tl.float64))
    count = tl.where(exists, chunk_moments_count(first, length, BLOCK, TILES), 0).to(tl.float64)
    total = tl.maximum(tl.minimum(BLOCK * TILES, length - first), 1).to(tl.float64)
    return merge_moments(count, mean, 0.0, m2, total)


@triton.jit
def _partial_kernel(
    x_ptr,
    partial_ptr,
    flag_ptr,
    length,
    chunks,
    tasks,
    TASKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Moments of TASKS chunks, and whether any of them holds a value that is not finite."""
    pid = tl.program_id(0).to(tl.int64)
    bad = tl.zeros([1], tl.int32)
    for i in range(TASKS):
        task = pid * TASKS + i
        mean, low, m2 = _chunk(x_ptr, task, task < tasks, length, chunks, BLOCK, TILES)
        tl.store(partial_ptr + task, mean, mask=task < tasks)
        tl.store(partial_ptr + tasks + task, low, mask=task < tasks)
        tl.store(partial_ptr + 2 * tasks + task, m2, mask=task < tasks)
        bad += tl.where(m2 - m2 == 0.0, 0, 1)
    if flag_ptr is not None:
        tl.store(flag_ptr + pid + tl.arange(0, 1), bad)


@triton.jit
def _slice_moments(partial_ptr, row, length, chunks, tasks, CHUNK: tl.constexpr, PARTIALS: tl.constexpr):
    """(mean, its low part, M2) of a slice from its chunks, in fixed order."""
    part = tl.arange(0, PARTIALS)
    mask = part < chunks
    count = tl.where(mask, tl.minimum(CHUNK, length - part.to(tl.int64) * CHUNK), 0).to(tl.float64)
    at = partial_ptr + row * chunks + part
    mean = tl.load(at, mask=mask, other=0.0)
    low = tl.load(at + tasks, mask=mask, other=0.0)
    m2 = tl.load(at + 2 * tasks, mask=mask, other=0.0)
    return merge_moments(count, mean, low, m2, tl.sum(count))


@triton.jit
def _apply_kernel(
    out_ptr,
    x_ptr,
    partial_ptr,
    flag_ptr,
    degrees: tl.float64,
    length,
    chunks,
    tasks,
    blocks,
    flags,
    CHUNK: tl.constexpr,
    PARTIALS: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Standardise; one value anywhere that is not finite makes everything NaN where flags are given."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    first = (pid % blocks).to(tl.int64) * (BLOCK * TILES)
    mean, low, m2 = _slice_moments(partial_ptr, row, length, chunks, tasks, CHUNK, PARTIALS)
    factor = 1.0 / tl.sqrt(m2 / degrees)
    if flag_ptr is not None:
        slot = tl.arange(0, FLAGS)
        bad = tl.sum(tl.load(flag_ptr + slot, mask=slot < flags, other=0))
        factor = tl.where(bad > 0, float("nan"), factor)
    for i in range(TILES):
        offset = first + i * BLOCK + tl.arange(0, BLOCK)
        valid = offset < length
        value = tl.load(x_ptr + row * length + offset, mask=valid, other=0.0).to(tl.float64)
        value = ((value - mean) - low) * factor
        tl.store(out_ptr + row * length + offset, narrow(value, out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _single_kernel(out_ptr, x_ptr, degrees: tl.float64, length, BLOCK: tl.constexpr):
    """One slice in registers: statistics and standardisation in one launch."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    valid = offset < length
    value = tl.load(x_ptr + row * length + offset, mask=valid, other=0.0).to(tl.float64)
    count = tl.where(valid, 1, 0).to(tl.float64)
    mean, low, m2 = merge_moments(count, value, 0.0, tl.zeros([BLOCK], tl.float64), degrees + 1.0)
    value = ((value - mean) - low) * (1.0 / tl.sqrt(m2 / degrees))
    tl.store(out_ptr + row * length + offset, narrow(value, out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _statistics_kernel(out_ptr, partial_ptr, length, chunks, tasks, CHUNK: tl.constexpr, PARTIALS: tl.constexpr):
    """(count, mean, M2) of one slice."""
    row = tl.program_id(0).to(tl.int64)
    mean, low, m2 = _slice_moments(partial_ptr, row, length, chunks, tasks, CHUNK, PARTIALS)
    tl.store(out_ptr + row * 3, (length + row * 0).to(tl.float64))
    tl.store(out_ptr + row * 3 + 1, mean + low)
    tl.store(out_ptr + row * 3 + 2, m2)


@dataclass(frozen=True)
class Chunks:
    """How a tensor of slices is cut: `chunks` per slice, each of `tiles` tiles of `block` elements."""

    slices: int
    length: int
    block: int
    tiles: int
    chunks: int


def chunks_of(x: Tensor) -> Chunks:
    """Fixed chunks of the slices over the last two dims."""
    length = x.shape[-2] * x.shape[-1]
    block = min(LIMITS.block, power_of_two(length))
    tiles = 1
    while ceil_div(length, block * tiles) > LIMITS.partials:
        tiles *= 2
    return Chunks(x.numel() // length, length, block, tiles, ceil_div(length, block * tiles))


def _launch_partials(x: Tensor, cut: Chunks, flagged: bool) -> tuple[Tensor, Tensor | None]:
    """First launch: partials (3, slices * chunks) fp64, and flags."""
    tasks = cut.slices * cut.chunks
    per_program = power_of_two(ceil_div(tasks, LIMITS.flags)) if flagged else 1
    programs = ceil_div(tasks, per_program)
    partial = torch.empty((3, tasks), dtype=torch.float64, device=x.device)
    flags = torch.empty(programs, dtype=torch.int32, device=x.device) if flagged else None
    _partial_kernel[(programs,)](
        x, partial, flags, cut.length, cut.chunks, tasks,
        TASKS=per_program, BLOCK=cut.block, TILES=cut.tiles, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return partial, flags


def _standardise(out: Tensor, x: Tensor, whole: bool) -> None:
    """Per slice; `whole`: as after a standardisation of the whole tensor, which any value that is not finite makes NaN."""
    if x.numel() == 0:
        return
    (target,) = dense([out])
    _standardise_dense(target, x, whole)
    hand_back([out], [target])


def _standardise_dense(out: Tensor, x: Tensor, whole: bool) -> None:
    cut = chunks_of(x)
    degrees = float(cut.length - 1)
    whole = whole and cut.slices > 1
    if not whole and cut.length <= LIMITS.single:
        block = power_of_two(cut.length)
        warps = min(8, max(1, block // 512))
        _single_kernel[(cut.slices,)](
            out, x, degrees, cut.length, BLOCK=block, num_warps=warps, enable_fp_fusion=True
        )  # fmt: skip
        return
    partial, flags = _launch_partials(x, cut, whole)
    blocks = ceil_div(cut.length, cut.block * cut.tiles)
    programs = 0 if flags is None else flags.numel()
    _apply_kernel[(cut.slices * blocks,)](
        out, x, partial, flags, degrees, cut.length, cut.chunks, partial.shape[1], blocks, programs,
        CHUNK=cut.block * cut.tiles, PARTIALS=power_of_two(cut.chunks), FLAGS=power_of_two(programs),
        BLOCK=cut.block, TILES=cut.tiles, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def launch(out: Tensor, args: NoiseArguments) -> None:
    """normalize_noise: per slice, and NaN everywhere where one value is not finite."""
    _standardise(out, args.noise, True)


def launch_channelwise(out: Tensor, args: Arguments) -> None:
    """channelwise_normalize: per slice."""
    _standardise(out, args.x, False)


def launch_statistics(out: Tensor, args: NoiseArguments) -> None:
    """noise_statistics: (count, mean, M2) of each slice."""
    noise = args.noise
    if noise.numel() == 0:
        return
    (target,) = dense([out])
    cut = chunks_of(noise)
    partial, _ = _launch_partials(noise, cut, False)
    _statistics_kernel[(cut.slices,)](
        target, partial, cut.length, cut.chunks, partial.shape[1],
        CHUNK=cut.block * cut.tiles, PARTIALS=power_of_two(cut.chunks), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    hand_back([out], [target])
