"""Two sums that share an operand in one pass: a weight with each of two LoRA deltas."""

from typing import NamedTuple

from torch import Tensor

from ltxkern.compiled import dual_add as launch
from ltxkern.dispatch import Op
from ltxkern.layout import fresh, through_torch
from ltxkern.ops import tiers
from ltxkern.ops.checks import SAMPLER_DTYPES, check_like, check_outs, check_tensor


class Arguments(NamedTuple):
    """Three tensors of one shape and dtype."""

    x: Tensor
    first: Tensor
    second: Tensor


def reference(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """`x + first` and `x + second`."""
    return (x + first).contiguous(), (x + second).contiguous()


OP = Op(
    "dual_add",
    Arguments,
    "(Tensor, Tensor)",
    reference,
    lambda args: (fresh(args.x), fresh(args.x)),
    backends=[*tiers.compiled(launch.run), tiers.triton("dual_add", tiers.not_contiguous)],
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
    if check_tensor("x", x, dtypes=SAMPLER_DTYPES, arrays=True):
        return through_torch(dual_add, locals())
    check_like("first", first, x)
    check_like("second", second, x)
    if out is not None:
        check_outs(out, x)
    sums: tuple[Tensor, Tensor] = OP(Arguments(x, first, second), out)
    return sums
