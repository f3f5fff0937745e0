"""The LTX-2 video VAE with fewer copies: norms write between frames that convolutions repeat, and depth goes to space densely.

The bits are those of its own forwards; these run where gradients are wanted or something traces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ltxkern.compiled.tensors import is_channels_last
from ltxkern.ops.checks import ACTIVATION_DTYPES, is_plain
from ltxkern.patching.norms import FusedPixelNorm
from ltxkern.patching.report import Report
from ltxkern.patching.watch import Fused, Group, Part, mix, own_class, stands

_VAE = "diffusers.models.autoencoders.autoencoder_kl_ltx2"
_HALVES = ("LTX2VideoEncoder3d", "LTX2VideoDecoder3d")
# What a residual block may hold beside norms and convolutions.
_EXTRA = ("conv_shortcut", "per_channel_scale1", "per_channel_scale2", "scale_shift_table")


def _padded(norm: Any, convolution: Any, x: Tensor, causal: bool) -> Tensor:
    """What the convolution over time takes of the fused norm."""
    frames = convolution.kernel_size[0] - 1
    padded: Tensor = norm.with_frames(x, *((frames, 0) if causal else (frames // 2, frames // 2)))
    return padded


def _writes(x: Tensor) -> bool:
    """Whether norms may write into a longer buffer."""
    if x.dtype not in ACTIVATION_DTYPES or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.is_meta or not torch.is_autocast_enabled(x.device.type)


class PaddingBlock(Fused):
    """LTX2VideoResnetBlock3d of norm, convolution, norm, convolution and sum."""

    def forward(
        self: Any, inputs: Tensor, temb: Tensor | None = None, generator: Any = None, causal: bool = True
    ) -> Tensor:
        """As its own."""
        if not stands(self):
            return type(self).forward(self, inputs, temb, generator, causal)
        if not _writes(inputs) or not all(map(is_plain, (self.dropout, self.conv1, self.conv2))):
            return super().forward(inputs, temb, generator, causal)
        # No name holds what a convolution has taken while the next one runs.
        y = self.conv1.conv(_padded(self.norm1, self.conv1, inputs, causal))
        y = _padded(self.norm2, self.conv2, y, causal)
        y = self.conv2.conv(y)
        return y.add_(inputs) if y.dtype == inputs.dtype else y + inputs


class DeferredNorm(FusedPixelNorm):
    """A norm that the convolution behind it applies."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x."""
        return x if stands(self) else type(self).forward(self, x)

    def apply_norm(self, x: Tensor) -> Tensor:
        """The norm and its activation."""
        return super().forward(x)


@dataclass
class NormBefore:
    """The norm that a convolution applies first."""

    norm: Any
    group: Group


class NormedConvolution(Part):
    """LTX2VideoCausalConv3d behind a norm that it applies itself."""

    LIVE = frozenset({"conv", "kernel_size"})
    _ltxkern: NormBefore

    def forward(self: Any, x: Tensor, causal: bool = True) -> Tensor:
        """As norm, activation and its own."""
        if not stands(self):
            return type(self).forward(self, x, causal)
        norm = self._ltxkern.norm
        if not _writes(x):
            return super().forward(norm.apply_norm(x), causal)
        return self.conv(_padded(norm, self, x, causal))


class DenseDepthToSpace(Fused):
    """LTX2VideoUpsampler3d without a residual."""

    def forward(self: Any, hidden_states: Tensor, causal: bool = True) -> Tensor:
        """As its own, without gaps."""
        if not stands(self):
            return type(self).forward(self, hidden_states, causal)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(hidden_states, causal)
        return depth_to_space(self.conv(hidden_states, causal=causal), self.stride)


def depth_to_space(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
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


def extend(block: Any, norms: list[nn.Module], group: Group, report: Report) -> None:
    """Of a block of the video VAE whose norms have just been fused, the convolutions as well."""
    kind = own_class(block)
    if kind.__module__ != _VAE or not all(isinstance(norm, FusedPixelNorm) for norm in norms):
        return
    if kind.__name__ == "LTX2VideoResnetBlock3d" and _is_plain_resnet(block):
        mix(block, PaddingBlock, group, group)
        report.watch(block, group, ("conv1", "conv2", "dropout", *_EXTRA))
        report.watch(block.dropout, group, ("p",))
    elif kind.__name__ in _HALVES and norms == [block.norm_out] and is_plain(block.conv_out):
        site = block.norm_out._ltxkern
        group.give_back(block.norm_out)
        mix(block.norm_out, DeferredNorm, site, group)
        mix(block.conv_out, NormedConvolution, NormBefore(block.norm_out, group), group)


def _is_plain_resnet(block: Any) -> bool:
    """Whether a block is norm, convolution, norm, convolution and sum."""
    return is_plain(block) and block.dropout.p == 0 and all(getattr(block, name) is None for name in _EXTRA)


def upsampler(block: Any, report: Report) -> bool:
    """Whether a module is an upsampler of the video VAE; then it takes the dense way where that is the same."""
    kind = own_class(block)
    if kind.__module__ != _VAE or kind.__name__ != "LTX2VideoUpsampler3d":
        return False
    if not block.residual and is_plain(block) and not stands(block):
        group = Group()
        mix(block, DenseDepthToSpace, group, group)
        report.watch(block, group, ("forward", "residual"))
        report.add(group)
    return True
