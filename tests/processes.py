"""Runs Python once more in a process of its own: in the checkout or a copy of it, on one thread, with its output kept."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def not_optimised(folder: Path) -> dict[str, str]:
    """Environment of a build whose C++ is compiled without optimisation, for what computes nothing; `folder` gets a script."""
    launcher = folder / "not-optimised"
    launcher.write_text('#!/bin/sh\nexec "$@" -O0\n')
    launcher.chmod(0o755)
    return {"CMAKE_CXX_COMPILER_LAUNCHER": str(launcher)}


def python(
    *arguments: object, status: int | None = 0, seconds: float = 900, folder: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The process when it has ended, which must be with `status`, or in any way where that is None."""
    given = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(folder)} | environment
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | given, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert status is None or done.returncode == status, done.stdout[-8000:] + done.stderr[-8000:]
    return done
