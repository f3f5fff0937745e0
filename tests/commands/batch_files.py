"""A file of prompts, and the options of a small batch."""

import json
from pathlib import Path
from typing import Any

SMALL = [
    "--height",
    "64",
    "--width",
    "128",
    "--num-frames",
    "9",
    "--steps",
    "2",
    "--device",
    "cpu",
    "--format",
    "latents",
]


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path
