"""Measures how well the demo's model does what prompts of new scenes say: python -m tools.demo_model.measure.

Rows are written into build/demo_model/measured.json as they are done, with --keep into the one beside the files; those of other
files go. --only measures some rows anew.
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
from ltxkern.whole_files import replacing
from tools.demo_model.faults import FAULTS
from tools.demo_model.runs import Made, Setting, is_right, row, run, tasks, workers

PROMPTS, PAIRS, WITH_FAULTS = 64, 16, 32
RESULTS = Path("build/demo_model")
VIDEOS = RESULTS / "videos"
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


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checksums(files: Path) -> dict[str, str]:
    """What tells the weights of a folder from any others."""
    names = (DEMO_NAMES.checkpoint, DEMO_NAMES.upsampler, DEMO_NAMES.distilled_lora)
    return {name: checksum(files / name) for name in names}


def told(made: Sequence[Made], right: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A row with the fit of each video of one shape, in percent.

    Args:
        made: its videos.
        right: a row of the same prompts; how many of its outlines fit better is told as `worse`, in percent.
    """
    fits = [round(100 * one.fit, 1) for one in made if math.isfinite(one.fit)]
    found: dict[str, Any] = {**row(made)}
    if right is not None:
        found["worse"] = round(100 * fmean(one < other for one, other in zip(fits, right["fits"], strict=True)))
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        # A list of figures in one line.
        temporary.write_text(re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n")


def count(text: str) -> int:
    """A whole number from 1, of a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}: expected a whole number from 1")
    return int(text)


def model_folder(text: str) -> Path:
    """A folder of the demo model's files, of a command line."""
    path = Path(text)
    if missing := [name for name in (DEMO_NAMES.checkpoint, DEMO_NAMES.upsampler) if not (path / name).is_file()]:
        raise argparse.ArgumentTypeError(f"{text} lacks {missing[0]}: expected a folder of files as in ltxkern/demo")
    return path


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.measure", description=__doc__)
    parser.add_argument(
        "--files", type=model_folder, default=DEMO_FOLDER, help="folder of the model; default the package's"
    )
    parser.add_argument("--prompts", type=count, default=PROMPTS, help="with one shape")
    parser.add_argument("--pairs", type=count, default=PAIRS, help="with two shapes")
    parser.add_argument("--with-faults", type=count, default=WITH_FAULTS, help="of them, of each fault")
    parser.add_argument("--only", action="append", choices=list(SETTINGS), help="this row alone; repeatable")
    parser.add_argument(
        "--keep", action="store_true", help="write the rows beside the files: those of the package are shipped"
    )
    arguments = parser.parse_args(given)
    path = (arguments.files if arguments.keep else RESULTS) / "measured.json"
    names = [name for name in SETTINGS if name in (arguments.only or SETTINGS)]
    with_faults = min(arguments.prompts, arguments.with_faults)
    counts = dict.fromkeys(SETTINGS, arguments.prompts) | dict.fromkeys(FAULTS, with_faults) | {TWO: arguments.pairs}
    if ONE not in names:
        known = known_rows(path, arguments.files)
        for name in names:
            right = AGAINST.get(name)
            if right is not None and known.get(right, {}).get("videos") != counts[name]:
                parser.error(
                    f"{name!r} is compared with {right!r}, which {path} lacks of {counts[name]} prompts: add --only {ONE!r}"
                )
    with workers() as pool:
        for name in names:
            chosen = tasks(counts[name], shapes=2 if name == TWO else 1)
            made = run(SETTINGS[name], arguments.files, chosen, VIDEOS / name.replace(" ", "-"), pool)
            right = known_rows(path, arguments.files).get(AGAINST.get(name, ""))
            keep(path, arguments.files, name, told(made, right), ROWS)
            if name == ONE:
                keep(path, arguments.files, NO_FAULT, told(made[:with_faults]), ROWS)
            fine = [number for number, one in enumerate(made) if is_right(one.verdict)]
            print(name, json.dumps(row(made)), "all right:", *fine, flush=True)


if __name__ == "__main__":
    main()
