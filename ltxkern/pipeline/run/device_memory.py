"""Work that ran out of device memory is done again once room was made for it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from ltxkern.pipeline.memory.manager import TwoStageDeviceManager
from ltxkern.pipeline.memory.modes import OFFLOADED, smaller_mode
from ltxkern.pipeline.memory.offload import OffloadStore

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


def with_room(name: str, work: Callable[[], _Result], make_room: Callable[[], str | None]) -> _Result:
    """What `work` gives, tried again for as long as it runs out of device memory and room can be made.

    Args:
        name: of the work, in words.
        work: has no effect that a second call would not undo.
        make_room: frees memory and says what it did; None where there is nothing left to free.

    Raises:
        OutOfMemoryError: of torch, one sentence.
    """
    while True:
        try:
            return work()
        except torch.OutOfMemoryError as error:
            # The error holds the frames, and these their tensors: nothing is free before it is gone.
            said = str(error).partition("\n")[0]
        done = make_room()
        if done is None:
            raise torch.OutOfMemoryError(
                f"{name}: the device ran out of memory, and there is nothing left to take off it: ask for a smaller or shorter "
                f"video, or free the device ({said})"
            )
        free_cached()
        logger.warning("%s: the device ran out of memory: %s (%s)", name, done, said)


def free_cached() -> None:
    """Give memory that nothing uses any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def vacate(manager: TwoStageDeviceManager) -> str | None:
    """Take the transformer and all components home; None where nothing of them was on the device.

    The transformer must be attached again before it is used.
    """
    if not (manager.is_attached or manager.lends):
        return None
    manager.close()
    return "everything else was taken off it"


def step_down(manager: TwoStageDeviceManager) -> str | None:
    """`vacate`, and the next `attach` gets the next device mode that needs less there; None where none does."""
    mode = manager.mode
    if mode is not None and isinstance(manager.store, OffloadStore):
        mode = OFFLOADED
    following = None if mode is None else smaller_mode(manager.choice.needs, mode)
    if following is None:
        return vacate(manager) if manager.lends else None
    manager.close()
    manager.offload = True if following == OFFLOADED else None
    manager.requested_mode = "original" if following == OFFLOADED else following
    return f"going on in device mode {following} instead of {mode}"
