"""Mode "original" for a device that does not hold the transformer: blocks visit it one by one, merged on arrival."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ltxkern.pipeline.files.lora import NO_LORA, LoRAPhase
from ltxkern.pipeline.files.lora_layout import target_of
from ltxkern.pipeline.memory.host_copy import HostCopy, bring_to, module_tensors
from ltxkern.pipeline.memory.host_memory import HostBudget, HostBudgetError
from ltxkern.pipeline.memory.stores import OriginalStore, StoreContext
from ltxkern.pipeline.memory.table import OUTER_BLOCK, block_of

logger = logging.getLogger(__name__)

_SLOTS = 2


def _place(tensor: Tensor) -> torch.device:
    return tensor.device


def _move(tensors: Iterable[tuple[Tensor, torch.device]]) -> None:
    """Each tensor's data to its device; tensors of one call that share memory go on sharing it."""
    by_place: dict[torch.device, list[Tensor]] = {}
    for tensor, place in tensors:
        by_place.setdefault(place, []).append(tensor)
    for place, group in by_place.items():
        bring_to(group, place)


@dataclass(frozen=True, eq=False)
class _Visitor:
    """One tensor of a block: the object the module reads, its pristine data on the host, its module if it is a weight."""

    tensor: Tensor
    home: Tensor
    module: str


class OffloadStore(OriginalStore):
    """Pristine blocks stay on the host; each is copied into one of two slots and merged there while the last one computes.

    A phase costs nothing to enter but the weights outside the blocks: the next visit of each block merges it. Copies and
    merges run on the side stream; the compute stream waits for a block at its first read. `close` returns every weight to
    where it lay before.
    """

    def __init__(self, context: StoreContext, budget: HostBudget, device: torch.device) -> None:
        super().__init__(context)
        self._device = device
        self._blocks: dict[str, list[_Visitor]] = {}
        self._copies: list[HostCopy] = []
        # Where tensors lay before, those outside the blocks and those of blocks that were not on the host.
        self._outer: list[tuple[Tensor, torch.device]] = []
        self._away: list[tuple[Tensor, torch.device]] = []
        self._slots: list[dict[tuple[Any, ...], Tensor]] = [{} for _ in range(_SLOTS)]
        self._free: list[Any] = [self.clock.mark() for _ in range(_SLOTS)]
        self._arrivals: dict[str, tuple[int, Any]] = {}
        self._next_slot = 0
        self._present: tuple[str, int] | None = None
        self._current = NO_LORA
        try:
            self._settle_blocks(self.table.transformer, budget)
        except BaseException:
            self.close()
            raise

    def _settle_blocks(self, transformer: nn.Module, budget: HostBudget) -> None:
        for name, module in transformer.named_modules():
            if name and block_of(f"{name}.") == name and any(True for _ in module_tensors(module)):
                away = [(t, _place(t)) for t in module_tensors(module) if _place(t).type != "cpu"]
                self._away += away
                _move((tensor, torch.device("cpu")) for tensor, _ in away)
                self._copies.append(self._keep(module, budget))
                targets = {id(p): target_of(f"{name}.{n}") for n, p in module.named_parameters()}
                self._blocks[name] = [_Visitor(t, t.data, targets.get(id(t), "")) for t in module_tensors(module)]
        inside = {id(visitor.tensor) for block in self._blocks.values() for visitor in block}
        self._outer = [(t, _place(t)) for t in module_tensors(transformer) if id(t) not in inside]
        _move((tensor, self._device) for tensor, _ in self._outer)

    @staticmethod
    def _keep(module: nn.Module, budget: HostBudget) -> HostCopy:
        try:
            return HostCopy(module, budget)
        except HostBudgetError:
            return HostCopy(module, budget, pin=False)

    @property
    def hooked_blocks(self) -> Iterable[str]:
        return tuple(self._blocks)

    def adopts(self, module: str) -> bool:
        return block_of(module) == OUTER_BLOCK

    def switch(self, phase: LoRAPhase) -> None:
        super().switch(phase)
        # Blocks that have been fetched already carry the former phase.
        self._arrivals.clear()
        self._current = phase

    def holds(self, phase: LoRAPhase) -> bool:
        return self._current == phase and super().holds(phase)

    def _fetch(self, block: str) -> None:
        slot, self._next_slot = self._next_slot, (self._next_slot + 1) % _SLOTS
        self._arrivals = {name: arrival for name, arrival in self._arrivals.items() if arrival[0] != slot}
        with self.clock.side():
            self.clock.wait(self._free[slot])
            self.clock.note(f"fetch {block}", sum(visitor.home.nbytes for visitor in self._blocks[block]))
            for index, visitor in enumerate(self._blocks[block]):
                target = self._buffer(slot, index, visitor.home)
                target.copy_(visitor.home, non_blocking=True)
                if visitor.module:
                    self.merge(target, visitor.module, self._current)
            self._arrivals[block] = (slot, self.clock.mark())

    def _buffer(self, slot: int, index: int, like: Tensor) -> Tensor:
        key = (index, like.shape, like.dtype)
        if key not in self._slots[slot]:
            self._slots[slot][key] = torch.empty(like.shape, dtype=like.dtype, device=self._device)
        return self._slots[slot][key]

    def before_block(self, block: str) -> None:
        if block not in self._blocks:
            return
        self._send_home()
        if block not in self._arrivals:
            self._fetch(block)
        slot, arrived = self._arrivals.pop(block)
        self.clock.wait(arrived)
        self._present = (block, slot)
        for index, visitor in enumerate(self._blocks[block]):
            visitor.tensor.data = self._buffer(slot, index, visitor.home)
        names = list(self._blocks)
        following = names[(names.index(block) + 1) % len(names)]
        if following != block and following not in self._arrivals:
            self._next_slot = (slot + 1) % _SLOTS
            self._fetch(following)

    def after_block(self, block: str) -> None:
        if block in self._blocks:
            self._send_home()

    def _send_home(self) -> None:
        if self._present is None:
            return
        block, slot = self._present
        self._free[slot] = self.clock.mark()
        for visitor in self._blocks[block]:
            visitor.tensor.data = visitor.home
        self._present = None

    def restore(self) -> None:
        self._send_home()
        self.switch(NO_LORA)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self.clock.synchronise)
            self._send_home()
            for copy in self._copies:
                copy.close()
            _move(self._outer)
        self._copies, self._outer = [], []
        # The slots go back to the side stream's memory: what it does next may not overtake the last reads.
        unread = self.clock.mark()
        with self.clock.side():
            self.clock.wait(unread)
        self._slots = [{} for _ in range(_SLOTS)]
        self._arrivals.clear()
        self._blocks.clear()
        self._take_back()

    def _take_back(self) -> None:
        """Blocks that lay elsewhere return there; where there is no room any more, all of them stay on the host."""
        away, self._away = self._away, []
        try:
            _move(away)
        except torch.cuda.OutOfMemoryError as error:
            _move((tensor, torch.device("cpu")) for tensor, _ in away)
            logger.warning("the transformer's blocks stay on the host: %s", str(error).splitlines()[0])

    @property
    def extra_device_bytes(self) -> int:
        return sum(buffer.nbytes for slot in self._slots for buffer in slot.values())
