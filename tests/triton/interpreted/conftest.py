"""Runs only where TRITON_INTERPRET=1 was set before Triton's kernels were decorated; test_interpreted.py starts such a process."""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from tests.triton import interpreter

    interpreter.mend()
