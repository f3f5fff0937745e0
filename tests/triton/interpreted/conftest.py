"""Runs only where TRITON_INTERPRET=1 was set before Triton's kernels were decorated; test_interpreted.py starts such a process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if INTERPRETED:
    import interpreter

    interpreter.mend()
