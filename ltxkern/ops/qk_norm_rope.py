"""RMSNorm of queries and keys over all heads together, then rotary position embedding."""

from typing import NamedTuple

import torch
from torch import Tensor

from ltxkern.compiled import qk_norm_rope as launch
from ltxkern.dispatch import Op
from ltxkern.layout import fresh, power_of_two, unit_rows
from ltxkern.ops import tiers
from ltxkern.ops.checks import (
    ACTIVATION_DTYPES,
    check_choice,
    check_device,
    check_finite_number,
    check_like,
    check_outs,
    check_tensor,
    check_vector,
)

LAYOUTS = ("split", "interleaved")


class Arguments(NamedTuple):
    """q and k (B, T, heads * d), their weights (heads * d,), cos and sin (B or 1, heads, T, d / 2)."""

    q: Tensor
    k: Tensor
    q_weight: Tensor
    k_weight: Tensor
    cos: Tensor
    sin: Tensor
    eps: float
    layout: str


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Rotate pairs of a (B, T, heads, d) tensor by (B, heads, T, d/2) tables."""
    cos, sin = cos.float().transpose(1, 2), sin.float().transpose(1, 2)
    if layout == "split":
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


def _one(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, layout: str) -> Tensor:
    heads = cos.shape[1]
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
    return rotate(y.unflatten(-1, (heads, -1)), cos, sin, layout).flatten(-2).to(x.dtype).contiguous()


def reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, layout: str
) -> tuple[Tensor, Tensor]:
    """The composition in fp32 with one rounding."""
    return _one(q, q_weight, cos, sin, eps, layout), _one(k, k_weight, cos, sin, eps, layout)


def _refuse_triton(args: Arguments) -> str | None:
    padded = 2 * power_of_two(args.cos.shape[1]) * power_of_two(args.cos.shape[3])
    if padded > tiers.MAX_WIDTH:
        return (
            f"tokens of {args.q.shape[-1]}: the kernel keeps at most {tiers.MAX_WIDTH} padded elements in registers, "
            f"needs {padded}"
        )
    if not unit_rows(args.q, args.k):
        return "the last dim of q or k is not dense"
    strides = args.cos.stride(), args.sin.stride()
    if strides[0] != strides[1]:
        return f"cos and sin have strides {strides[0]} and {strides[1]}: the kernel takes tables of one layout"
    return None


OP = Op(
    "qk_norm_rope",
    Arguments,
    "(Tensor, Tensor)",
    reference,
    lambda args: (fresh(args.q), fresh(args.k)),
    differentiable=True,
    backends=[*tiers.compiled(launch.run), tiers.triton("qk_norm_rope", _refuse_triton)],
    may_be=[("q",), ("k",)],
)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    layout: str = "split",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys over the inner dim, then rotate them by position.

    `v rsqrt(mean(v^2) + eps) weight` over all heads; then per head, in split layout with halves (v1, v2):
    `(v1 cos - v2 sin, v2 cos + v1 sin)`; in interleaved layout the pairs are neighbours.

    Args:
        q, k: (B, T, heads * d), fp16, bf16 or fp32.
        q_weight, k_weight: (heads * d,).
        cos, sin: (B or 1, heads, T, d / 2), fp16, bf16 or fp32.
        eps: added to the mean square.
        layout: "split" (LTX-2.3) or "interleaved".
        out: pair of tensors; the first may be q, the second k.
    Returns:
        (q, k) rotated, shapes and dtypes as given.
    Raises:
        TypeError, ValueError: each names the parameter.

    Contract: rounded; fp32 arithmetic, one rounding.
    Bytes: read and write q and k, read the tables.
    Source: Su et al. 2021 (RoPE); the LTX-2 attention.
    """
    check_tensor("q", q, dtypes=ACTIVATION_DTYPES)
    if q.dim() != 3:
        raise ValueError(f"q must be (B, T, heads * d), got shape {tuple(q.shape)}")
    check_like("k", k, q)
    batch, tokens, inner = q.shape
    check_vector("q_weight", q_weight, inner, q.device)
    check_vector("k_weight", k_weight, inner, q.device)
    check_tensor("cos", cos, dtypes=ACTIVATION_DTYPES)
    fits = (
        cos.dim() == 4
        and cos.shape[0] in (1, batch)
        and cos.shape[2] == tokens
        and 2 * cos.shape[1] * cos.shape[3] == inner
    )
    if not fits:
        raise ValueError(
            f"cos must be (1 or {batch}, heads, {tokens}, d/2) with heads * d = {inner}, got {tuple(cos.shape)}"
        )
    check_device("cos", cos, q.device)
    check_like("sin", sin, cos)
    check_choice("layout", layout, LAYOUTS)
    check_finite_number("eps", eps, low=0.0)
    if out is not None:
        check_outs(out, q)
    return OP(Arguments(q, k, q_weight, k_weight, cos, sin, eps, layout), out)
