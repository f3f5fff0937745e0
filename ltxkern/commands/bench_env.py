"""`ltxkern bench-env`: the machine and versions as JSON, to stand beside a measurement."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("bench-env", help="print machine and versions as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the facts."""
    from ltxkern.environment import environment

    print(json.dumps(environment(), indent=2))
    return 0
