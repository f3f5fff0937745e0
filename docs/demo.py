"""Writes what was measured of the demo's model into its card and its gallery: `python docs/demo.py`; with --check it only compares.

The figures are those of measured.json and options.json beside the weights, the sheets those of docs/gallery.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL, SHEETS = ROOT / "ltxkern/demo", ROOT / "docs/gallery"
FIT, EDGE = "fit of the outline", "pixels across an edge"
QUESTIONS = ("colour", "background", "shape", "motion", "pitch", "side")
# Under the text that stands for a picture.
TITLES = {"prompts": "Videos from prompts, six frames each", "pictures": "Videos that go on from a first frame"}


def rows(name: str) -> Mapping[str, Mapping[str, Any]]:
    """What was measured, row by row; none where nothing was."""
    path = MODEL / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else {}


def table(first: str, found: Mapping[str, Mapping[str, Any]], more: Mapping[str, Callable[[Any], str]]) -> str:
    """Rows in Markdown: shares in percent, then other figures."""
    if not found:
        return ""
    heads = [first, "videos", *QUESTIONS, "all of it", *more]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in found.items():
        shares = (f"{row[key]} %" if key in row else "" for key in (*QUESTIONS, "all"))
        lines.append(f"| {' | '.join([name, str(row['videos']), *shares, *(tell(row) for tell in more.values())])} |")
    return "\n".join(lines)


def told(key: str, equal: str = "") -> Callable[[Any], str]:
    """A figure of a row as text; one that is None says `equal`."""
    return lambda row: "" if key not in row else equal if row[key] is None else f"{row[key]:g}"


def figures() -> str:
    """Of the card."""
    more = {FIT: told("fit"), "worse outlines, %": told("worse"), EDGE: told("edge")}
    return table("", rows("measured"), more | {"first frame, least PSNR in dB": told("first_frame")})


def options() -> str:
    """Of the gallery."""
    likeness, seconds = "PSNR in dB", "seconds of a processor"
    more = {FIT: told("fit"), EDGE: told("edge"), likeness: told("decibels", "same"), seconds: told("seconds")}
    return table("option", rows("options"), more)


def sheets() -> str:
    """Pictures of the gallery."""
    return "\n\n".join(
        f"![{title}](gallery/{name}.png)" for name, title in TITLES.items() if (SHEETS / f"{name}.png").is_file()
    )


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    MODEL / "MODEL_CARD.md": {"figures": figures},
    ROOT / "docs/gallery.md": {"sheets": sheets, "options": options},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages anew, or only compare; 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is out of date")
    only_check = parser.parse_args(arguments).check
    stale = 0
    for page, parts in PAGES.items():
        text = new = page.read_text()
        for name, written in parts.items():
            begin, end = f"<!-- {name}: begin, written by docs/demo.py -->", f"<!-- {name}: end -->"
            before, found, rest = new.partition(begin)
            if not found:
                raise SystemExit(f"{page} has no place for the {name}")
            new = before + "\n".join(filter(None, (begin, written(), end))) + rest.partition(end)[2]
        stale += new != text
        if not only_check:
            page.write_text(new)
    return int(only_check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
