"""What a forward of the transformer takes: per modality on the host's terms, and as the tensors the model reads.

RoPE tables among them: from diffusers' embedding, with a row per value of a coordinate where these are known, else per token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltxkern.ops.qk_norm_rope import RotaryTables
from ltxkern.pipeline.sampling.coordinates import Coordinates

if TYPE_CHECKING:
    from ltxkern.pipeline.parallel.by_token import TokenShards

Embedding = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ModalityInput:
    """What one modality brings to a forward.

    Args:
        latent: (B, T, C) packed noisy tokens in the model dtype.
        sigma: noise level as a host float, in [0, 1].
        mask: (B, T, 1) fp32 denoise mask (0 keeps a token, 1 denoises it), or None for all ones.
        positions: (B, 3, T, 2) for video, (B, 1, T, 2) for audio; fp32 [start, end), seconds on the time axis.
        context: (B, L, D) text embeddings in the model dtype; every row is valid, there is no mask.
        levels: the distinct values of `mask`, each exactly as fp32, where the caller knows them: the timestep
            embedding and its projection are then computed once per value and not once per token. A mask value that is
            not among them takes the first one.
        coordinates: what `positions` are made of by axis, where the caller knows: RoPE tables then have a row for each
            value on an axis and not for each token.
    """

    latent: Tensor
    sigma: float
    mask: Tensor | None
    positions: Tensor
    context: Tensor
    levels: tuple[float, ...] | None = None
    coordinates: Coordinates | None = None


@dataclass(frozen=True)
class Perturbation:
    """What one guidance branch leaves out: self-attention of some blocks, or the attention between modalities."""

    skip_video_self_attn_blocks: tuple[int, ...] = ()
    skip_audio_self_attn_blocks: tuple[int, ...] = ()
    disable_a2v_cross_attn: bool = False
    disable_v2a_cross_attn: bool = False


@dataclass(frozen=True)
class Batch:
    """Branches that go through the blocks in one batch.

    perturbations: of each; the batch is split evenly over them.
    texts: the number of each one's text among those of the forward. Several: all branches have the tokens of the forward, once
        for each of them; one: the tokens are those of the whole batch, and so is the text.
    """

    perturbations: tuple[Perturbation, ...] = (Perturbation(),)
    texts: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class ModalityTensors:
    """One modality of a forward on the device; timesteps carry the model's scale (sigma * 1000), fp32."""

    tokens: Tensor  # (B, T, C)
    timestep: Tensor  # (B, N): one per token, one for all, or with `rows` one per distinct value
    sigma: Tensor  # (B,)
    positions: Tensor  # (B, axes, T, 2)
    contexts: tuple[Tensor, ...]  # (B, L, D) each, the texts of branches that share all the rest
    rows: Tensor | None = None  # (B, T) int64: which of the N timesteps a token has; out of `stack`, of all B * N
    coordinates: Coordinates | None = None  # of the positions

    def part(self, own: slice) -> ModalityTensors:
        """These tokens with their timesteps (where they differ) and positions."""
        shared = self.rows is not None or self.timestep.shape[1] != self.tokens.shape[1]
        return replace(
            self,
            tokens=self.tokens[:, own],
            timestep=self.timestep if shared else self.timestep[:, own],
            positions=self.positions[:, :, own],
            rows=None if self.rows is None else self.rows[:, own],
            coordinates=self.coordinates and self.coordinates.part(own),
        )


@dataclass(frozen=True)
class CrossStream:
    """What the attention between the modalities reads of one of them."""

    modulation: Tensor  # (B, N, 4 * D): scale, shift for a2v, scale, shift for v2a
    gate: Tensor  # (B, 1, D)
    rope: RotaryTables


@dataclass(frozen=True)
class Stream:
    """What every block of a forward reads of one modality."""

    contexts: tuple[Tensor, ...]  # (B, L, D) each: the texts of the branches, once each
    embedded: Tensor  # (B, N, D): its timesteps, of which the modulation is made
    modulation: Tensor  # (B, N, 9 * D): shift, scale, gate of self-attention, feed-forward, text attention
    prompt_modulation: Tensor  # (B, 1, 2 * D): shift, scale
    rope: RotaryTables
    cross: CrossStream | None  # None where the other modality is absent
    rows: Tensor | None = None  # (B, T) int64 into B * N; None where N is 1 or T
    shards: TokenShards | None = None  # where its tokens are shared out over ranks

    def repeated(self, times: int) -> Stream:
        """Of a batch with every item so many times, all items in turn; the texts stay."""
        if times == 1:
            return self
        rows = None if self.rows is None else self.rows.repeat(times, 1)

        def each(vectors: Tensor) -> Tensor:
            # Tables serve any batch, and so does the row of a single item.
            return vectors if rows is not None or vectors.shape[0] == 1 else vectors.repeat(times, 1, 1)

        cross = self.cross
        if cross is not None:
            cross = CrossStream(each(cross.modulation), each(cross.gate), _repeated(cross.rope, times))
        rope = _repeated(self.rope, times)
        return replace(self, modulation=each(self.modulation), rope=rope, cross=cross, rows=rows)


def _repeated(rope: RotaryTables, times: int) -> RotaryTables:
    if rope.rows is None:
        return RotaryTables(*(table.repeat(times, 1, 1, 1) if table.shape[0] > 1 else table for table in rope[:2]))
    return rope._replace(rows=rope.rows.repeat(times, 1, 1)) if rope.rows.shape[0] > 1 else rope


def _float32_exact(value: float) -> bool:
    return ctypes.c_float(value).value == value


def timesteps(item: ModalityInput, mask: Tensor | None) -> Tensor:
    """mask * sigma as (B, T, 1), or (B, 1, 1) without a mask: fp32, or fp64 where sigma is no fp32 number."""
    dtype = torch.float32 if _float32_exact(item.sigma) else torch.float64
    if mask is None:
        return item.latent.new_full((item.latent.shape[0], 1, 1), item.sigma, dtype=dtype)
    return mask.to(dtype) * item.sigma


def device_tensors(item: ModalityInput, scale: float) -> ModalityTensors:
    """The tensors of one branch and modality; `scale` is the model's factor on sigma."""
    # sigma * scale is rounded once: for an fp32 sigma the fp64 product is exact, so both precisions agree.
    sigma = item.latent.new_full((item.latent.shape[0],), item.sigma * scale, dtype=torch.float32)
    mask, rows = _distinct(item)
    timestep = (timesteps(item, mask) * scale).float().squeeze(-1)
    return ModalityTensors(item.latent, timestep, sigma, item.positions, (item.context,), rows, item.coordinates)


def _distinct(item: ModalityInput) -> tuple[Tensor | None, Tensor | None]:
    """The mask values to embed, (B, N, 1), and each token's place among them, None where they are one or T."""
    if item.mask is None or item.levels is None:
        return item.mask, None
    values = [torch.full_like(item.mask[:, :1], level) for level in item.levels]
    if len(values) == 1:
        return values[0], None
    places = (index * (item.mask.squeeze(-1) == level) for index, level in enumerate(item.levels))
    return torch.cat(values, dim=1), torch.stack(tuple(places)).sum(0)


def stack(items: Sequence[ModalityTensors]) -> ModalityTensors:
    """Branches of one forward, one after another along the batch; `rows` then count through the whole batch.

    Branches of one stage have one object for their coordinates; others go by their positions.
    """
    columns = {field.name: [getattr(item, field.name) for item in items] for field in fields(ModalityTensors)}
    if columns["rows"][0] is None:
        del columns["rows"]
    places, texts = columns.pop("coordinates"), columns.pop("contexts")
    coordinates = places[0] if all(place is places[0] for place in places) else None
    if coordinates is not None and coordinates.rows.shape[0] > 1:
        coordinates = replace(coordinates, rows=torch.cat([coordinates.rows] * len(items)))
    parts = {n: torch.cat(column) if len(items) > 1 else column[0] for n, column in columns.items()}
    context = torch.cat([each[0] for each in texts]) if len(items) > 1 else texts[0][0]
    joined = ModalityTensors(**parts, contexts=(context,), coordinates=coordinates)
    if joined.rows is None:
        return joined
    count, levels = joined.timestep.shape
    return replace(joined, rows=joined.rows + levels * torch.arange(count, device=joined.rows.device)[:, None])


def shares_all_but_text(items: Sequence[ModalityInput]) -> bool:
    """Whether branches have the very same tokens at the same noise level."""
    first = items[0]

    def same(item: ModalityInput) -> bool:
        objects = ("latent", "mask", "positions", "coordinates")
        return (item.sigma, item.levels) == (first.sigma, first.levels) and all(
            getattr(item, name) is getattr(first, name) for name in objects
        )

    return all(map(same, items))


def check_branch(config: Any, video: ModalityInput | None, audio: ModalityInput | None) -> None:
    """Refuse shapes that do not fit each other or the transformer's configuration."""
    sizes = {
        "video": (video, config.in_channels, 3),
        "audio": (audio, config.audio_in_channels, 1),
    }
    for name, (item, channels, axes) in sizes.items():
        if item is None:
            continue
        if item.latent.ndim != 3 or item.latent.shape[-1] != channels:
            raise ValueError(f"{name}.latent: expected (B, T, {channels}), got {tuple(item.latent.shape)}")
        batch, tokens = item.latent.shape[:2]
        if tuple(item.positions.shape) != (batch, axes, tokens, 2):
            raise ValueError(
                f"{name}.positions: expected ({batch}, {axes}, {tokens}, 2), got {tuple(item.positions.shape)}"
            )
        if item.mask is not None and tuple(item.mask.shape) != (batch, tokens, 1):
            raise ValueError(f"{name}.mask: expected ({batch}, {tokens}, 1), got {tuple(item.mask.shape)}")
        if item.levels is not None and (item.mask is None or not item.levels):
            raise ValueError(f"{name}.levels: expected the distinct values of a mask, or None")
        if item.context.ndim != 3 or item.context.shape[0] != batch:
            raise ValueError(f"{name}.context: expected ({batch}, L, D), got {tuple(item.context.shape)}")


def column(name: str, items: Sequence[ModalityInput | None]) -> list[ModalityInput]:
    """One modality of all branches, checked; empty where none of them has it."""
    given = [item for item in items if item is not None]
    if given and len(given) != len(items):
        raise ValueError(f"{name}: expected in every branch or in none, got it in {len(given)} of {len(items)}")
    if len({tuple(item.latent.shape) for item in given}) > 1:
        raise ValueError(f"{name}.latent: expected one shape, got {[tuple(i.latent.shape) for i in given]}")
    if len({item.mask is None for item in given}) > 1:
        raise ValueError(f"{name}.mask: expected in every branch or in none")
    if len({item.levels for item in given}) > 1:
        raise ValueError(f"{name}.levels: expected the same in every branch, got {[i.levels for i in given]}")
    return given


def shared_tensors(
    columns: Sequence[Sequence[ModalityInput]], scale: float
) -> tuple[tuple[int, ...], list[ModalityTensors | None]]:
    """Tensors of branches that differ in their texts alone, and the number of every branch's text among these."""
    texts = [tuple(item.context for item in items) for items in zip(*filter(None, columns), strict=True)]
    found = {tuple(map(id, text)): text for text in texts}
    order = {key: number for number, key in enumerate(found)}
    tensors: list[ModalityTensors | None] = [None] * len(columns)
    contexts = iter(zip(*found.values(), strict=True))
    for at, items in enumerate(columns):
        if items:
            tensors[at] = replace(device_tensors(items[0], scale), contexts=next(contexts))
    return tuple(order[tuple(map(id, text))] for text in texts), tensors


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

    tables = RotaryTables(by_row(cos), by_row(sin), coordinates.rows)
    return tables.side_by_side() if len(counts) > 1 else tables


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
