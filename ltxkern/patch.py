"""`patch(model)`: fused norm and activation inside models of other stacks, and `.undo()` to take it out again.

Blocks are recognised by class name and by what they hold, so that nothing is imported from the stacks themselves. Parameters and
state-dict keys stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ltxkern.compiled.tensors import is_channels_last
from ltxkern.nn import GroupNormSiLU, PixelNormSiLU
from ltxkern.ops.checks import ACTIVATION_DTYPES
from ltxkern.ops.group_norm_silu import apply_group_norm_silu, fuses, group_norm_silu, is_plain


@dataclass(frozen=True)
class Site:
    """One place of a block class: norms whose output goes straight into one activation, and nothing else does.

    norms, activation: attribute names; free: says of a block whether the activation has no further use in it.
    """

    norms: tuple[str, ...]
    activation: str
    free: Callable[[Any], bool] = lambda block: True


def _no_time_embedding(block: Any) -> bool:
    return getattr(block, "time_emb_proj", None) is None


def _no_time_projection(block: Any) -> bool:
    return getattr(block, "temb_proj", None) is None


def _no_timestep(block: Any) -> bool:
    return getattr(block, "scale_shift_table", None) is None


SITES: dict[str, Site] = {
    "LTX2VideoResnetBlock3d": Site(("norm1", "norm2"), "nonlinearity", _no_timestep),
    "LTX2VideoEncoder3d": Site(("norm_out",), "conv_act"),
    "LTX2VideoDecoder3d": Site(("norm_out",), "conv_act", _no_timestep),
    "LTX2AudioResnetBlock": Site(("norm1", "norm2"), "non_linearity", _no_time_projection),
    "LTX2AudioEncoder": Site(("norm_out",), "non_linearity"),
    "LTX2AudioDecoder": Site(("norm_out",), "non_linearity"),
    "LTX2LatentUpsamplerModel": Site(("initial_norm",), "initial_activation"),
    "LTXLatentUpsamplerModel": Site(("initial_norm",), "initial_activation"),
    "ResnetBlock2D": Site(("norm1", "norm2"), "nonlinearity", _no_time_embedding),
    "TemporalResnetBlock": Site(("norm1", "norm2"), "nonlinearity", _no_time_embedding),
    "Encoder": Site(("conv_norm_out",), "conv_act"),
    "Decoder": Site(("conv_norm_out",), "conv_act"),
    "HunyuanVideoResnetBlockCausal3D": Site(("norm1", "norm2"), "nonlinearity"),
    "HunyuanVideoEncoder3D": Site(("conv_norm_out",), "conv_act"),
    "HunyuanVideoDecoder3D": Site(("conv_norm_out",), "conv_act"),
    "HunyuanImageResnetBlock": Site(("norm1", "norm2"), "nonlinearity"),
}
RESIDUAL_BLOCKS = ("ResBlock",)
# Halves of a video VAE, which end in norm, activation and a convolution over time.
VIDEO_ENDS = ("LTX2VideoEncoder3d", "LTX2VideoDecoder3d")
PIXEL_NORMS = ("PerChannelRMSNorm", "LTX2AudioPixelNorm")


@dataclass
class Patched:
    """What `patch` changed; a context manager that undoes it at its end.

    Attributes:
        sites: names of the norms that are fused now, e.g. "decoder.mid_block.resnets.0.norm1".
    """

    sites: list[str] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put everything back as it was; twice is fine."""
        while self._undo:
            self._undo.pop()()
        self.sites.clear()

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch(model: nn.Module) -> Patched:
    """Fuse norm and SiLU wherever a known block of the model has them, in place.

    Args:
        model: any module; blocks of diffusers' LTX-2, LTX, HunyuanVideo, HunyuanImage and Stable Diffusion VAEs and latent
            upsamplers are known, and GroupNorm directly before SiLU in any `nn.Sequential`.
    Returns:
        `Patched`: the fused sites, `.undo()`, and a context manager.

    Contract: that of `group_norm_silu` and `pixel_norm_silu`. Blocks whose norm or activation has hooks, a forward of its own or
        no weights in memory are left alone. In the LTX-2 video VAE the fused norms write between the frames that a convolution
        over time repeats at its ends, and depth goes to space into a tensor without gaps: the same bits with fewer copies.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
        >>> handle = patch(model)
        >>> handle.sites
        ['0']
        >>> handle.undo()
    """
    patched = Patched()
    for name, block in list(model.named_modules()):
        prefix = f"{name}." if name else ""
        kind = type(block).__name__
        if kind in RESIDUAL_BLOCKS and _is_residual_block(block):
            _override(patched, block, _residual_block_forward)
            patched.sites += [f"{prefix}norm1", f"{prefix}norm2"]
        elif kind in SITES:
            _fuse_site(patched, block, SITES[kind], prefix)
            if kind == "LTX2VideoResnetBlock3d" and _is_plain_resnet(block):
                _override(patched, block, _video_resnet_forward)
            elif kind in VIDEO_ENDS and isinstance(block.norm_out, PixelNormSiLU) and is_plain(block.conv_out):
                _override(patched, block.conv_out, partial(_normed_convolution_forward, norm=block.norm_out))
                _replace(patched, block, {"norm_out": nn.Identity()})
        elif kind == "LTX2VideoUpsampler3d" and not block.residual and is_plain(block):
            _override(patched, block, _depth_to_space_forward)
        elif isinstance(block, nn.Sequential):
            for first, second in _pairs(block):
                _replace(patched, block, {first: _fused(block[int(first)]), second: nn.Identity()})
                patched.sites.append(prefix + first)
    return patched


def _fuse_site(patched: Patched, block: nn.Module, site: Site, prefix: str) -> None:
    activation = getattr(block, site.activation, None)
    norms = {name: getattr(block, name, None) for name in site.norms}
    fused = {name: _fused(norm) for name, norm in norms.items()}
    if type(activation) is not nn.SiLU or None in fused.values() or not is_plain(activation) or not site.free(block):
        return
    _replace(patched, block, {**fused, site.activation: nn.Identity()})
    patched.sites += [prefix + name for name in site.norms]


def _fused(norm: Any) -> nn.Module | None:
    if not is_plain(norm):
        return None
    if type(norm) is nn.GroupNorm:
        return GroupNormSiLU.sharing(norm)
    if type(norm).__name__ in PIXEL_NORMS and getattr(norm, "channel_dim", getattr(norm, "dim", 1)) == 1:
        return PixelNormSiLU(norm.eps)
    return None


def _pairs(block: nn.Sequential) -> Iterator[tuple[str, str]]:
    children = list(block.named_children())
    for (first, norm), (second, activation) in pairwise(children):
        if type(norm) is nn.GroupNorm and type(activation) is nn.SiLU and is_plain(norm) and is_plain(activation):
            yield first, second


def _replace(patched: Patched, block: nn.Module, modules: dict[str, nn.Module | None]) -> None:
    for name, module in modules.items():
        before = getattr(block, name)
        setattr(block, name, module)
        patched._undo.append(partial(setattr, block, name, before))


def _override(patched: Patched, block: nn.Module, forward: Callable[..., Tensor]) -> None:
    block.forward = MethodType(forward, block)
    patched._undo.append(lambda: block.__dict__.pop("forward", None))


def _is_residual_block(block: Any) -> bool:
    parts = [getattr(block, name, None) for name in ("conv1", "norm1", "conv2", "norm2", "activation")]
    norms = type(parts[1]) is nn.GroupNorm and type(parts[3]) is nn.GroupNorm
    return norms and type(parts[4]) is nn.SiLU and "forward" not in vars(block) and all(map(is_plain, parts))


def _residual_block_forward(block: Any, x: Tensor) -> Tensor:
    """`silu(gn2(conv2(silu(gn1(conv1(x))))) + x)`, the second activation after the residual."""
    y = apply_group_norm_silu(block.conv1(x), block.norm1, block.activation)
    y, norm = block.conv2(y), block.norm2
    if fuses(y, norm) and y.dtype == x.dtype and y.shape == x.shape:
        return group_norm_silu(y, norm.weight, norm.bias, norm.num_groups, norm.eps, residual=x)
    return block.activation(norm(y) + x)


def _is_plain_resnet(block: Any) -> bool:
    """Whether a block of the LTX-2 video VAE is norm, convolution, norm, convolution and sum, with its norms fused."""
    extra = ("conv_shortcut", "per_channel_scale1", "per_channel_scale2", "scale_shift_table")
    fused = isinstance(block.norm1, PixelNormSiLU) and isinstance(block.norm2, PixelNormSiLU)
    return fused and is_plain(block) and block.dropout.p == 0 and all(getattr(block, name) is None for name in extra)


def _padded(norm: PixelNormSiLU, convolution: Any, x: Tensor, causal: bool) -> Tensor:
    """What the convolution over time takes of the fused norm."""
    frames = convolution.kernel_size[0] - 1
    return norm.with_frames(x, *((frames, 0) if causal else (frames // 2, frames // 2)))


def _video_resnet_forward(
    block: Any, inputs: Tensor, temb: Tensor | None = None, generator: Any = None, causal: bool = True
) -> Tensor:
    parts = block.dropout, block.conv1, block.conv2
    if inputs.dtype not in ACTIVATION_DTYPES or torch.is_grad_enabled() or not all(map(is_plain, parts)):
        return type(block).forward(block, inputs, temb, generator, causal)
    # No name holds what a convolution has taken while the next one runs.
    y = block.conv1.conv(_padded(block.norm1, block.conv1, inputs, causal))
    y = _padded(block.norm2, block.conv2, y, causal)
    y = block.conv2.conv(y)
    return y.add_(inputs) if y.dtype == inputs.dtype else y + inputs


def _normed_convolution_forward(convolution: Any, x: Tensor, causal: bool = True, *, norm: PixelNormSiLU) -> Tensor:
    if x.dtype not in ACTIVATION_DTYPES or torch.is_grad_enabled():
        return type(convolution).forward(convolution, norm(x), causal)
    return convolution.conv(_padded(norm, convolution, x, causal))


def _depth_to_space_forward(block: Any, hidden_states: Tensor, causal: bool = True) -> Tensor:
    if torch.is_grad_enabled():
        return type(block).forward(block, hidden_states, causal)
    return _depth_to_space(block.conv(hidden_states, causal=causal), block.stride)


def _depth_to_space(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Channels (c, t, h, w) to frames, rows and columns, without the first t - 1 frames; as dense as x, and in its layout."""
    t, h, w = stride
    batch, channels, frames, height, width = x.shape
    layout = torch.channels_last_3d if not x.is_contiguous() and is_channels_last(x) else torch.contiguous_format
    shape = batch, channels // (t * h * w), frames * t - (t - 1), height * h, width * w
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    parts = x.unflatten(1, (-1, t, h, w)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    for source, first, last in ((parts[:, :, :1, t - 1 :], 0, 1), (parts[:, :, 1:], 1, shape[2])):
        target = (
            out[:, :, first:last].unflatten(4, (width, w)).unflatten(3, (height, h)).unflatten(2, source.shape[2:4])
        )
        target.copy_(source)
    return out
