"""Triton kernel of RMSNorm + modulation, alone and behind a gated residual, once or twice: whole rows in registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ltxkern.layout import ceil_div, contiguous, dense, hand_back, power_of_two, rows_of
from ltxkern.triton.numerics import reciprocal_root

if TYPE_CHECKING:
    from ltxkern.ops.rms_norm_modulate import Arguments, GatedArguments, TwiceArguments

# Rows of 4096 (the video stream) take 8 warps at 16 elements a thread; shorter rows share a program up to this many elements.
TILE = 4096


@triton.jit
def _modulate_kernel(
    out_ptr,
    summed_ptr,
    out2_ptr,
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    scale2_ptr,
    shift2_ptr,
    weight_ptr,
    index_ptr,
    eps,
    inverse,
    rows,
    inner,
    D,
    count,
    x_b,
    x_t,
    y_b,
    y_t,
    gate_b,
    gate_t,
    scale_b,
    scale_t,
    shift_b,
    shift_t,
    scale2_b,
    scale2_t,
    shift2_b,
    shift2_t,
    index_b,
    index_t,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """BR rows; with `y_ptr`, x becomes `x + y gate`, is stored rounded, and its rounded value is normalised.

    With `out2_ptr` the norm is modulated a second time, into it.

    With `index_ptr`, gate, scale and shift are tables of `count` rows (their `_b` strides are 0), and a row whose index is none of
    them becomes NaN.
    """
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    column = tl.arange(0, BD)[None, :]
    valid = (row < rows) & (column < D)
    b = row // inner
    t = row % inner
    x = tl.load(x_ptr + b * x_b + t * x_t + column, mask=valid, other=0.0)
    if y_ptr is not None:
        y = tl.load(y_ptr + b * y_b + t * y_t + column, mask=valid, other=0.0).to(tl.float32)
    found = valid
    if index_ptr is not None:
        t = tl.load(index_ptr + b * index_b + t * index_t, mask=row < rows, other=0).to(tl.int64)
        inside = (t >= 0) & (t < count)
        found = valid & inside
    if y_ptr is not None:
        gate = tl.load(gate_ptr + b * gate_b + t * gate_t + column, mask=found, other=0.0).to(tl.float32)
        if index_ptr is not None:
            gate = tl.where(inside, gate, float("nan"))
        x = (x.to(tl.float32) + y * gate).to(x_ptr.dtype.element_ty)
        tl.store(summed_ptr + row * D + column, x, mask=valid)
    value = x.to(tl.float32)
    mean_square = tl.sum(value * value, axis=1, keep_dims=True) * inverse
    value = value * reciprocal_root(mean_square + eps, out_ptr.dtype.element_ty)
    if weight_ptr is not None:
        value *= tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + b * scale_b + t * scale_t + column, mask=found, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * shift_b + t * shift_t + column, mask=found, other=0.0).to(tl.float32)
    if index_ptr is not None:
        shift = tl.where(inside, shift, float("nan"))
    tl.store(out_ptr + row * D + column, (value * (1.0 + scale) + shift).to(out_ptr.dtype.element_ty), mask=valid)
    if out2_ptr is not None:
        scale = tl.load(scale2_ptr + b * scale2_b + t * scale2_t + column, mask=found, other=0.0).to(tl.float32)
        shift = tl.load(shift2_ptr + b * shift2_b + t * shift2_t + column, mask=found, other=0.0).to(tl.float32)
        if index_ptr is not None:
            shift = tl.where(inside, shift, float("nan"))
        tl.store(out2_ptr + row * D + column, (value * (1.0 + scale) + shift).to(out2_ptr.dtype.element_ty), mask=valid)


def _launch(outputs: Sequence[Tensor], args: Arguments | GatedArguments | TwiceArguments) -> None:
    """`outputs`: the norm, the sum where there is one, the second norm where there is one."""
    x, scale, index = args.x, args.scale, args.rows
    if x.numel() == 0:
        return
    y, gate, scale2, shift2 = (getattr(args, name, None) for name in ("y", "gate", "scale2", "shift2"))
    view = rows_of([x, y], [gate, scale, args.shift, scale2, shift2], index)
    assert view is not None
    width, rows = x.shape[-1], view.outer * view.inner
    columns = power_of_two(width)
    together = min(power_of_two(rows), max(1, TILE // 2 // columns))
    targets = dense(outputs)
    out, summed, out2 = (*targets, None, None)[:3]
    _modulate_kernel[(ceil_div(rows, together),)](
        out, summed, out2, x, y, gate, scale, args.shift, scale2, shift2, contiguous(args.weight), index,
        args.eps, 1.0 / width, rows, view.inner, width, 0 if index is None else scale.shape[0],
        *(stride for pair in view.strides for stride in pair),
        BR=together, BD=columns, num_warps=min(16, max(4, together * columns // 512)), enable_fp_fusion=True,
    )  # fmt: skip
    hand_back(outputs, targets)


def launch(out: Tensor, args: Arguments) -> None:
    """rms_norm_modulate on rows that collapse to two dims."""
    _launch([out], args)


def launch_gated(out: tuple[Tensor, Tensor], args: GatedArguments) -> None:
    """gated_residual_rms_norm_modulate: out is (sum, norm)."""
    _launch([out[1], out[0]], args)


def launch_twice(out: tuple[Tensor, Tensor, Tensor], args: TwiceArguments) -> None:
    """gated_residual_rms_norm_modulate_twice: out is (sum, norm, second norm)."""
    _launch([out[1], out[0], out[2]], args)
