"""PixelNorm (RMS over channels) followed by SiLU."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltxkern.compiled import pixel_norm_silu as launch
from ltxkern.compiled.tensors import device_limits
from ltxkern.dispatch import Op
from ltxkern.layout import like, through_torch
from ltxkern.ops import tiers
from ltxkern.ops.checks import ACTIVATION_DTYPES, check_finite_number, check_out, check_tensor, check_vector

# Channels of a position that a Triton program keeps in registers.
MAX_CHANNELS = 1024


class Arguments(NamedTuple):
    """x (N, C, *), weight (C,)."""

    x: Tensor
    eps: float
    weight: Tensor | None


def reference(x: Tensor, eps: float = 1e-8, weight: Tensor | None = None) -> Tensor:
    """The torch composition that `pixel_norm_silu` replaces; low precisions compute in fp32 and round once."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(dim=1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.float().reshape((1, -1) + (1,) * (x.dim() - 2))
    return like(F.silu(y).to(x.dtype), x)


def _refuse(args: Arguments) -> str | None:
    return tiers.unlike_channels(args.x, (), (args.weight,))


def _refuse_cuda(args: Arguments) -> str | None:
    if (reason := _refuse(args)) is not None:
        return reason
    most = launch.most_channels(device_limits(args.x.device.index).shared_bytes)
    channels = args.x.shape[1]
    return f"serves up to {most} channels on {args.x.device}, got {channels}" if channels > most else None


def _refuse_triton(args: Arguments) -> str | None:
    if args.x.shape[1] > MAX_CHANNELS:
        return f"x has {args.x.shape[1]} channels: the kernel keeps at most {MAX_CHANNELS} in registers"
    return tiers.split_positions(x=args.x)


OP = Op(
    "pixel_norm_silu",
    Arguments,
    "Tensor",
    reference,
    lambda args: torch.empty_like(args.x),
    backends=[
        *tiers.compiled(launch.run, refuse=_refuse, refuse_cuda=_refuse_cuda),
        tiers.triton("pixel_norm_silu", _refuse_triton),
    ],
    may_be=[("x",)],
)


def pixel_norm_silu(x: Tensor, eps: float = 1e-8, *, weight: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """SiLU of a tensor normalised by its root mean square over the channels of each position.

    `silu(x * rsqrt(mean_c(x^2) + eps) * weight_c)`.

    Args:
        x: (N, C, *), fp16, bf16 or fp32; contiguous or channels-last.
        eps: added to the mean square (1e-8 in the LTX-2 video VAE, 1e-6 in its audio VAE).
        weight: (C,), of x's dtype or a wider one; None for the parameter-free norm of the LTX-2 VAEs.
        out: written in place of a fresh tensor; shape, dtype and device of x. May be x itself.
    Returns:
        (N, C, *) in x's dtype, with x's strides where x is dense.
    Raises:
        TypeError, ValueError: see the checks; each names the parameter.

    Contract: rounded. fp32 arithmetic, one rounding at the end. On GPUs results below 1e-36 may be zero: exponentials and
    reciprocals below 1.2e-38 are.
    Bytes: read x, write out (2 units) where a position's channels fit in registers.
    Source: Karras et al. 2018 (PixelNorm).
    """
    if check_tensor("x", x, dtypes=ACTIVATION_DTYPES, min_dim=2, arrays=True):
        return through_torch(pixel_norm_silu, locals())
    check_finite_number("eps", eps, low=0.0)
    if weight is not None:
        check_vector("weight", weight, x.shape[1], x.device)
        if weight.dtype != x.dtype and torch.promote_types(weight.dtype, x.dtype) != weight.dtype:
            raise TypeError(f"weight must be {x.dtype} like x or wider, got {weight.dtype}: use weight.to({x.dtype})")
    if out is not None:
        check_out(out, x.shape, x.dtype, x.device)
    return OP(Arguments(x, eps, weight), out)
