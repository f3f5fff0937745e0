"""`ltxkern verify`: proves every op and backend on the machine at hand, times them, and keeps what dispatch goes by."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltxkern.commands.doctor import table

if TYPE_CHECKING:
    from ltxkern.verify.report import Report

INTERRUPTED = 130


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("verify", help="prove and time every op and backend on this machine")
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", dest="level", action="store_const", const="quick", help="under 60 s; the default")
    level.add_argument("--full", dest="level", action="store_const", const="full", help="under 9 minutes")
    parser.add_argument(
        "--budget", type=budget, metavar="SECONDS", help="that the run may take, in place of the level's own"
    )
    parser.add_argument("--output-json", metavar="FILE", help="also write what is found to this file")
    parser.add_argument("--tiers", metavar="NAMES", help="of cuda,nvrtc,triton,cpu (default: all that run here)")
    parser.add_argument("--ops", metavar="NAMES", help="names of ops, comma between them (default: all)")
    parser.set_defaults(run=run, level="quick")


def budget(text: str) -> float:
    """Seconds as an option gives them: finite and above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(
            f"expected a number of seconds above 0, got {text!r}; without the option the default holds"
        )
    return value


def _names(text: str | None, option: str, known: tuple[str, ...]) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{option}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    if not names:
        raise ValueError(f"{option} names nothing: leave it out for all, or name some of {', '.join(known)}")
    return names


def _writable(path: str) -> Path:
    from ltxkern.pipeline.results.atomic import writable_file

    try:
        return writable_file(path)
    except ValueError as error:
        raise ValueError(f"--output-json: {error}") from error


def run(arguments: argparse.Namespace) -> int:
    """Verify, and print what is found, after an interruption too: then status 130.

    Status 1: something is wrong, not reached or not written, or nothing could be checked.
    """
    from ltxkern.trust import proofs
    from ltxkern.verify.checks import IMPORTANCE
    from ltxkern.verify.interruption import interruptible
    from ltxkern.verify.report import Report, verify

    tiers = _names(arguments.tiers, "--tiers", proofs.TIERS)
    ops = _names(arguments.ops, "--ops", IMPORTANCE)
    path = None if arguments.output_json is None else _writable(arguments.output_json)
    report = Report(arguments.level)

    def changed(now: Report) -> None:
        done = ", ".join(f"{tier} {sum(e.passed for e in row.values())}" for tier, row in now.found.items())
        if sys.stderr.isatty():
            print(f"\r{now.seconds:5.0f} s: {done} checks passed ", end="", file=sys.stderr, flush=True)
        if path is not None and (now.finished or now.wrong() or now.seconds - written[0] >= 1):
            written[0] = now.seconds
            # Whether it can be written is said at the end.
            now.write(path)

    written = [0.0]
    try:
        with interruptible():
            verify(arguments.level, seconds=arguments.budget, tiers=tiers, ops=ops, on_change=changed, report=report)
    except KeyboardInterrupt:
        report.notes.append("interrupted: what was found until then")
        report.store()
    if report.finished and ops is None:
        report.notes += _decoder_layouts()
    unwritten = None if path is None else report.write(path)
    if unwritten is not None:
        report.notes.append(
            f"--output-json: {unwritten}: what was found stands above alone; "
            "see that the folder is there and has room, and verify again"
        )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    _print(report, [op for op in IMPORTANCE if ops is None or op in ops])
    if not report.finished:
        return INTERRUPTED
    failed = not report.found or report.wrong() or report.stopped or report.unreached()
    return 1 if failed or unwritten is not None else 0


def _decoder_layouts() -> list[str]:
    """How the video decoder lies on each card, checked there; nothing without one."""
    import torch

    if not torch.cuda.is_available():
        return []
    from ltxkern.pipeline.model.decoder_layout import describe

    return [describe(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]


def _cell(report: Report, tier: str, op: str) -> str:
    if tier in report.absent:
        return "-"
    entry = report.found.get(tier, {}).get(op)
    if entry is None or not entry.planned:
        return "not reached"
    return f"{entry.verdict} {entry.passed}/{entry.planned}" if entry.verdict != "wrong" else "WRONG"


def _print(report: Report, ops: Sequence[str]) -> None:
    for kind, origin in report.origins.items():
        print(
            f"{kind}: "
            + ", ".join(f"{name} {value[:12] if name == 'build' else value}" for name, value in origin.items())
        )
    tiers = [*report.found, *report.absent]
    rows = [(op, *(_cell(report, tier, op) for tier in tiers)) for op in ops]
    table("checks passed, of those planned", [("op", *tiers), *rows])
    times = [
        (row["op"], row["case"], row["tier"], f"{row['seconds'] * 1e6:.1f} us", f"{row['percent_of_roof']:.0f} %")
        for row in report.times
    ]
    if times:
        table(
            "median call, and its least traffic at the rate of a copy",
            [("op", "case", "tier", "time", "of roof"), *times],
        )
    print()
    for tier, reason in report.absent.items():
        print(f"{tier} does not run here: {reason}")
    for tier, reason in report.stopped.items():
        print(f"{tier} was not asked: {reason}")
    for op, tier, reason in report.wrong():
        print(f"WRONG: {op} on {tier}: {reason}")
    for note in report.notes:
        print(note)
    for file in report.stored:
        print(f"stored in {file}")
    if not report.stored:
        print("nothing was stored: dispatch goes on by what it had")
