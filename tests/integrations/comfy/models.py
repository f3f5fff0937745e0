"""Small models built as ComfyUI builds its own: its norms by their module and class names, its blocks by their structure."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cast_bias_weight(module: Any, input: Tensor, offloadable: bool = False) -> tuple[Any, ...]:
    """Weights as the input wants them, a LoRA that waits applied; counted on the module."""
    weight, bias = module.weight.to(input), module.bias.to(input)
    for function in module.weight_function:
        weight = function(weight)
    for function in module.bias_function:
        bias = function(bias)
    module.casts = getattr(module, "casts", 0) + 1
    return (weight, bias, "stream") if offloadable else (weight, bias)


def uncast_bias_weight(module: Any, weight: Tensor, bias: Tensor, stream: Any) -> None:
    assert stream == "stream"
    module.casts -= 1


class GroupNorm(nn.GroupNorm):
    """comfy.ops.disable_weight_init.GroupNorm."""

    comfy_cast_weights = False

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.weight_function: list[Any] = []
        self.bias_function: list[Any] = []

    def forward(self, *args: Any, **keywords: Any) -> Tensor:
        if self.comfy_cast_weights or self.weight_function or self.bias_function:
            weight, bias = cast_bias_weight(self, *args)
            self.casts -= 1
            return F.group_norm(*args, self.num_groups, weight, bias, self.eps)
        return super().forward(*args, **keywords)


GroupNorm.__module__, GroupNorm.__qualname__ = "comfy.ops", "disable_weight_init.GroupNorm"


class PixelNorm(nn.Module):
    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(self.dim, keepdim=True) + self.eps).sqrt()


PixelNorm.__module__ = "comfy.ldm.lightricks.vae.pixel_norm"


class RMSNorm(nn.Module):
    """RMS_norm of comfy.ldm.wan.vae."""

    def __init__(self, dim: int, channel_first: bool = True) -> None:
        super().__init__()
        self.channel_first, self.scale, self.bias = channel_first, dim**0.5, None
        self.gamma = nn.Parameter(torch.rand(dim, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1 if self.channel_first else -1) * self.scale * self.gamma.to(x)


RMSNorm.__module__, RMSNorm.__qualname__ = "comfy.ldm.wan.vae", "RMS_norm"


def carried(held: list[Tensor], convolution: nn.Module) -> Tensor:
    out: Tensor = convolution(held.pop())
    return out


class ImageBlock(nn.Module):
    """Of the image VAEs: an activation in place that serves the time embedding too, values that go on in a list."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.swish = nn.SiLU(inplace=True)
        self.norm1, self.conv1 = GroupNorm(2, width, eps=1e-6), nn.Conv2d(width, width, 3, padding=1)
        self.temb_proj = nn.Linear(width, width)
        self.norm2, self.conv2 = GroupNorm(2, width, eps=1e-6), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = x
        h = self.norm1(h)
        h = [self.swish(h)]
        h = carried(h, self.conv1)
        if temb is not None:
            h = h + self.temb_proj(self.swish(temb))[:, :, None, None]
        h = self.norm2(h)
        h = self.swish(h)
        h = carried([h], self.conv2)
        return x + h


class VideoBlock(nn.Module):
    """Of the LTX VAEs: one activation behind both norms, a scale and shift between where the block is conditioned on time."""

    def __init__(self, width: int, timestep_conditioning: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2, self.non_linearity = PixelNorm(), PixelNorm(), nn.SiLU()
        self.conv1, self.conv2 = (nn.Conv3d(width, width, 3, padding=1) for _ in range(2))
        self.timestep_conditioning = timestep_conditioning
        if timestep_conditioning:
            self.scale_shift_table = nn.Parameter(torch.randn(4, width))

    def forward(self, input_tensor: Tensor, causal: bool = True, timestep: Tensor | None = None) -> Tensor:
        hidden_states = self.norm1(input_tensor)
        if self.timestep_conditioning:
            shift1, scale1, shift2, scale2 = self.scale_shift_table[None, :, :, None, None, None].unbind(dim=1)
            hidden_states = hidden_states * (1 + scale1) + shift1
        hidden_states = self.non_linearity(hidden_states)
        hidden_states = self.conv1(hidden_states)
        hidden_states = self.norm2(hidden_states)
        if self.timestep_conditioning:
            hidden_states = hidden_states * (1 + scale2) + shift2
        hidden_states = self.non_linearity(hidden_states)
        return self.conv2(hidden_states) + input_tensor


class CausalConv3d(nn.Conv3d):
    pass


class WanBlock(nn.Module):
    """Of the Wan VAE: a Sequential whose layers the block calls itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *(RMSNorm(width), nn.SiLU(), CausalConv3d(width, width, 3, padding=1)),
            *(RMSNorm(width), nn.SiLU(), nn.Dropout(0.0), CausalConv3d(width, width, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        old = x
        for layer in self.residual:
            x = layer(x)
        return x + old


class ResBlock(nn.Module):
    """Of the UNets: Sequentials that a block with scale and shift takes apart."""

    def __init__(self, width: int, use_scale_shift_norm: bool = False) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(GroupNorm(2, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(1, 2 * width if use_scale_shift_norm else width))
        self.out_layers = nn.Sequential(GroupNorm(2, width), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h, out = self.in_layers(x), self.emb_layers(emb)[..., None, None]
        if self.use_scale_shift_norm:
            scale, shift = out.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            return x + self.out_layers[1:](h)
        return x + self.out_layers(h + out)


class UNet(nn.Module):
    """A BaseModel with its diffusion_model: called with the state and its noise level, it gives the clean prediction."""

    def __init__(self, width: int = 4, **settings: Any) -> None:
        super().__init__()
        self.diffusion_model = nn.ModuleDict({"block": ResBlock(width, **settings)})

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        out: Tensor = self.diffusion_model["block"](x, sigma[:, None]).tanh()
        return out


class Transformer(nn.Module):
    """No norm of it goes into SiLU."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.diffusion_model = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        out: Tensor = self.diffusion_model(x)
        return out


class Decoder(nn.Module):
    """A first_stage_model."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def decode(self, z: Tensor) -> Tensor:
        out: Tensor = self.blocks(z)
        return out
