"""Drop-in modules: fused ops with the parameters and state-dict keys of what they replace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxkern.compiled.tensors import is_channels_last
from ltxkern.ops.checks import ACTIVATION_DTYPES
from ltxkern.ops.group_norm_silu import fuses, group_norm_silu
from ltxkern.ops.pixel_norm_silu import pixel_norm_silu
from ltxkern.ops.qk_norm_rope import RotaryTables, qk_norm_rope
from ltxkern.ops.rms_norm_modulate import rms_norm_modulate


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
    """`silu(x rsqrt(mean_c(x^2) + eps) [gamma])` in one op.

    Args:
        eps: 1e-8 in the LTX-2 video VAE, 1e-6 in its audio VAE; of a norm by length, as Wan has it, 1e-24 / C.
        gamma: shape of the weight, e.g. (C, 1, 1, 1) as the norms of the Wan, QwenImage and HunyuanVideo-1.5 VAEs have it; None for
            the norms of the LTX-2 VAEs, which have no parameters.

    Example:
        >>> import torch, ltxkern.nn
        >>> list(ltxkern.nn.PixelNormSiLU(gamma=(8, 1, 1)).state_dict())
        ['gamma']
    """

    gamma: nn.Parameter | None

    def __init__(self, eps: float = 1e-8, gamma: Sequence[int] | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("gamma", None if gamma is None else nn.Parameter(torch.ones(tuple(gamma))))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) to (N, C, *)."""
        gamma = self.gamma
        if x.dtype in ACTIVATION_DTYPES and (gamma is None or gamma.dtype == x.dtype):
            return pixel_norm_silu(x, self.eps, weight=None if gamma is None else gamma.flatten())
        y = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + self.eps)
        return F.silu(y if gamma is None else y * gamma)

    def with_frames(self, x: Tensor, before: int, after: int) -> Tensor:
        """`forward` without a gamma between copies of its first and last frame, see `pixel_norm_silu_with_frames`."""
        return pixel_norm_silu_with_frames(x, self.eps, before, after)

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"eps={self.eps}"


def pixel_norm_silu_with_frames(x: Tensor, eps: float, before: int, after: int) -> Tensor:
    """`pixel_norm_silu` between copies of its first and of its last frame: what a convolution over time takes that pads so.

    Args:
        x: (N, C, F, H, W), fp16, bf16 or fp32, without gradients.
        eps: added to the mean square.
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
    inner = pixel_norm_silu(x, eps, out=padded.narrow(2, before, frames))
    padded[:, :, :before] = inner[:, :, :1]
    padded[:, :, before + frames :] = inner[:, :, -1:]
    return padded


class RMSNormModulate(nn.Module):
    """`x rsqrt(mean(x^2) + eps) [weight] (1 + scale) + shift` over the last dim in one op; the key is that of an RMSNorm.

    Args:
        dim: of x and the modulation.
        eps: added to the mean square.
        elementwise_affine: whether there is a `weight` (dim,); the norms of the LTX-2 transformer have none.

    Example:
        >>> import torch, ltxkern.nn
        >>> norm = ltxkern.nn.RMSNormModulate(8)
        >>> norm(torch.randn(2, 5, 8), torch.zeros(2, 1, 8), torch.zeros(2, 1, 8)).shape
        torch.Size([2, 5, 8])
    """

    weight: nn.Parameter | None

    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = False) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.register_parameter("weight", nn.Parameter(torch.ones(dim)) if elementwise_affine else None)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, rows: Tensor | None = None) -> Tensor:
        """As `ltxkern.rms_norm_modulate`: x (..., dim); scale and shift over it, or tables that `rows` points into."""
        return rms_norm_modulate(x, scale, shift, eps=self.eps, weight=self.weight, rows=rows)

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"{self.dim}, eps={self.eps}, elementwise_affine={self.weight is not None}"


class QKNormRope(nn.Module):
    """RMSNorm of queries and keys over all heads, then their rotation, in one op.

    The keys are `norm_q.weight` and `norm_k.weight`, as in an attention that holds the two norms by these names.

    Args:
        heads, head_dim: of queries and keys.
        eps: added to the mean square.
        layout: "split" (LTX-2.3) or "interleaved".

    Example:
        >>> import torch, ltxkern.nn
        >>> norms = ltxkern.nn.QKNormRope(heads=2, head_dim=4)
        >>> cos, sin = torch.ones(1, 2, 5, 2), torch.zeros(1, 2, 5, 2)
        >>> q, k = norms(torch.randn(1, 5, 8), torch.randn(1, 5, 8), ltxkern.nn.RotaryTables(cos, sin))
    """

    def __init__(self, heads: int, head_dim: int, eps: float = 1e-6, layout: str = "split") -> None:
        super().__init__()
        self.heads, self.eps, self.layout = heads, eps, layout
        self.norm_q = nn.RMSNorm(heads * head_dim, eps=eps)
        self.norm_k = nn.RMSNorm(heads * head_dim, eps=eps)

    def forward(
        self, q: Tensor, k: Tensor, tables: RotaryTables, k_tables: RotaryTables | None = None
    ) -> tuple[Tensor, Tensor]:
        """q (B, T, heads * head_dim) and k (B, L, heads * head_dim), rotated; `k_tables` where keys have positions of their own."""
        k_cos, k_sin, k_rows = k_tables or (None, None, None)
        return qk_norm_rope(
            q,
            k,
            self.norm_q.weight,
            self.norm_k.weight,
            tables.cos,
            tables.sin,
            eps=self.eps,
            layout=self.layout,
            rows=tables.rows,
            heads=None if tables.rows is None else self.heads,
            k_cos=k_cos,
            k_sin=k_sin,
            k_rows=k_rows,
        )

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"heads={self.heads}, eps={self.eps}, layout={self.layout}"
