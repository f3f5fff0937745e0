"""Two sums that share an operand in one pass: a weight with each of two LoRA deltas."""

from __future__ import annotations

import torch
from torch import Tensor

from ltxkern.compiled import dual_add as launch
from ltxkern.compiled.programs import backends
from ltxkern.dispatch import Op
from ltxkern.ops.checks import SAMPLER_DTYPES, check_like, check_outs, check_tensor
from ltxkern.triton import constraints, triton_backend


def reference(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """`x + first` and `x + second`."""
    return (x + first).contiguous(), (x + second).contiguous()


def allocate(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Twice shape and dtype of x, contiguous."""
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    )


OP = Op(
    "dual_add",
    "(Tensor x, Tensor first, Tensor second) -> (Tensor, Tensor)",
    reference,
    allocate,
    differentiable=True,
    backends=[*backends(launch.run), triton_backend("dual_add", constraints.dual_add)],
    may_be=[("x",), ("x",)],
)


def dual_add(
    x: Tensor, first: Tensor, second: Tensor, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Two sums that share an operand, which is read once: `(x + first, x + second)`.

    Args:
        x: any shape, fp16, bf16, fp32 or fp64.
        first, second: shape and dtype of x.
        out: pair written in place of fresh tensors; one of them may be x, and neither may overlap an input otherwise.
    Returns:
        Two tensors of shape and dtype of x.
    Raises:
        TypeError, ValueError: each names the parameter.

    Contract: exact; each sum rounded once, as torch's add does.
    Bytes: read x, first and second, write both sums; two adds of torch read x twice.
    Source: both phases of a LoRA schedule from one pristine weight.
    """
    check_tensor("x", x, dtypes=SAMPLER_DTYPES)
    check_like("first", first, x)
    check_like("second", second, x)
    if out is not None:
        check_outs(out, x)
    sums: tuple[Tensor, Tensor] = OP(x, first, second, out=out)
    return sums
