"""Runs every op's benchmark in one process and writes one report: `python bench/run_all.py --cases small`.

The JSON goes to bench/results/<machine>-<revision>.json unless --output-json names another place; the report is printed, and
written beside it where --report names a file. Exit status 1: an op gave a wrong result. 2: nothing could be measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import machine
from cases import CASE_SETS
from command_line import finish, parser, relaunch_warm, start_run
from harness import run_suite
from report import full_report
from suites import SUITES

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the whole run."""
    options = parser("Every op's benchmark, one report.")
    options.add_argument("--ops", help="stems separated by commas (default: all)")
    options.add_argument("--report", type=Path, help="also write the report to this Markdown file")
    parsed = options.parse_args(arguments)
    if parsed.cases not in CASE_SETS:
        options.error(f"--cases: run_all takes {', '.join(CASE_SETS)}; names go to bench_<op>.py")
    known = [suite.op for suite in SUITES]
    wanted = parsed.ops.split(",") if parsed.ops else known
    if unknown := sorted(set(wanted) - set(known)):
        options.error(f"--ops: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    relaunch_warm(parsed)
    run = start_run(parsed)
    began = time.monotonic()
    for suite in SUITES:
        if suite.op in wanted:
            print(f"{suite.op} ...", file=sys.stderr, flush=True)
            run_suite(run, suite, parsed.cases)
    run.facts["wall_s"] = round(time.monotonic() - began, 1)
    report = full_report(run.results())
    print(report)
    if parsed.report:
        parsed.report.write_text(report + "\n")
    if not run.records and not run.failures and not run.check_only:
        print("nothing was measured: see the reasons above", file=sys.stderr)
        return 2
    if parsed.output_json is None and run.records:
        parsed.output_json = RESULTS / f"{machine.slug(run.facts)}.json"
        print(f"results: {parsed.output_json}", file=sys.stderr)
    return finish(run, parsed)


if __name__ == "__main__":
    sys.exit(main())
