"""Runs workers, one a tier, and takes a crash, an error or a silence that is too long as what it is: a finding."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ltxkern.verify.checks import Check

WORKER = (sys.executable, "-m", "ltxkern.verify.worker")
# Imports, and on a GPU a context.
START_SECONDS = 120.0


@dataclass(frozen=True)
class Limits:
    """Seconds: when the run is to end, by `time.monotonic`, and how long one check may take."""

    end: float
    check: float

    def left(self) -> float:
        """Until the end."""
        return self.end - time.monotonic()

    def share(self, part: float) -> Limits:
        """A part of what is left."""
        return Limits(time.monotonic() + part * self.left(), self.check)


@dataclass
class Found:
    """Of one op on one tier: checks that passed, checks that it refused, and the first that failed."""

    planned: int = 0
    passed: int = 0
    refused: int = 0
    essential_left: int = 0
    wrong: str = ""

    @property
    def verdict(self) -> str:
        """In one word or two."""
        if self.wrong:
            return "wrong"
        if self.essential_left:
            return "not reached"
        return "proven" if self.passed else "refused"


class Silent(Exception):  # noqa: N818 - an event, not an error
    """A worker said nothing for too long."""


class NoWorkerError(Exception):
    """A worker does not start."""


class Worker:
    """A subprocess with a job.

    Args:
        command: of the subprocess.
        job: what it is to do.
    """

    def __init__(self, command: Sequence[str], job: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("LTXKERN_DEBUG") else None,
            text=True,
            # Ctrl-C reaches the supervisor alone, which ends the worker.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.close()
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._collect, daemon=True).start()

    def _collect(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def report(self, seconds: float) -> dict[str, Any] | None:
        """The next one, None after the last; raises `Silent` where none comes in time."""
        try:
            line = self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise Silent from None
        return None if line is None else json.loads(line)

    def end(self) -> str:
        """End it, whatever it does; how it ended, in words."""
        # It may have ended, its last line read, and not be gone yet.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0 if self._lines.empty() and self._process.poll() is None else 0.0)
        if self._process.poll() is None:
            self._process.kill()
        code = self._process.wait()
        if code >= 0:
            return f"status {code}"
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
        return f"signal {-code}"

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def worker(command: Sequence[str], job: dict[str, Any]) -> Iterator[Worker]:
    """A worker that does not outlive the block."""
    running = Worker(command, job)
    try:
        yield running
    finally:
        running.kill()


def check_tier(
    tier: str,
    device: str,
    level: str,
    planned: Sequence[tuple[int, Check]],
    limits: Limits,
    changed: Callable[[dict[str, Found]], None],
    command: Sequence[str] = WORKER,
) -> dict[str, Found]:
    """Run checks on one tier; an op is left alone after its first fault, and a worker that dies or hangs is followed by another.

    Args:
        tier: the backend.
        device: of the tensors.
        level: of the plan that the checks are of.
        planned: checks with their index in the plan, the most important first.
        limits: of the time.
        changed: called with what is found so far after each finding.
        command: of the workers.
    Raises:
        NoWorkerError: a worker ended, or was silent, before its first check.
    """
    found: dict[str, Found] = {}
    for _, check in planned:
        entry = found.setdefault(check.case.op, Found())
        entry.planned += 1
        entry.essential_left += check.rank == 0
    checks, left = dict(planned), [index for index, _ in planned]
    while left and limits.left() > 0:
        job = {"tier": tier, "device": device, "level": level, "checks": left}
        with worker(command, job) as running:
            at, fault = _follow(running, checks, left, found, limits, changed)
        if fault is None:
            break
        if at is None:
            # It did not come as far as a check: that says nothing of any op.
            raise NoWorkerError(fault)
        entry = found[checks[at].case.op]
        entry.wrong = entry.wrong or f"{checks[at]}: {fault}"
        changed(found)
        left = [index for index in left if not found[checks[index].case.op].wrong]
    return found


def _follow(
    running: Worker,
    checks: dict[int, Check],
    left: list[int],
    found: dict[str, Found],
    limits: Limits,
    changed: Callable[[dict[str, Found]], None],
) -> tuple[int | None, str | None]:
    """Take a worker's reports until it is done, the time is up, or a fault calls for another worker: (check, fault)."""
    at: int | None = None
    wait = START_SECONDS
    while limits.left() > 0:
        patience = min(wait, max(0.0, limits.left()))
        try:
            report = running.report(patience)
        except Silent:
            return (at, f"no end after {wait:g} s") if patience >= wait else (None, None)
        if report is None:
            return at, f"the process ended by {running.end()}"
        wait = limits.check
        if "done" in report:
            return None, None
        if "begin" in report:
            at = report["begin"]
        if "end" in report:
            check = checks[report["end"]]
            entry = found[check.case.op]
            left.remove(report["end"])
            entry.essential_left -= check.rank == 0
            if report.get("fault") is not None:
                entry.wrong = f"{check}: {report['fault']}"
                left[:] = [index for index in left if checks[index].case.op != check.case.op]
            elif report.get("refused"):
                entry.refused += 1
            else:
                entry.passed += 1
            changed(found)
    return None, None


def time_tiers(
    device: str,
    tiers: dict[str, list[str]],
    limits: Limits,
    command: Sequence[str] = WORKER,
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], str]]:
    """Time all tiers in one worker: the rows, and the op and tier that crashed or hung, with the reason; then the rest goes on."""
    rows: list[dict[str, Any]] = []
    faults: dict[tuple[str, str], str] = {}
    tiers = {op: list(names) for op, names in tiers.items() if names}
    while tiers and limits.left() > 0:
        job = {"timing": tiers, "device": device, "seconds": 0.5 * limits.left()}
        with worker(command, job) as running:
            at, fault = _follow_timing(running, rows, limits)
        if fault is None or at is None:
            break
        faults[at] = f"{fault}, at a call of production size"
        timed = {row["op"] for row in rows}
        tiers[at[0]].remove(at[1])
        tiers = {op: names for op, names in tiers.items() if op not in timed and names}
    return rows, faults


def _follow_timing(
    running: Worker, rows: list[dict[str, Any]], limits: Limits
) -> tuple[tuple[str, str] | None, str | None]:
    at: tuple[str, str] | None = None
    wait = START_SECONDS
    while limits.left() > 0:
        patience = min(wait, max(0.0, limits.left()))
        try:
            report = running.report(patience)
        except Silent:
            return (at, f"no end after {wait:g} s") if patience >= wait else (None, None)
        if report is None:
            return at, f"the process ended by {running.end()}"
        wait = START_SECONDS if "ready" in report else limits.check
        if "done" in report:
            return None, None
        if "begin" in report:
            op, tier = report["begin"]
            at = op, tier
        if "timed" in report:
            rows.append(report["timed"])
    return None, None
