"""What each device mode needs on the device and on the host, which one fits, and the store that serves it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ltxkern.pipeline.memory.host_memory import HostBudget, device_available
from ltxkern.pipeline.memory.inplace import InplaceStore
from ltxkern.pipeline.memory.offload import OffloadStore
from ltxkern.pipeline.memory.snapshot import SnapshotStore
from ltxkern.pipeline.memory.stores import OriginalStore, PhaseStore, ResidentStore, StoreContext
from ltxkern.pipeline.memory.table import OUTER_BLOCK, blocks_of

# In order of preference: the first that fits is taken.
MODES = ("resident", "inplace", "snapshot", "original")

OFFLOADED = "original, offloaded"

_STORES: dict[str, Any] = {
    "resident": ResidentStore,
    "inplace": InplaceStore,
    "snapshot": SnapshotStore,
    "original": OriginalStore,
}

# Corrections of both phases at the HQ strengths; measured by the test of that name for |delta| = 5 % of |W|.
CORRECTION_BYTES_PER_WEIGHT = 0.5


@dataclass(frozen=True)
class ModeNeeds:
    """Bytes that a mode needs at its peak: on the device, and on the host beside the files' cache."""

    mode: str
    device_bytes: int
    host_bytes: int

    def __str__(self) -> str:
        return f"{self.mode}: {gib(self.device_bytes)} on the device, {gib(self.host_bytes)} on the host"


def gib(nbytes: int) -> str:
    """Bytes for people."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} bytes"


@dataclass(frozen=True)
class WeightSizes:
    """Sizes that decide, in bytes: all weights, the patched ones, their number, the largest blocks, LoRA factors.

    `outer`: of the patched weights those outside all blocks.
    """

    total: int
    patched: int
    patched_numel: int
    largest_blocks: tuple[int, ...]
    factors: int = 0
    outer: int = 0

    def spare(self, count: int) -> int:
        """Bytes of the `count` largest blocks."""
        return sum(self.largest_blocks[:count])


def needs_of(
    sizes: WeightSizes, *, keeps_source: bool = True, activation_bytes: int = 0, spare_blocks: int = 2
) -> dict[str, ModeNeeds]:
    """What every mode needs at its peak.

    Args:
        sizes: of the transformer and its LoRAs.
        keeps_source: pristine weights are kept on the host where the mode needs them (no file to read them from).
        activation_bytes: what a forward needs beside the weights.
        spare_blocks: of "snapshot".
    """
    source = sizes.patched if keeps_source else 0
    base = sizes.total + activation_bytes
    correction = int(CORRECTION_BYTES_PER_WEIGHT * sizes.patched_numel)
    blocks = sizes.spare(2)
    return {
        "resident": ModeNeeds("resident", base + sizes.patched, source + sizes.factors),
        "inplace": ModeNeeds("inplace", base + correction + blocks, sizes.factors),
        "snapshot": ModeNeeds("snapshot", base + sizes.spare(spare_blocks), source + sizes.patched + sizes.factors),
        "original": ModeNeeds("original", base, source + sizes.factors),
        # Blocks live on the host, two of them on the device at a time.
        OFFLOADED: ModeNeeds(
            OFFLOADED, base - sizes.patched + sizes.outer + blocks, sizes.patched - sizes.outer + sizes.factors
        ),
    }


def weight_sizes(tensors: Iterable[Tensor], patched: Mapping[str, Tensor], factor_bytes: int = 0) -> WeightSizes:
    """Sizes of a loaded transformer (or one on the meta device)."""
    found = {block: sum(patched[name].nbytes for name in names) for block, names in blocks_of(patched).items()}
    return WeightSizes(
        total=sum(tensor.nbytes for tensor in tensors),
        patched=sum(weight.nbytes for weight in patched.values()),
        patched_numel=sum(weight.numel() for weight in patched.values()),
        largest_blocks=tuple(sorted(found.values(), reverse=True)),
        factors=factor_bytes,
        outer=found.get(OUTER_BLOCK, 0),
    )


def choose_mode(
    needs: Mapping[str, ModeNeeds], device_free: int, host_free: int, *, unified: bool = False
) -> tuple[str, str]:
    """The first mode that fits, and why; else "original", with its blocks on the host where that fits.

    Args:
        needs: per mode.
        device_free, host_free: bytes that can be taken; on a CPU both are the same memory (`unified`).

    Returns:
        (mode, reason).
    """
    free = gib(device_free) if unified else f"{gib(device_free)} on the device and {gib(host_free)} on the host"

    def fits(need: ModeNeeds) -> bool:
        if unified:
            return need.device_bytes + need.host_bytes <= min(device_free, host_free)
        return need.device_bytes <= device_free and need.host_bytes <= host_free

    refused: list[str] = []
    for mode in MODES:
        if fits(needs[mode]):
            tried = f" ({'; '.join(refused)})" if refused else ""
            return mode, f"chosen: it is the fastest that fits into {free} free{tried}"
        refused.append(f"{needs[mode]} do not fit")
    if not unified and OFFLOADED in needs and fits(needs[OFFLOADED]):
        return "original", f"chosen: only block by block does the model fit into {free} free ({'; '.join(refused)})"
    return "original", f"no mode fits into the free memory ({'; '.join(refused)}); the smallest is tried"


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
    sizes = weight_sizes(tensors, patched, factor_bytes)
    needs = needs_of(sizes, keeps_source=keeps_source, activation_bytes=activation_bytes, spare_blocks=spare_blocks)
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


def smaller_mode(needs: Mapping[str, ModeNeeds], mode: str) -> str | None:
    """The next mode in order of preference that needs less of the device; None where none does.

    Args:
        needs: per mode.
        mode: one of `MODES`, or `OFFLOADED`.
    """
    order = (*MODES, OFFLOADED)
    later = order[order.index(mode) + 1 :]
    return next((name for name in later if needs[name].device_bytes < needs[mode].device_bytes), None)


def build_store(
    mode: str, context: StoreContext, budget: HostBudget, device: torch.device, *, offload: bool, spare_blocks: int
) -> PhaseStore:
    """The store of a mode; `budget`, `device`, `offload` and `spare_blocks` as in `TwoStageDeviceManager`."""
    if mode == "snapshot":
        return SnapshotStore(context, budget, spare_blocks)
    if mode == "original" and offload:
        return OffloadStore(context, budget, device)
    if mode == "original" and device.type == "cuda":
        return OriginalStore(context, budget)
    store: PhaseStore = _STORES[mode](context)
    return store


def mode_of(store: PhaseStore | None) -> str | None:
    """The mode that a store serves."""
    return next((mode for mode, kind in _STORES.items() if isinstance(store, kind)), None)
