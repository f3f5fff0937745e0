"""How far a run is: one event wherever something advances, with the time of its stage and what of it remains."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ProgressEvent:
    """Something advanced.

    Attributes:
        stage: what is being done, such as "stage 1", "video" or "writing".
        done, total: of its steps, tiles or frames.
        seconds: since the stage began.
        remaining: seconds that the rest of this stage will take at the pace so far; None before there is one.
    """

    stage: str
    done: int
    total: int
    seconds: float
    remaining: float | None


OnProgress = Callable[[ProgressEvent], None]


@dataclass
class _Began:
    at: float
    units: int = 0


class ProgressClock:
    """Makes events of what stages report, and hands them on: `clock(stage, done, total)`.

    The pace is of what was done here: a stage that goes on where an earlier process ended begins with what that one left.
    Stages may take turns, as decoding and writing do.
    """

    def __init__(self, tell: OnProgress, now: Callable[[], float] = time.monotonic) -> None:
        self._tell = tell
        self._now = now
        self._last = now()
        self._stages: dict[str, _Began] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` of a stage is through."""
        now = self._now()
        if done == 0:
            self._stages[stage] = _Began(now)
        # A stage that does not report its beginning began when the last report came.
        began = self._stages.setdefault(stage, _Began(self._last))
        self._last = now
        began.units += done > 0
        seconds = now - began.at
        remaining = (total - done) * seconds / began.units if began.units else None
        if done >= total:
            del self._stages[stage]
        self._tell(ProgressEvent(stage, done, total, seconds, remaining))


def report(progress: Report | None, stage: str, done: int, total: int) -> None:
    """Tell a callback, where there is one."""
    if progress is not None:
        progress(stage, done, total)
