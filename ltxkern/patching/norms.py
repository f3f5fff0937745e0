"""Norms of torch and of other stacks that a fused op may take the place of, each with its activation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxkern.nn import pixel_norm_silu_with_frames
from ltxkern.ops.checks import ACTIVATION_DTYPES
from ltxkern.ops.group_norm_silu import fuses, group_norm_silu
from ltxkern.ops.pixel_norm_silu import pixel_norm_silu
from ltxkern.patching.report import Site
from ltxkern.patching.watch import Fused, Part, stands

# Under x / max(|x|, this) a norm by length is one by root mean square with this squared, over the channels, added to the mean.
_SHORTEST = 1e-12


class Including(Part):
    """A norm that includes its activation, or that activation."""

    _ltxkern: Site


def takes(x: Tensor, weight: Tensor | None) -> bool:
    """Whether `pixel_norm_silu` gives what the composition would, in its dtype."""
    if x.dtype not in ACTIVATION_DTYPES or x.dim() < 2:
        return False
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return False
    return weight is None or weight.dtype == x.dtype


# A hook that was put in since the patch keeps a forward below, bound to a module that has its class back: the first line of each.
class FusedGroupNorm(Including):
    """nn.GroupNorm, SiLU included."""

    LIVE = frozenset({"eps", "num_groups"})

    def forward(self: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`silu(gn(x) [+ residual])`."""
        if not stands(self):
            return type(self).forward(self, x)
        if fuses(x, self) and (residual is None or (residual.dtype == x.dtype and residual.shape == x.shape)):
            call = functools.partial(
                group_norm_silu,
                weight=self.weight,
                bias=self.bias,
                num_groups=self.num_groups,
                eps=self.eps,
                residual=residual,
            )
            return self._ltxkern.serve(x, call)
        self._ltxkern.compose()
        y = super().forward(x)
        return F.silu(y if residual is None else y + residual)


class FusedFrameNorm(Including):
    """GroupNorm of each frame of a video, by a norm within it that is fused too."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, C, T, H, W)."""
        if not stands(self):
            return type(self).forward(self, x)
        frames = x.transpose(1, 2).flatten(0, 1)
        return self.norm_layer(frames).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class FusedPixelNorm(Including):
    """A norm by root mean square over the channels, SiLU included."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, C, *)."""
        if not stands(self):
            return type(self).forward(self, x)
        if takes(x, None):
            return self._ltxkern.serve(x, functools.partial(pixel_norm_silu, eps=self.eps))
        self._ltxkern.compose()
        return F.silu(super().forward(x))

    def with_frames(self: Any, x: Tensor, before: int, after: int) -> Tensor:
        """The result between copies of its first and of its last frame."""
        self._ltxkern.count(x, functools.partial(pixel_norm_silu, eps=self.eps))
        return pixel_norm_silu_with_frames(x, self.eps, before, after)


class FusedLengthNorm(Including):
    """A norm by length over the channels, times their root and a weight, SiLU included."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, C, *)."""
        if not stands(self):
            return type(self).forward(self, x)
        gamma = self._ltxkern_gamma(x)
        if takes(x, gamma):
            eps = _SHORTEST**2 / gamma.numel()
            return self._ltxkern.serve(x, functools.partial(pixel_norm_silu, eps=eps, weight=gamma.flatten()))
        self._ltxkern.compose()
        return F.silu(super().forward(x))

    def _ltxkern_gamma(self: Any, x: Tensor) -> Tensor:
        return self.gamma


class FusedLastDimNorm(Including):
    """An RMSNorm over the last dim, SiLU included."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, *, C)."""
        if not stands(self):
            return type(self).forward(self, x)
        weight = self.weight
        if not takes(x, weight):
            self._ltxkern.compose()
            return F.silu(super().forward(x))
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        call = functools.partial(pixel_norm_silu, eps=eps, weight=weight)
        return self._ltxkern.serve(x.movedim(-1, 1), call).movedim(1, -1)


class Passed(Including):
    """An activation behind norms that include it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x."""
        return x if stands(self) else type(self).forward(self, x)


class Kind(NamedTuple):
    """A class of norms, and what may take its place."""

    op: str
    mixin: type[Fused]
    misfit: Callable[[Any], str | None]
    residual: bool = False  # whether it may be added before the activation
    inner: str = ""  # the GroupNorm within it that does the work


def _group_misfit(norm: Any) -> str | None:
    return "has a weight and no bias" if norm.weight is not None and norm.bias is None else None


def _frame_misfit(norm: Any) -> str | None:
    return _group_misfit(norm.norm_layer)


def _channel_misfit(norm: Any) -> str | None:
    dim = getattr(norm, "channel_dim", getattr(norm, "dim", 1))
    return None if dim == 1 else f"normalises over dim {dim}, not over the channels"


def _length_misfit(norm: Any) -> str | None:
    if not norm.channel_first:
        return "normalises over the last dim"
    if isinstance(norm.bias, Tensor):
        return "adds a bias"
    return (
        None if norm.scale == norm.gamma.numel() ** 0.5 else f"scales by {norm.scale}, not by the root of its channels"
    )


def _last_dim_misfit(norm: Any) -> str | None:
    shape = norm.normalized_shape if isinstance(norm, nn.RMSNorm) else norm.dim
    if len(shape) != 1:
        return f"normalises over {len(shape)} dims"
    return "adds a bias" if getattr(norm, "bias", None) is not None else None


_VAE = "diffusers.models.autoencoders.autoencoder_kl_"
_LENGTH_NORMS = (
    "wan.WanRMS_norm",
    "qwenimage.QwenImageRMS_norm",
    "qwenimage21.QwenImage21RMS_norm",
    "hunyuanvideo15.HunyuanVideo15RMS_norm",
    "hunyuanimage_refiner.HunyuanImageRefinerRMS_norm",
)
KINDS: dict[str, Kind] = {
    "torch.nn.modules.normalization.GroupNorm": Kind("group_norm_silu", FusedGroupNorm, _group_misfit, residual=True),
    "torch.nn.modules.normalization.RMSNorm": Kind("pixel_norm_silu", FusedLastDimNorm, _last_dim_misfit),
    "diffusers.models.normalization.RMSNorm": Kind("pixel_norm_silu", FusedLastDimNorm, _last_dim_misfit),
    f"{_VAE}ltx2.PerChannelRMSNorm": Kind("pixel_norm_silu", FusedPixelNorm, _channel_misfit),
    f"{_VAE}ltx2_audio.LTX2AudioPixelNorm": Kind("pixel_norm_silu", FusedPixelNorm, _channel_misfit),
    f"{_VAE}mochi.MochiChunkedGroupNorm3D": Kind("group_norm_silu", FusedFrameNorm, _frame_misfit, inner="norm_layer"),
    **{_VAE + name: Kind("pixel_norm_silu", FusedLengthNorm, _length_misfit) for name in _LENGTH_NORMS},
}


def kind_of(norm: Any) -> Kind | None:
    """What is known of the very class of a norm."""
    return KINDS.get(f"{type(norm).__module__}.{type(norm).__qualname__}") if isinstance(norm, nn.Module) else None
