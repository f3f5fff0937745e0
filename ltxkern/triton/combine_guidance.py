"""Triton kernels of guidance: partial moments of two tensors, then rescale and combination in the second launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltxkern.layout import ceil_div, dense, hand_back, power_of_two
from ltxkern.triton.numerics import narrow, scalar, square_root

if TYPE_CHECKING:
    from ltxkern.ops.combine_guidance import Arguments


@dataclass(frozen=True)
class Limits:
    """Bounds of the launch heuristic; chunks depend on the size alone, so that results never vary.

    Attributes:
        block: elements of a tile at 8 warps: 16 a thread, two packs of each branch under way.
        partials: most chunks, since every program of the second launch merges them all.
    """

    block: int = 2048
    partials: int = 512


LIMITS = Limits()
# Elements that a thread sums by itself.
PACK = 8


@triton.jit
def _load(ptr, at, left, COMPUTE: tl.constexpr, WHOLE: tl.constexpr):
    """Elements of a chunk that has `left` of them, the first one in place of those beyond; no mask if all are WHOLE."""
    if WHOLE:
        return tl.load(ptr + at).to(COMPUTE)
    else:
        return tl.load(ptr + at, mask=at < left, other=tl.load(ptr)).to(COMPUTE)


@triton.jit
def _combined(branches, first, at, left, scales, COMPUTE: tl.constexpr, WHOLE: tl.constexpr):
    """cond and the combination at `at` of the chunk that begins at `first`; a missing branch adds nothing."""
    cond_ptr, uncond_ptr, perturbed_ptr, isolated_ptr = branches
    cfg, stg, modality = scales
    base = _load(cond_ptr + first, at, left, COMPUTE, WHOLE)
    total = base
    if uncond_ptr is not None:
        total += scalar(cfg, COMPUTE) * (base - _load(uncond_ptr + first, at, left, COMPUTE, WHOLE))
    if perturbed_ptr is not None:
        total += scalar(stg, COMPUTE) * (base - _load(perturbed_ptr + first, at, left, COMPUTE, WHOLE))
    if isolated_ptr is not None:
        total += scalar(modality, COMPUTE) * (base - _load(isolated_ptr + first, at, left, COMPUTE, WHOLE))
    return base, total


@triton.jit
def _between(a, b, c, d):
    return (a + c) * 0.5, (b + d) * 0.5


@triton.jit
def _deviations(value, centre, unit, at, left, WHOLE: tl.constexpr):
    """Sums over packs of the deviations from the centre, times the unit, and of their squares."""
    delta = (value - centre) * unit
    if not WHOLE:
        delta = tl.where(at < left, delta, 0.0)
    return tl.sum(delta, axis=1), tl.sum(delta * delta, axis=1)


@triton.jit
def _add_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _measured(
    branches, first, at, left, scales, centres, units,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Sums of the deviations of cond and of the combination, each before that of its squares."""
    base_sum, base_squares, total_sum, total_squares = 0.0, 0.0, 0.0, 0.0
    for i in tl.static_range(TILES):
        there = i * BLOCK + at
        base, total = _combined(branches, first, there, left, scales, COMPUTE, WHOLE)
        sums, squares = _deviations(base, centres[0], units[0], there, left, WHOLE)
        base_sum += sums
        base_squares += squares
        sums, squares = _deviations(total, centres[1], units[1], there, left, WHOLE)
        total_sum += sums
        total_squares += squares
    return tl.reduce((base_sum, base_squares, total_sum, total_squares), 0, _add_four)


@triton.jit
def _unit(squares):
    """The power of two at which fp32 squares neither lose their precision below nor overflow."""
    return tl.where(squares < 2.0**-90, 2.0**100, tl.where(squares < 2.0**126, 1.0, 2.0**-80)).to(squares.dtype)


@triton.jit
def _store_moments(partial_ptr, chunks, centre, unit, sums, squares, each):
    """Mean and M2 in fp64; `each` is the part of the mean that a value has."""
    total = sums.to(tl.float64)
    offset = total * each
    spread = squares.to(tl.float64) - total * offset
    back = tl.where(unit > 1.0, 2.0**-100, tl.where(unit < 1.0, 2.0**80, 1.0)).to(tl.float64)
    tl.store(partial_ptr, centre.to(tl.float64) + offset * back)
    tl.store(partial_ptr + chunks, tl.where(spread < 0.0, 0.0, spread) * back * back)


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
    PACK: tl.constexpr,
    TILES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """(mean, M2) of cond and of the combination over one chunk, by sums about a centre of its first tile."""
    branches = (cond_ptr, uncond_ptr, perturbed_ptr, isolated_ptr)
    scales = (cfg, stg, modality)
    pid = tl.program_id(0)
    first = pid.to(tl.int64) * (BLOCK * TILES)
    left = tl.minimum(size - first, BLOCK * TILES).to(tl.int32)
    at = tl.arange(0, BLOCK // PACK)[:, None] * PACK + tl.arange(0, PACK)[None, :]
    tile = _combined(branches, first, at, left, scales, COMPUTE, WHOLE)
    # Near the means, and exactly the value of a tensor that has but one: then the deviations vanish.
    centres = tl.reduce(tl.reduce(tile, 1, _between), 0, _between)
    one = tl.full([], 1.0, COMPUTE)
    base_unit, unit, base_sum, base_squares, sums, squares = one, one, one, one, one, one
    tries = 2 if COMPUTE.is_fp32() else 1
    while tries > 0:
        base_unit = _unit(base_squares)
        unit = _unit(squares)
        base_sum, base_squares, sums, squares = _measured(
            branches, first, at, left, scales, centres, (base_unit, unit), COMPUTE, BLOCK, TILES, WHOLE
        )
        good = (_unit(base_squares) == 1.0) & (_unit(squares) == 1.0)
        tries = tl.where(good, 0, tries - 1)
    chunks = tl.num_programs(0)
    each = 1.0 / left.to(tl.float64)
    _store_moments(partial_ptr + pid, chunks, centres[0], base_unit, base_sum, base_squares, each)
    _store_moments(partial_ptr + 2 * chunks + pid, chunks, centres[1], unit, sums, squares, each)


@triton.jit
def _moments(partial_ptr, part, chunks, count):
    """What each partial adds to the sum of deviations from the mean of the first chunk, and to that of their squares."""
    mean = tl.load(partial_ptr + part, mask=part < chunks, other=0.0)
    m2 = tl.load(partial_ptr + chunks + part, mask=part < chunks, other=0.0)
    moved = count * (mean - tl.load(partial_ptr))
    return moved, m2 + moved * (mean - tl.load(partial_ptr))


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
    each: tl.float64,
    size,
    chunks,
    COMPUTE: tl.constexpr,
    PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Combine a chunk, and multiply by the rescale factor where partials are given: those merged in a fixed order."""
    first = tl.program_id(0).to(tl.int64) * (BLOCK * TILES)
    left = tl.minimum(size - first, BLOCK * TILES).to(tl.int32)
    at = tl.arange(0, BLOCK)
    branches = (cond_ptr, uncond_ptr, perturbed_ptr, isolated_ptr)
    scales = (cfg, stg, modality)
    # On its way while the partials are merged.
    _, total = _combined(branches, first, at, left, scales, COMPUTE, WHOLE)
    factor = tl.full([], 1.0, COMPUTE)
    if partial_ptr is not None:
        part = tl.arange(0, PARTIALS)
        count = tl.minimum(size - part.to(tl.int64) * (BLOCK * TILES), BLOCK * TILES).to(tl.float64)
        count = tl.where(part < chunks, count, 0.0)
        base_sum, base_squares = _moments(partial_ptr, part, chunks, count)
        sums, squares = _moments(partial_ptr + 2 * chunks, part, chunks, count)
        base_sum, base_squares, sums, squares = tl.reduce((base_sum, base_squares, sums, squares), 0, _add_four)
        ratio = (base_squares - base_sum * base_sum * each) / (squares - sums * sums * each)
        factor = (rescale * square_root(ratio.to(COMPUTE)).to(tl.float64) + (1.0 - rescale)).to(COMPUTE)
    for i in tl.static_range(TILES):
        there = i * BLOCK + at
        if i > 0:
            _, total = _combined(branches, first, there, left, scales, COMPUTE, WHOLE)
        value = narrow(total * factor, out_ptr.dtype.element_ty)
        if WHOLE:
            tl.store(out_ptr + first + there, value)
        else:
            tl.store(out_ptr + first + there, value, mask=there < left)


def launch(out: Tensor, args: Arguments) -> None:
    """Launch on contiguous arguments."""
    cond = args.cond
    size = cond.numel()
    if size == 0:
        return
    (target,) = dense([out])
    compute = tl.float64 if cond.dtype == torch.float64 else tl.float32
    scales = (args.cfg_scale - 1.0, args.stg_scale, args.modality_scale - 1.0)
    branches = (cond, args.uncond, args.perturbed, args.isolated)
    block = min(LIMITS.block, power_of_two(size))
    tiles = min(2, ceil_div(size, block))
    while ceil_div(size, block * tiles) > LIMITS.partials:
        tiles *= 2
    chunks = ceil_div(size, block * tiles)
    whole = size % (block * tiles) == 0
    partial = None
    if args.rescale_scale != 0.0:
        partial = torch.empty((4, chunks), dtype=torch.float64, device=cond.device)
        _partial_kernel[(chunks,)](
            *branches, partial, *scales, size,
            COMPUTE=compute, BLOCK=block, PACK=min(PACK, block), TILES=tiles, WHOLE=whole,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    _apply_kernel[(chunks,)](
        target, *branches, partial, *scales, args.rescale_scale, 1.0 / size, size, chunks,
        COMPUTE=compute, PARTIALS=power_of_two(chunks), BLOCK=block, TILES=tiles, WHOLE=whole,
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    hand_back([out], [target])
