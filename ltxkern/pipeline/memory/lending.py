"""Components other than the transformer: lent to the device for as long as they are needed, two of them side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from ltxkern.pipeline.memory.host_copy import Lender
from ltxkern.pipeline.memory.host_memory import HostBudget
from ltxkern.pipeline.memory.streams import StreamClock, clock_for, side_by_side

_First = TypeVar("_First")
_Second = TypeVar("_Second")
_Device = TypeVar("_Device", bound="ComponentDevice")


class ComponentDevice:
    """A device with its streams and a budget of host memory, to which components are lent.

    Args:
        device: where components run.
        host_budget_bytes: as `HostBudget`.
        clock: streams and events; None: those of the device.
    """

    def __init__(self, device: str | torch.device, host_budget_bytes: int | None, clock: StreamClock | None) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.budget = HostBudget(host_budget_bytes)
        self.clock = clock if clock is not None else clock_for(self.device)
        self._lender = Lender(self.device, self.budget)

    @property
    def keeps_components(self) -> bool:
        """Whether a component stays on the device until `close` where its user does not say."""
        return False

    @property
    def lends(self) -> bool:
        """Whether a component is on the device that has its home elsewhere."""
        return self._lender.lends

    @contextlib.contextmanager
    def component(self, name: str, module: Any, *, keep: bool | None = None, once: bool = False) -> Iterator[Any]:
        """Puts a module on the device for the block.

        Args:
            name: of the component, for the log.
            module: anything with or without weights; nothing happens to what is on the device already.
            keep: leave it there until `close`; None: as `keeps_components` says.
            once: it is let go afterwards (a text encoder): not worth page-locking.
        """
        keep = self.keeps_components if keep is None else keep
        with self._lender.lent(name, module, keep=keep and not once, once=once):
            yield module

    def side_by_side(self, first: Callable[[], _First], second: Callable[[], _Second]) -> tuple[_First, _Second]:
        """Runs `first` on the side stream and `second` on the current one; both results are ready for the current stream.

        Args:
            first: the smaller piece (decoding audio), enqueued first.
            second: the larger piece (decoding video).
        """
        return side_by_side(self.clock, first, second)

    def close(self) -> None:
        """Takes all components home and gives their page-locked memory back."""
        self._lender.close()

    def __enter__(self: _Device) -> _Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
