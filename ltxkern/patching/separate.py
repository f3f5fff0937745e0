"""What the row ops stand for in a transformer block: the ops of diffusers' block, every one with its own rounding.

Modulations are (B, 1 or T, D), or tables (N, D) where `rows` says which of theirs a token has.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _taken(rows: Tensor | None, table: Tensor) -> Tensor:
    return table if rows is None else table[rows]


def _rms(x: Tensor, eps: float) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + eps)).to(x.dtype)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x (1 + scale) + shift`."""
    return x * (1 + scale) + shift


def norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, rows: Tensor | None) -> Tensor:
    """RMSNorm, modulated."""
    return modulate(_rms(x, eps), _taken(rows, scale), _taken(rows, shift))


def residual(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None) -> Tensor:
    """`x + y gate`."""
    return x + y * _taken(rows, gate)


def residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`x + y gate`, and its modulated norm."""
    summed = residual(x, y, gate, rows)
    return summed, norm(summed, scale, shift, eps, rows)


def residual_norms(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    *,
    eps: float,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`x + y gate`, and its norm with two modulations."""
    summed, normed = residual_norm(x, y, gate, scale, shift, eps, rows)
    return summed, normed, norm(summed, scale2, shift2, eps, rows)


def head_gate(x: Tensor, logits: Tensor) -> Tensor:
    """`x 2 sigmoid(logits)` per head of (..., heads, d)."""
    return x * (2.0 * torch.sigmoid(logits)).unsqueeze(-1)
