"""Switches the transformer between the LoRA phases of the two stages, exactly, in every memory class."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from ltxkern.pipeline.files.lora import NO_LORA, LoRAPhase
from ltxkern.pipeline.memory.factors import FactorCache
from ltxkern.pipeline.memory.hooks import ForwardHooks
from ltxkern.pipeline.memory.host_copy import HostCopy, module_tensors
from ltxkern.pipeline.memory.host_memory import HostBudgetError
from ltxkern.pipeline.memory.lending import ComponentDevice
from ltxkern.pipeline.memory.merge import CorrectionTooLargeError
from ltxkern.pipeline.memory.modes import MODES, ModeChoice, build_store, decide, mode_of
from ltxkern.pipeline.memory.offload import OffloadStore
from ltxkern.pipeline.memory.origin import Home, release_weights
from ltxkern.pipeline.memory.stores import PhaseStore, StoreContext
from ltxkern.pipeline.memory.streams import StreamClock
from ltxkern.pipeline.memory.table import (
    OUTER_BLOCK,
    HostPristine,
    LoRAPhaseError,
    PristinePlace,
    PristineSource,
    WeightTable,
    checkpoint_source,
)

logger = logging.getLogger(__name__)


class TwoStageDeviceManager(ComponentDevice):
    """Keeps one transformer in one LoRA phase at a time, and lends the other components to the device.

    After `switch_lora_phase(p)` the weights equal, bit for bit, a fresh merge of p from the pristine weights, whatever
    came before. After an exception the transformer is either in a phase (`phase`) or refuses to run until the next
    successful switch.

    Args:
        mode: "resident" (both phases on the device), "snapshot" (the other phase page-locked on the host, prefetched),
            "inplace" (one copy and exact corrections), "original" (one copy, merged again from pristine weights), or
            "auto": by the memory that is free. Default: LTXKERN_DEVICE_MODE, else "auto".
        device: where the transformer runs.
        host_budget_bytes: bound of what is kept on the host beside the pristine weights: snapshots, and page-locked
            copies of weights, components and of the LoRA factors that the device has no room for; None: nine tenths of
            what is free there, control groups included.
        rounding: as `merge_lora_`.
        spare_blocks: "snapshot": blocks of the next phase that are fetched ahead.
        offload: "original": blocks stay on the host and visit the device one by one; None: where the device does not hold
            the transformer.
        clock: streams and events; tests give their own.
    """

    def __init__(
        self,
        mode: str | None = None,
        *,
        device: str | torch.device = "cpu",
        host_budget_bytes: int | None = None,
        rounding: str = "reference",
        spare_blocks: int = 2,
        offload: bool | None = None,
        clock: StreamClock | None = None,
    ) -> None:
        mode = mode or os.environ.get("LTXKERN_DEVICE_MODE") or "auto"
        if mode not in ("auto", *MODES):
            raise ValueError(f"mode must be one of auto, {', '.join(MODES)}, got {mode!r}")
        if spare_blocks < 0:
            raise ValueError(f"spare_blocks must be at least 0, got {spare_blocks}")
        super().__init__(device, host_budget_bytes, clock)
        self.requested_mode = mode
        self.rounding = rounding
        self._spare_blocks = spare_blocks
        self.offload = offload
        self._factors = FactorCache(budget=self.budget)
        self._table: WeightTable | None = None
        self._source: PristineSource | None = None
        self._store: PhaseStore | None = None
        self._phase: LoRAPhase | None = None
        self._phases: tuple[LoRAPhase, ...] = ()
        self._home: Home | None = None
        self._is_placed = False
        self._hooks: ForwardHooks | None = None
        self._forwards_left: int | None = None
        self._upcoming: LoRAPhase | None = None
        self.choice = ModeChoice(mode)

    def attach(self, transformer: nn.Module, *, pristine: PristineSource | PristinePlace | None = None) -> None:
        """Takes a transformer whose weights are pristine. They move to the device with the first `prepare`.

        Args:
            transformer: on the host or on the device.
            pristine: where pristine weights can be read again: the model's file or folder, or a source of your own; None:
                they are kept on the host where the mode needs them.

        Raises:
            ValueError: a transformer is attached already, or has weights on the meta device.
        """
        if self._table is not None:
            raise ValueError("transformer: one is attached already; close() first")
        if any(tensor.device.type == "meta" for tensor in module_tensors(transformer)):
            raise ValueError("transformer must have its weights loaded, got tensors on the meta device")
        if isinstance(pristine, PristinePlace):
            pristine = checkpoint_source(pristine, transformer)
        self._source = pristine
        self._table = WeightTable(transformer)
        self._phase = NO_LORA
        self._home = Home(transformer)
        self._hooks = ForwardHooks(transformer, self._before_forward, lambda: self._after_block(OUTER_BLOCK))

    @property
    def mode(self) -> str | None:
        """The mode in force, None before the first `prepare`."""
        return mode_of(self._store)

    @property
    def is_attached(self) -> bool:
        """Whether a transformer is."""
        return self._table is not None

    @property
    def phase(self) -> LoRAPhase | None:
        """The phase the weights are in; None after a failure: then the transformer refuses to run."""
        return self._phase

    @property
    def table(self) -> WeightTable:
        """The patched weights; raises LoRAPhaseError where nothing is attached."""
        if self._table is None:
            raise LoRAPhaseError("no transformer is attached: call attach(transformer) first")
        return self._table

    def prepare(self, phase1: LoRAPhase, phase2: LoRAPhase | None = None, *, activation_bytes: int = 0) -> None:
        """Makes ready for a run and brings the weights into its first phase.

        Args:
            phase1, phase2: of the two stages; equal ones cost one merge, none where they are empty.
            activation_bytes: what a run needs on the device beside the weights (the planner says it); "auto" leaves it
                free.

        Raises:
            ValueError: a LoRA does not fit; nothing is changed then.
            HostBudgetError: "snapshot" was asked for and the host has no room; the weights are in a phase.
        """
        wanted = (phase1,) if phase2 is None or phase2 == phase1 else (phase1, phase2)
        modules = self.table.new_modules(wanted)
        with self._transition():
            self._choose(wanted, modules, activation_bytes)
            self._adopt(modules)
            self._phases = wanted
            self._factors.keep_only(wanted)
            self._factors.page_lock(wanted if self.store.merges_again else (), self.device)
            try:
                self.store.prepare(wanted)
            except (CorrectionTooLargeError, HostBudgetError) as error:
                self._fall_back(error, wanted)
            self._switch(phase1)

    @property
    def store(self) -> PhaseStore:
        """How the phases are kept; raises LoRAPhaseError before the first `prepare`."""
        if self._store is None:
            raise LoRAPhaseError("nothing is prepared: call prepare(phase1, phase2) first")
        return self._store

    def _choose(self, wanted: tuple[LoRAPhase, ...], modules: list[str], activation_bytes: int) -> None:
        if self._store is not None and (self.table.live or not modules):
            return
        self.choice = decide(
            self.requested_mode,
            list(module_tensors(self.table.transformer)),
            {name: self.table.parameter(name) for name in modules},
            device=self.device,
            budget=self.budget,
            factor_bytes=max((phase.nbytes for phase in wanted), default=0),
            keeps_source=self._source is None,
            activation_bytes=activation_bytes,
            spare_blocks=self._spare_blocks,
            offload=self.offload,
        )
        logger.info("device mode %s: %s", self.choice.mode, self.choice.reason)
        self._factors.limit = self.choice.factor_bytes
        if self._store is not None:
            self._store.close()
        self._store, self._is_placed = self._build(self.choice.mode, self.choice.offload), False

    def _build(self, mode: str, offload: bool) -> PhaseStore:
        if mode != "inplace" and self._source is None:
            self._source = HostPristine()
        source = None if mode == "inplace" else self._source
        context = StoreContext(self.table, source, self.clock, self.rounding, self._factors)
        return build_store(mode, context, self.budget, self.device, offload=offload, spare_blocks=self._spare_blocks)

    def _adopt(self, modules: list[str]) -> None:
        """Moves the transformer to the device, and takes in weights that no phase has changed so far."""
        if self._is_placed and not modules:
            return
        assert self._home is not None
        pristine = {name: self.table.parameter(name).data for name in filter(self.store.adopts, modules)}
        weights = self._home.move_out(pristine, self.device, self._source)
        if not isinstance(self._source, HostPristine) or isinstance(self._store, OffloadStore):
            # Nothing is kept on the host in these cases: what `close` brings back is made from the live weights.
            self._home.let_go()
        self.table.adopt(weights)
        if self.device.type != "cpu" and not isinstance(self._store, OffloadStore):
            HostCopy(self.table.transformer, self.budget, pin=False).lend(self.device)
        self._follow_blocks()
        self._is_placed = True

    def _follow_blocks(self) -> None:
        if self._hooks is not None:
            self._hooks.follow(self.store.hooked_blocks, self.store.before_block, self._after_block)

    def _after_block(self, block: str) -> None:
        if self._store is None:
            return
        self._store.after_block(block)
        if self._forwards_left == 0 and self._upcoming is not None and self._store.fetches_ahead:
            self._phase = None
            self._store.release(block, self._upcoming)

    def _before_forward(self) -> None:
        if self._phase is None and self._upcoming is not None and self._phases:
            previous = next(phase for phase in self._phases if phase != self._upcoming)
            logger.warning("more forwards in this stage than announced: its weights are fetched again")
            self._forwards_left = None
            self.switch_lora_phase(previous)
        if self._phase is None:
            raise LoRAPhaseError("the transformer is between two LoRA phases: call switch_lora_phase(phase) again")
        if self._forwards_left:
            self._forwards_left -= 1
        if self._store is not None:
            self._store.before_block(OUTER_BLOCK)

    def _fall_back(self, error: Exception, wanted: tuple[LoRAPhase, ...]) -> None:
        """From "inplace" to "snapshot", and to "original" where "auto" chose; else the error stands."""
        if isinstance(error, CorrectionTooLargeError):
            following = "snapshot"
        elif self.requested_mode != "snapshot":
            following = "original"
        else:
            self._switch(wanted[0])
            raise error
        logger.warning("device mode %s instead of %s: %s", following, self.mode, error)
        self.choice = replace(self.choice, reason=f"{self.mode} was given up: {error}")
        self.store.restore()
        self.store.close()
        if self._source is None:
            live = self.table.live.items()
            self._source = HostPristine({module: weight.tensor.clone().to("cpu") for module, weight in live})
        self._store = self._build(following, bool(self.offload))
        self._follow_blocks()
        self._factors.page_lock(wanted if self.store.merges_again else (), self.device)
        try:
            self._store.prepare(wanted)
        except HostBudgetError as again:
            self._fall_back(again, wanted)

    def switch_lora_phase(self, phase: LoRAPhase) -> None:
        """Brings the weights into a phase; free where they are in it.

        Args:
            phase: one of the prepared ones, or any other, which then is merged from pristine weights.

        Raises:
            ValueError: a LoRA does not fit; nothing is changed then.
            LoRAPhaseError: a checksum says that the result is not what it was before, or pristine weights are lost.
        """
        if self._phase == phase:
            return
        modules = self.table.new_modules([phase])
        if self._store is None:
            self.prepare(phase)
            return
        with self._transition():
            self._adopt(modules)
            self._switch(phase)

    @contextlib.contextmanager
    def _transition(self) -> Iterator[None]:
        """Within, the transformer is in no phase; on an exception it returns to the former one only if all weights say so."""
        previous = self._phase
        self._phase = self._forwards_left = self._upcoming = None
        try:
            yield
        except BaseException:
            if previous is not None and self._is_whole(previous):
                self._phase = previous
            raise

    def _is_whole(self, phase: LoRAPhase) -> bool:
        """Whether every weight holds the phase, by the table and by its checksum."""
        if self._store is not None:
            self._store.settle()
            return self._store.holds(phase) and self.table.verify()
        return self.table.holds(phase)

    def _switch(self, phase: LoRAPhase) -> None:
        self.store.switch(phase)
        if not self.store.holds(phase):
            raise LoRAPhaseError(f"the weights did not all reach the phase {phase}")
        self._phase = phase

    def begin_stage(self, name: str, *, forwards: int | None = None) -> None:
        """Says that a stage starts: the other prepared phase may travel meanwhile.

        Args:
            name: for the log and the timeline.
            forwards: calls of the transformer in this stage; during the last one blocks are released one by one.
        """
        self.clock.note(f"{name} begins")
        others = [phase for phase in self._phases if phase != self._phase]
        if self._store is None or self._phase is None or len(others) != 1:
            return
        self._upcoming = others[0]
        self._forwards_left = forwards
        self._store.prefetch(others[0])

    def end_stage(self, name: str) -> None:
        """Says that the transformer is not called again in this stage."""
        self.clock.note(f"{name} ends")
        self._forwards_left = None

    @contextlib.contextmanager
    def stage(self, name: str, *, forwards: int | None = None) -> Iterator[None]:
        """`begin_stage` and `end_stage` around a block."""
        self.begin_stage(name, forwards=forwards)
        try:
            yield
        finally:
            self.end_stage(name)

    def block_checksums(self) -> dict[str, int]:
        """One number per block over its patched weights: equal for equal bits."""
        if self._store is not None:
            self._store.settle()
        return self.table.block_checksums()

    @property
    def keeps_components(self) -> bool:
        """In mode "resident"."""
        return self.mode == "resident"

    def describe(self) -> str:
        """The mode and why it was chosen, and what each mode needs on the device and on the host."""
        return self.choice.describe(self.mode or self.requested_mode, self._store)

    def close(self, *, discard: bool = False) -> None:
        """Brings the pristine weights back to where `attach` found them, releases what was pinned, removes the hooks.

        Weights that have no room there any more stay where they are, which the log says. After an interruption the
        transformer refuses to run until `close` is called again. Closing twice is fine.

        Args:
            discard: the transformer is not needed any more: its memory is freed, and nothing is merged or copied for it.

        Raises:
            LoRAPhaseError: the pristine weights are lost; everything else is undone.
        """
        super().close()
        if self._table is None:
            if self._hooks is not None:
                self._hooks.remove()
            return
        assert self._home is not None
        # An interruption from here on leaves it in no phase: then no forward runs.
        self._phase = self._upcoming = None
        try:
            if self._store is not None and not (discard or self._home.is_kept):
                self._store.restore()
                self._store.settle()
        except LoRAPhaseError:
            self._detach()
            raise
        self._detach(discard=discard)

    def _detach(self, *, discard: bool = False) -> None:
        transformer = self.table.transformer
        if discard:
            release_weights(transformer)
        if self._store is not None:
            self._store.close()
        if discard:
            # The store may have pointed the block that was last on the device back to the host.
            release_weights(transformer)
        elif self._home is not None:
            self._home.restore(self.device)
        self._factors.keep_only(())
        self._is_placed, self._phases = False, ()
        self._table = self._source = self._store = self._phase = self._home = None
        # Last: as long as the books say that something is attached, no forward may run unseen.
        if self._hooks is not None:
            self._hooks.remove()
