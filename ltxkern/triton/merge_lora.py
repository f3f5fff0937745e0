"""Triton kernel of the LoRA merge: a tile of the weight is read, changed and written by one program, with no temporary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltxkern.layout import ceil_div, power_of_two

if TYPE_CHECKING:
    from ltxkern.ops.merge_lora import Arguments

# LoRAs of one launch: the kernel names each.
LORAS = 4


@dataclass(frozen=True)
class Tile:
    """Rows, columns and ranks of a tile; fp32 factors run on the plain cores, so a smaller tile keeps registers in bounds."""

    rows: int
    columns: int
    ranks: int
    warps: int
    stages: int


HALF = Tile(128, 128, 32, 8, 3)
FULL = Tile(64, 64, 16, 4, 2)


@triton.jit
def _product(
    a_ptr,
    b_ptr,
    row,
    column,
    M,
    N,
    RANK: tl.constexpr,
    DOT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """fp32 tile of B @ A."""
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(0, (RANK + BK - 1) // BK):
        rank = k * BK + tl.arange(0, BK)
        b = tl.load(
            b_ptr + row[:, None] * RANK + rank[None, :], mask=(row < M)[:, None] & (rank < RANK)[None, :], other=0.0
        )
        a = tl.load(
            a_ptr + rank[:, None].to(tl.int64) * N + column[None, :],
            mask=(rank < RANK)[:, None] & (column < N)[None, :],
            other=0.0,
        )
        total = tl.dot(b.to(DOT), a.to(DOT), total, input_precision="ieee")
    return total


@triton.jit
def _merge_kernel(
    weight_ptr,
    a0_ptr,
    b0_ptr,
    s0,
    a1_ptr,
    b1_ptr,
    s1,
    a2_ptr,
    b2_ptr,
    s2,
    a3_ptr,
    b3_ptr,
    s3,
    M,
    N,
    stride,
    column_blocks,
    R0: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    R3: tl.constexpr,
    DOT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """`W += sum_k s_k B_k A_k` on one tile, one rounding."""
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // column_blocks) * BM + tl.arange(0, BM)
    column = (pid % column_blocks) * BN + tl.arange(0, BN)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    delta = s0 * _product(a0_ptr, b0_ptr, row, column, M, N, R0, DOT, BM, BN, BK)
    if a1_ptr is not None:
        delta += s1 * _product(a1_ptr, b1_ptr, row, column, M, N, R1, DOT, BM, BN, BK)
    if a2_ptr is not None:
        delta += s2 * _product(a2_ptr, b2_ptr, row, column, M, N, R2, DOT, BM, BN, BK)
    if a3_ptr is not None:
        delta += s3 * _product(a3_ptr, b3_ptr, row, column, M, N, R3, DOT, BM, BN, BK)
    valid = (row < M)[:, None] & (column < N)[None, :]
    at = weight_ptr + row[:, None] * stride + column[None, :]
    weight = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    tl.store(at, (weight + delta).to(dtype), mask=valid)


_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _dot_dtype(factors: Sequence[Tensor]) -> torch.dtype:
    """Dtype of the tile products: the factors' common one, fp32 where they differ."""
    dtypes = {factor.dtype for factor in factors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def launch(args: Arguments) -> None:
    """Merge up to LORAS contiguous LoRAs; there is no temporary, so no chunks."""
    weight = args.weight
    dot = _dot_dtype([*args.lora_a, *args.lora_b])
    tile = FULL if dot == torch.float32 else HALF
    rows, columns = weight.shape
    block_rows = max(16, min(tile.rows, power_of_two(rows)))
    block_columns = max(16, min(tile.columns, power_of_two(columns)))
    pairs: list[Any] = []
    for a, b, s in zip(args.lora_a, args.lora_b, args.scale, strict=True):
        pairs += [a, b, s]
    missing = LORAS - len(args.lora_a)
    ranks = [a.shape[0] for a in args.lora_a] + [0] * missing
    column_blocks = ceil_div(columns, block_columns)
    _merge_kernel[(ceil_div(rows, block_rows) * column_blocks,)](
        weight, *pairs, *([None, None, 0.0] * missing), rows, columns, weight.stride(0), column_blocks,
        R0=ranks[0], R1=ranks[1], R2=ranks[2], R3=ranks[3], DOT=_TRITON_DTYPES[dot],
        BM=block_rows, BN=block_columns, BK=tile.ranks,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
