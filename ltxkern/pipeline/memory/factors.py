"""LoRA factors near the device: kept on it as far as there is room, page-locked on the host beyond that."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ltxkern.pipeline.files.lora import LoRA, LoRAPhase
from ltxkern.pipeline.files.lora_kinds import Change
from ltxkern.pipeline.memory.host_memory import HostBudget, HostBudgetError

logger = logging.getLogger(__name__)

# Page-locked memory comes in powers of two: factors share pieces of this size, or the rest would be lost for each of them.
PIECE_BYTES = 256 << 20
# Every copy begins on a boundary that any dtype and the copy engine are content with.
_ALIGNMENT = 256

Copies = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class _Piece:
    """A page-locked buffer with the copies of the factors that lie in it."""

    buffer: Tensor
    copies: dict[Change, Copies]


def _factors_of(phases: Iterable[LoRAPhase]) -> dict[LoRA, list[Change]]:
    """The factors that phases merge, each LoRA once."""
    return {lora: list(lora.factors.values()) for phase in phases for lora, _ in phase.entries}


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _pieces(factors: Iterable[Change]) -> Iterator[tuple[list[Change], int]]:
    """Groups of factors with the bytes of each, PIECE_BYTES at most where one pair does not need more."""
    group: list[Change] = []
    nbytes = 0
    for pair in factors:
        more = sum(map(_room, pair.tensors))
        if group and nbytes + more > PIECE_BYTES:
            yield group, nbytes
            group, nbytes = [], 0
        group.append(pair)
        nbytes += more
    if group:
        yield group, nbytes


class FactorCache:
    """Factors on the device, kept there as far as the limit goes, so that a switch need not bring them again.

    Args:
        limit: bytes that may be kept on the device.
        budget: counts what is page-locked on the host.
    """

    def __init__(self, limit: int = 0, budget: HostBudget | None = None) -> None:
        self.limit = limit
        self.nbytes = 0
        self._budget = budget
        self._kept: dict[Change, Copies] = {}
        self._pieces: list[_Piece] = []
        self._locked: dict[Change, Copies] = {}

    def on(self, device: torch.device, factors: Change) -> Copies:
        """The tensors of a change on a device."""
        if factors in self._kept:
            if device.type == "cuda":
                # Other streams than the one they came on read them: their memory is not given away before that.
                for tensor in self._kept[factors]:
                    tensor.record_stream(torch.cuda.current_stream(device))
            return self._kept[factors]
        if factors in self._locked:
            # Read by the current stream alone: the host need not wait.
            return tuple(tensor.to(device, non_blocking=True) for tensor in self._locked[factors])
        # Blocking copies: what is kept may be read by another stream than the one it came on.
        pair = tuple(tensor.to(device) for tensor in factors.tensors)
        if device != factors.tensors[0].device and self.nbytes + factors.nbytes <= self.limit:
            self._kept[factors] = pair
            self.nbytes += factors.nbytes
        return pair

    def stays_on(self, device: torch.device, factors: Change) -> bool:
        """Whether they lie on the device, or would be kept there once they are asked for."""
        near = factors in self._kept or device == factors.tensors[0].device
        return near or self.nbytes + factors.nbytes <= self.limit

    def keep_only(self, phases: Iterable[LoRAPhase]) -> None:
        """Lets go of what these phases do not merge, on the device and on the host."""
        wanted = {factors for group in _factors_of(phases).values() for factors in group}
        self._kept = {factors: pair for factors, pair in self._kept.items() if factors in wanted}
        self.nbytes = sum(factors.nbytes for factors in self._kept)
        self._unlock_all_but(wanted)

    def page_lock(self, phases: Iterable[LoRAPhase], device: torch.device) -> None:
        """Page-locks copies of those factors of these phases that the device has no room for, and gives other copies back.

        For phases that are merged again and again. What the host has no room for stays pageable. Nothing happens to
        factors that lie on the device or are page-locked already, and nothing at all without a GPU.

        Args:
            phases: none gives everything back.
            device: where the factors are merged.
        """
        groups = _factors_of(phases)
        self._unlock_all_but({factors for group in groups.values() for factors in group})
        if self._budget is None or not torch.cuda.is_available():
            return
        room = self.limit - self.nbytes
        for lora, group in groups.items():
            staying = []
            for factors in group:
                if factors in self._kept or factors in self._locked or device == factors.tensors[0].device:
                    continue
                if factors.nbytes <= room:
                    room -= factors.nbytes
                elif not all(tensor.is_pinned() for tensor in factors.tensors):
                    staying.append(factors)
            try:
                for members, nbytes in _pieces(staying):
                    self._lock(lora.name, members, nbytes)
            except HostBudgetError as error:
                logger.info("factors stay pageable: %s", error)

    def _lock(self, name: str, members: list[Change], nbytes: int) -> None:
        assert self._budget is not None
        piece = _Piece(self._budget.take(torch.Size([nbytes]), torch.uint8, f"factors of LoRA {name}"), {})
        self._pieces.append(piece)
        offset = 0
        for factors in members:
            copies = []
            for tensor in factors.tensors:
                part = piece.buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                copies.append(part.copy_(tensor))
                offset += _room(tensor)
            piece.copies[factors] = self._locked[factors] = tuple(copies)

    def _unlock_all_but(self, wanted: set[Change]) -> None:
        for piece in [piece for piece in self._pieces if wanted.isdisjoint(piece.copies)]:
            assert self._budget is not None
            self._pieces.remove(piece)
            for factors in piece.copies:
                self._locked.pop(factors, None)
            self._budget.give_back(piece.buffer)

    @property
    def locked_bytes(self) -> int:
        """Bytes of the factors that are page-locked on the host."""
        return sum(factors.nbytes for factors in self._locked)
