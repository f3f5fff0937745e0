"""The exact correction of a subtraction: which weights `W + delta - delta` does not restore, and what they were."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GROUP = 256
_ESCAPE = -128
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Correction:
    """The weights that a subtraction leaves wrong, sparse: offset in a group of 256 and distance in units of bits.

    Args:
        counts: (groups,) int16, wrong weights per group of 256 in row-major order.
        offsets: (n,) uint8, position within the group, ascending.
        codes: (n,) int8, right bit pattern minus wrong one as integers; -128 says that `escapes` holds the next one.
        escapes: (m,) int of the weight's width, distances that a code cannot hold, in order.
    """

    counts: Tensor
    offsets: Tensor
    codes: Tensor
    escapes: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the correction; two for a wrong weight and 1/128 for each weight."""
        return sum(tensor.nbytes for tensor in (self.counts, self.offsets, self.codes, self.escapes))


def bit_pattern(weight: Tensor) -> Tensor:
    """The contiguous tensor as a flat view of integers of its width."""
    return weight.view(-1).view(_WORDS[weight.dtype.itemsize])


def record_correction(right: Tensor, wrong: Tensor) -> Correction:
    """What turns `wrong` into `right`, bit for bit.

    Args:
        right, wrong: contiguous, one shape and dtype.

    Numerical contract: exact for every bit pattern, NaN and signed zero included.
    Bytes: read both once; about 13 bytes of temporaries per wrong weight and 2 per weight.
    """
    target, current = bit_pattern(right), bit_pattern(wrong)
    index = torch.nonzero(target != current).view(-1)
    distance = target[index] - current[index]
    groups = -(-target.numel() // _GROUP)
    counts = torch.zeros(groups, dtype=torch.int64, device=right.device)
    # bincount would synchronise for its length; every index lies below numel, so the length is known.
    counts.scatter_add_(0, index // _GROUP, torch.ones_like(index))
    escaped = (distance < _ESCAPE + 1) | (distance > -_ESCAPE - 1)
    codes = torch.where(escaped, torch.full_like(distance, _ESCAPE), distance).to(torch.int8)
    return Correction(counts.to(torch.int16), (index % _GROUP).to(torch.uint8), codes, distance[escaped].clone())


def apply_correction(weight: Tensor, correction: Correction) -> Tensor:
    """Puts the recorded bits back, in place.

    Args:
        weight: contiguous; the `wrong` of `record_correction`.

    Returns:
        `weight`, equal to the recorded `right` bit for bit.
    """
    groups = torch.arange(correction.counts.numel(), device=weight.device) * _GROUP
    index = torch.repeat_interleave(groups, correction.counts.to(torch.int64), output_size=correction.offsets.numel())
    index += correction.offsets
    bits = bit_pattern(weight)
    distance = correction.codes.to(bits.dtype, copy=True)
    if correction.escapes.numel():
        distance.masked_scatter_(correction.codes == _ESCAPE, correction.escapes)
    bits[index] = distance.add_(bits[index])
    return weight
