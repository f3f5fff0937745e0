"""Noise schedules: the shifted LTX-2 schedule, the fixed lists of the distilled models, and the res2s coefficients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ltxkern.ops.res2s_step import Res2sStep, res2s_coefficients, res2s_steps, sde_coefficients

__all__ = [
    "BASE_SHIFT_TOKENS",
    "DEFAULT_TOKENS",
    "DISTILLED_SIGMAS",
    "FP32_MAX_TOKENS",
    "MAX_SHIFT_TOKENS",
    "STAGE_2_SIGMAS",
    "TILED_STAGE_2_SIGMAS",
    "Res2sStep",
    "ltx2_sigmas",
    "res2s_coefficients",
    "res2s_steps",
    "sde_coefficients",
]

BASE_SHIFT_TOKENS = 1024
MAX_SHIFT_TOKENS = 4096
DEFAULT_TOKENS = 4096
FP32_MAX_TOKENS = 40_000
MAX_SHIFT = 700.0

STAGE_2_SIGMAS = (0.909375, 0.725, 0.421875, 0.0)
DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
TILED_STAGE_2_SIGMAS = (0.625, 0.4, 0.0)


def ltx2_sigmas(
    steps: int,
    tokens: int = DEFAULT_TOKENS,
    *,
    base_shift: float = 0.95,
    max_shift: float = 2.05,
    terminal: float = 0.1,
    stretch: bool = True,
) -> Tensor:
    """Shifted noise schedule of LTX-2: longer videos spend more steps at high noise.

    With `t_i = 1 - i / steps`: `shift = base + (max - base)(tokens - 1024) / (4096 - 1024)`, not clamped;
    `sigma_i = e^shift / (e^shift + 1/t_i - 1)`; with `stretch`, `z = 1 - sigma` over the nonzero entries is scaled so that the
    last nonzero sigma is `terminal`.

    Args:
        steps: number of steps, at least 1. One step is (1, 0): there is nothing to stretch.
        tokens: video tokens of the stage, frames * height * width of the latent.
        base_shift, max_shift: shift at 1024 and at 4096 tokens.
        terminal: last nonzero sigma with `stretch`, in (0, 1).
        stretch: whether the terminal value is enforced.
    Returns:
        (steps + 1,) fp32 on the CPU, from 1 to 0; strictly decreasing with `stretch`.
    Raises:
        TypeError, ValueError: each names the parameter.

    Contract: exact. Up to 40,000 tokens in fp32 in the official order of operations: that formula is ill-conditioned for long
    videos (5e-4 off at 31,000 tokens), so only the same order gives the same numbers. Above, and where fp32 no longer tells two
    sigmas apart, in fp64, well conditioned at every length.
    Source: the LTX-2 scheduler; Esser et al. 2024 (resolution-dependent shift).
    """
    _check_schedule(steps, tokens, base_shift, max_shift, terminal)
    slope = (max_shift - base_shift) / (MAX_SHIFT_TOKENS - BASE_SHIFT_TOKENS)
    shift = tokens * slope + (base_shift - slope * BASE_SHIFT_TOKENS)
    if steps == 1:
        return torch.tensor([1.0, 0.0])
    if abs(shift) > MAX_SHIFT:
        legal = "0.95 and 2.05"
        if (base_shift, max_shift) == (0.95, 2.05):
            most = int((MAX_SHIFT - base_shift) / slope + BASE_SHIFT_TOKENS)
            legal = f"at most {most} tokens, by fewer frames or a smaller size"
        raise ValueError(f"base_shift and max_shift give a shift of {shift:g} at {tokens} tokens: use {legal}")
    if tokens <= FP32_MAX_TOKENS:
        sigmas = _sigmas_fp32(steps, shift, terminal if stretch else None)
        if bool((sigmas.diff() < 0).all()):
            return sigmas
    return _sigmas_fp64(steps, shift, terminal if stretch else None)


def _check_schedule(steps: int, tokens: int, base_shift: float, max_shift: float, terminal: float) -> None:
    for name, count in (("steps", steps), ("tokens", tokens)):
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name} must be an int, got {type(count).__name__}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}: use 1")
    for name, shift in (("base_shift", base_shift), ("max_shift", max_shift)):
        if not math.isfinite(shift):
            raise ValueError(f"{name} must be finite, got {shift}")
    if not 0.0 < terminal < 1.0:
        raise ValueError(f"terminal must be between 0 and 1, got {terminal}: use 0.1")


def _sigmas_fp32(steps: int, shift: float, terminal: float | None) -> Tensor:
    """The official order of operations, rounded to fp32 after each."""
    times = torch.linspace(1.0, 0.0, steps + 1)[:-1]
    factor = math.exp(shift)
    sigmas = factor / (factor + (1 / times - 1))
    if terminal is not None:
        complement = 1.0 - sigmas
        sigmas = 1.0 - complement / (complement[-1] / (1.0 - terminal))
    return torch.cat([sigmas, torch.zeros(1)])


def _sigmas_fp64(steps: int, shift: float, terminal: float | None) -> Tensor:
    """The same formula through the odds r = i / (steps - i), `1 - sigma = r / (e^shift + r)`, which cancels nowhere."""
    inverse = math.exp(-shift)
    odds = [i / (steps - i) for i in range(steps)]
    if terminal is None:
        sigmas = [1.0 / (1.0 + r * inverse) for r in odds]
    else:
        last = odds[-1]
        sigmas = [1.0 - (1.0 - terminal) * (r / last) * (1.0 + last * inverse) / (1.0 + r * inverse) for r in odds]
    return torch.tensor([*sigmas, 0.0])
