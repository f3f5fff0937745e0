"""How tests start jobs of several ranks, and the options of the command line that say how."""

import argparse
import json
from pathlib import Path
from typing import Any

from tests.processes import python


def start(module: str, folder: Path) -> dict[str, Any]:
    """Results that a program of ranks left in `folder`."""
    done = python("-m", module, folder, seconds=400)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results | {"stderr": done.stderr}


def arguments(**changes: Any) -> argparse.Namespace:
    options = {"cfg_parallel_size": None, "stage2_parallel": "none", "max_batch_size": 1, "device": None, "image": []}
    options["pipeline"] = "hq"
    return argparse.Namespace(**{**options, **changes})
