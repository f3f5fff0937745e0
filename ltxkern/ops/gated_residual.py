"""Gated residual of the transformer block, and its per-head attention gate."""

from typing import NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled import rows as launch
from ltxkern.dispatch import Op
from ltxkern.layout import fresh, through_torch
from ltxkern.ops import tiers
from ltxkern.ops.checks import (
    ACTIVATION_DTYPES,
    broadcasts,
    check_device,
    check_indexed,
    check_like,
    check_out,
    check_shape,
    check_tensor,
)
from ltxkern.ops.rms_norm_modulate import taken


class ResidualArguments(NamedTuple):
    """Of `gated_residual`."""

    x: Tensor
    y: Tensor
    gate: Tensor
    rows: Tensor | None


class HeadGateArguments(NamedTuple):
    """Of `head_gate`."""

    x: Tensor
    logits: Tensor


def residual_reference(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None = None) -> Tensor:
    """`x + y gate` in fp32, one rounding."""
    (gate,) = taken(rows, gate)
    return (x.float() + y.float() * gate.float()).to(x.dtype).contiguous()


def head_gate_reference(x: Tensor, logits: Tensor) -> Tensor:
    """`x 2 sigmoid(logits)` per head in fp32, one rounding."""
    return (x.float() * (2 * torch.sigmoid(logits.float()))[..., None]).to(x.dtype).contiguous()


def _refuse_triton_residual(args: ResidualArguments) -> str | None:
    return tiers.split_rows([args.x, args.y], [args.gate], args.rows, dense=False)


def _refuse_triton_head_gate(args: HeadGateArguments) -> str | None:
    return tiers.split_rows([args.x], [args.logits[..., None]], None, dense=False)


RESIDUAL = Op(
    "gated_residual",
    ResidualArguments,
    "Tensor",
    residual_reference,
    lambda args: fresh(args.x),
    backends=[*tiers.compiled(launch.gated_residual), tiers.triton("gated_residual", _refuse_triton_residual)],
    may_be=[("x", "y")],
    indices={"rows": "gate"},
)
HEAD_GATE = Op(
    "head_gate",
    HeadGateArguments,
    "Tensor",
    head_gate_reference,
    lambda args: fresh(args.x),
    backends=[
        *tiers.compiled(launch.head_gate),
        tiers.triton("gated_residual", _refuse_triton_head_gate, "launch_head_gate"),
    ],
    may_be=[("x",)],
    indices={},
)


def gated_residual(
    x: Tensor, y: Tensor, gate: Tensor, *, rows: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Residual stream plus a gated branch: `x + y gate`.

    Args:
        x: (..., D), fp16, bf16 or fp32.
        y: shape and dtype of x.
        gate: broadcastable to x; with `rows` a table (N, D).
        rows: (...), int32 or int64: a row of x takes row `rows` of the table, and no gate of x's size is ever made.
        out: written in place of a fresh tensor; may be x or y.
    Returns:
        Shape and dtype of x.
    Raises:
        TypeError, ValueError: each names the parameter.

    Contract: rounded; fp32 arithmetic, one rounding; with `rows` the bits of `gate[rows]`.
    Bytes: read x and y, write out; 4 or 8 a row for its index (`gate[rows]` costs 2 D values a row, written and read).
    An index below 0 or beyond N - 1: see `rms_norm_modulate`.
    Source: the LTX-2 transformer block.
    """
    args = ResidualArguments(x, y, gate, rows)
    if out is None and (known := RESIDUAL.again(args)) is not None:
        return known
    if check_tensor("x", x, dtypes=ACTIVATION_DTYPES, arrays=True):
        return through_torch(gated_residual, locals())
    check_like("y", y, x)
    check_tensor("gate", gate, dtypes=ACTIVATION_DTYPES)
    check_device("gate", gate, x.device)
    if rows is not None:
        check_indexed(x, rows, {"gate": gate})
    elif not broadcasts(gate.shape, x.shape):
        raise ValueError(f"gate must broadcast to x's shape {tuple(x.shape)}, got {tuple(gate.shape)}")
    if out is not None:
        check_out(out, x.shape, x.dtype, x.device)
    return RESIDUAL(args, out)


def head_gate(x: Tensor, logits: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Per-head gate on an attention output: `x_h * 2 sigmoid(logits_h)`.

    Args:
        x: (..., heads, head_dim), fp16, bf16 or fp32.
        logits: (..., heads).
        out: written in place of a fresh tensor; may be x.
    Returns:
        Shape and dtype of x.
    Raises:
        TypeError, ValueError: each names the parameter.

    Contract: rounded; fp32 arithmetic, one rounding. Below logits of -88 the factor has fewer digits, and below -104 it is 0; in
    between it may be 0 already, and an infinite x times 0 is NaN.
    Bytes: read x, write out.
    Source: gated attention of LTX-2.3.
    """
    args = HeadGateArguments(x, logits)
    if out is None and (known := HEAD_GATE.again(args)) is not None:
        return known
    if check_tensor("x", x, dtypes=ACTIVATION_DTYPES, min_dim=2, arrays=True):
        return through_torch(head_gate, locals())
    check_tensor("logits", logits, dtypes=ACTIVATION_DTYPES)
    check_shape("logits", logits, x.shape[:-1])
    check_device("logits", logits, x.device)
    if out is not None:
        check_out(out, x.shape, x.dtype, x.device)
    return HEAD_GATE(args, out)
