"""Parameter-free (or weighted) RMSNorm and adaLN modulation: alone, behind a gated residual, and there with two modulations."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltxkern.compiled import rows as launch
from ltxkern.dispatch import Op
from ltxkern.layout import fresh, through_torch
from ltxkern.ops import tiers
from ltxkern.ops.checks import (
    ACTIVATION_DTYPES,
    broadcasts,
    check_device,
    check_finite_number,
    check_indexed,
    check_like,
    check_out,
    check_outs,
    check_tensor,
    check_vector,
)


class Arguments(NamedTuple):
    """Of `rms_norm_modulate`."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    eps: float
    weight: Tensor | None
    rows: Tensor | None


class GatedArguments(NamedTuple):
    """Of `gated_residual_rms_norm_modulate`."""

    x: Tensor
    y: Tensor
    gate: Tensor
    scale: Tensor
    shift: Tensor
    eps: float
    weight: Tensor | None
    rows: Tensor | None


class TwiceArguments(NamedTuple):
    """Of `gated_residual_rms_norm_modulate_twice`."""

    x: Tensor
    y: Tensor
    gate: Tensor
    scale: Tensor
    shift: Tensor
    scale2: Tensor
    shift2: Tensor
    eps: float
    weight: Tensor | None
    rows: Tensor | None


def taken(rows: Tensor | None, *tables: Tensor) -> tuple[Tensor, ...]:
    """Each modulation table (N, D) as (..., D) by `rows (...)`: what the kernels take without writing it. Unchanged without rows.

    Raises:
        ValueError: an index on the host that is no row of the tables.
    """
    if rows is None:
        return tables
    launch.check_range(rows, tables[0].shape[0])
    return tuple(F.embedding(rows, table) for table in tables)


def reference(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor | None, rows: Tensor | None = None
) -> Tensor:
    """The composition in fp32 with one rounding."""
    scale, shift = taken(rows, scale, shift)
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.float()
    return (y * (1 + scale.float()) + shift.float()).to(x.dtype).contiguous()


def gated_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    weight: Tensor | None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual `x + y gate` rounded to x's dtype, and its modulated norm."""
    gate, scale, shift = taken(rows, gate, scale, shift)
    summed = (x.float() + y.float() * gate.float()).to(x.dtype).contiguous()
    return summed, reference(summed, scale, shift, eps, weight)


def twice_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    eps: float,
    weight: Tensor | None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual `x + y gate` rounded to x's dtype, and its norm with either modulation."""
    summed, normed = gated_reference(x, y, gate, scale, shift, eps, weight, rows)
    return summed, normed, reference(summed, scale2, shift2, eps, weight, rows)


def _refuse_triton(args: Arguments) -> str | None:
    return tiers.wide_rows(args.x) or tiers.split_rows([args.x], [args.scale, args.shift], args.rows)


def _refuse_triton_gated(args: GatedArguments) -> str | None:
    over_x, modulation = [args.x, args.y], [args.gate, args.scale, args.shift]
    return tiers.wide_rows(args.x) or tiers.split_rows(over_x, modulation, args.rows)


def _refuse_triton_twice(args: TwiceArguments) -> str | None:
    modulation = [args.gate, args.scale, args.shift, args.scale2, args.shift2]
    return tiers.wide_rows(args.x) or tiers.split_rows([args.x, args.y], modulation, args.rows)


OP = Op(
    "rms_norm_modulate",
    Arguments,
    "Tensor",
    reference,
    lambda args: fresh(args.x),
    backends=[*tiers.compiled(launch.rms_norm_modulate), tiers.triton("rms_norm_modulate", _refuse_triton)],
    may_be=[("x",)],
    indices={"rows": "scale"},
)
GATED = Op(
    "gated_residual_rms_norm_modulate",
    GatedArguments,
    "(Tensor, Tensor)",
    gated_reference,
    lambda args: (fresh(args.x), fresh(args.x)),
    backends=[
        *tiers.compiled(launch.gated_norm),
        tiers.triton("rms_norm_modulate", _refuse_triton_gated, "launch_gated"),
    ],
    may_be=[("x", "y"), ("x", "y")],
    indices={"rows": "scale"},
)

TWICE = Op(
    "gated_residual_rms_norm_modulate_twice",
    TwiceArguments,
    "(Tensor, Tensor, Tensor)",
    twice_reference,
    lambda args: (fresh(args.x), fresh(args.x), fresh(args.x)),
    backends=[
        *tiers.compiled(launch.gated_norm_twice),
        tiers.triton("rms_norm_modulate", _refuse_triton_twice, "launch_twice"),
    ],
    may_be=[("x", "y"), ("x", "y"), ("x", "y")],
    indices={"rows": "scale"},
)


def _check_rows(name: str, value: Tensor, x: Tensor) -> None:
    check_tensor(name, value, dtypes=ACTIVATION_DTYPES)
    check_device(name, value, x.device)
    if not broadcasts(value.shape, x.shape) or value.dim() == 0 or value.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{name} must broadcast to x's shape {tuple(x.shape)} and have its last dim, got {tuple(value.shape)}"
        )


def _check_norm(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor | None, rows: Tensor | None, **others: Tensor
) -> bool:
    if check_tensor("x", x, dtypes=ACTIVATION_DTYPES, min_dim=1, arrays=True):
        return True
    if rows is None:
        _check_rows("scale", scale, x)
        _check_rows("shift", shift, x)
        for name, value in others.items():
            _check_rows(name, value, x)
    else:
        check_indexed(x, rows, {"scale": scale, "shift": shift, **others})
    if weight is not None:
        check_vector("weight", weight, x.shape[-1], x.device)
    check_finite_number("eps", eps, low=0.0)
    return False


def rms_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """RMSNorm over the last dim, then modulation: `x rsqrt(mean(x^2) + eps) [weight] (1 + scale) + shift`.

    Args:
        x: (..., D), fp16, bf16 or fp32.
        scale, shift: broadcastable to x with last dim D, e.g. (B, 1, D) for one row per sample; with `rows` tables (N, D) of one N.
        eps: added to the mean square.
        weight: (D,); None for the parameter-free norm of the LTX-2 transformer.
        rows: (...), int32 or int64: a row of x takes row `rows` of the tables. Where few rows are distinct, as with the timesteps
            of image conditioning, nothing of x's size is then made. None: scale and shift lie over x itself.
        out: written in place of a fresh tensor; may be x.
    Returns:
        Shape and dtype of x.
    Raises:
        TypeError, ValueError: each names the parameter.

    Contract: rounded; fp32 arithmetic, one rounding (eager torch rounds after each of four steps); with `rows` the bits of
        `rms_norm_modulate(x, scale[rows], shift[rows])`.
    Bytes: read x, write out; scale and shift once where they are rows or tables, and 4 or 8 a row for its index. `scale[rows]` and
        `shift[rows]` cost 4 D values a row instead, written and read. On a GPU tables whose rows do not lie on 16 bytes are copied.
    An index below 0 or beyond N - 1: ValueError on the host, before anything is written. On a device nobody waits to look at the
        indices: that row of the result is NaN, and nothing outside the tables is read (the torch reference fails in torch's own
        lookup there).
    Source: Zhang and Sennrich 2019 (RMSNorm); Peebles and Xie 2023 (adaLN).
    """
    args = Arguments(x, scale, shift, eps, weight, rows)
    if out is None and (known := OP.again(args)) is not None:
        return known
    if _check_norm(x, scale, shift, eps, weight, rows):
        return through_torch(rms_norm_modulate, locals())
    if out is not None:
        check_out(out, x.shape, x.dtype, x.device)
    return OP(args, out)


def gated_residual_rms_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated residual and the next modulated norm in one pass: `s = x + y gate`, `n = rms_norm_modulate(s, scale, shift)`.

    Args:
        x: residual stream, (..., D), fp16, bf16 or fp32.
        y: branch output, shape and dtype of x.
        gate, scale, shift: broadcastable to x with last dim D; with `rows` tables (N, D) of one N.
        eps, weight: as in `rms_norm_modulate`.
        rows: as in `rms_norm_modulate`, one index for all three tables.
        out: pair (s, n); either may be x or y.
    Returns:
        (s, n), shape and dtype of x; n is computed from the rounded s.
    Raises:
        TypeError, ValueError: each names the parameter.

    Contract: rounded; s is rounded once, n once; with `rows` the bits of gate[rows], scale[rows] and shift[rows].
    Bytes: read x and y, write s and n; 4 or 8 a row for its index.
    An index below 0 or beyond N - 1: see `rms_norm_modulate`.
    Source: the LTX-2 transformer block.
    """
    args = GatedArguments(x, y, gate, scale, shift, eps, weight, rows)
    if out is None and (known := GATED.again(args)) is not None:
        return known
    if _check_norm(x, scale, shift, eps, weight, rows, gate=gate):
        return through_torch(gated_residual_rms_norm_modulate, locals())
    check_like("y", y, x)
    if out is not None:
        check_outs(out, x)
    return GATED(args, out)


def gated_residual_rms_norm_modulate_twice(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    *,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    rows: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated residual and its norm with two modulations, from one read: where two attentions look at one stream.

    Args:
        x, y, gate, scale, shift, eps, weight, rows: as in `gated_residual_rms_norm_modulate`.
        scale2, shift2: the second modulation, as the first.
        out: (s, n, n2); any may be x or y.
    Returns:
        (s, n, n2), shape and dtype of x: `s = x + y gate`, `n = rms_norm_modulate(s, scale, shift)` and
        `n2 = rms_norm_modulate(s, scale2, shift2)`.
    Raises:
        TypeError, ValueError: each names the parameter.

    Contract: rounded; s, n and n2 are rounded once each, with the bits of `gated_residual_rms_norm_modulate` for s and n.
    Bytes: read x and y, write s, n and n2; 4 or 8 a row for its index.
    An index below 0 or beyond N - 1: see `rms_norm_modulate`.
    Source: the LTX-2 transformer block, between its text attention and the two attentions between the modalities.
    """
    args = TwiceArguments(x, y, gate, scale, shift, scale2, shift2, eps, weight, rows)
    if out is None and (known := TWICE.again(args)) is not None:
        return known
    if _check_norm(x, scale, shift, eps, weight, rows, gate=gate, scale2=scale2, shift2=shift2):
        return through_torch(gated_residual_rms_norm_modulate_twice, locals())
    check_like("y", y, x)
    if out is not None:
        check_outs(out, x, 3)
    return TWICE(args, out)
