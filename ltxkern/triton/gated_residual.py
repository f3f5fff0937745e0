"""Triton kernel of the gated residual and of the per-head attention gate: elementwise, 2 to 3 passes over the bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ltxkern.layout import ceil_div, dense, hand_back, power_of_two, rows_of
from ltxkern.triton.numerics import exp_accurate

if TYPE_CHECKING:
    from ltxkern.ops.gated_residual import HeadGateArguments, ResidualArguments

# 16 elements a thread at 4 warps: two 16-byte loads of each bf16 operand in flight.
TILE = 2048


@triton.jit
def _gate_kernel(
    out_ptr,
    x_ptr,
    y_ptr,
    gate_ptr,
    index_ptr,
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
    index_b,
    index_t,
    gate_d,
    column_blocks,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """`x + y gate`; without y: `x 2 sigmoid(gate)`.

    With `index_ptr`, gate is a table of `count` rows (`gate_b` is 0), and a row whose index is none of them becomes NaN.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // column_blocks) * BR + tl.arange(0, BR)[:, None]
    column = (pid % column_blocks) * BD + tl.arange(0, BD)[None, :]
    valid = (row < rows) & (column < D)
    b = row // inner
    t = row % inner
    x = tl.load(x_ptr + b * x_b + t * x_t + column, mask=valid, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + b * y_b + t * y_t + column, mask=valid, other=0.0).to(tl.float32)
        if index_ptr is not None:
            t = tl.load(index_ptr + b * index_b + t * index_t, mask=row < rows, other=0).to(tl.int64)
            inside = (t >= 0) & (t < count)
            gate = tl.load(gate_ptr + b * gate_b + t * gate_t + column * gate_d, mask=valid & inside, other=0.0)
            gate = tl.where(inside, gate.to(tl.float32), float("nan"))
        else:
            gate = tl.load(gate_ptr + b * gate_b + t * gate_t + column * gate_d, mask=valid, other=0.0).to(tl.float32)
        x += y * gate
    else:
        gate = tl.load(gate_ptr + b * gate_b + t * gate_t, mask=row < rows, other=0.0).to(tl.float32)
        # A large x makes the sigmoid's last digits count, however small it is.
        power = exp_accurate(-gate) if x_ptr.dtype.element_ty == tl.float32 else tl.exp(-gate)
        x *= tl.div_rn(2.0, 1.0 + power)
    tl.store(out_ptr + row * D + column, x.to(out_ptr.dtype.element_ty), mask=valid)


def _launch(out: Tensor, x: Tensor, y: Tensor | None, gate: Tensor, index: Tensor | None = None) -> None:
    if x.numel() == 0:
        return
    if x.dim() == 0:
        x, y, gate = x.reshape(1), None if y is None else y.reshape(1), gate.reshape(1)
    view = rows_of([x, y], [gate], index)
    assert view is not None
    width, rows = x.shape[-1], view.outer * view.inner
    columns = min(TILE, power_of_two(width))
    together = min(power_of_two(rows), TILE // columns)
    column_blocks = ceil_div(width, columns)
    (target,) = dense([out])
    _gate_kernel[(ceil_div(rows, together) * column_blocks,)](
        target, x, y, gate, index, rows, view.inner, width, 0 if index is None else gate.shape[0],
        *(stride for pair in view.strides for stride in pair),
        gate.stride(-1) if gate.shape[-1] == width else 0, column_blocks,
        BR=together, BD=columns, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    hand_back([out], [target])


def launch(out: Tensor, args: ResidualArguments) -> None:
    """gated_residual on rows that collapse to two dims."""
    x, y, gate, rows = args
    _launch(out, x, y, gate.reshape(1) if gate.dim() == 0 else gate, rows)


def launch_head_gate(out: Tensor, args: HeadGateArguments) -> None:
    """head_gate: a row is one head."""
    _launch(out, args.x, None, args.logits[..., None])
