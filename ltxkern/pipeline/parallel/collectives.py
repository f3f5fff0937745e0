"""The collectives of a run on several ranks, counted: all-gather, and an all-to-all of unequal pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ltxkern.pipeline.parallel.ranks import RankError, Ranks

# torch 2.13 renamed it; the old name warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Traffic:
    """What went through the collectives of one rank: their number, and bytes given and received (its own part left out)."""

    collectives: int = 0
    evaluations: int = 0
    sent: int = 0
    received: int = 0

    def count(self, sent: int, received: int) -> None:
        """One collective, in bytes. What an all-gather gives counts once, however many ranks it goes to."""
        self.collectives += 1
        self.sent += sent
        self.received += received

    def __str__(self) -> str:
        return (
            f"{self.evaluations} evaluations exchanged in {self.collectives} collectives; "
            f"each rank gave {self.sent / 1e6:.3f} MB and received {self.received / 1e6:.3f} MB"
        )


@dataclass
class Collectives:
    """The ranks of a process group.

    Attributes:
        group: process group of the data; None for the default one.
        ranks: the job's control plane, which explains broken collectives; None where there is none.
        traffic: collectives and bytes so far.
    """

    group: Any = None
    ranks: Ranks | None = None
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def rank(self) -> int:
        """This rank within the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Ranks in the group: the degree."""
        return dist.get_world_size(self.group)

    def gather(self, own: Tensor) -> Tensor:
        """(n,) of each rank to (ranks, n) on every rank.

        Raises:
            RankError: a rank is gone.
        """
        everyone = own.new_empty(self.size * own.numel())
        self._explained(lambda: _all_gather(everyone, own, group=self.group))
        self.traffic.count(own.nbytes, own.nbytes * (self.size - 1))
        return everyone.view(self.size, -1)

    def exchange(self, own: Tensor, sent: Sequence[int], received: Sequence[int]) -> list[Tensor]:
        """An all-to-all: consecutive pieces of `own` (n,), one for each rank, to the pieces that each rank has for this one.

        Args:
            own: contiguous and one-dimensional.
            sent, received: values to and from each rank.
        Raises:
            RankError: a rank is gone.
        """
        pieces = own.new_empty(sum(received))
        self._explained(lambda: dist.all_to_all_single(pieces, own, list(received), list(sent), group=self.group))
        me, width = self.rank, own.dtype.itemsize
        self.traffic.count((sum(sent) - sent[me]) * width, (sum(received) - received[me]) * width)
        return list(pieces.split(list(received)))

    def _explained(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            if self.ranks is not None:
                raise RankError(self.ranks.explain(error)) from error
            raise RankError(f"the ranks lost each other in a collective: {error}") from error


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the bits of tensors as an int64 on their device; independent of order and threads."""
    sums = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1)
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.dtype.itemsize]
        sums.append(flat.view(width).sum(dtype=torch.int64))
    return torch.stack(sums).sum()
