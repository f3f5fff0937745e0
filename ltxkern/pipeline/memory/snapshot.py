"""Mode "snapshot": one phase on the device, the others as page-locked host snapshots, fetched on a side stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ltxkern.pipeline.files.lora import PRISTINE_KEY, LoRAPhase, WeightKey
from ltxkern.pipeline.memory.host_memory import HostBudget, HostBudgetError
from ltxkern.pipeline.memory.stores import PhaseStore, StoreContext
from ltxkern.pipeline.memory.table import OUTER_BLOCK, LiveWeight, blocks_of


class SnapshotStore(PhaseStore):
    """Weights of the next phase travel while the present one computes.

    The first blocks go into spare buffers on the device as soon as `prefetch` is called; the others over the blocks that
    are no longer read. Nothing waits but the first read of a block, on the stream that reads it. A phase without a
    snapshot comes from the pristine source and is merged on the side stream.

    Args:
        spare_blocks: how many blocks of spare buffers are kept on the device.
    """

    fetches_ahead = True

    def __init__(self, context: StoreContext, budget: HostBudget, spare_blocks: int = 2) -> None:
        super().__init__(context)
        self._budget = budget
        self._spare_blocks = spare_blocks
        self._snapshots: dict[tuple[str, WeightKey], Tensor] = {}
        self._prepared: tuple[LoRAPhase, ...] = ()
        self._spare: dict[str, LiveWeight] = {}
        self._spare_free: Any = None
        # Events after which a block, or its spare buffers, may be read.
        self._arrivals: dict[str, list[Any]] = {}
        self._spare_arrivals: dict[str, list[Any]] = {}

    def prepare(self, phases: Sequence[LoRAPhase]) -> None:
        """Takes snapshots, the phase of stage 2 first; that of stage 1 too where the host budget allows it.

        Raises:
            HostBudgetError: not even one phase fits; nothing is kept then.
        """
        if self._prepared == tuple(phases):
            return
        self._prepared = ()
        super().prepare(phases)
        self._drop_snapshots()
        if len(phases) < 2:
            return
        first, second = phases
        changed = [module for module in self.table.live if first.key(module) != second.key(module)]
        self._allocate_spare(changed)
        self._take_snapshot(second, changed)
        # Stage 1 starts a run, where nothing has to be hidden: without a snapshot its weights are merged again from pristine.
        with contextlib.suppress(HostBudgetError):
            self._take_snapshot(first, changed)
        self._prepared = self.phases

    def _allocate_spare(self, changed: Sequence[str]) -> None:
        self.settle()
        self._spare.clear()
        self._spare_arrivals.clear()
        for modules in list(blocks_of(changed).values())[: self._spare_blocks]:
            for module in modules:
                self._spare[module] = LiveWeight(torch.empty_like(self.table.live[module].tensor), None)
        self._spare_free = self.clock.mark()

    def _take_snapshot(self, phase: LoRAPhase, modules: Sequence[str]) -> None:
        taken: list[tuple[str, WeightKey]] = []
        try:
            for module in modules:
                entry = (module, phase.key(module))
                if entry not in self._snapshots:
                    self._snapshots[entry] = self._snapshot(module, phase)
                    taken.append(entry)
        except BaseException:
            for entry in taken:
                self._budget.give_back(self._snapshots.pop(entry))
            raise

    def _snapshot(self, module: str, phase: LoRAPhase) -> Tensor:
        live = self.table.live[module]
        host = self._budget.take(live.tensor.shape, live.tensor.dtype, f"the snapshot of {module}")
        try:
            merged = live.tensor
            if live.key != phase.key(module):
                if live.key == PRISTINE_KEY:
                    # At hand: nothing need come from the host. The checksum says that nobody wrote into it.
                    self.table.expect(module, PRISTINE_KEY, live.tensor)
                    merged = live.tensor.clone()
                else:
                    merged = torch.empty_like(live.tensor).copy_(self.source.fetch(module))
                self.merge(merged, module, phase)
            self.table.expect(module, phase.key(module), merged)
            return host.copy_(merged)
        except BaseException:
            self._budget.give_back(host)
            raise

    def _drop_snapshots(self) -> None:
        kept = {(module, phase.key(module)) for module in self.table.live for phase in self.phases}
        for entry in set(self._snapshots) - kept:
            self._budget.give_back(self._snapshots.pop(entry))

    def _fill(self, tensor: Tensor, module: str, phase: LoRAPhase) -> None:
        """Enqueues the phase's weight into `tensor` on the current stream."""
        snapshot = self._snapshots.get((module, phase.key(module)))
        if snapshot is not None:
            tensor.copy_(snapshot, non_blocking=True)
        else:
            tensor.copy_(self.source.fetch(module), non_blocking=True)
            self.merge(tensor, module, phase)

    def prefetch(self, phase: LoRAPhase) -> None:
        with self.clock.side():
            started = False
            for block, modules in blocks_of(self._spare).items():
                wanted = [
                    module
                    for module in modules
                    if phase.key(module) not in (self._spare[module].key, self.table.live[module].key)
                ]
                if not wanted:
                    continue
                if not started:
                    self.clock.wait(self._spare_free)
                    started = True
                self.clock.note(f"prefetch {block}", sum(self._spare[module].tensor.nbytes for module in wanted))
                with self._arriving(self._spare_arrivals, block):
                    for module in wanted:
                        tensor = self._spare[module].tensor
                        self._spare[module] = LiveWeight(tensor, None)
                        self._fill(tensor, module, phase)
                        self._spare[module] = LiveWeight(tensor, phase.key(module))

    @contextlib.contextmanager
    def _arriving(self, arrivals: dict[str, list[Any]], block: str) -> Iterator[None]:
        """What is enqueued within has to be waited for, even where it ends half-way in an exception."""
        try:
            yield
        finally:
            arrivals.setdefault(block, []).append(self.clock.mark())

    def release(self, block: str, phase: LoRAPhase) -> None:
        modules = [
            module
            for module in self.table.blocks.get(block, ())
            if self.table.live[module].key != phase.key(module)
            and (module not in self._spare or self._spare[module].key != phase.key(module))
        ]
        if modules:
            self._fetch_over(block, modules, phase, self.clock.mark())

    def _fetch_over(self, block: str, modules: Sequence[str], phase: LoRAPhase, unread: Any) -> None:
        with self.clock.side():
            self.clock.wait(unread)
            self.clock.note(f"fetch {block}", sum(self.table.live[module].tensor.nbytes for module in modules))
            with self._arriving(self._arrivals, block):
                for module in modules:
                    tensor = self.table.live[module].tensor
                    self.table.live[module] = LiveWeight(tensor, None)
                    self._fill(tensor, module, phase)
                    self.table.live[module] = LiveWeight(tensor, phase.key(module))

    def switch(self, phase: LoRAPhase) -> None:
        # Whatever becomes a spare buffer below has been read by what is enqueued now.
        unread = self._spare_free = self.clock.mark()
        for block, modules in self.stale(phase):
            ready = [m for m in modules if m in self._spare and self._spare[m].key == phase.key(m)]
            if ready:
                self.clock.note(f"swap {block}")
                # What is on its way to either of the two is still on its way after the swap; there may be nothing.
                pending = self._arrivals.setdefault(block, [])
                pending += self._spare_arrivals.pop(block, ())
            for module in ready:
                live = self.table.live[module]
                spare = self._spare.pop(module)
                self.table.live[module] = spare
                self._spare[module] = live
                self.table.point(module)
            missing = [module for module in modules if module not in ready]
            if missing:
                self._fetch_over(block, missing, phase, unread)

    @property
    def hooked_blocks(self) -> Iterable[str]:
        return [block for block in self.table.blocks if block != OUTER_BLOCK]

    def before_block(self, block: str) -> None:
        for event in self._arrivals.pop(block, ()):
            self.clock.wait(event)

    def settle(self) -> None:
        for block in list(self._arrivals):
            self.before_block(block)
        for block in list(self._spare_arrivals):
            for event in self._spare_arrivals.pop(block):
                self.clock.wait(event)

    def close(self) -> None:
        self.settle()
        self.clock.synchronise()
        self._spare.clear()
        self._spare_arrivals.clear()
        self.phases = self._prepared = ()
        self._drop_all()

    def _drop_all(self) -> None:
        for entry in list(self._snapshots):
            self._budget.give_back(self._snapshots.pop(entry))

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of the host snapshots."""
        return sum(snapshot.nbytes for snapshot in self._snapshots.values())

    @property
    def extra_device_bytes(self) -> int:
        return sum(spare.tensor.nbytes for spare in self._spare.values())

    @property
    def host_bytes(self) -> int:
        return super().host_bytes + self.snapshot_bytes
