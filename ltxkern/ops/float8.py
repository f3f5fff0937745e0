"""Rounding to float8 e4m3, to nearest or stochastically from a counter: the torch reference of what the merge kernels do."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
WORD = 0xFFFFFFFF


def _mixed(word: Tensor) -> Tensor:
    """A mix of 32-bit words (in int64) in which every input bit reaches every output bit."""
    word = word ^ (word >> 16)
    word = (word * 0x7FEB352D) & WORD
    word = word ^ (word >> 15)
    word = (word * 0x846CA68B) & WORD
    return word ^ (word >> 16)


def counter_bits(seed: int, index: Tensor) -> Tensor:
    """32 random bits (in int64) for each index: of seed and index alone, whatever order or tiles the indices come in."""
    low, high = (
        torch.tensor(part, dtype=torch.int64, device=index.device) for part in (seed & WORD, seed >> 32 & WORD)
    )
    mixed = _mixed((index & WORD) ^ _mixed(low))
    return _mixed(mixed ^ ((index >> 32) & WORD) ^ _mixed(high ^ 0x9E3779B9))


def to_e4m3(values: Tensor) -> Tensor:
    """Nearest e4m3 value, clamped to the largest finite one; NaN stays NaN."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def stochastic_e4m3(values: Tensor, index: Tensor, seed: int) -> Tensor:
    """fp32 to one of the two neighbours in e4m3, the nearer the likelier: `floor(|v| / step + u) step`, u of 20 bits.

    Args:
        values: fp32.
        index: int64, position of each value in the whole weight.
        seed: of the counter-based bits.
    Returns:
        e4m3, clamped to the largest finite value; NaN stays NaN.
    """
    magnitude = values.abs().clamp(max=E4M3_MAX)
    missing = values.isnan()
    magnitude = torch.where(missing, 0.0, magnitude)
    exponent = torch.frexp(magnitude).exponent - 1
    step = torch.where(magnitude == 0, -6, exponent).clamp(min=-6) - 3
    units = torch.ldexp(magnitude, 20 - step).to(torch.int64)
    whole = (units + (counter_bits(seed, index) >> 12)) >> 20
    rounded = torch.ldexp(whole.to(torch.float32), step)
    rounded = torch.where(missing, torch.nan, torch.copysign(rounded, values))
    return rounded.to(torch.float8_e4m3fn)
