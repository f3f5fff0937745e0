"""The weights that LoRA phases change: where each lives, which phase it holds, its checksum, its pristine source."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ltxkern.pipeline.files.headers import identity, require_unchanged
from ltxkern.pipeline.files.hub import ModelFiles
from ltxkern.pipeline.files.lora import PRISTINE_KEY, LoRA, LoRAPhase, WeightKey
from ltxkern.pipeline.files.lora_layout import target_of

PristinePlace = ModelFiles | str | Path
OUTER_BLOCK = "outer"
_BLOCK = re.compile(r"(?:^|.*?\.)(?:\w*blocks|layers)\.\d+(?=\.)")


class LoRAPhaseError(RuntimeError):
    """The weights are in no defined phase, or could not be brought into one."""


def block_of(module: str) -> str:
    """Name of the transformer block that a module lies in, or "outer"."""
    match = _BLOCK.match(module)
    return match.group(0) if match else OUTER_BLOCK


def checksum(tensor: Tensor) -> Tensor:
    """Two int64 on the tensor's device: the sum of all bit patterns, and the sum of row sums times odd row numbers.

    Integer arithmetic modulo 2^64: exact, and equal for equal bits whatever the order of summation. A contiguous tensor
    is read once.
    """
    flat = tensor.detach().contiguous().view(-1)
    if flat.numel() == 0:
        return torch.zeros(2, dtype=torch.int64, device=tensor.device)
    nbytes = flat.numel() * flat.element_size()
    width = next(size for size in (8, 4, 2, 1) if (nbytes % size == 0 and size >= flat.element_size()) or size == 1)
    words = flat.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[width])
    columns = next(size for size in (1024, 64, 8, 1) if words.numel() % size == 0)
    rows = words.view(-1, columns).sum(dim=1, dtype=torch.int64)
    return (rows * _row_factors(rows.numel(), rows.device)).sum(dim=1)


@functools.lru_cache(maxsize=32)
def _row_factors(rows: int, device: torch.device) -> Tensor:
    """(2, rows) int64: ones, and odd row numbers; few row counts occur, and a switch asks for thousands."""
    numbers = torch.arange(rows) * 2 + 1
    # Made on the host: the blocking copy leaves nothing for other streams to wait for.
    return torch.stack((torch.ones_like(numbers), numbers)).to(device)


class PristineSource(Protocol):
    """Where the weights without any LoRA come from."""

    def fetch(self, module: str) -> Tensor:
        """The pristine weight of a module, on the host; not to be written."""

    def host_bytes(self) -> int:
        """Bytes that the source keeps on the host."""


class HostPristine:
    """Pristine weights kept on the host: the tensors the model was loaded into, copied only where they lie elsewhere."""

    def __init__(self, pristine: Mapping[str, Tensor] | None = None) -> None:
        self._weights = dict(pristine or {})

    def add(self, module: str, weight: Tensor) -> None:
        """Keeps a weight that is pristine now."""
        self._weights[module] = weight.detach().to("cpu")

    def fetch(self, module: str) -> Tensor:
        return self._weights[module]

    def host_bytes(self) -> int:
        return sum(weight.nbytes for weight in self._weights.values())


class CheckpointPristine:
    """Pristine weights read from the model's files whenever they are needed; nothing stays on the host.

    Args:
        path: official single file, the diffusers folder of the transformer, or where a model's parts lie.
        dtype: dtype of the model.
    """

    def __init__(self, path: PristinePlace, dtype: torch.dtype) -> None:
        from ltxkern.pipeline.files.checkpoint import stored_tensors

        self._dtype = dtype
        self._stored = {target_of(name): tensor for name, tensor in stored_tensors(path, "transformer").items()}
        self._before = identity({tensor.path for tensor in self._stored.values()})
        self._open: dict[Path, Any] = {}

    def fetch(self, module: str) -> Tensor:
        from safetensors import safe_open

        from ltxkern.pipeline.files.quantized import read_tensor

        if module not in self._stored:
            raise LoRAPhaseError(f"the checkpoint holds no weight of {module}")
        stored = self._stored[module]
        # Kept open: the header lists thousands of tensors and would be read for each of them.
        for tensor in (stored, stored.scale):
            if tensor is not None and tensor.path not in self._open:
                require_unchanged(self._before, [tensor.path])
                self._open[tensor.path] = safe_open(str(tensor.path), framework="pt")
        return read_tensor(self._open, stored, self._dtype)

    def host_bytes(self) -> int:
        return 0


def checkpoint_source(path: PristinePlace, transformer: nn.Module) -> CheckpointPristine:
    """The files of a transformer, read in the dtype of its weights."""
    dtype = next((p.dtype for p in transformer.parameters() if p.is_floating_point()), torch.bfloat16)
    return CheckpointPristine(path, dtype)


@dataclass(frozen=True, eq=False)
class LiveWeight:
    """What a module computes with: the tensor, and what is merged in it (None: unknown, it was being written)."""

    tensor: Tensor
    key: WeightKey | None


class WeightTable:
    """The patched weights of one transformer by block; the truth about which tensor each parameter points to.

    An entry is replaced as a whole, so that an exception at any point leaves every weight with a known content or marked
    as unknown.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.live: dict[str, LiveWeight] = {}
        self.blocks: dict[str, tuple[str, ...]] = {}
        self.checksums: dict[tuple[str, WeightKey], tuple[int, ...]] = {}
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        self._fitting: weakref.WeakSet[LoRA] = weakref.WeakSet()

    def parameter(self, module: str) -> nn.Parameter:
        """The parameter that a module computes with; the name may be that of a parameter beside the weights."""
        if module not in self._owners:
            parent, _, last = module.rpartition(".")
            owner = self.transformer.get_submodule(parent)
            inner = getattr(owner, last)
            self._owners[module] = (inner, "weight") if isinstance(inner, nn.Module) else (owner, last)
        owner, name = self._owners[module]
        weight = getattr(owner, name)
        if not isinstance(weight, nn.Parameter):
            raise TypeError(f"{module} must have a parameter, got {type(weight).__name__}")
        return weight

    def new_modules(self, phases: Iterable[LoRAPhase]) -> list[str]:
        """Modules that these phases change and that are not in the table yet.

        Raises:
            ValueError: a LoRA does not fit, or two modules share one weight.
        """
        modules: set[str] = set()
        for phase in phases:
            for lora, _ in phase.entries:
                if lora not in self._fitting:
                    lora.check(self.transformer)
                    self._fitting.add(lora)
            modules.update(phase.modules)
        if modules <= self.live.keys():
            return []
        by_storage: dict[int, str] = {}
        for module in sorted(modules | set(self.live)):
            pointer = self.parameter(module).untyped_storage().data_ptr()
            if self.parameter(module).numel() and by_storage.setdefault(pointer, module) != module:
                raise ValueError(f"{by_storage[pointer]} and {module} share one weight: a LoRA cannot change both")
        return sorted(modules - set(self.live))

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Takes in weights that are pristine and writable, and points their parameters to them."""
        for module, tensor in weights.items():
            self.live[module] = LiveWeight(tensor, PRISTINE_KEY)
            self.checksums[module, PRISTINE_KEY] = tuple(checksum(tensor).tolist())
            self.point(module)
        self.blocks = blocks_of(self.live)

    def point(self, module: str) -> None:
        """Makes the module compute with the table's tensor."""
        parameter, tensor = self.parameter(module), self.live[module].tensor
        if parameter.data_ptr() != tensor.data_ptr():
            parameter.data = tensor

    def holds(self, phase: LoRAPhase) -> bool:
        """Whether every weight holds this phase and is what its module computes with."""
        return all(
            live.key == phase.key(module) and self.parameter(module).data_ptr() == live.tensor.data_ptr()
            for module, live in self.live.items()
        )

    def expect(self, module: str, key: WeightKey, tensor: Tensor) -> None:
        """Compares a weight with the checksum that the same content had before, or remembers it.

        Raises:
            LoRAPhaseError: they differ.
        """
        self.expect_all({module: tensor}, {module: key})

    def expect_all(self, tensors: Mapping[str, Tensor], keys: Mapping[str, WeightKey]) -> None:
        """`expect` for the weights of a block, with one transfer to the host."""
        self.expect_sums({module: checksum(tensor) for module, tensor in tensors.items()}, keys)

    def expect_sums(self, sums: Mapping[str, Tensor], keys: Mapping[str, WeightKey]) -> None:
        """`expect_all`, of checksums that are on the device."""
        if not sums:
            return
        for module, found in zip(sums, torch.stack([*sums.values()]).tolist(), strict=True):
            before = self.checksums.setdefault((module, keys[module]), tuple(found))
            if before != tuple(found):
                raise LoRAPhaseError(
                    f"{module}.weight does not have the bits it had with the same LoRAs before: the device's matrix product "
                    "is not repeatable, or something else wrote into the weight"
                )

    def verify(self) -> bool:
        """Whether every live weight has the bits that its content had when it was made."""
        for modules in self.blocks.values():
            sums = torch.stack([checksum(self.live[module].tensor) for module in modules]).tolist()
            for module, found in zip(modules, sums, strict=True):
                key = self.live[module].key
                if key is None or self.checksums.get((module, key), tuple(found)) != tuple(found):
                    return False
        return True

    def block_checksums(self) -> dict[str, int]:
        """One number per block over its patched weights as they are now."""
        result = {}
        for block, modules in self.blocks.items():
            total = torch.stack([checksum(self.parameter(module)) for module in modules])
            total = total * (torch.arange(len(modules), device=total.device)[:, None] * 2 + 1)
            result[block] = int(total.sum())
        return result

    @property
    def nbytes(self) -> int:
        """Bytes of the patched weights, once."""
        return sum(live.tensor.nbytes for live in self.live.values())

    @property
    def numel(self) -> int:
        """Number of the patched weights."""
        return sum(live.tensor.numel() for live in self.live.values())


def blocks_of(modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Modules by block: those outside all blocks first, then the blocks in order of their numbers."""
    found: dict[str, list[str]] = {}
    for module in sorted(modules):
        found.setdefault(block_of(module), []).append(module)

    def order(block: str) -> tuple[bool, str, int]:
        stem, _, number = block.rpartition(".")
        return block != OUTER_BLOCK, stem, int(number) if number.isdigit() else -1

    return {block: tuple(found[block]) for block in sorted(found, key=order)}
