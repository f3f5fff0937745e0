"""What the tests of the commands type and write, and how a refusal looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ltxkern.cli import main

MODEL = ["--model", "demo-random"]
SIZE = ["--height", "64", "--width", "128", "--num-frames", "9", "--steps", "2"]
SMALL = ["--prompt", "a kite", *MODEL, *SIZE, "--quiet"]
BATCH = [*MODEL, *SIZE, "--device", "cpu", "--format", "latents"]


def run(*arguments: str) -> int:
    return main(["generate", *SMALL, *arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, command: str = "generate") -> str:
    """Status 2, one line that begins with the program's name, and no traceback."""
    extra = SMALL if command == "generate" else []
    assert main([command, *extra, *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("ltxkern: error: ")
    return lines[0]


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path
