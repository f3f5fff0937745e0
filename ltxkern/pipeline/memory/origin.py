"""Where a transformer's weights lay when it was attached, and their way back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ltxkern.pipeline.memory.host_copy import bring_to, module_tensors, storages_of
from ltxkern.pipeline.memory.host_memory import device_available
from ltxkern.pipeline.memory.modes import gib
from ltxkern.pipeline.memory.table import HostPristine, PristineSource

logger = logging.getLogger(__name__)


class Home:
    """The data of a module's parameters and buffers, as long as nobody lets go of it or writes over it, and its places.

    Args:
        module: its weights are at home now.
    """

    def __init__(self, module: nn.Module) -> None:
        self._data: list[tuple[Tensor, Tensor]] | None = [(tensor, tensor.data) for tensor in module_tensors(module)]
        self._places = [(tensor, tensor.device) for tensor in module_tensors(module)]

    @property
    def is_kept(self) -> bool:
        """Whether the data itself is still there, so that nothing need be copied."""
        return self._data is not None

    def let_go(self) -> None:
        """The data is given up, or about to be written over: the way back is a copy of the live weights."""
        self._data = None

    def move_out(
        self, weights: Mapping[str, Tensor], device: torch.device, source: PristineSource | None
    ) -> dict[str, Tensor]:
        """The weights on `device`, ready to be written over; `HostPristine` keeps them as they were."""
        live = {}
        for module, data in weights.items():
            keeps_data = False
            if isinstance(source, HostPristine):
                source.add(module, data)
                keeps_data = data.device.type == "cpu"
            live[module] = data.to(device, copy=keeps_data and device.type == "cpu").contiguous()
            if live[module].data_ptr() == data.data_ptr():
                self.let_go()
        return live

    def restore(self, device: torch.device) -> None:
        """Points every tensor to its data of old, or moves what lies on `device` to where it came from.

        What finds no room there stays on the device, which the log says. A failure leaves all tensors where they were.
        """
        if self._data is not None:
            for tensor, data in self._data:
                tensor.data = data
            return
        away: dict[torch.device, list[Tensor]] = {}
        for tensor, place in self._places:
            if tensor.device == device != place:
                away.setdefault(place, []).append(tensor)
        for place, tensors in away.items():
            self._bring(tensors, place)

    @staticmethod
    def _bring(tensors: Iterable[Tensor], place: torch.device) -> None:
        tensors = list(tensors)
        needed = sum(storage.nbytes() for storage in storages_of(tensors).values())
        free = device_available(place)
        if needed > free:
            logger.warning(
                "the transformer's weights stay where they are: they take %s, and %s are free on %s, where they came from",
                gib(needed),
                gib(free),
                place,
            )
            return
        bring_to(tensors, place)


def release_weights(module: nn.Module) -> None:
    """Frees the memory of all parameters and buffers: the module cannot run any more."""
    for tensor in module_tensors(module):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
