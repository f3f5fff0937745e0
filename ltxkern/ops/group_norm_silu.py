"""GroupNorm followed by SiLU, with an optional residual and a folded convolution bias."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxkern.compiled import group_norm_silu as launch
from ltxkern.dispatch import Op
from ltxkern.layout import like, through_torch
from ltxkern.ops import tiers
from ltxkern.ops.checks import (
    ACTIVATION_DTYPES,
    check_finite_number,
    check_integer,
    check_like,
    check_out,
    check_tensor,
    check_together,
    check_vector,
    is_plain,
    raise_no_tensor,
)


class Arguments(NamedTuple):
    """x and residual (N, C, *), the others (C,)."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    num_groups: int
    eps: float
    residual: Tensor | None
    conv_bias: Tensor | None


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    conv_bias: Tensor | None = None,
) -> Tensor:
    """The torch composition that `group_norm_silu` replaces."""
    if x.numel() == 0:
        return torch.empty_like(x)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    if weight is not None and weight.dtype != x.dtype:
        compute = torch.promote_types(weight.dtype, x.dtype)
        y = x.to(compute)
    else:
        compute, y = x.dtype, x
    if conv_bias is not None:
        y = y + conv_bias.to(compute).reshape(shape)
    # torch.group_norm: the one of torch.nn.functional refuses a group of one element.
    y = torch.group_norm(
        y, num_groups, None if weight is None else weight.to(compute), None if bias is None else bias.to(compute), eps
    )
    if residual is not None:
        y = y + residual
    return like(F.silu(y).to(x.dtype), x)


def _refuse(args: Arguments) -> str | None:
    return tiers.unlike_channels(args.x, (args.residual,), (args.weight, args.bias, args.conv_bias))


def _refuse_triton(args: Arguments) -> str | None:
    return tiers.split_positions(x=args.x, residual=args.residual)


OP = Op(
    "group_norm_silu",
    Arguments,
    "Tensor",
    reference,
    lambda args: torch.empty_like(args.x),
    backends=[*tiers.compiled(launch.run, refuse=_refuse), tiers.triton("group_norm_silu", _refuse_triton)],
    may_be=[("x", "residual")],
)


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    conv_bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """SiLU of a group-normalised tensor, in one op.

    `silu(gn(x + conv_bias) + residual)` with `gn(v) = (v - mean_g) / sqrt(var_g + eps) * weight_c + bias_c`; mean and biased
    variance run over the C/num_groups channels and all positions of a group; `silu(v) = v / (1 + exp(-v))`.

    Args:
        x: (N, C, *), fp16, bf16 or fp32; contiguous or channels-last (other layouts work, through a copy where needed).
        weight, bias: (C,), of x's dtype or a wider one; None for no affine part.
        num_groups: divides C.
        eps: added to the variance.
        residual: shape of x, added after the affine part, before SiLU.
        conv_bias: (C,), bias of the convolution that made x, folded into the statistics instead of a pass of its own.
        out: written in place of a fresh tensor; shape, dtype and device of x. May be x or residual itself.
    Returns:
        (N, C, *) in x's dtype, with x's strides where x is dense.
    Raises:
        TypeError, ValueError: see the checks; each names the parameter.

    Contract: rounded. Statistics in fp32 from per-chunk (mean, M2) merged by Chan's rule; one rounding at the end. The torch
    composition rounds between GroupNorm, add and SiLU. On GPUs results below 1e-36 may be zero: exponentials and reciprocals
    below 1.2e-38 are.
    Bytes: read x, write out (2 units), plus one unit for residual; a third unit where a group does not fit on the chip.
    Source: Wu and He 2018 (GroupNorm); Chan, Golub, LeVeque 1979 (merging of moments).
    """
    if check_tensor("x", x, dtypes=ACTIVATION_DTYPES, min_dim=2, arrays=True):
        return through_torch(group_norm_silu, locals())
    channels = x.shape[1]
    for name, value in (("weight", weight), ("bias", bias), ("conv_bias", conv_bias)):
        if value is not None:
            check_vector(name, value, channels, x.device)
            if value.dtype != x.dtype and torch.promote_types(value.dtype, x.dtype) != value.dtype:
                raise TypeError(
                    f"{name} must be {x.dtype} like x or wider, got {value.dtype}: use {name}.to({x.dtype})"
                )
    check_together("weight", weight, "bias", bias)
    check_integer("num_groups", num_groups, 1)
    if channels % num_groups != 0:
        legal = [g for g in range(1, channels + 1) if channels % g == 0]
        nearest = min(legal, key=lambda g: abs(g - num_groups), default=1)
        raise ValueError(f"num_groups must divide the {channels} channels of x, got {num_groups}: use {nearest}")
    check_finite_number("eps", eps, low=0.0)
    if residual is not None:
        check_like("residual", residual, x)
    if out is not None:
        check_out(out, x.shape, x.dtype, x.device)
    return OP(Arguments(x, weight, bias, num_groups, eps, residual, conv_bias), out)


def fuses(x: Tensor, norm: nn.GroupNorm) -> bool:
    """Whether `group_norm_silu` takes this input with this norm's parameters; not under autocast."""
    if x.dtype not in ACTIVATION_DTYPES or x.dim() < 2 or x.shape[1] != norm.num_channels:
        return False
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return False
    weight, bias = norm.weight, norm.bias
    return weight is None or (bias is not None and torch.promote_types(weight.dtype, x.dtype) == weight.dtype)


def apply_group_norm_silu(x: Tensor, norm: nn.Module, activation: nn.Module) -> Tensor:
    """Drop-in for `activation(norm(x))`: the fused op where it serves, exactly that composition where it does not.

    Args:
        x: (N, C, *).
        norm: an `nn.GroupNorm` for the fused path; any module otherwise.
        activation: an `nn.SiLU` for the fused path (`inplace` is honoured in meaning: the result is returned).
    Returns:
        (N, C, *).
    Raises:
        TypeError: no tensor, or no modules.

    Contract: as `group_norm_silu` on the fused path, exact otherwise. Autocast and modules that are not plain (hooks, a forward of
        their own) take the composition.
    """
    if not isinstance(x, Tensor):
        raise_no_tensor("x", x)
    for name, module in (("norm", norm), ("activation", activation)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
    if type(norm) is not nn.GroupNorm or type(activation) is not nn.SiLU or not fuses(x, norm):
        return activation(norm(x))
    if not (is_plain(norm) and is_plain(activation)):
        return activation(norm(x))
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
