"""Writes the files of the tutorial into a checkout: `python examples/adding_an_op/apply.py FOLDER`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("README.md")
BLOCK = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def changed(text: str, difference: str) -> str:
    """A text with the lines of a difference: those it keeps and removes must stand there once."""
    lines = difference.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    if text.count(before) != 1:
        raise ValueError(f"these lines must stand there once, and stand there {text.count(before)} times:\n{before}")
    return text.replace(before, after)


def apply(folder: Path) -> list[str]:
    """Follow the page in a checkout; the paths of what was written, in the page's order."""
    written = []
    for language, name, content in BLOCK.findall(PAGE.read_text()):
        path = folder / name
        if language == "diff":
            path.write_text(changed(path.read_text(), content))
        elif path.exists():
            raise FileExistsError(f"{path} is there already: follow the tutorial in a fresh checkout")
        else:
            path.write_text(content)
        written.append(name)
    return written


if __name__ == "__main__":
    print("\n".join(apply(Path(sys.argv[1]))))
