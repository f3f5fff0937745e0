"""Triton kernel of RMSNorm + modulation, alone and behind a gated residual: whole rows in registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ltxkern.layout import ceil_div, contiguous, dense, hand_back, power_of_two, rows_of
from ltxkern.triton.numerics import reciprocal_root

if TYPE_CHECKING:
    from ltxkern.ops.rms_norm_modulate import Arguments, GatedArguments

# Rows of 4096 (the video stream) take 8 warps at 16 elements a thread; shorter rows share a program up to this many elements.
TILE = 4096


@triton.jit
def _modulate_kernel(
    out_ptr,
    summed_ptr,
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
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
    index_b,
    index_t,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """BR rows; with `y_ptr`, x becomes `x + y gate`, is stored rounded, and its rounded value is normalised.

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
    value = value * (1.0 + scale) + shift
    tl.store(out_ptr + row * D + column, value.to(out_ptr.dtype.element_ty), mask=valid)


def _launch(
    out: Tensor, summed: Tensor | None, y: Tensor | None, gate: Tensor | None, args: Arguments | GatedArguments
) -> None:
    x, scale, shift, index = args.x, args.scale, args.shift, args.rows
    if x.numel() == 0:
        return
    view = rows_of([x, y], [gate, scale, shift], index)
    assert view is not None
    width, rows = x.shape[-1], view.outer * view.inner
    columns = power_of_two(width)
    together = min(power_of_two(rows), max(1, TILE // 2 // columns))
    outputs = [out] if summed is None else [out, summed]
    targets = dense(outputs)
    _modulate_kernel[(ceil_div(rows, together),)](
        targets[0], None if summed is None else targets[1], x, y, gate, scale, shift, contiguous(args.weight), index,
        args.eps, 1.0 / width, rows, view.inner, width, 0 if index is None else scale.shape[0],
        *(stride for pair in view.strides for stride in pair),
        BR=together, BD=columns, num_warps=min(16, max(4, together * columns // 512)), enable_fp_fusion=True,
    )  # fmt: skip
    hand_back(outputs, targets)


def launch(out: Tensor, args: Arguments) -> None:
    """rms_norm_modulate on rows that collapse to two dims."""
    _launch(out, None, None, None, args)


def launch_gated(out: tuple[Tensor, Tensor], args: GatedArguments) -> None:
    """gated_residual_rms_norm_modulate: out is (sum, norm)."""
    _launch(out[1], out[0], args.y, args.gate, args)
