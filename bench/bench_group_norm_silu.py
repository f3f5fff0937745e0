"""Benchmark of group_norm_silu at the shapes of the LTX-2 upsamplers and of a video VAE."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ltxkern
from cases import Call, Case, Suite, count_bytes, normal
from command_line import main

GROUPS, EPS = 32, 1e-5


def composition(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, conv_bias: Tensor | None, *out: Tensor
) -> Tensor:
    """`silu(group_norm(x + conv_bias) + residual)` as models write it; it has no use for `out`."""
    if conv_bias is not None:
        x = x + conv_bias.reshape(1, -1, *[1] * (x.dim() - 2))
    y = F.group_norm(x, GROUPS, weight, bias, EPS)
    return F.silu(y if residual is None else y + residual)


def in_place(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *others: Any) -> Tensor:
    """The same with sum and SiLU in place."""
    if others[0] is not None:
        x = x + others[0].reshape(1, -1, *[1] * (x.dim() - 2))
    y = F.group_norm(x, GROUPS, weight, bias, EPS)
    return F.silu(y if residual is None else y.add_(residual), inplace=True)


def fused(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, conv_bias: Tensor | None, *out: Tensor
) -> Tensor:
    """The toolkit's op."""
    given = {"residual": residual, "conv_bias": conv_bias, "out": out[0] if out else None}
    return ltxkern.group_norm_silu(x, weight, bias, GROUPS, EPS, **given)


def load_sglang() -> Callable[..., Any]:
    """sglang's Triton kernel; it has no residual and no bias of a convolution."""
    from sglang.jit_kernel.diffusion.triton.group_norm_silu import triton_group_norm_silu

    return lambda x, weight, bias, residual, conv_bias: triton_group_norm_silu(x, weight, bias, GROUPS, EPS)


def prepare(case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """Random activations with the mean and spread of a convolution's output."""
    random = normal(dtype, device, generator)
    x = random(*case.shape) * 2 + 0.5
    residual = random(*case.shape) if case.options.get("residual") else None
    conv_bias = random(case.shape[1]) if case.options.get("conv_bias") else None
    if case.options.get("channels_last"):
        x = x.contiguous(memory_format=torch.channels_last_3d)
        residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last_3d)
    plain = residual is None and conv_bias is None and not case.options.get("channels_last")
    args = (x, 1 + 0.1 * random(case.shape[1]), 0.1 * random(case.shape[1]), residual, conv_bias)
    return Call(
        args=(*args, torch.zeros_like(x)) if case.options.get("out") else args,
        op=fused,
        composition=composition,
        other={"torch eager, in-place SiLU": in_place},
        peers={"sglang": load_sglang} if plain and not case.options.get("out") else {},
        reads=count_bytes(args),
    )


LOW, HIGH = (1, 1024, 16, 17, 30), (1, 1024, 16, 34, 60)
SUITE = Suite(
    op="group_norm_silu",
    cases=(
        Case("ltx23_upsampler_low", LOW, "small"),
        Case("ltx2_upsampler_small", (1, 512, 8, 45, 80), "small"),
        Case("ltx2_upsampler_small_out", (1, 512, 8, 45, 80), options={"out": True}),
        Case("ltx23_upsampler_low_residual", LOW, "small", {"residual": True}),
        Case("ltx23_upsampler_low_conv_bias", LOW, options={"conv_bias": True}),
        Case("ltx23_upsampler_low_channels_last", LOW, options={"channels_last": True}),
        Case("ltx23_upsampler_high", HIGH),
        Case("ltx23_upsampler_high_residual", HIGH, options={"residual": True}),
        Case("ltx23_upsampler_high_residual_channels_last", HIGH, options={"residual": True, "channels_last": True}),
        Case("ltx2_upsampler_pre_720p", (1, 512, 16, 90, 160), "large"),
        Case("ltx2_upsampler_post_720p", (1, 512, 16, 180, 320), "large"),
        Case("ltx2_upsampler_post_720p_channels_last", (1, 512, 16, 180, 320), "large", {"channels_last": True}),
        Case("hunyuan_vae", (1, 128, 20, 256, 256), "large"),
    ),
    prepare=prepare,
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
