"""Triton kernels of the res2s sampler: SDE step and both half-steps, video and audio in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltxkern.layout import ceil_div, dense, hand_back, power_of_two
from ltxkern.triton.numerics import narrow, scalar

if TYPE_CHECKING:
    from ltxkern.ops.res2s import AdvanceArguments, MidpointArguments, StepArguments

# 8 elements a thread at 4 warps: 16-byte loads of a bf16 state; five fp64 values of each element stay below 128 registers.
BLOCK = 1024


@triton.jit
def _locate(pid, length, blocks, BLOCK: tl.constexpr):
    """Slice of a program, index of its first element, indices of all, and which exist."""
    row = pid // blocks
    first = (pid % blocks) * BLOCK
    offset = first + tl.arange(0, BLOCK)
    return row, row * length + first, row * length + offset, offset < length


@triton.jit
def _token_mask(mask_ptr, clean_ptr, first, at, valid, C, BLOCK: tl.constexpr):
    """Mask of each element's token, and `clean (1 - mask)`, in fp32."""
    token = first // C
    inside = (first - token * C).to(tl.int32) + tl.arange(0, BLOCK)
    mask = tl.load(mask_ptr + token + inside // C, mask=valid, other=0.0)
    clean = tl.load(clean_ptr + at, mask=valid, other=0.0).to(tl.float32)
    return mask, clean * (1.0 - mask)


@triton.jit
def _prediction(x0_ptr, at, valid, mask, kept, dtype: tl.constexpr):
    """x0, masked in fp32 or wider and rounded to its own dtype, in the compute dtype."""
    x0 = tl.load(x0_ptr + at, mask=valid, other=0.0)
    if mask is not None:
        wide: tl.constexpr = tl.float64 if x0_ptr.dtype.element_ty == tl.float64 else tl.float32
        x0 = narrow(x0.to(wide) * mask.to(wide) + kept.to(wide), x0_ptr.dtype.element_ty)
    return x0.to(dtype)


@triton.jit
def _noise(noise_ptr, stats_ptr, row, at, valid, dtype: tl.constexpr):
    """Ready noise, or raw noise brought to mean 0 and std 1 by the statistics of its slice, in the compute dtype."""
    noise = tl.load(noise_ptr + at, mask=valid, other=0.0)
    if stats_ptr is not None:
        count = tl.load(stats_ptr + row * 3)
        mean = tl.load(stats_ptr + row * 3 + 1)
        m2 = tl.load(stats_ptr + row * 3 + 2)
        noise = (noise.to(tl.float64) - mean) * (1.0 / tl.sqrt(m2 / (count - 1.0)))
    return noise.to(dtype)


@triton.jit
def _half_step_tile(
    pid,
    state_ptr,
    x0_ptr,
    x0_mid_ptr,
    noise_ptr,
    mask_ptr,
    clean_ptr,
    stats_ptr,
    out_ptr,
    anchor_ptr,
    length,
    blocks,
    C,
    w,
    w_mid,
    a,
    b,
    s,
    REFINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    compute: tl.constexpr = (state_ptr if anchor_ptr is None else anchor_ptr).dtype.element_ty
    row, first, at, valid = _locate(pid, length, blocks, BLOCK)
    mask = None
    kept = None
    if mask_ptr is not None:
        mask, kept = _token_mask(mask_ptr, clean_ptr, first, at, valid, C, BLOCK)
    start = tl.load(state_ptr + at, mask=valid, other=0.0).to(compute)
    target = _prediction(x0_ptr, at, valid, mask, kept, compute)
    move = scalar(w, compute) * (target - start)
    if x0_mid_ptr is not None:
        move += scalar(w_mid, compute) * (_prediction(x0_mid_ptr, at, valid, mask, kept, compute) - start)
    moved = start + move
    noise = _noise(noise_ptr, stats_ptr, row, at, valid, compute)
    moved = scalar(a, compute) * start + scalar(b, compute) * moved + scalar(s, compute) * noise
    if mask is not None and kept is not None:
        moved = moved * mask.to(compute) + kept.to(compute)
    tl.store(out_ptr + at, narrow(moved, out_ptr.dtype.element_ty), mask=valid)
    if anchor_ptr is not None:
        anchor = start
        if REFINE:
            anchor = (moved - scalar(w, compute) * target) * (1.0 / (1.0 - scalar(w, tl.float64))).to(compute)
        tl.store(anchor_ptr + at, anchor, mask=valid)


@triton.jit
def _half_step_kernel(
    state_ptr,
    x0_ptr,
    x0_mid_ptr,
    noise_ptr,
    mask_ptr,
    clean_ptr,
    stats_ptr,
    out_ptr,
    anchor_ptr,
    length,
    blocks,
    C,
    state2_ptr,
    x02_ptr,
    x0_mid2_ptr,
    noise2_ptr,
    mask2_ptr,
    clean2_ptr,
    stats2_ptr,
    out2_ptr,
    anchor2_ptr,
    length2,
    blocks2,
    C2,
    programs,
    w: tl.float64,
    w_mid: tl.float64,
    a: tl.float64,
    b: tl.float64,
    s: tl.float64,
    REFINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A half-step of one modality (the first `programs` programs) and of a second one, if there is one.

    The first half-step has an anchor to write, the second a prediction at the midpoint to read.
    """
    pid = tl.program_id(0).to(tl.int64)
    if pid < programs:
        _half_step_tile(
            pid, state_ptr, x0_ptr, x0_mid_ptr, noise_ptr, mask_ptr, clean_ptr, stats_ptr, out_ptr, anchor_ptr,
            length, blocks, C, w, w_mid, a, b, s, REFINE, BLOCK,
        )  # fmt: skip
    elif state2_ptr is not None:
        _half_step_tile(
            pid - programs, state2_ptr, x02_ptr, x0_mid2_ptr, noise2_ptr, mask2_ptr, clean2_ptr, stats2_ptr, out2_ptr,
            anchor2_ptr, length2, blocks2, C2, w, w_mid, a, b, s, REFINE, BLOCK,
        )  # fmt: skip


@triton.jit
def _sde_step_kernel(
    out_ptr,
    sample_ptr,
    denoised_ptr,
    noise_ptr,
    stats_ptr,
    length,
    blocks,
    a: tl.float64,
    b: tl.float64,
    s: tl.float64,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`a sample + b denoised + s noise`, rounded once."""
    row, _, at, valid = _locate(tl.program_id(0).to(tl.int64), length, blocks, BLOCK)
    sample = tl.load(sample_ptr + at, mask=valid, other=0.0).to(COMPUTE)
    denoised = tl.load(denoised_ptr + at, mask=valid, other=0.0).to(COMPUTE)
    noise = _noise(noise_ptr, stats_ptr, row, at, valid, COMPUTE)
    moved = scalar(a, COMPUTE) * sample + scalar(b, COMPUTE) * denoised + scalar(s, COMPUTE) * noise
    tl.store(out_ptr + at, narrow(moved, out_ptr.dtype.element_ty), mask=valid)


def _slices(x: Tensor, stats: Tensor | None) -> tuple[int, int]:
    """(slices, elements of a slice) that share statistics; without statistics all is one slice."""
    if stats is None or x.dim() < 2:
        return 1, x.numel()
    length = x.shape[-2] * x.shape[-1]
    return x.numel() // length, length


def _block(lengths: Sequence[int]) -> int:
    return min(BLOCK, power_of_two(max(lengths)))


def launch_sde_step(out: Tensor, args: StepArguments) -> None:
    """One SDE step on contiguous tensors."""
    sample, denoised, noise, coefficients, stats = args
    if sample.numel() == 0:
        return
    (target,) = dense([out])
    slices, length = _slices(sample, stats)
    block = _block([length])
    blocks = ceil_div(length, block)
    double = torch.float64 in (sample.dtype, denoised.dtype)
    _sde_step_kernel[(slices * blocks,)](
        target, sample, denoised, noise, stats, length, blocks, *coefficients,
        COMPUTE=tl.float64 if double else tl.float32, BLOCK=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    hand_back([out], [target])


def _launch_pairs(
    columns: Sequence[Sequence[Tensor | None]],
    stats: Sequence[Tensor | None],
    coefficients: Sequence[float],
    refine: bool = False,
) -> None:
    """Two modalities a launch; each is an entry of every column, the pointers that a tile takes, the state's first."""
    filled = []
    for pointers, statistics in zip(zip(*columns, strict=True), stats, strict=True):
        state = pointers[0]
        assert state is not None
        if state.numel():
            filled.append((pointers, *_slices(state, statistics), state.shape[-1]))
    for i in range(0, len(filled), 2):
        pair = filled[i : i + 2]
        block = _block([length for _, _, length, _ in pair])
        args: list[Any] = []
        programs = []
        for pointers, slices, length, channels in pair:
            blocks = ceil_div(length, block)
            args += [*pointers, length, blocks, channels]
            programs.append(slices * blocks)
        if len(pair) == 1:
            args += [None] * len(columns) + [0, 0, 0]
        _half_step_kernel[(sum(programs),)](
            *args, programs[0], *coefficients, REFINE=refine, BLOCK=block, num_warps=4, enable_fp_fusion=False
        )


def launch_midpoint(out: Sequence[Tensor], args: MidpointArguments) -> None:
    """Half-step 1 on contiguous tensors: x_mid of all modalities, then the anchors of all, in `out`."""
    targets = dense(out)
    count = len(args.latent)
    weight, *step = args.coefficients
    columns = (args.latent, args.x0, [None] * count, *args[2:6], targets[:count], targets[count:])
    _launch_pairs(columns, args.noise_stats, (weight, 0.0, *step), args.refine)
    hand_back(out, targets)


def launch_advance(out: Sequence[Tensor], args: AdvanceArguments) -> None:
    """Half-step 2 on contiguous tensors: the next latent of each modality in `out`."""
    targets = dense(out)
    _launch_pairs((*args[:7], targets, [None] * len(targets)), args.noise_stats, args.coefficients)
    hand_back(out, targets)
