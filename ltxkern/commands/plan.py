"""`ltxkern plan`: memory per component, stage and device mode, from configurations and headers alone."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ltxkern.commands import admission, options

TABLE_WIDTH = 120


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "plan",
        help="show what a request needs, before anything is loaded",
        description="Bytes per component and stage, peak per device mode and forwards, from headers alone.",
    )
    options.add_request_options(parser)
    options.add_model_options(parser)
    parser.add_argument("--device-free-gib", type=_gib, metavar="F", help="plan for this much free device memory")
    parser.add_argument("--host-free-gib", type=_gib, metavar="F", help="plan for this much free host memory")
    parser.add_argument(
        "--checksums",
        action="store_true",
        help="also read every file whole: its SHA-256 against the hub's, or against what an earlier look recorded",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a file; the command line wins")
    parser.set_defaults(run=run, parser=parser)


def _gib(text: str) -> int:
    """Bytes of a finite number of GiB, 0 at least."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of GiB of at least 0, got {text!r}")
    return int(value * 2**30)


def run(arguments: argparse.Namespace) -> int:
    """Print the table; status 2 with the nearest request that fits where this one does not."""
    chosen, request = admission.read_options(arguments)
    made = chosen.plan(request, device_free=arguments.device_free_gib, host_free=arguments.host_free_gib)
    from rich.console import Console  # what is refused is refused without it

    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(made.table())
    if arguments.checksums:
        _check_files(chosen)
    made.check()
    return 0


def _check_files(chosen: options.ModelOptions) -> None:
    """Print a line a file.

    Raises:
        ValueError: those that are not what they should be.
    """
    from ltxkern.pipeline.planning.checksums import check_files, files_of

    bad = []
    for file in check_files(files_of(chosen.model, chosen.lora_files)):
        print(f"{file.sha256}  {file.path}: {file.verdict}", flush=True)
        bad += [] if file.is_whole else [f"{file.path}: {file.verdict}"]
    if bad:
        raise ValueError("\n  ".join([f"{len(bad)} of the files are not what they were:", *bad]))
