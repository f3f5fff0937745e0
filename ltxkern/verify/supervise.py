"""Runs workers, one a tier, and takes a crash, an error or a silence that is too long as what it is: a finding."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ltxkern.verify.checks import Check

WORKER = (sys.executable, "-m", "ltxkern.verify.worker")
# Imports, and on a GPU a context.
START_SECONDS = 120.0


@dataclass(frozen=True)
class Limits:
    """Seconds: when the run is to end, by `time.monotonic`, how long one check may take, and how long a call of a backend in it.

    A call that has begun has its time in any case, past the end if need be: cut short it would say nothing of the backend. What a
    process takes until it is ready is not its checks' time: it moves the end, up to `last`, and may be `start` long.
    """

    end: float
    check: float
    call: float
    last: float = math.inf
    start: float = START_SECONDS

    def left(self) -> float:
        """Until the end."""
        return self.end - time.monotonic()

    def share(self, part: float, least: float) -> Limits:
        """A part of what is left; one call may take a quarter of it, or `least`, so that an endless one leaves time to others."""
        left = self.left()
        seconds = part * left
        call = min(self.call, max(least, 0.25 * seconds))
        start = min(START_SECONDS, max(seconds, 0.5 * left))
        return Limits(time.monotonic() + seconds, self.check, call, self.end, start)


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

    @property
    def complete(self) -> bool:
        """Whether all checks ran, but for those that it refused."""
        return self.passed + self.refused == self.planned


class NoWorkerError(Exception):
    """A worker does not start."""


class Worker:
    """A subprocess with a job.

    Args:
        command: of the subprocess.
        job: what it is to do.
    Attributes:
        fault: in words why its reports ended; None where it was done or the time was up.
    """

    def __init__(self, command: Sequence[str], job: dict[str, Any]) -> None:
        self.fault: str | None = None
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

    def ready(self, limits: Limits) -> Limits | None:
        """Wait until it is ready: the limits from then on; None, where it has a `fault` or was not ready in time."""
        began = time.monotonic()
        if self._next(max(0.0, min(limits.start, limits.last - began)), START_SECONDS) is None:
            return None
        return replace(limits, end=min(limits.last, limits.end + time.monotonic() - began))

    def reports(self, limits: Limits, first: float) -> Iterator[dict[str, Any]]:
        """What it reports once ready until it is done, the time is up, or a `fault` calls for another worker.

        Args:
            limits: of the time.
            first: seconds to its first call.
        """
        wait, calling = first, False
        while calling or limits.left() > 0:
            report = self._next(wait if calling else min(wait, max(0.0, limits.left())), wait)
            if report is None or "done" in report:
                return
            calling = report.get("call", False)
            wait = limits.call if calling else limits.check
            yield report

    def _next(self, patience: float, whole: float) -> dict[str, Any] | None:
        """Its next report; None where it has ended, and where it was silent: a `fault`, unless the `whole` time was not left."""
        try:
            line = self._lines.get(timeout=patience)
        except queue.Empty:
            if patience >= whole:
                self.fault = f"no end after {whole:.3g} s"
            return None
        if line is None:
            self.fault = f"the process ended by {self.end()}"
            return None
        report: dict[str, Any] = json.loads(line)
        return report

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
            at, ready = None, running.ready(limits)
            if ready is not None:
                limits = ready
                at = _follow(running, checks, left, found, limits, changed)
        if running.fault is None:
            break
        if at is None:
            # It did not come as far as a check: that says nothing of any op.
            raise NoWorkerError(running.fault)
        entry = found[checks[at].case.op]
        entry.wrong = entry.wrong or f"{checks[at]}: {running.fault}"
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
) -> int | None:
    """Take a worker's reports; the check that it began last."""
    at: int | None = None
    for report in running.reports(limits, limits.check):
        if "begin" in report:
            at = report["begin"]
        if "end" in report:
            check = checks[report["end"]]
            entry = found[check.case.op]
            left.remove(report["end"])
            entry.essential_left -= check.rank == 0 and not report.get("left_out")
            if report.get("fault") is not None:
                entry.wrong = f"{check}: {report['fault']}"
                left[:] = [index for index in left if checks[index].case.op != check.case.op]
            elif report.get("refused"):
                entry.refused += 1
            elif not report.get("left_out"):
                entry.passed += 1
            changed(found)
    return at


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
            at: tuple[str, str] | None = None
            ready = running.ready(limits)
            # Once ready it times a copy, before the first call.
            for report in running.reports(ready, START_SECONDS) if ready is not None else ():
                if "begin" in report:
                    op, tier = report["begin"]
                    at = op, tier
                if "timed" in report:
                    rows.append(report["timed"])
        if running.fault is None or at is None:
            break
        faults[at] = f"{running.fault}, at a call of production size"
        timed = {row["op"] for row in rows}
        tiers[at[0]].remove(at[1])
        tiers = {op: names for op, names in tiers.items() if op not in timed and names}
    return rows, faults
