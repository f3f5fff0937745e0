"""Triton kernel of two sums that share an operand: elementwise, each tensor met once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltxkern.layout import ceil_div, dense, hand_back
from ltxkern.triton.numerics import narrow

if TYPE_CHECKING:
    from ltxkern.ops.dual_add import Arguments

# 8 elements a thread at 4 warps: one 16-byte load of each bf16 operand.
BLOCK = 1024


@triton.jit
def _dual_add_kernel(
    first_out_ptr, second_out_ptr, x_ptr, first_ptr, second_ptr, size, COMPUTE: tl.constexpr, BLOCK: tl.constexpr
):
    """`x + first` and `x + second`, each rounded once; everything is read before the first store, which may go to x."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = offset < size
    x = tl.load(x_ptr + offset, mask=valid, other=0.0).to(COMPUTE)
    first = x + tl.load(first_ptr + offset, mask=valid, other=0.0).to(COMPUTE)
    second = x + tl.load(second_ptr + offset, mask=valid, other=0.0).to(COMPUTE)
    tl.store(first_out_ptr + offset, narrow(first, first_out_ptr.dtype.element_ty), mask=valid)
    tl.store(second_out_ptr + offset, narrow(second, second_out_ptr.dtype.element_ty), mask=valid)


def launch(out: Sequence[Tensor], args: Arguments) -> None:
    """Launch on contiguous arguments."""
    size = args.x.numel()
    if size == 0:
        return
    targets = dense(out)
    _dual_add_kernel[(ceil_div(size, BLOCK),)](
        *targets, *args, size,
        COMPUTE=tl.float64 if args.x.dtype == torch.float64 else tl.float32, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    hand_back(out, targets)
