"""Runs every op's benchmark in one process and writes one report: `python bench/run_all.py --cases small`.

The JSON goes to bench/results/<machine>-<revision>.json unless --output-json names another place (with --ops only there), and is
written again after every op, so that a run that is cut short keeps what it measured. The report is printed, and written where
--report names a file. Exit status 1: an op gave a wrong result or crashed. 2: nothing could be measured. 130: interrupted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import machine
from cases import CASE_SETS, Suite
from command_line import BUDGET, measured, names_of, parser, relaunch_warm, start_run, suites
from harness import Budget, Run, count_cases, run_suite
from report import full_report

RESULTS = Path(__file__).resolve().parent / "results"
# Seconds that a run may take: the small set anywhere under 5 minutes, all cases on a GPU under 8, start and end included.
SMALL_BUDGET, GPU_BUDGET = 270.0, 430.0


def default_budget(run: Run, cases: str) -> float:
    """Seconds of a run for which --budget says nothing; no end (0) for all cases on a CPU."""
    if cases == "small":
        return SMALL_BUDGET
    return GPU_BUDGET if run.device.type == "cuda" else 0.0


def measure(run: Run, chosen: Sequence[Suite], parsed: argparse.Namespace) -> None:
    """Every suite in turn; the results file is brought up to date after each."""
    began = time.monotonic()
    for suite in chosen:
        print(f"{suite.op} ...", file=sys.stderr, flush=True)
        try:
            run_suite(run, suite, parsed.cases)
        finally:
            run.facts["wall_s"] = round(time.monotonic() - began, 1)
        run.keep()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the whole run."""
    options = parser("Every op's benchmark, one report.")
    options.add_argument("--ops", help="stems separated by commas (default: all)")
    options.add_argument("--report", type=Path, help="also write the report to this Markdown file")
    options.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"{BUDGET} (default: {SMALL_BUDGET:g} for --cases small, {GPU_BUDGET:g} on a GPU, else 0)",
    )
    parsed = options.parse_args(arguments)
    if parsed.cases not in CASE_SETS:
        options.error(f"--cases: run_all takes {', '.join(CASE_SETS)}; names go to bench_<op>.py")
    known = [suite.op for suite in suites()]
    wanted = names_of(options, "--ops", parsed.ops or None, known)
    relaunch_warm(parsed)
    run = start_run(parsed)
    chosen = [suite for suite in suites() if suite.op in wanted]
    if parsed.output_json is None and not parsed.ops and not run.check_only:
        run.output = RESULTS / f"{machine.slug(run.facts)}.json"
    seconds = default_budget(run, parsed.cases) if parsed.budget is None else parsed.budget
    try:
        if seconds > 0:
            run.budget = Budget(seconds, count_cases(run, chosen, parsed.cases))
        status = measured(run, parsed, lambda: measure(run, chosen, parsed))
    except ValueError as error:
        options.error(str(error))
    if parsed.report:
        parsed.report.write_text(full_report(run.results()) + "\n")
    if run.output and run.records:
        print(f"results: {run.output}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
