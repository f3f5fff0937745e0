"""How the weights of LoRA phases are kept: the interface, and the modes "resident" and "original"."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltxkern.pipeline.files.lora import NO_LORA, PRISTINE_KEY, LoRAPhase
from ltxkern.pipeline.memory.factors import FactorCache
from ltxkern.pipeline.memory.host_memory import HostBudget, HostBudgetError
from ltxkern.pipeline.memory.merge import merge_phase, merge_phase_beside, merge_phase_pair, proven_ratios
from ltxkern.pipeline.memory.streams import StreamClock
from ltxkern.pipeline.memory.table import LiveWeight, LoRAPhaseError, PristineSource, WeightTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreContext:
    """What every mode works with; `source` is None for "inplace", which needs none."""

    table: WeightTable
    source: PristineSource | None
    clock: StreamClock
    rounding: str
    factors: FactorCache


class PhaseStore:
    """One way to keep the phases of a transformer.

    Attributes:
        fetches_ahead: `release` may overwrite a block with the next phase while the present one still runs elsewhere.
        merges_again: prepared phases are merged at every switch or forward: their factors had better be near.
    """

    fetches_ahead = False
    merges_again = False

    def __init__(self, context: StoreContext) -> None:
        self.table = context.table
        self.clock = context.clock
        self.rounding = context.rounding
        self.factors = context.factors
        self._source = context.source
        self.phases: tuple[LoRAPhase, ...] = ()

    @property
    def source(self) -> PristineSource:
        """Where pristine weights come from."""
        if self._source is None:
            raise LoRAPhaseError("the weights are unknown and there is no pristine source: load the transformer again")
        return self._source

    def prepare(self, phases: Sequence[LoRAPhase]) -> None:
        """Makes ready for switches between these phases (one, or two different ones)."""
        self.phases = tuple(phases)

    def switch(self, phase: LoRAPhase) -> None:
        """Brings every weight into the phase; after an exception every weight is known or marked as unknown."""
        raise NotImplementedError

    def prefetch(self, phase: LoRAPhase) -> None:
        """May start to bring in what `phase` will need while the present one computes."""

    def release(self, block: str, phase: LoRAPhase) -> None:
        """The block is not read again before `phase` is wanted; its memory may be overwritten."""

    @property
    def hooked_blocks(self) -> Iterable[str]:
        """Blocks whose forwards the store must know of."""
        return ()

    def adopts(self, module: str) -> bool:
        """Whether the weight of a module is kept in the table, on the device."""
        return True

    def holds(self, phase: LoRAPhase) -> bool:
        """Whether every weight is in this phase, as far as the books say."""
        return self.table.holds(phase)

    def before_block(self, block: str) -> None:
        """The block is about to be read by the current stream."""

    def after_block(self, block: str) -> None:
        """The block has been read, as far as the current stream goes."""

    def settle(self) -> None:
        """The current stream waits for everything that is on its way."""

    def restore(self) -> None:
        """Pristine weights back, whatever was there."""
        self.switch(NO_LORA)

    def close(self) -> None:
        """Gives back what is kept on the host and the device beside the live weights."""

    @property
    def extra_device_bytes(self) -> int:
        """Bytes on the device beside one copy of the weights."""
        return 0

    @property
    def host_bytes(self) -> int:
        """Bytes kept on the host, the pristine source included."""
        return 0 if self._source is None else self._source.host_bytes()

    def merge(self, tensor: Tensor, module: str, phase: LoRAPhase, *, sign: int = 1) -> None:
        """`merge_phase` with the store's rounding and factors."""
        merge_phase(tensor, module, phase, rounding=self.rounding, sign=sign, cache=self.factors)

    def pristine(self, module: str) -> Tensor:
        """The pristine weight of a module, on the host."""
        return self.source.fetch(module)

    def overwrite(self, module: str, phase: LoRAPhase) -> None:
        """Fills the live weight from the pristine source, unless it is pristine, and merges; it is marked unknown in between."""
        tensor, key = self.table.live[module].tensor, self.table.live[module].key
        if key == PRISTINE_KEY:
            # At hand: nothing need come from the host. The checksum says that nobody wrote into it.
            self.table.expect(module, key, tensor)
        self.table.live[module] = LiveWeight(tensor, None)
        if key != PRISTINE_KEY:
            tensor.copy_(self.pristine(module), non_blocking=True)
        self.merge(tensor, module, phase)
        self.table.expect(module, phase.key(module), tensor)
        self.table.live[module] = LiveWeight(tensor, phase.key(module))
        self.table.point(module)

    def stale(self, phase: LoRAPhase) -> Iterable[tuple[str, list[str]]]:
        """Blocks with the modules that do not hold the phase yet; pointers of the others are set right."""
        for block, modules in self.table.blocks.items():
            for module in modules:
                self.table.point(module)
            yield block, [module for module in modules if self.table.live[module].key != phase.key(module)]


class OriginalStore(PhaseStore):
    """One copy; a switch brings the pristine weights again and merges.

    Args:
        context: what every mode works with.
        budget: pristine weights that a switch will bring are kept page-locked, as far as it goes, from where a device fetches them
            several times as fast as from pageable memory or a file; None: the source alone serves.
    """

    merges_again = True

    def __init__(self, context: StoreContext, budget: HostBudget | None = None) -> None:
        super().__init__(context)
        self._budget = budget
        self._near: dict[str, Tensor] = {}

    def prepare(self, phases: Sequence[LoRAPhase]) -> None:
        super().prepare(phases)
        changing = [m for m in self.table.live if len({phase.key(m) for phase in (*phases, NO_LORA)}) > 1]
        try:
            for module in changing if self._budget is not None and len(phases) > 1 else ():
                live = self.table.live[module]
                if live.key == PRISTINE_KEY and module not in self._near:
                    self._near[module] = self._lock(module, live.tensor)
        except HostBudgetError as error:
            logger.info("pristine weights stay where they are: %s", error)

    def _lock(self, module: str, weight: Tensor) -> Tensor:
        assert self._budget is not None
        return self._budget.take(weight.shape, weight.dtype, f"the pristine weight of {module}").copy_(
            weight, non_blocking=True
        )

    def pristine(self, module: str) -> Tensor:
        near = self._near.get(module)
        return super().pristine(module) if near is None else near

    def close(self) -> None:
        while self._near and self._budget is not None:
            self._budget.give_back(self._near.popitem()[1])

    @property
    def host_bytes(self) -> int:
        return super().host_bytes + sum(weight.nbytes for weight in self._near.values())

    def switch(self, phase: LoRAPhase) -> None:
        for block, modules in self.stale(phase):
            self.clock.note(f"merge {block}")
            for module in modules:
                self.overwrite(module, phase)


class ResidentStore(PhaseStore):
    """Two copies on the device; a switch between the prepared phases swaps pointers."""

    def __init__(self, context: StoreContext) -> None:
        super().__init__(context)
        # Modules that both phases treat alike have none.
        self._spare: dict[str, LiveWeight] = {}

    def prepare(self, phases: Sequence[LoRAPhase]) -> None:
        super().prepare(phases)
        if len(phases) < 2:
            return
        first, second = phases
        for modules in self.table.blocks.values():
            fresh = {module: self.table.live[module] for module in modules if module not in self._spare}
            pristine = {module: live.tensor for module, live in fresh.items() if live.key == PRISTINE_KEY}
            exact = self.rounding == "reference"
            ratios = proven_ratios(pristine, (first, second), self.factors) if exact else {}
            for module in modules:
                self._prepare_pair(module, first, second, ratios.get(module))

    def _prepare_pair(self, module: str, first: LoRAPhase, second: LoRAPhase, ratio: float | None) -> None:
        wanted = first.key(module), second.key(module)
        live = self.table.live[module]
        if wanted[0] == wanted[1]:
            return
        if live.key == PRISTINE_KEY and PRISTINE_KEY not in wanted and module not in self._spare:
            spare = torch.empty_like(live.tensor)
            self.table.live[module] = LiveWeight(live.tensor, None)
            merge_phase_pair(
                live.tensor, spare, module, (first, second), rounding=self.rounding, cache=self.factors, ratio=ratio
            )
            self.table.expect(module, wanted[1], spare)
            self._spare[module] = LiveWeight(spare, wanted[1])
            self.table.expect(module, wanted[0], live.tensor)
            self.table.live[module] = LiveWeight(live.tensor, wanted[0])
            return
        if live.key not in wanted:
            if module in self._spare and self._spare[module].key in wanted:
                self._swap(module)
            else:
                self.overwrite(module, first)
        other = second if self.table.live[module].key == wanted[0] else first
        self._fill_spare(module, other)

    def _fill_spare(self, module: str, phase: LoRAPhase) -> None:
        key = phase.key(module)
        spare = self._spare.get(module)
        if spare is not None and spare.key == key:
            return
        tensor = torch.empty_like(self.table.live[module].tensor) if spare is None else spare.tensor
        self._spare[module] = LiveWeight(tensor, None)
        self._fresh_merge(module, tensor, phase)
        self.table.expect(module, key, tensor)
        self._spare[module] = LiveWeight(tensor, key)

    def _fresh_merge(self, module: str, tensor: Tensor, phase: LoRAPhase) -> None:
        live = self.table.live[module]
        if live.key != PRISTINE_KEY:
            tensor.copy_(self.pristine(module), non_blocking=True)
            self.merge(tensor, module, phase)
            return
        # At hand: nothing need come from the host. The checksum says that nobody wrote into it.
        self.table.expect(module, PRISTINE_KEY, live.tensor)
        merge_phase_beside(live.tensor, tensor, module, phase, rounding=self.rounding, cache=self.factors)

    def _swap(self, module: str) -> None:
        live = self.table.live[module]
        # Taken out first: an exception between the steps may lose the spare, never alias it with the live tensor.
        spare = self._spare.pop(module)
        self.table.live[module] = spare
        self._spare[module] = live
        self.table.point(module)

    def switch(self, phase: LoRAPhase) -> None:
        pending = [(block, modules) for block, modules in self.stale(phase) if modules]
        for block, modules in pending:
            for module in modules:
                self._fill_spare(module, phase)
            self.clock.note(f"swap {block}")
        for _, modules in pending:
            for module in modules:
                self._swap(module)

    def close(self) -> None:
        self._spare.clear()

    @property
    def extra_device_bytes(self) -> int:
        return sum(spare.tensor.nbytes for spare in self._spare.values())
