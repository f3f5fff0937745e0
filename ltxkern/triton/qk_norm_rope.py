"""Triton kernel of query and key RMSNorm with rotary embedding: one program a token and tensor, q and k in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ltxkern.layout import dense, hand_back, power_of_two
from ltxkern.triton.numerics import reciprocal_root

if TYPE_CHECKING:
    from ltxkern.ops.qk_norm_rope import Arguments


@triton.jit
def _load_pairs(ptr, head, pair, valid, D: tl.constexpr, SPLIT: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr):
    """First and second members of the rotated pairs, [BH, BP] each, in fp32; interleaved pairs by one dense load."""
    if SPLIT:
        first = tl.load(ptr + head * D + pair, mask=valid, other=0.0)
        second = tl.load(ptr + head * D + D // 2 + pair, mask=valid, other=0.0)
    else:
        side = tl.arange(0, 2)[None, None, :]
        at = ptr + (head * D + 2 * pair)[:, :, None] + side
        both = tl.load(at, mask=valid[:, :, None] & (side < 2), other=0.0)
        first, second = tl.split(both)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _rotate(
    out_ptr, x_ptr, weight_ptr, cos, sin, head, pair, valid, inverse, eps,
    D: tl.constexpr, SPLIT: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """One token: norm over all heads, weight, rotation, one rounding."""
    first, second = _load_pairs(x_ptr, head, pair, valid, D, SPLIT, BH, BP)
    square = first * first + second * second
    rstd = reciprocal_root(tl.sum(tl.sum(square, axis=1), axis=0) * inverse + eps)
    first_weight, second_weight = _load_pairs(weight_ptr, head, pair, valid, D, SPLIT, BH, BP)
    first = first * rstd * first_weight
    second = second * rstd * second_weight
    left = (first * cos - second * sin).to(out_ptr.dtype.element_ty)
    right = (second * cos + first * sin).to(out_ptr.dtype.element_ty)
    if SPLIT:
        tl.store(out_ptr + head * D + pair, left, mask=valid)
        tl.store(out_ptr + head * D + D // 2 + pair, right, mask=valid)
    else:
        side = tl.arange(0, 2)[None, None, :]
        at = out_ptr + (head * D + 2 * pair)[:, :, None] + side
        tl.store(at, tl.join(left, right), mask=valid[:, :, None] & (side < 2))


@triton.jit
def _rope_kernel(
    q_out_ptr,
    k_out_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    inverse,
    tokens,
    heads,
    q_b,
    q_t,
    k_b,
    k_t,
    rope_b,
    rope_h,
    rope_t,
    rope_d,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BH: tl.constexpr,
    BP: tl.constexpr,
):
    """Even programs rotate a token's query, odd ones its key, so that both use the same table lines."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid // 2
    b = row // tokens
    t = row % tokens
    head = tl.arange(0, BH)[:, None]
    pair = tl.arange(0, BP)[None, :]
    valid = (head < heads) & (pair < D // 2)
    at = b * rope_b + t * rope_t + head.to(tl.int64) * rope_h + pair * rope_d
    cos = tl.load(cos_ptr + at, mask=valid, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=valid, other=0.0).to(tl.float32)
    width = heads * D
    if pid % 2 == 0:
        _rotate(
            q_out_ptr + row * width, q_ptr + b * q_b + t * q_t, q_weight_ptr, cos, sin, head, pair, valid, inverse, eps,
            D, SPLIT, BH, BP,
        )  # fmt: skip
    else:
        _rotate(
            k_out_ptr + row * width, k_ptr + b * k_b + t * k_t, k_weight_ptr, cos, sin, head, pair, valid, inverse, eps,
            D, SPLIT, BH, BP,
        )  # fmt: skip


def launch(out: tuple[Tensor, Tensor], args: Arguments) -> None:
    """Launch on checked arguments."""
    q, k, cos = args.q, args.k, args.cos
    if q.numel() == 0:
        return
    batch, tokens, width = q.shape
    heads = cos.shape[1]
    depth = width // heads
    targets = dense(out)
    block_heads, block_pairs = power_of_two(heads), power_of_two(depth // 2)
    _rope_kernel[(2 * batch * tokens,)](
        *targets, q, k, args.q_weight.contiguous(), args.k_weight.contiguous(), cos, args.sin, args.eps, 1.0 / width, tokens, heads,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        cos.stride(0) if cos.shape[0] == batch else 0, *cos.stride()[1:],
        D=depth, SPLIT=args.layout == "split", BH=block_heads, BP=block_pairs,
        num_warps=min(16, max(4, block_heads * block_pairs * 2 // 512)), enable_fp_fusion=True,
    )  # fmt: skip
    hand_back(out, targets)
