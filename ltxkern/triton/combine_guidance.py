"""Triton kernels of guidance: partial moments of two tensors, then rescale and combination in the second launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltxkern.layout import ceil_div, dense, hand_back, power_of_two
from ltxkern.triton.numerics import chunk_moments_count, divide, merge_moments, narrow, scalar, slot_update, square_root

if TYPE_CHECKING:
    from ltxkern.ops.combine_guidance import Arguments


@dataclass(frozen=True)
class Limits:
    """Bounds of the launch heuristic; chunks depend on the size alone, so that results never vary.

    Attributes:
        block: elements of a tile at 4 warps: 8 a thread, two pairs of running moments each.
        partials: most chunks, since every program of the second launch merges them all.
    """

    block: int = 1024
    partials: int = 512


LIMITS = Limits()


@triton.jit
def _term(total, base, branch_ptr, offset, valid, scale):
    """`total + scale (base - branch)`; a missing branch adds nothing."""
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + offset, mask=valid, other=0.0).to(base.dtype)
        total += scalar(scale, base.dtype) * (base - branch)
    return total


@triton.jit
def _partial_kernel(
    cond_ptr,
    uncond_ptr,
    perturbed_ptr,
    isolated_ptr,
    partial_ptr,
    cfg: tl.float64,
    stg: tl.float64,
    modality: tl.float64,
    size,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """(mean, M2) of cond and of the combination over one chunk."""
    pid = tl.program_id(0).to(tl.int64)
    first = pid * (BLOCK * TILES)
    base_mean = tl.zeros([BLOCK], COMPUTE)
    base_m2 = tl.zeros([BLOCK], COMPUTE)
    mean = tl.zeros([BLOCK], COMPUTE)
    m2 = tl.zeros([BLOCK], COMPUTE)
    for i in range(TILES):
        offset = first + i * BLOCK + tl.arange(0, BLOCK)
        valid = offset < size
        base = tl.load(cond_ptr + offset, mask=valid, other=0.0).to(COMPUTE)
        total = _term(base, base, uncond_ptr, offset, valid, cfg)
        total = _term(total, base, perturbed_ptr, offset, valid, stg)
        total = _term(total, base, isolated_ptr, offset, valid, modality)
        step = (i + tl.zeros([1], tl.int32)).to(COMPUTE)
        base_mean, base_m2 = slot_update(base, valid, base_mean, base_m2, step)
        mean, m2 = slot_update(total, valid, mean, m2, step)
    count = chunk_moments_count(first, size, BLOCK, TILES).to(COMPUTE)
    values = tl.minimum(BLOCK * TILES, size - first).to(COMPUTE)
    base_centre, _, base_spread = merge_moments(count, base_mean, 0.0, base_m2, values)
    centre, _, spread = merge_moments(count, mean, 0.0, m2, values)
    chunks = tl.num_programs(0)
    tl.store(partial_ptr + pid, base_centre)
    tl.store(partial_ptr + chunks + pid, base_spread)
    tl.store(partial_ptr + 2 * chunks + pid, centre)
    tl.store(partial_ptr + 3 * chunks + pid, spread)


@triton.jit
def _deviation(partial_ptr, count, mask, part, chunks, degrees):
    """Unbiased standard deviation from the partial means and M2 at `partial_ptr`, in fixed order."""
    mean = tl.load(partial_ptr + part, mask=mask, other=0.0)
    m2 = tl.load(partial_ptr + chunks + part, mask=mask, other=0.0)
    _, _, spread = merge_moments(count, mean, 0.0, m2, tl.sum(count))
    return square_root(divide(spread, degrees))


@triton.jit
def _apply_kernel(
    out_ptr,
    cond_ptr,
    uncond_ptr,
    perturbed_ptr,
    isolated_ptr,
    partial_ptr,
    cfg: tl.float64,
    stg: tl.float64,
    modality: tl.float64,
    rescale: tl.float64,
    degrees: tl.float64,
    size,
    chunks,
    COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combine, and multiply by the rescale factor where partials are given."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = offset < size
    base = tl.load(cond_ptr + offset, mask=valid, other=0.0).to(COMPUTE)
    total = _term(base, base, uncond_ptr, offset, valid, cfg)
    total = _term(total, base, perturbed_ptr, offset, valid, stg)
    total = _term(total, base, isolated_ptr, offset, valid, modality)
    if partial_ptr is not None:
        part = tl.arange(0, PARTIALS)
        mask = part < chunks
        count = tl.where(mask, tl.minimum(CHUNK, size - part.to(tl.int64) * CHUNK), 0).to(COMPUTE)
        free = scalar(degrees, COMPUTE)
        base_deviation = _deviation(partial_ptr, count, mask, part, chunks, free)
        ratio = divide(base_deviation, _deviation(partial_ptr + 2 * chunks, count, mask, part, chunks, free))
        total *= scalar(rescale, COMPUTE) * ratio + scalar(1.0 - rescale, COMPUTE)
    tl.store(out_ptr + offset, narrow(total, out_ptr.dtype.element_ty), mask=valid)


def launch(out: Tensor, args: Arguments) -> None:
    """Launch on contiguous arguments."""
    cond = args.cond
    size = cond.numel()
    if size == 0:
        return
    (target,) = dense([out])
    compute, dtype = (tl.float64, torch.float64) if cond.dtype == torch.float64 else (tl.float32, torch.float32)
    scales = (args.cfg_scale - 1.0, args.stg_scale, args.modality_scale - 1.0)
    branches = (cond, args.uncond, args.perturbed, args.isolated)
    block = min(LIMITS.block, power_of_two(size))
    tiles = 1
    while ceil_div(size, block * tiles) > LIMITS.partials:
        tiles *= 2
    chunks = ceil_div(size, block * tiles)
    partial = None
    if args.rescale_scale != 0.0:
        partial = torch.empty((4, chunks), dtype=dtype, device=cond.device)
        _partial_kernel[(chunks,)](
            *branches, partial, *scales, size,
            COMPUTE=compute, BLOCK=block, TILES=tiles, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    _apply_kernel[(ceil_div(size, block),)](
        target, *branches, partial, *scales, args.rescale_scale, float(size - 1), size, chunks,
        COMPUTE=compute, CHUNK=block * tiles, PARTIALS=power_of_two(chunks), BLOCK=block,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    hand_back([out], [target])
