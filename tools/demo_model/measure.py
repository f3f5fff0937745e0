"""Measures how well the demo's model does what prompts of new scenes say: python -m tools.demo_model.measure.

Rows are written into measured.json beside the files as they are done; those of other files go. --only measures some rows anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ltxkern.pipeline.files.hub import DEMO_FOLDER, DEMO_NAMES
from ltxkern.pipeline.run.presets import PRESETS
from tools.demo_model.faults import FAULTS
from tools.demo_model.runs import Made, Setting, is_right, row, run, tasks, workers

PROMPTS, PAIRS, WITH_FAULTS = 64, 16, 32
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
} | {fault: Setting(fault=fault) for fault in FAULTS}
# What a row's outlines are compared with.
AGAINST = {"stage 1 enlarged": ONE, "stage 2 without the LoRA": ONE} | dict.fromkeys(FAULTS, NO_FAULT)
ROWS = (*list(SETTINGS)[: -len(FAULTS)], NO_FAULT, *FAULTS)


def checksums(files: Path) -> dict[str, str]:
    """What tells the weights of a folder from any others."""
    names = (DEMO_NAMES.checkpoint, DEMO_NAMES.upsampler, DEMO_NAMES.distilled_lora)
    return {name: hashlib.sha256((files / name).read_bytes()).hexdigest() for name in names}


def told(made: Sequence[Made], right: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A row with the fit of each video of one shape, in percent.

    Args:
        made: its videos.
        right: a row of the same prompts; how many of its outlines fit better is told as `worse`, in percent.
    """
    fits = [round(100 * one.fit, 1) for one in made if math.isfinite(one.fit)]
    found: dict[str, Any] = {**row(made)}
    if right is not None:
        found["worse"] = round(100 * fmean(one < other for one, other in zip(fits, right["fits"], strict=False)))
    if fits:
        found["fits"] = fits
    return found


def known_rows(path: Path, files: Path) -> dict[str, Any]:
    """Rows of these very files."""
    kept = json.loads(path.read_text()) if path.is_file() else {}
    return kept["rows"] if kept.get("files") == checksums(files) else {}


def keep(path: Path, files: Path, name: str, found: dict[str, Any], names: Sequence[str]) -> None:
    """Adds a row to those of the same files, in the order of names."""
    rows = known_rows(path, files)
    rows[name] = found
    ordered = {known: rows[known] for known in names if known in rows}
    text = json.dumps({"files": checksums(files), "rows": ordered}, indent=1)
    # A list of figures in one line.
    path.write_text(re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.measure", description=__doc__)
    parser.add_argument("--files", type=Path, default=DEMO_FOLDER, help="folder of the model; default the package's")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="with one shape")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="with two shapes")
    parser.add_argument("--with-faults", type=int, default=WITH_FAULTS, help="of them, of each fault")
    parser.add_argument("--only", action="append", choices=list(SETTINGS), help="this row alone; repeatable")
    arguments = parser.parse_args()
    path = arguments.files / "measured.json"
    with workers() as pool:
        for name in arguments.only or SETTINGS:
            chosen = tasks(arguments.pairs, shapes=2) if name == TWO else tasks(arguments.prompts)
            if name in FAULTS:
                chosen = chosen[: arguments.with_faults]
            made = run(SETTINGS[name], arguments.files, chosen, VIDEOS / name.replace(" ", "-"), pool)
            right = known_rows(path, arguments.files).get(AGAINST.get(name, ""))
            keep(path, arguments.files, name, told(made, right), ROWS)
            if name == ONE:
                keep(path, arguments.files, NO_FAULT, told(made[: arguments.with_faults]), ROWS)
            fine = [number for number, one in enumerate(made) if is_right(one.verdict)]
            print(name, json.dumps(row(made)), "all right:", *fine, flush=True)


if __name__ == "__main__":
    main()
