"""A module that moves to the device for a while and comes back without being copied back: its weights do not change."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from ltxkern.pipeline.memory.host_memory import HostBudget, HostBudgetError

logger = logging.getLogger(__name__)


def module_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, each object once."""
    seen: set[int] = set()
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def storages_of(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages of tensors by address, shared ones once, empty ones left out."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and tensor.device.type != "meta":
            found[storage.data_ptr()] = storage
    return found


def storages(module: nn.Module) -> dict[int, torch.UntypedStorage]:
    """`storages_of` all parameters and buffers."""
    return storages_of(module_tensors(module))


def rebase(tensors: Iterable[Tensor], move: Callable[[torch.UntypedStorage], torch.UntypedStorage]) -> None:
    """Points every tensor to the moved storage of its own, views and sharing kept; a failure leaves all as they were."""
    moved: dict[int, torch.UntypedStorage] = {}
    targets = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if not storage.nbytes() or tensor.device.type == "meta":
            continue
        pointer = storage.data_ptr()
        if pointer not in moved:
            moved[pointer] = move(storage)
        base = torch.empty(0, dtype=tensor.dtype, device=moved[pointer].device)
        targets.append((tensor, base.set_(moved[pointer], tensor.storage_offset(), tensor.shape, tensor.stride())))
    # Nothing is changed before all storages have been made.
    for tensor, target in targets:
        tensor.data = target


def bring_to(tensors: Iterable[Tensor], device: torch.device, *, non_blocking: bool = False) -> None:
    """Moves tensors to a device, storages that they share once. A failure leaves all where they were."""

    def move(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        if storage.device == device:
            return storage
        copy = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
        return copy.copy_(storage, non_blocking=non_blocking)

    rebase(tensors, move)


class HostCopy:
    """Keeps a module's weights on the host, page-locked where the budget allows, and lends them to a device.

    Args:
        module: on the host; modules without weights are fine.
        budget: counts page-locked memory. A module that does not fit stays pageable.
        pin: page-lock; pass False to leave it pageable.
    """

    def __init__(self, module: nn.Module, budget: HostBudget, *, pin: bool = True) -> None:
        self.module = module
        self._budget = budget
        self._pinned: list[Tensor] = []
        self._away = False
        try:
            if pin and torch.cuda.is_available():
                self._pin()
            self._home = [(tensor, tensor.data) for tensor in module_tensors(module)]
        except BaseException:
            self._give_back()
            raise

    def _pin(self) -> None:
        def move(storage: torch.UntypedStorage) -> torch.UntypedStorage:
            if storage.device.type != "cpu" or storage.is_pinned():
                return storage
            copy = self._budget.take(torch.Size([storage.nbytes()]), torch.uint8, type(self.module).__name__)
            self._pinned.append(copy)
            return copy.untyped_storage().copy_(storage)

        rebase(module_tensors(self.module), move)

    def lend(self, device: torch.device) -> None:
        """Copies the weights to the device, on the current stream; a failure leaves the module at home."""
        self._away = True
        bring_to(module_tensors(self.module), device, non_blocking=True)

    def is_home(self) -> bool:
        """Whether the module holds the host weights that this keeps: someone else may have moved or replaced them."""
        now = list(module_tensors(self.module))
        return len(now) == len(self._home) and all(
            tensor is kept and tensor.data_ptr() == data.data_ptr()
            for tensor, (kept, data) in zip(now, self._home, strict=True)
        )

    @property
    def is_away(self) -> bool:
        """Whether the module is on a device."""
        return self._away

    def take_home(self) -> None:
        """Points the module to its host weights again; the device's copies are freed, nothing is copied."""
        for tensor, data in self._home:
            tensor.data = data
        self._away = False

    def close(self) -> None:
        """Takes the module home and gives the page-locked memory back; weights that someone else put there stay."""
        if self._away:
            self.take_home()
        if self._pinned and self.is_home():
            rebase(module_tensors(self.module), lambda storage: torch.UntypedStorage(storage.nbytes()).copy_(storage))
            self._home = []
        self._give_back()

    def _give_back(self) -> None:
        for tensor in self._pinned:
            self._budget.give_back(tensor)
        self._pinned.clear()


def _is_on(module: nn.Module, device: torch.device) -> bool:
    return all(tensor.device.type == device.type for tensor in module_tensors(module))


class Lender:
    """Lends components to a device by name. A component that comes again finds its host copy page-locked already.

    Args:
        device: they are lent to.
        budget: counts page-locked memory; a component that does not fit stays pageable.
    """

    def __init__(self, device: torch.device, budget: HostBudget) -> None:
        self._device = device
        self._budget = budget
        self._copies: dict[str, HostCopy] = {}

    @contextlib.contextmanager
    def lent(self, name: str, module: nn.Module, *, keep: bool, once: bool = False) -> Iterator[None]:
        """The module is on the device within the block, and at home again afterwards unless `keep`; an error takes it home.

        Args:
            name: of the component.
            module: with or without weights; nothing happens to what is on the device already.
            keep: it stays on the device until `close`.
            once: it is not expected again: nothing is page-locked or kept for it.
        """
        if _is_on(module, self._device):
            yield
            return
        copy = HostCopy(module, self._budget, pin=False) if once else self._copy(name, module)
        done = False
        try:
            copy.lend(self._device)
            yield
            done = True
        finally:
            if not (keep and done):
                copy.take_home()

    def _copy(self, name: str, module: nn.Module) -> HostCopy:
        known = self._copies.get(name)
        if known is not None and known.module is module and known.is_home():
            return known
        if known is not None:
            del self._copies[name]
            known.close()
        try:
            made = HostCopy(module, self._budget)
        except HostBudgetError as error:
            logger.info("%s stays pageable: %s", name, error)
            made = HostCopy(module, self._budget, pin=False)
        self._copies[name] = made
        return made

    @property
    def lends(self) -> bool:
        """Whether a component is on the device now."""
        return any(copy.is_away for copy in self._copies.values())

    def close(self) -> None:
        """Takes all components home and gives page-locked memory back."""
        while self._copies:
            self._copies.popitem()[1].close()
