"""What moved between two results files: `python bench/compare.py A.json B.json`.

A row counts as moved where its medians differ by more than both runs' own spread (half of p20..p80) together, and by more than
--threshold. A move of a tenth or more that the spread could hide is listed as unclear: measure again. The spread within a run does
not hold what differs from one process to the next (where pages lie, what the host does beside it), so each row also says how far
torch eager moved on the same case: where both moved alike, the machine did. Exit status 1 where something became slower.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from providers import EAGER
from report import Record, Results, duration, markdown_table, read_json

UNCLEAR_FROM = 0.1
SAME_MACHINE = ("gpu", "cpu", "threads", "torch", "triton", "allocator", "driver")


@dataclass(frozen=True)
class Move:
    """One measurement in both files."""

    before: Record
    after: Record
    change: float
    """After over before, less one: 0.2 is 20 % slower."""
    spread: float
    """What the two runs vary by themselves, relative."""

    eager: float | None = None
    """The change of torch eager on the same case."""

    def verdict(self, threshold: float) -> str:
        """ "slower", "faster", "unclear" (large, and yet within the spread), or nothing."""
        if abs(self.change) > max(threshold, self.spread):
            return "slower" if self.change > 0 else "faster"
        return "unclear" if abs(self.change) > max(threshold, UNCLEAR_FROM) else ""


def relative_spread(record: Record) -> float:
    """Half of p20..p80 over the median."""
    return (record.p80_us - record.p20_us) / 2 / record.median_us


def moves(before: Results, after: Results) -> list[Move]:
    """Every measurement that both files have."""
    old = {record.key: record for record in before.records}
    both = [(old[record.key], record) for record in after.records if record.key in old]
    change = {new.key: new.median_us / one.median_us - 1 for one, new in both}
    return [
        Move(one, new, change[new.key], relative_spread(one) + relative_spread(new), change.get((*new.key[:3], EAGER)))
        for one, new in both
    ]


def report(before: Results, after: Results, threshold: float) -> tuple[str, bool]:
    """The comparison in words, and whether anything became slower."""
    found = moves(before, after)
    lines = [f"{before.machine['revision']} -> {after.machine['revision']}: {len(found)} measurements in both"]
    for fact in SAME_MACHINE:
        old, new = before.machine.get(fact), after.machine.get(fact)
        if old != new:
            lines.append(f"CAUTION: {fact} differs, {old} -> {new}: times are not comparable")
    for name in sorted(before.roofs.keys() & after.roofs.keys()):
        change = after.roofs[name] / before.roofs[name] - 1
        if abs(change) > UNCLEAR_FROM:
            lines.append(f"CAUTION: the {name} roof moved by {100 * change:+.0f} %: the machine was not the same")
    verdicts = [(move.verdict(threshold), move) for move in sorted(found, key=lambda move: -move.change)]
    rows = [
        [
            verdict,
            *[str(part) for part in move.after.key],
            duration(move.before.median_us),
            duration(move.after.median_us),
            f"{100 * move.change:+.1f} %",
            f"{100 * move.spread:.1f} %",
            "-" if move.eager is None or move.after.provider == EAGER else f"{100 * move.eager:+.1f} %",
        ]
        for verdict, move in verdicts
        if verdict
    ]
    if rows:
        header = ("", "op", "case", "dtype", "provider", "before", "after", "change", "spread", "eager moved")
        lines += ["", markdown_table(header, rows), ""]
    if not any(verdict in ("slower", "faster") for verdict, _ in verdicts):
        lines.append("nothing moved beyond its spread")
    keys_before, keys_after = {r.key for r in before.records}, {r.key for r in after.records}
    for key in sorted(keys_before - keys_after):
        lines.append(f"gone: {' '.join(key)}")
    for key in sorted(keys_after - keys_before):
        lines.append(f"new: {' '.join(key)}")
    for failure in after.failures:
        lines.append(f"FAILED in the second file: {failure['op']} {failure['case']}: {failure['error']}")
    return "\n".join(lines), any(verdict == "slower" for verdict, _ in verdicts) or bool(after.failures)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python bench/compare.py A.json B.json`."""
    options = argparse.ArgumentParser(description="What moved between two results files.")
    options.add_argument("before", type=Path)
    options.add_argument("after", type=Path)
    options.add_argument("--threshold", type=float, default=0.03, help="smallest relative change worth a line")
    parsed = options.parse_args(arguments)
    try:
        before, after = read_json(parsed.before), read_json(parsed.after)
    except (OSError, ValueError) as error:
        options.error(str(error))
    text, slower = report(before, after, parsed.threshold)
    print(text)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
