"""Sequence parallel: one forward over several ranks, video tokens shared out, attention by heads (the Ulysses exchange).

Everything per token runs on the rank that holds the token. An attention over video tokens needs all of them: one all-to-all turns
token shards of all heads into all tokens of a rank's heads, another turns the result back. Audio, text and weights are whole on
every rank. Shards need not be equal: neither tokens nor heads have to be divisible by the ranks, and nothing is padded or masked.

Source: Jacobs et al. 2023, DeepSpeed Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from ltxkern.pipeline.parallel.collectives import Collectives, checksum
from ltxkern.pipeline.parallel.ranks import RankError
from ltxkern.pipeline.sampling.state import Latents

if TYPE_CHECKING:
    from ltxkern.pipeline.sampling.guidance import CFGBranch, Forward

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class TokenInput(Protocol):
    """What the video of a forward must offer to be shared out by tokens."""

    @property
    def tokens(self) -> Tensor:
        """(B, T, C)."""

    def part(self: Video, own: slice) -> Video:
        """These tokens, with all that belongs to them."""


Video = TypeVar("Video", bound=TokenInput)


def even_parts(count: int, parts: int) -> list[int]:
    """`count` in `parts` consecutive parts that differ by one at most, larger ones first."""
    return [count // parts + (index < count % parts) for index in range(parts)]


@dataclass
class SequenceParallel(Collectives):
    """The ranks that share out the video tokens of a forward; attributes as `Collectives`."""

    def require(self, **counts: int) -> None:
        """Make sure that every rank gets a part of each count, e.g. heads=32.

        Raises:
            ValueError: fewer than ranks.
        """
        for name, count in counts.items():
            if count < self.size:
                raise ValueError(
                    f"sequence parallel on {self.size} ranks needs at least as many {name}, got {count}: "
                    f"use at most {count} ranks"
                )

    def forward(self, forward: Any) -> Forward:
        """The forward of a stage (a `BranchForward`) with its video tokens shared out.

        Every rank calls it alike and gets the whole prediction. One all-gather of 24 bytes a forward makes sure that all are at
        the same point.

        Raises:
            RankError: (by the forward) the ranks differ in latents, context or sigma, or one is gone.
        """
        shared = replace(forward, sequence=self)

        def run(latents: Latents, sigma: float, branch: CFGBranch) -> Mapping[str, Tensor]:
            self._agree(latents, sigma, branch)
            self.traffic.evaluations += 1
            return shared(latents, sigma, branch)

        return run

    def run(
        self, transformer: Any, video: TokenInput | None, audio: Any, perturbations: tuple[Any, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The transformer's velocities, whole on every rank; it runs undivided where there is no video."""
        if video is None:
            return transformer(video, audio, perturbations)
        heads = transformer.config.num_attention_heads
        count = video.tokens.shape[1]
        self.require(heads=min(heads, transformer.config.audio_num_attention_heads), tokens=count)
        shards = TokenShards(self, even_parts(count, self.size))
        velocity, sound = transformer(shards.split(video), audio, perturbations, shards)
        return shards.join(velocity), sound

    def _agree(self, latents: Latents, sigma: float, branch: CFGBranch) -> None:
        contexts = [value for value in branch.kwargs.values() if isinstance(value, Tensor)]
        device = next(iter(latents.values())).device
        zero = torch.zeros((), dtype=torch.int64, device=device)
        bits = struct.unpack("<q", struct.pack("<d", sigma))[0]
        own = torch.stack([zero + bits, checksum(latents.values()), checksum(contexts) if contexts else zero])
        everyone = self.gather(own).tolist()
        for rank, theirs in enumerate(everyone):
            for name, value, first in zip(("sigma", "latents", "context"), theirs, everyone[0], strict=True):
                if value != first:
                    raise RankError(f"rank {rank} is out of step with rank 0 in a stage shared by tokens: other {name}")


@dataclass(frozen=True)
class TokenShards:
    """Which video tokens each rank holds in one forward: `tokens[r]` consecutive ones on rank r."""

    parallel: SequenceParallel
    tokens: Sequence[int]

    def split(self, video: Video) -> Video:
        """This rank's tokens with all that belongs to them."""
        start = sum(self.tokens[: self.parallel.rank])
        return video.part(slice(start, start + self.tokens[self.parallel.rank]))

    def join(self, x: Tensor) -> Tensor:
        """(B, t, C) of each rank to (B, T, C) on every rank."""
        return self._gathered(x.transpose(0, 1), self.tokens).transpose(0, 1)

    def self_attention(self, query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
        """`attention` over all tokens; in and out (B, t, H, d) of this rank's tokens. Two all-to-alls."""
        whole = self._to_heads(torch.stack([query, key, value]))
        return self._to_tokens(attention(*whole), query.shape[2])

    def attention_from_outside(self, query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
        """`attention` of queries that are whole on every rank (audio) over all video tokens.

        Args:
            query: (B, L, H, d), the same on every rank.
            key, value: (B, t, H, d) of this rank's tokens.
            attention: over (B, L or T, heads, d).
        Returns:
            (B, L, H, d), whole on every rank. One all-to-all and one all-gather.
        """
        heads = even_parts(query.shape[2], self.parallel.size)
        start = sum(heads[: self.parallel.rank])
        mine = query[:, :, start : start + heads[self.parallel.rank]]
        result = attention(mine, *self._to_heads(torch.stack([key, value])))
        return self._gathered(result.permute(2, 0, 1, 3), heads).permute(1, 2, 0, 3)

    def _to_heads(self, x: Tensor) -> Iterator[Tensor]:
        """(n, B, t, H, d) of this rank's tokens to n tensors (B, T, h, d) of this rank's heads."""
        n, batch, own, count, width = x.shape
        heads = even_parts(count, self.parallel.size)
        mine, row = heads[self.parallel.rank], n * batch * width
        pieces = self.parallel.exchange(
            x.permute(3, 0, 1, 2, 4).reshape(-1),
            [each * own * row for each in heads],
            [mine * each * row for each in self.tokens],
        )
        shaped = [p.view(mine, n, batch, each, width) for p, each in zip(pieces, self.tokens, strict=True)]
        return iter(torch.cat(shaped, dim=3).permute(1, 2, 3, 0, 4))

    def _to_tokens(self, x: Tensor, count: int) -> Tensor:
        """(B, T, h, d) of this rank's heads to (B, t, H, d) of its tokens; H is `count`."""
        batch, _, mine, width = x.shape
        heads = even_parts(count, self.parallel.size)
        own, row = self.tokens[self.parallel.rank], batch * width
        pieces = self.parallel.exchange(
            x.transpose(0, 1).reshape(-1),
            [each * mine * row for each in self.tokens],
            [own * each * row for each in heads],
        )
        shaped = [p.view(own, batch, each, width) for p, each in zip(pieces, heads, strict=True)]
        return torch.cat(shaped, dim=2).transpose(0, 1)

    def _gathered(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """(counts[rank], ...) of each rank to (sum(counts), ...) on every rank; shorter ones travel with a filled-up end."""
        longest = max(counts)
        padded = x.new_zeros((longest, *x.shape[1:]))
        padded[: x.shape[0]] = x
        everyone = self.parallel.gather(padded.view(-1)).view(len(counts), longest, *x.shape[1:])
        return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])
