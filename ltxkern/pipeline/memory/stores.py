"""How the weights of LoRA phases are kept: the interface, and the modes "resident", "inplace" and "original"."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltxkern.pipeline.files.lora import NO_LORA, PRISTINE_KEY, LoRAPhase, WeightKey
from ltxkern.pipeline.memory.exact_subtraction import Correction, apply_correction, record_correction
from ltxkern.pipeline.memory.factors import FactorCache
from ltxkern.pipeline.memory.merge import (
    MAX_CORRECTION_BYTES,
    CorrectionTooLargeError,
    as_matrix,
    binary_ratio,
    merge_phase,
    merge_phase_beside,
    merge_phase_pair,
    phase_deltas,
)
from ltxkern.pipeline.memory.streams import StreamClock
from ltxkern.pipeline.memory.table import LiveWeight, LoRAPhaseError, PristineSource, WeightTable, checksum

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

    def overwrite(self, module: str, phase: LoRAPhase) -> None:
        """Fills the live weight from the pristine source and merges; it is marked unknown in between."""
        tensor = self.table.live[module].tensor
        self.table.live[module] = LiveWeight(tensor, None)
        tensor.copy_(self.source.fetch(module), non_blocking=True)
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
    """One copy; a switch reads the pristine weights again and merges."""

    merges_again = True

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
            for module in modules:
                self._prepare_pair(module, first, second)

    def _prepare_pair(self, module: str, first: LoRAPhase, second: LoRAPhase) -> None:
        wanted = first.key(module), second.key(module)
        live = self.table.live[module]
        if wanted[0] == wanted[1]:
            return
        if live.key == PRISTINE_KEY and PRISTINE_KEY not in wanted and module not in self._spare:
            spare = torch.empty_like(live.tensor)
            self.table.live[module] = LiveWeight(live.tensor, None)
            pair = first, second
            merge_phase_pair(live.tensor, spare, module, pair, rounding=self.rounding, cache=self.factors)
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
            tensor.copy_(self.source.fetch(module), non_blocking=True)
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


class InplaceStore(PhaseStore):
    """One copy and no host copy: back to pristine by subtracting and an exact correction, then the other merge.

    A block is computed beside its present tensors, checked, and only then swapped in; the tensors that it replaces serve
    the next block. So an exception at any point loses nothing.
    """

    merges_again = True

    def __init__(self, context: StoreContext) -> None:
        super().__init__(context)
        self._corrections: dict[tuple[str, WeightKey], Correction] = {}
        self._scratch: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        # Needed to subtract: the phase behind a key.
        self._phase_of: dict[tuple[str, WeightKey], LoRAPhase] = {}

    def switch(self, phase: LoRAPhase) -> None:
        if phase.reads_weights:
            raise CorrectionTooLargeError(
                "a LoRA with weight decomposition depends on the pristine weights, which inplace does not keep"
            )
        for block, modules in self.stale(phase):
            if modules:
                self.clock.note(f"merge {block}")
                self._switch_block(modules, phase)
        self._scratch.clear()
        self._drop_corrections(phase)
        logger.info("inplace corrections: %.3f bytes per weight", self.bytes_per_weight)

    def prepare(self, phases: Sequence[LoRAPhase]) -> None:
        super().prepare(phases)
        self._drop_corrections(None)
        # Both corrections are made now, so that a run finds out here whether they fit.
        for phase in reversed(phases):
            if not all(
                key == PRISTINE_KEY or (module, key) in self._corrections
                for module in self.table.live
                for key in [phase.key(module)]
            ):
                self.switch(phase)
        if self.bytes_per_weight > MAX_CORRECTION_BYTES:
            raise CorrectionTooLargeError(
                f"the exact corrections need {self.bytes_per_weight:.2f} bytes per weight, "
                f"more than {MAX_CORRECTION_BYTES:g}: the LoRAs change the weights too much"
            )

    def _switch_block(self, modules: Sequence[str], phase: LoRAPhase) -> None:
        # Tensors that the block before had and this one cannot use are not kept beside it.
        shapes = {(live.tensor.shape, live.tensor.dtype) for live in map(self.table.live.__getitem__, modules)}
        self._scratch = {shape: free for shape, free in self._scratch.items() if shape in shapes}
        built = {module: self._take(self.table.live[module].tensor) for module in modules}
        ratios = {module: self._known_ratio(module, phase) for module in modules}
        wanted = {module: phase.key(module) for module in modules}
        try:
            for module, ratio in ratios.items():
                if ratio is not None:
                    self._by_one_product(module, built[module], ratio)
            self._by_two_products({m: tensor for m, tensor in built.items() if ratios[m] is None}, phase)
            self.table.expect_all(built, wanted)
        except LoRAPhaseError:
            if all(ratio is None for ratio in ratios.values()):
                raise
            # An under- or overflow is enough; the long way tells whether it was that or a weight that someone changed.
            self._by_two_products(built, phase)
            self.table.expect_all(built, wanted)
        for module, tensor in built.items():
            before = self.table.live[module].tensor
            self.table.live[module] = LiveWeight(tensor, phase.key(module))
            self.table.point(module)
            self._scratch[tensor.shape, tensor.dtype].append(before)

    def _known_ratio(self, module: str, phase: LoRAPhase) -> float | None:
        """Of the deltas of `phase` and of the present one, where one product serves both and a checksum proves the result."""
        key, wanted = self.table.live[module].key, phase.key(module)
        if self.rounding != "reference" or key is None or PRISTINE_KEY in (key, wanted):
            return None
        # The checksum comes after the correction: an exception in between leaves nothing that could prove the result.
        if (module, wanted) not in self._corrections or (module, wanted) not in self.table.checksums:
            return None
        return binary_ratio(module, self._phase_of[module, key], phase)

    def _by_one_product(self, module: str, tensor: Tensor, ratio: float) -> None:
        """(W - d), corrected, + ratio d."""
        live = self.table.live[module]
        assert live.key is not None
        entry = (module, live.key)
        present, matrix = as_matrix(live.tensor), as_matrix(tensor)
        deltas = list(phase_deltas(matrix, module, self._phase_of[entry], self.factors))
        for delta, rows in deltas:
            torch.sub(present[rows], delta, out=matrix[rows])
        apply_correction(tensor, self._corrections[entry])
        for delta, rows in deltas:
            matrix[rows].add_(delta, alpha=ratio)

    def _by_two_products(self, built: Mapping[str, Tensor], phase: LoRAPhase) -> None:
        """Back to pristine, then the merge, for weights of one block."""
        for module, tensor in built.items():
            tensor.copy_(self.table.live[module].tensor)
            self._subtract(module, tensor)
        # Where the result has a checksum already, that one will tell.
        unproven = {m: tensor for m, tensor in built.items() if (m, phase.key(m)) not in self.table.checksums}
        self.table.expect_all(unproven, dict.fromkeys(unproven, PRISTINE_KEY))
        for module, tensor in built.items():
            if phase.key(module) != PRISTINE_KEY:
                self._merge(module, tensor, phase)

    def _subtract(self, module: str, tensor: Tensor) -> None:
        key = self.table.live[module].key
        if key is None:
            raise LoRAPhaseError(f"{module}.weight is unknown and inplace keeps no copy: load the transformer again")
        if key != PRISTINE_KEY:
            self.merge(tensor, module, self._phase_of[module, key], sign=-1)
            apply_correction(tensor, self._corrections[module, key])

    def _merge(self, module: str, tensor: Tensor, phase: LoRAPhase) -> None:
        """Merges into a pristine tensor; records and proves the correction where there is none yet."""
        entry = (module, phase.key(module))
        if entry in self._corrections:
            self.merge(tensor, module, phase)
            return
        pristine = self._take(tensor).copy_(tensor)
        self.merge(tensor, module, phase)
        subtracted = self._take(tensor).copy_(tensor)
        self.merge(subtracted, module, phase, sign=-1)
        correction = record_correction(pristine, subtracted)
        again = subtracted.copy_(tensor)
        self.merge(again, module, phase, sign=-1)
        apply_correction(again, correction)
        if not torch.equal(checksum(again), checksum(pristine)):
            raise CorrectionTooLargeError(f"the matrix product of {module} is not repeatable on this device")
        self._phase_of[entry] = phase
        self._corrections[entry] = correction
        self._scratch[tensor.shape, tensor.dtype] += [pristine, again]

    def _take(self, like: Tensor) -> Tensor:
        free = self._scratch.setdefault((like.shape, like.dtype), [])
        return free.pop() if free else torch.empty(like.shape, dtype=like.dtype, device=like.device)

    def _drop_corrections(self, current: LoRAPhase | None) -> None:
        """Keeps the corrections of the prepared phases and of what is in the weights."""
        kept = {(module, phase.key(module)) for module in self.table.live for phase in self.phases}
        kept |= {(module, live.key) for module, live in self.table.live.items() if live.key is not None}
        for entry in set(self._corrections) - kept:
            del self._corrections[entry]
            del self._phase_of[entry]

    def close(self) -> None:
        self._corrections.clear()
        self._phase_of.clear()
        self._scratch.clear()

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of all corrections per patched weight."""
        return self.extra_device_bytes / max(1, self.table.numel)

    @property
    def extra_device_bytes(self) -> int:
        return sum(correction.nbytes for correction in self._corrections.values())
