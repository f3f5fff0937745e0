"""Values for checks, and the ways in which they may lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def poisoned(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An output full of NaN, so that an element never written is seen."""
    return torch.full(like.shape, torch.nan, dtype=dtype or like.dtype, device=like.device)


def strided(x: Tensor) -> Tensor:
    """The same values, every second element of a wider tensor."""
    view = x.repeat_interleave(2, dim=-1)[..., ::2]
    assert x.shape[-1] < 2 or not view.is_contiguous()
    return view


def transposed(x: Tensor) -> Tensor:
    """The same values with the last two dims swapped in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def channels_last(x: Tensor) -> Tensor:
    """The same values of (N, C, *), channels innermost in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def misaligned(x: Tensor, by: int = 1) -> Tensor:
    """The same values, contiguous, `by` elements past an aligned address."""
    return x.new_empty(x.numel() + by)[by:].view(x.shape).copy_(x)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Standard normal numbers of a fixed seed, drawn in fp64 so that every dtype holds the same ones rounded."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
    return (scale * drawn).to(dtype).to(torch.get_default_device())
