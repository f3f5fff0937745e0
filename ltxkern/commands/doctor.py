"""`ltxkern doctor`: versions, devices, and which backend serves each op or why not; `ltxkern bench-env`: the machine as JSON.

Neither needs an optional package.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Declare both commands."""
    parser = subparsers.add_parser("doctor", help="show versions, devices, backends and why a backend is missing")
    parser.set_defaults(run=run)
    parser = subparsers.add_parser("bench-env", help="print machine and versions as JSON")
    parser.set_defaults(run=run_bench_env)


def table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their longest cell, but the last: a reason is shown whole, on one line."""
    print(f"\n{title}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    for row in rows:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        print("  " + "  ".join([*padded, row[-1]]).rstrip())


def run(arguments: argparse.Namespace) -> int:
    """Print three tables: versions, backends with reasons, op x backend."""
    import ltxkern
    from ltxkern.dispatch import unavailable
    from ltxkern.environment import environment
    from ltxkern.trust import proofs
    from ltxkern.trust.backends import probing
    from ltxkern.trust.permitted import BACKENDS, environment_choice

    facts = environment()
    versions = [(name, version or "not installed") for name, version in facts["packages"].items()]
    table(f"ltxkern {facts['ltxkern']}, Python {facts['python']}", versions)
    print(f"\nprocessor: {facts['processor']}, {facts['cores']} cores, torch uses {facts['threads']} threads")
    if not facts["devices"]:
        print("devices: no CUDA device; everything runs on the CPU")
    for device in facts["devices"]:
        gibibytes = device["memory_bytes"] / 2**30
        print(f"device: {device['name']}, capability {device['capability']}, {gibibytes:.0f} GiB")
    for kind in ("cuda", "cpu") if facts["devices"] else ("cpu",):
        for name, proof in proofs.stored(kind).items():
            print(f"proof of {name}: {'none, ltxkern verify makes one' if proof is None else proof.when}")
    if (chosen := environment_choice()) is not None:
        print(f"LTXKERN_BACKEND: nothing is served but by {', '.join(chosen)}")
    print(f"what no proof covers is {'probed at its first call' if probing() else 'not probed: LTXKERN_SELFCHECK=off'}")
    table("backends, best first", [(name, unavailable(name) or "ready") for name in BACKENDS])
    capabilities = ltxkern.capabilities()
    served = [(op, *("yes" if row[name] is None else "-" for name in BACKENDS)) for op, row in capabilities.items()]
    table("what serves which op here", [("op", *BACKENDS), *served])
    for op, row in capabilities.items():
        for name, reason in row.items():
            if reason is not None and reason != unavailable(name):
                print(f"{op}, {name}: {reason}")
    return 0


def run_bench_env(arguments: argparse.Namespace) -> int:
    """Print what stands beside a measurement."""
    from ltxkern.environment import environment

    print(json.dumps(environment(), indent=2))
    return 0
