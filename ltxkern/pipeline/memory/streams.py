"""Two streams and their events: computing, and a side stream for weights that travel meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch.utils._pytree import tree_iter

_First = TypeVar("_First")
_Second = TypeVar("_Second")


class StreamClock(Protocol):
    """What the device manager asks of streams; a test gives one that writes down what happened when."""

    def side(self) -> contextlib.AbstractContextManager[Any]:
        """Within the block the side stream is the current one."""

    def mark(self) -> Any:
        """An event on the current stream: everything enqueued so far."""

    def wait(self, event: Any) -> None:
        """The current stream goes on only after `event`; the host does not wait."""

    def hand_over(self, value: Any) -> None:
        """Tensors in `value`, made on the side stream, are read by the current one: their memory stays until then."""

    def note(self, label: str, nbytes: int = 0) -> None:
        """Says what is enqueued next on the current stream, and how many bytes it moves."""

    def synchronise(self) -> None:
        """The host waits until the side stream is empty."""


class HostClock:
    """Device and host are one: whatever was called has happened."""

    def side(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def mark(self) -> None:
        return None

    def wait(self, event: None) -> None:
        return None

    def hand_over(self, value: Any) -> None:
        return None

    def note(self, label: str, nbytes: int = 0) -> None:
        return None

    def synchronise(self) -> None:
        return None


class CudaClock:
    """A CUDA device: the caller's current stream computes, one stream of our own moves weights."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def side(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._side)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def hand_over(self, value: Any) -> None:
        for tensor in tree_iter(value):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(self._device))

    def note(self, label: str, nbytes: int = 0) -> None:
        return None

    def synchronise(self) -> None:
        self._side.synchronize()


def clock_for(device: torch.device) -> StreamClock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


def side_by_side(
    clock: StreamClock, first: Callable[[], _First], second: Callable[[], _Second]
) -> tuple[_First, _Second]:
    """Runs `first` on the side stream and `second` on the current one; the current stream then waits for both."""
    start = clock.mark()
    ends = []
    try:
        with clock.side():
            clock.wait(start)
            try:
                result = first()
            finally:
                ends.append(clock.mark())
        other = second()
    finally:
        # After an exception too: what the side stream still reads must not be given away before.
        for end in ends:
            clock.wait(end)
    clock.hand_over(result)
    return result, other


def in_turn(clock: StreamClock, jobs: Sequence[Callable[[], _First]]) -> list[_First]:
    """Runs jobs by turns on the current stream and on the side stream, which start and end together.

    One job's matrix product then runs beside the passes over memory of another, and launches need not wait for each other.
    """
    start = clock.mark()
    results: list[_First] = []
    with clock.side():
        clock.wait(start)
    try:
        for index, job in enumerate(jobs):
            with clock.side() if index % 2 else contextlib.nullcontext():
                results.append(job())
    finally:
        # After an exception too: what the side stream still reads must not be given away before.
        with clock.side():
            end = clock.mark()
        clock.wait(end)
    clock.hand_over(results[1::2])
    return results
