"""RoPE tables of a forward, from diffusers' embedding: a row per value of a coordinate where these are known, else per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltxkern.ops.qk_norm_rope import RotaryTables
from ltxkern.pipeline.sampling.coordinates import Coordinates

Embedding = Callable[[Tensor], tuple[Tensor, Tensor]]


def rotary_tables(embedding: Embedding, positions: Tensor, coordinates: Coordinates | None) -> RotaryTables:
    """Cosines and sines of positions, the same numbers in either form.

    Args:
        embedding: positions (B, axes, T, 2) to split tables (B, heads, T, d/2); a pair depends on one axis, and axes take turns.
        positions: of all tokens; not read where the coordinates are given.
        coordinates: of all tokens; tables of 16 x 34 x 60 latents are 0.6 MB with them and 535 MB without.
    """
    if coordinates is None:
        return RotaryTables(*embedding(positions))
    counts = [len(bounds) for bounds in coordinates.bounds]
    # Every value on every axis, of which its own is kept.
    cos, sin = embedding(torch.cat(coordinates.bounds).expand(1, len(counts), -1, 2))

    def by_row(table: Tensor) -> Tensor:
        places = table[0].transpose(0, 1).flatten(1)
        columns = F.pad(places, (-places.shape[1] % len(counts), 0)).unflatten(1, (-1, len(counts)))
        return torch.cat([part[..., axis] for axis, part in enumerate(columns.split(counts))])

    return RotaryTables(by_row(cos), by_row(sin), coordinates.rows)


class KeptTables:
    """The tables of a model's embeddings, each kept while forwards come with the coordinates that it was made for."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Coordinates, Any, RotaryTables]] = {}

    def of(
        self, name: str, embedding: Embedding, positions: Tensor, coordinates: Coordinates | None, *, alone: bool
    ) -> RotaryTables:
        """`rotary_tables` by the embedding of this name; `alone` for those of the first axis alone."""
        used = coordinates.first_axis() if alone and coordinates is not None else coordinates
        if coordinates is None or torch.compiler.is_compiling():
            return rotary_tables(embedding, positions, used)
        known = self._made.get(name)
        if known is None or known[0] is not coordinates or known[1] is not embedding:
            known = self._made[name] = (coordinates, embedding, rotary_tables(embedding, positions, used))
        return known[2]
