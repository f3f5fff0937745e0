"""Measures how well the demo's model does what prompts of new scenes say: python -m tools.demo_model.measure.

Rows are written into measured.json beside the files as they are done; those of other files go. --only measures some rows anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from ltxkern.pipeline.files.hub import DEMO_FOLDER, DEMO_NAMES
from ltxkern.pipeline.run.presets import PRESETS
from tools.demo_model.faults import FAULTS
from tools.demo_model.runs import Setting, is_right, row, run, tasks, workers

PROMPTS, PAIRS, WITH_FAULTS = 64, 16, 16
VIDEOS = Path("build/demo_model/videos")
ONE, TWO = "one shape", "two shapes"
# The first of one shape: what the faults are to be compared with.
NO_FAULT = "no fault"
SETTINGS = {
    ONE: Setting(),
    TWO: Setting(),
    "first frame given": Setting(first_frame=True),
    "stage 1 enlarged": Setting(enlarged=True),
    "stage 2 without the LoRA": Setting({"distilled_strengths": (PRESETS["hq"].distilled_strengths[0], 0.0)}),
    NO_FAULT: Setting(),
} | {fault: Setting(fault=fault) for fault in FAULTS}


def checksums(files: Path) -> dict[str, str]:
    """What tells the weights of a folder from any others."""
    names = (DEMO_NAMES.checkpoint, DEMO_NAMES.upsampler, DEMO_NAMES.distilled_lora)
    return {name: hashlib.sha256((files / name).read_bytes()).hexdigest() for name in names}


def keep(path: Path, files: Path, name: str, found: dict[str, Any], names: list[str]) -> None:
    """Adds a row to those of the same files, in the order of names."""
    told = json.loads(path.read_text()) if path.is_file() else {}
    own = checksums(files)
    rows = told["rows"] if told.get("files") == own else {}
    rows[name] = found
    ordered = {known: rows[known] for known in names if known in rows}
    path.write_text(json.dumps({"files": own, "rows": ordered}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.measure", description=__doc__)
    parser.add_argument("--files", type=Path, default=DEMO_FOLDER, help="folder of the model; default the package's")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="with one shape")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="with two shapes")
    parser.add_argument("--with-faults", type=int, default=WITH_FAULTS, help="prompts of each fault")
    parser.add_argument("--only", action="append", choices=list(SETTINGS), help="this row alone; repeatable")
    arguments = parser.parse_args()
    with workers() as pool:
        for name in arguments.only or SETTINGS:
            count = arguments.with_faults if name in (NO_FAULT, *FAULTS) else arguments.prompts
            chosen = tasks(arguments.pairs, shapes=2) if name == TWO else tasks(count)
            made = run(SETTINGS[name], arguments.files, chosen, VIDEOS / name.replace(" ", "-"), pool)
            keep(arguments.files / "measured.json", arguments.files, name, row(made), list(SETTINGS))
            fine = [number for number, one in enumerate(made) if is_right(one.verdict)]
            print(name, json.dumps(row(made)), "all right:", *fine, flush=True)


if __name__ == "__main__":
    main()
