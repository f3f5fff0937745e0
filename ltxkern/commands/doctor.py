"""`ltxkern doctor`: versions, devices, and which backend serves each op or why not."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("doctor", help="show versions, devices, backends and why a backend is missing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print three tables: environment, backends with reasons, op x backend."""
    from rich.console import Console
    from rich.table import Table

    import ltxkern
    from ltxkern.dispatch import BACKENDS, unavailable
    from ltxkern.environment import environment

    console = Console(soft_wrap=False)
    facts = environment()
    versions = Table("package", "version", title=f"ltxkern {facts['ltxkern']}, Python {facts['python']}")
    for name, version in facts["packages"].items():
        versions.add_row(name, version or "not installed")
    console.print(versions)
    console.print(f"processor: {facts['processor']}, {facts['cores']} cores, torch uses {facts['threads']} threads")
    if not facts["devices"]:
        console.print("devices: no CUDA device; everything runs on the CPU")
    for device in facts["devices"]:
        gibibytes = device["memory_bytes"] / 2**30
        console.print(f"device: {device['name']}, capability {device['capability']}, {gibibytes:.0f} GiB")
    tiers = Table("backend", "state", title="backends, best first")
    for name in BACKENDS:
        tiers.add_row(name, unavailable(name) or "ready")
    console.print(tiers)
    table = Table("op", *BACKENDS, title="what serves which op here")
    for op, row in ltxkern.capabilities().items():
        table.add_row(op, *("yes" if row[name] is None else "-" for name in BACKENDS))
    console.print(table)
    for op, row in ltxkern.capabilities().items():
        for name, reason in row.items():
            if reason is not None and reason != unavailable(name):
                console.print(f"{op}, {name}: {reason}")
    return 0
