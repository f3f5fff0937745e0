"""What moved between two results files: `python bench/compare.py A.json B.json`.

A row counts as moved where its medians differ by more than both runs' own spread (half of p20..p80) together, and by more than
--threshold. Exit status 1 where something became slower.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from record import Record, Results, read_json
from report import duration, markdown_table

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

    def beyond(self, threshold: float) -> bool:
        """Whether the change is more than noise."""
        return abs(self.change) > max(threshold, self.spread)


def relative_spread(record: Record) -> float:
    """Half of p20..p80 over the median."""
    return (record.p80_us - record.p20_us) / 2 / record.median_us


def moves(before: Results, after: Results) -> list[Move]:
    """Every measurement that both files have."""
    old = {record.key: record for record in before.records}
    return [
        Move(
            old[record.key],
            record,
            record.median_us / old[record.key].median_us - 1,
            relative_spread(old[record.key]) + relative_spread(record),
        )
        for record in after.records
        if record.key in old
    ]


def report(before: Results, after: Results, threshold: float) -> tuple[str, bool]:
    """The comparison in words, and whether anything became slower."""
    found = moves(before, after)
    lines = [f"{before.machine['revision']} -> {after.machine['revision']}: {len(found)} measurements in both"]
    for fact in SAME_MACHINE:
        old, new = before.machine.get(fact), after.machine.get(fact)
        if old != new:
            lines.append(f"CAUTION: {fact} differs, {old} -> {new}: times are not comparable")
    moved = sorted((move for move in found if move.beyond(threshold)), key=lambda move: -move.change)
    rows = [
        [
            "slower" if move.change > 0 else "faster",
            *[str(part) for part in move.after.key],
            duration(move.before.median_us),
            duration(move.after.median_us),
            f"{100 * move.change:+.1f} %",
            f"{100 * move.spread:.1f} %",
        ]
        for move in moved
    ]
    if rows:
        header = ("", "op", "case", "dtype", "provider", "before", "after", "change", "spread")
        lines += ["", markdown_table(header, rows)]
    else:
        lines.append("nothing moved beyond its spread")
    keys_before, keys_after = {r.key for r in before.records}, {r.key for r in after.records}
    for key in sorted(keys_before - keys_after):
        lines.append(f"gone: {' '.join(key)}")
    for key in sorted(keys_after - keys_before):
        lines.append(f"new: {' '.join(key)}")
    for failure in after.failures:
        lines.append(f"FAILED in the second file: {failure['op']} {failure['case']}: {failure['error']}")
    return "\n".join(lines), any(move.change > 0 for move in moved) or bool(after.failures)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python bench/compare.py A.json B.json`."""
    options = argparse.ArgumentParser(description="What moved between two results files.")
    options.add_argument("before", type=Path)
    options.add_argument("after", type=Path)
    options.add_argument("--threshold", type=float, default=0.03, help="smallest relative change worth a line")
    parsed = options.parse_args(arguments)
    text, slower = report(read_json(parsed.before), read_json(parsed.after), parsed.threshold)
    print(text)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
