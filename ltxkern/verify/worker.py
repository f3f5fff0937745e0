"""The subprocess that runs checks of one tier, or the timing, and reports each on a line: `python -m ltxkern.verify.worker`.

A job comes as one line of JSON on standard input, reports as lines on standard output. One precedes each check, so that a crash
or a hang has a name.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from dataclasses import asdict
from typing import Any

import torch

from ltxkern.dispatch import BackendError
from ltxkern.trust import backends as trust
from ltxkern.verify import checks, timing


def _reports() -> Any:
    """A stream of reports on the standard output that was; what libraries print goes to standard error."""
    stream = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return stream


def _die_with_parent() -> None:
    """A kernel that never ends must not outlive who asked for it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def run_checks(job: dict[str, Any], say: Any) -> bool:
    """The checks of a job, of each op up to its first fault; False after an error of a GPU: the process is of no more use then."""
    device, planned = torch.device(job["device"]), checks.plan(job["level"])
    wrong: set[str] = set()

    def calling(now: bool) -> None:
        say(call=now)

    for index in job["checks"]:
        check = planned[index]
        if check.case.op in wrong:
            continue
        say(begin=index)
        try:
            reason = checks.fault(check, job["tier"], device, calling)
        except BackendError:
            say(end=index, refused=True)
            continue
        except torch.OutOfMemoryError:
            # Memory that others hold says nothing of a backend.
            say(end=index, left_out=True)
            continue
        except Exception as error:
            # Whatever it is: a backend that said it serves the call did not.
            say(end=index, fault=f"{type(error).__name__}: {str(error).strip()[:500]}")
            if device.type == "cuda":
                return False
            reason = ""
        else:
            say(end=index, fault=reason)
        if reason is not None:
            wrong.add(check.case.op)
    return True


def run_timing(job: dict[str, Any], say: Any) -> bool:
    """The times of a job."""
    device = torch.device(job["device"])

    def calling(op: str, tier: str, now: bool) -> None:
        say(begin=[op, tier], call=now)

    for row in timing.measure(device, job["timing"], job["seconds"], calling):
        say(timed=asdict(row))
    return True


def main() -> None:
    """One job."""
    _die_with_parent()
    reports = _reports()
    trust.ignore()
    job = json.loads(sys.stdin.readline())

    def say(**facts: Any) -> None:
        reports.write(json.dumps(facts) + "\n")

    if job["device"] == "cpu" and "timing" not in job:
        torch.set_num_threads(1)
    # A context takes seconds, which are no check's.
    torch.empty(1, device=job["device"])
    say(ready=True)
    if (run_timing if "timing" in job else run_checks)(job, say):
        say(done=True)


if __name__ == "__main__":
    main()
