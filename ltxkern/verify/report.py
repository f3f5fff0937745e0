"""A whole verification: which tiers run where, in what order, what came out of it, and what is stored of that."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ltxkern import triton
from ltxkern.dispatch import unavailable
from ltxkern.trust import proofs
from ltxkern.trust.permitted import BACKENDS
from ltxkern.verify import timing
from ltxkern.verify.checks import IMPORTANCE, Check, plan
from ltxkern.verify.supervise import WORKER, Found, Limits, NoWorkerError, check_tier, time_tiers
from ltxkern.whole_files import replacing

SCHEMA = 1
# Of a run: how long it may take, how long a check may, and what is kept for the timing.
SECONDS = {"quick": 50.0, "full": 510.0}
CHECK_SECONDS = {"quick": 20.0, "full": 60.0}
TIMING_SHARE = 0.25
# What a call of a tier has at the least, in however short a run: two of them compile in it.
CALL_SECONDS = {"cuda": 2.0, "nvrtc": 8.0, "triton": 8.0, "cpu": 2.0}


def device_of(tier: str) -> str:
    """Where a tier's tensors lie."""
    return "cpu" if tier in ("cpu", "torch") or (tier == "triton" and triton.interpreted()) else "cuda"


@dataclass
class Report:
    """What is found so far; complete once `finished`.

    Attributes:
        level: "quick" or "full".
        origins: what it holds for, by kind of device.
        absent: tiers that cannot run here, with the reason.
        found: by tier and op.
        times: rows of `timing.Timed`.
        order: by kind of device and op, the order of preference.
        stopped: tiers that could not be asked, with the reason.
        notes: what was left out, and what could not be stored.
        seconds: that it took.
    """

    level: str
    origins: dict[str, dict[str, str]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    found: dict[str, dict[str, Found]] = field(default_factory=dict)
    times: list[dict[str, Any]] = field(default_factory=list)
    order: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False

    def wrong(self) -> list[tuple[str, str, str]]:
        """Op, tier and reason of what is wrong."""
        return [(op, tier, e.wrong) for tier, row in self.found.items() for op, e in row.items() if e.wrong]

    def unreached(self) -> list[tuple[str, str]]:
        """Op and tier of what is neither proven nor wrong nor refused for want of time or memory."""
        return [(op, t) for t, row in self.found.items() for op, e in row.items() if e.verdict == "not reached"]

    def as_data(self) -> dict[str, Any]:
        """As JSON holds it."""
        found = {
            op: {tier: {**asdict(row[op]), "verdict": row[op].verdict} for tier, row in self.found.items() if op in row}
            for op in IMPORTANCE
        }
        return {
            "schema": SCHEMA,
            "stage": "verify",
            **asdict(self),
            "found": {op: row for op, row in found.items() if row},
        }

    def write(self, path: Path) -> str | None:
        """Write the JSON, whole or not at all; the reason in words where that is not possible."""
        try:
            with replacing(path) as partial:
                partial.write_text(json.dumps(self.as_data(), indent=1) + "\n")
        except OSError as error:
            return f"{path} cannot be written ({error.strerror or error})"
        return None

    def proof(self, kind: str) -> proofs.Proof:
        """What is worth storing of a kind of device."""
        verdicts: dict[str, dict[str, proofs.Verdict]] = {}
        for tier, row in self.found.items():
            for op, entry in row.items():
                if device_of(tier) == kind and entry.verdict in ("proven", "wrong"):
                    level = self.level if entry.wrong or entry.complete else "partial"
                    verdict = proofs.Verdict(not entry.wrong, level, entry.passed, entry.wrong)
                    verdicts.setdefault(op, {})[tier] = verdict
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        return proofs.Proof(verdicts, self.order.get(kind, {}), now)

    def store(self) -> None:
        """Keep what is found under the user's cache."""
        self.stored.clear()
        for kind in {device_of(tier) for tier in self.found}:
            origin = next(iter(proofs.origins(kind).values()))
            failure = proofs.write(origin, self.proof(kind))
            if failure is None:
                self.stored.append(str(origin.path))
            elif failure not in self.notes:
                self.notes.append(failure)


def numbered(level: str) -> list[tuple[int, Check]]:
    """The plan with the index by which workers know a check."""
    return list(enumerate(plan(level)))


def share(limits: Limits, tier: str, to_come: Sequence[str]) -> Limits:
    """A tier's part of the time, of those `to_come`: a cpu kernel answers quickly, and NVRTC and Triton compile each call first."""
    weights = {"cuda": 3.0, "nvrtc": 2.0, "triton": 4.0, "cpu": 1.0}
    part = weights[tier] / sum(weights[other] for other in to_come)
    return limits.share(part * (1 - TIMING_SHARE), CALL_SECONDS[tier])


def verify(
    level: str,
    *,
    seconds: float | None = None,
    check_seconds: float | None = None,
    tiers: Sequence[str] | None = None,
    ops: Sequence[str] | None = None,
    timed: bool = True,
    command: Sequence[str] = WORKER,
    on_change: Callable[[Report], None] = lambda report: None,
    report: Report | None = None,
) -> Report:
    """Check and time every op on every tier that runs here.

    Args:
        level: "quick" or "full".
        seconds, check_seconds: of the whole, and of one check; None for the level's own.
        tiers, ops: names; None for all.
        timed: whether what is proven is also timed.
        command: of the workers.
        on_change: called with the report whenever something is found.
        report: filled in, so that what was found survives an interruption.
    Returns:
        The report.
    """
    began = time.monotonic()
    longest = CHECK_SECONDS[level] if check_seconds is None else check_seconds
    limits = Limits(began + (SECONDS[level] if seconds is None else seconds), longest, longest)
    report = Report(level) if report is None else report
    wanted = [tier for tier in BACKENDS if tier != "torch" and (tiers is None or tier in tiers)]
    report.absent = {tier: reason for tier in wanted if (reason := unavailable(tier)) is not None}
    here = [tier for tier in wanted if tier not in report.absent]
    if not here:
        report.notes.append(
            f"nothing was checked: {', '.join(wanted)} cannot run here; "
            "install what one of them needs, or name others by --tiers"
        )
    if "cuda" in here and "nvrtc" in here:
        # The same kernels, which dispatch reaches only where the first are not.
        here = [*(tier for tier in here if tier != "nvrtc"), "nvrtc"]
    kinds = list(dict.fromkeys(map(device_of, here)))
    for kind in kinds:
        report.origins[kind] = next(iter(proofs.origins(kind).values()))._asdict()
    checks = [(i, check) for i, check in numbered(level) if ops is None or check.case.op in ops]
    for place, tier in enumerate(here):

        def note(found: dict[str, Found], tier: str = tier) -> None:
            report.found[tier] = found
            report.seconds = round(time.monotonic() - began, 1)
            on_change(report)

        given = share(limits, tier, here[place:])
        try:
            note(check_tier(tier, device_of(tier), level, checks, given, note, command))
        except NoWorkerError as error:
            report.stopped[tier] = f"its process does not start: {error}"
        if tier not in report.found:
            continue
        report.store()
        left = sum(
            entry.planned - entry.passed - entry.refused for entry in report.found[tier].values() if not entry.wrong
        )
        if left:
            report.notes.append(f"{tier}: {left} of {len(checks)} checks left out for want of time or memory")
    for kind in kinds if timed else ():
        _time(report, kind, here, limits, command, [op for op in IMPORTANCE if ops is None or op in ops])
        report.seconds = round(time.monotonic() - began, 1)
        on_change(report)
    report.store()
    report.finished = True
    on_change(report)
    return report


def _time(
    report: Report, kind: str, here: Sequence[str], limits: Limits, command: Sequence[str], ops: Sequence[str]
) -> None:
    """Time what is proven on a kind of device, torch beside it."""
    proven = {
        op: [t for t in here if t in report.found and device_of(t) == kind and report.found[t][op].verdict == "proven"]
        for op in ops
    }
    given = limits.share(1.0, max(CALL_SECONDS.values()))
    rows, faults = time_tiers(kind, {op: [*row, "torch"] for op, row in proven.items() if row}, given, command)
    for (op, tier), reason in faults.items():
        if tier in report.found:
            report.found[tier][op].wrong = reason
    report.times += rows
    timed = [timing.Timed(**row) for row in rows]
    report.order[kind] = timing.preferred(timed, BACKENDS)
    missed = [op for op in ops if proven[op] and op not in report.order[kind]]
    if missed:
        report.notes.append(f"not timed on {kind}: {', '.join(missed)}")
