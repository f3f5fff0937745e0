"""Positions of tokens by axis: every value that occurs, once, and which one a token has."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coordinates:
    """What the positions of tokens are made of. A video of 16 x 34 x 60 latents has 110 values for its 32,640 tokens.

    bounds: for each axis (N_axis, 2) fp32, [start, end) of every value.
    rows: (1 or B, axes, T) int32, the value of a token on each axis, counted through the values of all axes.
    """

    bounds: tuple[Tensor, ...]
    rows: Tensor

    @classmethod
    def on_grid(cls, *bounds: Tensor) -> Coordinates:
        """Tokens at all combinations of these values, those of the last axis fastest."""
        ends = accumulate(len(axis) for axis in bounds)
        numbers = [
            torch.arange(end - len(axis), end, dtype=torch.int32, device=axis.device)
            for end, axis in zip(ends, bounds, strict=True)
        ]
        grid = torch.meshgrid(*numbers, indexing="ij")
        return cls(bounds, torch.stack([axis.flatten() for axis in grid])[None])

    def positions(self, batch: int) -> Tensor:
        """fp32 (batch, axes, T, 2): start and end of every token on each axis."""
        values = torch.cat(self.bounds)[self.rows.long()]
        return values.expand(batch, -1, -1, -1).contiguous()

    def joined(self, others: Coordinates) -> Coordinates:
        """These tokens, then the others."""
        before = seen = 0
        rows, further = [], []
        for axis, (own, other) in enumerate(zip(self.bounds, others.bounds, strict=True)):
            # Behind this axis' values come those of the others on it.
            before += len(own)
            rows.append(self.rows[:, axis] + seen)
            further.append(others.rows[:, axis] + before)
            seen += len(other)
        bounds = tuple(torch.cat(pair) for pair in zip(self.bounds, others.bounds, strict=True))
        return Coordinates(bounds, torch.cat([torch.stack(rows, 1), torch.stack(further, 1)], dim=2))

    def part(self, tokens: slice) -> Coordinates:
        """Those of some tokens."""
        return Coordinates(self.bounds, self.rows[:, :, tokens])

    def first_axis(self) -> Coordinates:
        """On the first axis alone."""
        return Coordinates(self.bounds[:1], self.rows[:, :1])
