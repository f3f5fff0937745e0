"""Triton kernel of RMSNorm with rotary embedding: one launch, a program a token of both where they share their angles."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from ltxkern.layout import dense, hand_back, lie_side_by_side, power_of_two
from ltxkern.triton.numerics import reciprocal_root

if TYPE_CHECKING:
    from ltxkern.ops.qk_norm_rope import Arguments, RotaryTables


@triton.jit
def _load_pairs(ptr, head, pair, valid, D: tl.constexpr, SPLIT: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr):
    """First and second members of the rotated pairs, [BH, BP] each; interleaved pairs by one dense load."""
    if SPLIT:
        first = tl.load(ptr + head * D + pair, mask=valid, other=0.0)
        second = tl.load(ptr + head * D + D // 2 + pair, mask=valid, other=0.0)
    else:
        side = tl.arange(0, 2)[None, None, :]
        at = ptr + (head * D + 2 * pair)[:, :, None] + side
        both = tl.load(at, mask=valid[:, :, None] & (side < 2), other=0.0)
        first, second = tl.split(both)
    return first, second


@triton.jit
def _load_tables(
    cos_ptr, sin_ptr, rows_ptr, head, pair, valid, b, t, rope_b, rope_h, rope_t, rope_d, rows_b, rows_a, rows_t, count,
    D: tl.constexpr, AXES: tl.constexpr, LEAD: tl.constexpr, BESIDE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of a token in fp32; by coordinate (AXES > 0) also NaN where a row is none of the tables' `count`, else 0.

    BESIDE: every sine lies behind its cosine, one load has both, and strides count such pairs. WIDE: 32 bits do not reach all.
    """
    nothing = 0.0
    if AXES == 0:
        at = b * rope_b + t * rope_t + head.to(tl.int64) * rope_h + pair * rope_d
    else:
        valid = valid & (count > 0)
        place = head * (D // 2) + pair + LEAD
        column = place // AXES
        axis = place - column * AXES
        rows = rows_ptr + b * rows_b + t * rows_t
        at = column * rope_d
        for a in tl.static_range(AXES):
            row = tl.load(rows + a * rows_a)
            known = (row >= 0) & (row < count)
            nothing = tl.where(known, nothing, float("nan"))
            row = tl.where(known, row, 0)
            at = tl.where(axis == a, at + (row.to(tl.int64) if WIDE else row) * rope_t, at)
    if BESIDE:
        side = tl.arange(0, 2)[None, None, :]
        both = cos_ptr + (2 * at)[:, :, None] + side
        cos, sin = tl.split(tl.load(both, mask=valid[:, :, None] & (side < 2), other=0.0))
    else:
        cos = tl.load(cos_ptr + at, mask=valid, other=0.0)
        sin = tl.load(sin_ptr + at, mask=valid, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32), nothing


@triton.jit
def _rotate(
    out_ptr, first, second, weight_ptr, cos, sin, nothing, head, pair, valid, inverse, eps,
    D: tl.constexpr, SPLIT: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr, BY_AXIS: tl.constexpr,
):  # fmt: skip
    """One token: norm over all heads, weight, rotation, one rounding; NaN where `nothing` is."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    square = first * first + second * second
    total = tl.sum(tl.sum(square, axis=1), axis=0)
    if BY_AXIS:
        total += nothing
    rstd = reciprocal_root(total * inverse + eps, out_ptr.dtype.element_ty)
    first_weight, second_weight = _load_pairs(weight_ptr, head, pair, valid, D, SPLIT, BH, BP)
    first = first * rstd * first_weight.to(tl.float32)
    second = second * rstd * second_weight.to(tl.float32)
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
    rows_ptr,
    k_cos_ptr,
    k_sin_ptr,
    k_rows_ptr,
    eps,
    inverse,
    shared,
    heads,
    q_tokens,
    q_b,
    q_t,
    rope_b,
    rope_h,
    rope_t,
    rope_d,
    rows_b,
    rows_a,
    rows_t,
    count,
    k_tokens,
    k_b,
    k_t,
    k_rope_b,
    k_rope_h,
    k_rope_t,
    k_rope_d,
    k_rows_b,
    k_rows_a,
    k_rows_t,
    k_count,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BH: tl.constexpr,
    BP: tl.constexpr,
    AXES: tl.constexpr,
    LEAD: tl.constexpr,
    BESIDE: tl.constexpr,
    WIDE: tl.constexpr,
    SHARED: tl.constexpr,
):
    """A token of q and k that share angles, else of one: in turn as long as both have some, so that neighbours share lines."""
    pid = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    of_q = pid % 2 == 0
    t = pid // 2
    if pid >= 2 * shared:
        of_q = q_tokens > k_tokens
        t = pid - shared
    if SHARED:
        t = pid
    t = t.to(tl.int64)
    head = tl.arange(0, BH)[:, None]
    pair = tl.arange(0, BP)[None, :]
    valid = (head < heads) & (pair < D // 2)
    width = heads * D
    # By coordinate tables lie in caches, and where they lie takes long to compute: what comes from memory is asked for first.
    if SHARED or of_q:
        if AXES > 0:
            first, second = _load_pairs(q_ptr + b * q_b + t * q_t, head, pair, valid, D, SPLIT, BH, BP)
            if SHARED:
                k_first, k_second = _load_pairs(k_ptr + b * k_b + t * k_t, head, pair, valid, D, SPLIT, BH, BP)
        cos, sin, nothing = _load_tables(
            cos_ptr, sin_ptr, rows_ptr, head, pair, valid, b, t, rope_b, rope_h, rope_t, rope_d, rows_b, rows_a, rows_t,
            count, D, AXES, LEAD, BESIDE, WIDE,
        )  # fmt: skip
        if AXES == 0:
            first, second = _load_pairs(q_ptr + b * q_b + t * q_t, head, pair, valid, D, SPLIT, BH, BP)
        _rotate(
            q_out_ptr + (b * q_tokens + t) * width, first, second, q_weight_ptr, cos, sin, nothing, head, pair, valid, inverse,
            eps, D, SPLIT, BH, BP, AXES > 0,
        )  # fmt: skip
        if SHARED:
            if AXES == 0:
                k_first, k_second = _load_pairs(k_ptr + b * k_b + t * k_t, head, pair, valid, D, SPLIT, BH, BP)
            _rotate(
                k_out_ptr + (b * k_tokens + t) * width, k_first, k_second, k_weight_ptr, cos, sin, nothing, head, pair, valid,
                inverse, eps, D, SPLIT, BH, BP, AXES > 0,
            )  # fmt: skip
    else:
        if AXES > 0:
            first, second = _load_pairs(k_ptr + b * k_b + t * k_t, head, pair, valid, D, SPLIT, BH, BP)
        cos, sin, nothing = _load_tables(
            k_cos_ptr, k_sin_ptr, k_rows_ptr, head, pair, valid, b, t, k_rope_b, k_rope_h, k_rope_t, k_rope_d, k_rows_b,
            k_rows_a, k_rows_t, k_count, D, AXES, LEAD, BESIDE, WIDE,
        )  # fmt: skip
        if AXES == 0:
            first, second = _load_pairs(k_ptr + b * k_b + t * k_t, head, pair, valid, D, SPLIT, BH, BP)
        _rotate(
            k_out_ptr + (b * k_tokens + t) * width, first, second, k_weight_ptr, cos, sin, nothing, head, pair, valid, inverse,
            eps, D, SPLIT, BH, BP, AXES > 0,
        )  # fmt: skip


def _lies(x: Tensor, tables: RotaryTables, beside: bool) -> tuple[int, ...]:
    """Tokens and strides of q or k, those of its tables, in pairs of a cosine and its sine where such lie side by side, and the
    rows that these have."""
    cos, _, rows = tables
    if rows is None:
        return (
            x.shape[1],
            x.stride(0),
            x.stride(1),
            cos.stride(0) if cos.shape[0] == x.shape[0] else 0,
            *cos.stride()[1:],
            0,
            0,
            0,
            0,
        )
    own = rows.stride(0) if rows.shape[0] == x.shape[0] else 0
    lie = [stride // 2 if beside else stride for stride in cos.stride()]
    return x.shape[1], x.stride(0), x.stride(1), 0, 0, *lie, own, rows.stride(1), rows.stride(2), cos.shape[0]


def launch(out: tuple[Tensor, Tensor], args: Arguments) -> None:
    """Launch on checked arguments."""
    q, k, heads = args.q, args.k, args.head_count
    if q.numel() + k.numel() == 0:
        return
    batch, tokens, width = q.shape
    axes = 0 if args.rows is None else args.rows.shape[1]
    depth = width // heads
    targets = dense(out)
    block_heads, block_pairs = power_of_two(heads), power_of_two(depth // 2)
    shared = tokens == k.shape[1] and all(map(operator.is_, args.q_tables, args.k_tables))
    wide = axes > 0 and any(cos.shape[0] * cos.stride(0) >= 1 << 31 for cos, _, _ in (args.q_tables, args.k_tables))
    beside = axes > 0 and all(lie_side_by_side(cos, sin) for cos, sin, _ in (args.q_tables, args.k_tables))
    _rope_kernel[(tokens if shared else tokens + k.shape[1], batch)](
        *targets, q, k, args.q_weight.contiguous(), args.k_weight.contiguous(), *args.q_tables, *args.k_tables,
        args.eps, 1.0 / width, min(tokens, k.shape[1]), heads, *_lies(q, args.q_tables, beside), *_lies(k, args.k_tables, beside),
        D=depth, SPLIT=args.layout == "split", BH=block_heads, BP=block_pairs,
        AXES=axes, LEAD=-(width // 2) % axes if axes else 0, BESIDE=beside, WIDE=wide, SHARED=shared,
        num_warps=min(16, max(4, block_heads * block_pairs * 2 // 512)), enable_fp_fusion=True,
    )  # fmt: skip
    hand_back(out, targets)
