"""How tests start jobs of several ranks, and the options of the command line that say how."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}


def start(module: str, folder: Path) -> dict[str, Any]:
    """Results that a program of ranks left in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results | {"stderr": done.stderr}


def arguments(**changes: Any) -> argparse.Namespace:
    options = {"cfg_parallel_size": None, "stage2_parallel": "none", "max_batch_size": 1, "device": None, "image": []}
    options["pipeline"] = "hq"
    return argparse.Namespace(**{**options, **changes})
