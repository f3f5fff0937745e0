"""Which device mode a transformer gets, in words and numbers, and the store that serves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ltxkern.pipeline.memory.host_memory import HostBudget, device_available
from ltxkern.pipeline.memory.modes import OFFLOADED, ModeNeeds, choose_mode, gib, mode_needs
from ltxkern.pipeline.memory.offload import OffloadStore
from ltxkern.pipeline.memory.snapshot import SnapshotStore
from ltxkern.pipeline.memory.stores import InplaceStore, OriginalStore, PhaseStore, ResidentStore, StoreContext

_STORES: dict[str, Any] = {
    "resident": ResidentStore,
    "inplace": InplaceStore,
    "snapshot": SnapshotStore,
    "original": OriginalStore,
}


@dataclass(frozen=True)
class ModeChoice:
    """A mode with the reason for it.

    Attributes:
        mode: one of `MODES`.
        reason: in words.
        offload: "original": blocks stay on the host and visit the device one by one.
        needs: bytes that every mode needs.
        factor_bytes: room on the device for LoRA factors beside what the mode needs.
    """

    mode: str
    reason: str = "not prepared yet"
    offload: bool = False
    needs: Mapping[str, ModeNeeds] = field(default_factory=dict)
    factor_bytes: int = 0

    def describe(self, mode: str, store: PhaseStore | None) -> str:
        """The mode in force and why, what each mode needs, and what the store keeps."""
        lines = [f"device mode {mode}: {self.reason}"]
        lines += [f"  {needs}" for needs in self.needs.values()]
        if isinstance(store, InplaceStore):
            lines.append(f"  corrections: {store.bytes_per_weight:.3f} bytes per weight")
        if store is not None and (store.factors.nbytes or store.factors.locked_bytes):
            kept, locked = gib(store.factors.nbytes), gib(store.factors.locked_bytes)
            lines.append(f"  LoRA factors: {kept} kept on the device, {locked} page-locked on the host")
        return "\n".join(lines)


def decide(
    requested: str,
    tensors: Sequence[Tensor],
    patched: Mapping[str, Tensor],
    *,
    device: torch.device,
    budget: HostBudget,
    factor_bytes: int = 0,
    keeps_source: bool = True,
    activation_bytes: int = 0,
    spare_blocks: int = 2,
    offload: bool | None = None,
) -> ModeChoice:
    """The mode that was asked for, or for "auto" the first that fits into the memory that is free now.

    Args:
        requested: "auto" or one of `MODES`.
        tensors: of the transformer; those on the device need no further room there.
        patched: the weights that LoRAs change, by module.
        device: where the transformer will run; a CPU is one memory with the host.
        budget: of the host.
        factor_bytes, keeps_source, activation_bytes, spare_blocks: as `needs_of`.
        offload: of "original"; None: where the device does not hold the transformer.
    """
    needs = mode_needs(
        tensors,
        patched,
        factor_bytes=factor_bytes,
        keeps_source=keeps_source,
        activation_bytes=activation_bytes,
        spare_blocks=spare_blocks,
    )
    unified = device.type == "cpu"
    free = device_available(device)
    if not unified:
        free += sum(tensor.nbytes for tensor in tensors if tensor.device.type == device.type)
    mode, reason = requested, "asked for"
    if mode == "auto":
        mode, reason = choose_mode(needs, free, budget.available, unified=unified)
    if offload is None:
        offload = not unified and needs["original"].device_bytes > free
    offload = offload and mode == "original"
    if offload:
        reason += "; blocks stay on the host and visit the device one by one"
    taken = needs[OFFLOADED if offload else mode].device_bytes
    return ModeChoice(mode, reason, offload, needs, 0 if unified else max(0, free - taken))


def build_store(
    mode: str, context: StoreContext, budget: HostBudget, device: torch.device, *, offload: bool, spare_blocks: int
) -> PhaseStore:
    """The store of a mode; `budget`, `device`, `offload` and `spare_blocks` as in `TwoStageDeviceManager`."""
    if mode == "snapshot":
        return SnapshotStore(context, budget, spare_blocks)
    if mode == "original" and offload:
        return OffloadStore(context, budget, device)
    store: PhaseStore = _STORES[mode](context)
    return store


def mode_of(store: PhaseStore | None) -> str | None:
    """The mode that a store serves."""
    return next((mode for mode, kind in _STORES.items() if isinstance(store, kind)), None)
