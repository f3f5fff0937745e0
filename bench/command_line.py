"""The command line that every bench_<op>.py shares, and the start of a run."""

from __future__ import annotations

import argparse
import errno
import functools
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import machine
from cases import CASE_SETS, Suite
from harness import Budget, Run, count_cases, run_suite
from ltxkern.verify.interruption import interruptible
from report import full_report, write_csv
from timing import Settings

INTERRUPTED = 130
BUDGET = "wall time of the run: each case's samples are shortened to fit, and cases are left out once it is spent; 0 is no limit"
# Without these each fresh output of some megabytes is mapped and unmapped, and page faults drown the kernel. glibc and OpenMP
# read them only when a process starts.
WARM_START = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "OMP_PROC_BIND": "close",
    "OMP_PLACES": "cores",
    "KINETO_LOG_LEVEL": "99",
}


@functools.cache
def suites() -> tuple[Suite, ...]:
    """Every op's: the SUITE of bench_<stem>.py for each stem of ltxkern/ops that has one."""
    stems = sorted(path.stem for path in (machine.ROOT / "ltxkern" / "ops").glob("*.py"))
    here = Path(__file__).parent
    return tuple(
        importlib.import_module(f"bench_{stem}").SUITE for stem in stems if (here / f"bench_{stem}.py").exists()
    )


def at_least_one(text: str) -> int:
    """A count, as argparse wants it."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def result_file(text: str) -> Path:
    """A path that can be written, folders that lack made then; as argparse wants it."""
    path = Path(text)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        there = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=there):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be written ({error.strerror}): name a file in a folder that can be"
        ) from error


def names_of(options: argparse.ArgumentParser, option: str, given: str | None, known: Sequence[str]) -> list[str]:
    """The names that an option has, commas between, or all where it is absent; ends the command at one that is not known."""
    names = [*known] if given is None else [name.strip() for name in given.split(",")]
    if unknown := sorted(set(names) - set(known)):
        options.error(f"{option}: unknown {', '.join(unknown) or repr(given)}; known are {', '.join(known)}")
    return names


def parser(description: str) -> argparse.ArgumentParser:
    """The shared options."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", default="small", help=f"{', '.join(CASE_SETS)}, or names separated by commas")
    options.add_argument("--dtypes", help="of bf16,fp16,fp32 (default: what the op is used with)")
    options.add_argument("--backends", help="providers to time, e.g. 'torch eager,cpu,triton' (default: all there are)")
    options.add_argument("--rounds", type=at_least_one, default=3, help="times that every provider comes round")
    options.add_argument("--warmup", type=float, default=25, help="milliseconds before each provider's samples")
    options.add_argument("--rep", type=float, default=100, help="milliseconds of samples per provider and round")
    options.add_argument("--output-csv", type=result_file)
    options.add_argument("--output-json", type=result_file)
    options.add_argument("--profile-provider", metavar="NAME", help="also profile this provider on each case")
    options.add_argument("--check", action="store_true", help="correctness only, no timing")
    options.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    options.add_argument("--threads", type=at_least_one, help="CPU threads (default: torch's)")
    options.add_argument("--default-allocator", action="store_true", help="CPU: keep glibc's page-returning default")
    return options


def relaunch_warm(arguments: argparse.Namespace) -> None:
    """Start this process anew with `WARM_START`, unless it has it or was told not to."""
    done = "MALLOC_MMAP_THRESHOLD_" in os.environ
    # A GPU's figures need none of it, and bound threads would make torch.compile's workers share one core.
    on_gpu = torch.cuda.is_available() and arguments.device != "cpu"
    if done or on_gpu or arguments.default_allocator or not sys.platform.startswith("linux"):
        return
    # Once OpenMP has bound the first thread its affinity is one core: count before.
    threads = {"OMP_NUM_THREADS": str(default_threads(arguments))}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **WARM_START, **threads})


def default_threads(arguments: argparse.Namespace) -> int:
    """--threads, else OMP_NUM_THREADS, else every core this process may use."""
    return arguments.threads or int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def start_run(arguments: argparse.Namespace) -> Run:
    """A run as the command line wants it: device, threads, durations, machine facts."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch.cuda.is_available() is false here")
    device = torch.device("cpu") if arguments.device == "cpu" else machine.best_device()
    threads = default_threads(arguments)
    torch.set_num_threads(threads)
    return Run(
        device=device,
        settings=Settings(arguments.rounds, arguments.warmup, arguments.rep),
        threads=threads,
        dtypes=tuple(part.strip() for part in arguments.dtypes.split(",")) if arguments.dtypes else None,
        backends=tuple(part.strip() for part in arguments.backends.split(",")) if arguments.backends else None,
        check_only=arguments.check,
        profile_provider=arguments.profile_provider,
        facts=machine.describe(device, threads),
        output=arguments.output_json,
    )


def measured(run: Run, arguments: argparse.Namespace, measure: Callable[[], None]) -> int:
    """Measure, and `finish` with the rows there are where that is interrupted, by a signal to end too; a crash keeps them.

    Returns:
        The exit status: 130 where it was interrupted, else that of `finish`.
    """
    interrupted = False
    try:
        with interruptible():
            measure()
    except KeyboardInterrupt:
        interrupted = True
    except BaseException:
        run.keep()
        raise
    status = finish(run, arguments)
    if interrupted:
        print("interrupted: what was measured stands above", file=sys.stderr)
    return INTERRUPTED if interrupted else status


def finish(run: Run, arguments: argparse.Namespace, text: str | None = None) -> int:
    """Print the report, or another text, and write the asked-for files.

    Returns:
        The exit status: 1 after a wrong result or a crash, 2 where nothing was measured.
    """
    run.end()
    # First the files: a lost connection takes no print.
    run.keep()
    results = run.results()
    if arguments.output_csv:
        write_csv(results.records, arguments.output_csv)
    print(full_report(results) if text is None else text)
    for failure in run.failures:
        print(f"FAILED: {failure['op']} {failure['case']}: {failure['error']}", file=sys.stderr)
    if run.records or run.failures or run.check_only:
        return 1 if run.failures else 0
    print("nothing was measured: see the reasons above", file=sys.stderr)
    return 2


def main(suite: Suite, arguments: Sequence[str] | None = None) -> int:
    """`python bench/bench_<op>.py`."""
    options = parser(f"Benchmark of {suite.op}.\ncases: " + ", ".join(f"{c.name} ({c.size})" for c in suite.cases))
    options.add_argument("--budget", type=float, default=0.0, metavar="SECONDS", help=BUDGET)
    parsed = options.parse_args(arguments)
    relaunch_warm(parsed)
    run = start_run(parsed)
    try:
        if parsed.budget > 0:
            run.budget = Budget(parsed.budget, count_cases(run, [suite], parsed.cases))
        return measured(run, parsed, lambda: run_suite(run, suite, parsed.cases))
    except ValueError as error:
        options.error(str(error))
