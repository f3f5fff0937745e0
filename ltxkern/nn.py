"""Drop-in modules: fused norm and activation with the parameters and state-dict keys of the norm they replace."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxkern.compiled.tensors import is_channels_last
from ltxkern.ops.checks import ACTIVATION_DTYPES
from ltxkern.ops.group_norm_silu import fuses, group_norm_silu
from ltxkern.ops.pixel_norm_silu import pixel_norm_silu


class GroupNormSiLU(nn.GroupNorm):
    """`silu(group_norm(x))` in one op; parameters and keys are those of `nn.GroupNorm`.

    Example:
        >>> import torch, ltxkern.nn
        >>> ltxkern.nn.GroupNormSiLU(8, 32)(torch.randn(1, 32, 4, 4)).shape
        torch.Size([1, 32, 4, 4])
    """

    @classmethod
    def sharing(cls, norm: nn.GroupNorm) -> GroupNormSiLU:
        """The fused module on the very parameters of an existing norm."""
        fused = cls(norm.num_groups, norm.num_channels, norm.eps, affine=False)
        fused.affine = norm.affine
        fused.weight, fused.bias = norm.weight, norm.bias
        return fused.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) to (N, C, *)."""
        if fuses(x, self):
            return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)
        return F.silu(super().forward(x))


class PixelNormSiLU(nn.Module):
    """`silu(x rsqrt(mean_c(x^2) + eps))` in one op; no parameters.

    Args:
        eps: 1e-8 in the LTX-2 video VAE, 1e-6 in its audio VAE.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) to (N, C, *)."""
        if x.dtype in ACTIVATION_DTYPES:
            return pixel_norm_silu(x, self.eps)
        return F.silu(x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + self.eps))

    def with_frames(self, x: Tensor, before: int, after: int) -> Tensor:
        """`forward` between copies of its first and of its last frame: what a convolution over time takes that pads so.

        Args:
            x: (N, C, F, H, W), fp16, bf16 or fp32, without gradients.
            before, after: copies of the first frame, and of the last.
        Returns:
            (N, C, before + F + after, H, W), channels-last where x is. The op writes in place: nothing is concatenated.
        """
        frames, last = x.shape[2], not x.is_contiguous() and is_channels_last(x)
        padded = torch.empty(
            (*x.shape[:2], before + frames + after, *x.shape[3:]),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last_3d if last else torch.contiguous_format,
        )
        inner = pixel_norm_silu(x, self.eps, out=padded.narrow(2, before, frames))
        padded[:, :, :before] = inner[:, :, :1]
        padded[:, :, before + frames :] = inner[:, :, -1:]
        return padded

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"eps={self.eps}"
