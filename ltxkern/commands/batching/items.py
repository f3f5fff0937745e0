"""A batch of generations: items from a JSON-lines file, a manifest that makes it resumable, and the loop in one process."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ltxkern.commands.text_files import read_text

MANIFEST = "manifest.jsonl"
_LEGAL_NAME = re.compile(r"[\w][\w.-]*")


@dataclass(frozen=True)
class Item:
    """One generation of a batch.

    name: of its output file, unique in the batch; line: in the file, from 1; options: what the line sets; error: why the line
    cannot be run, or None.
    """

    name: str
    line: int
    options: Mapping[str, Any]
    error: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of an item; one line of the manifest. status: "done" or "failed"; bytes: size of the output."""

    name: str
    status: str
    digest: str
    output: str = ""
    bytes: int = 0
    seconds: float = 0.0
    error: str = ""


def read_items(path: str | Path) -> list[Item]:
    """Items of a JSON-lines file: an object per line with a "prompt" and any request option; "name" is the output's.

    Empty lines are left out. A line that cannot be read becomes an item with its error, so that the others still run.

    Raises:
        ValueError: there is no such file, it is in another encoding than UTF-8 or UTF-16, or it holds no item.
    """
    items: list[Item] = []
    # Not splitlines: it also ends a line at U+2028 and its like, which a prompt may hold.
    for number, line in enumerate(read_text(path, "prompts").split("\n"), 1):
        text = line.lstrip("\ufeff").strip()  # files that were put together have marks within
        if text:
            items.append(_item(text, number, {item.name for item in items}))
    if not items:
        raise ValueError(f'prompts: {path} is empty: write one {{"prompt": "..."}} per line')
    return items


def _item(text: str, line: int, taken: set[str]) -> Item:
    name = f"{line:05d}"
    try:
        content = json.loads(text, object_pairs_hook=_without_twins)
    except json.JSONDecodeError as error:
        return Item(name, line, {}, f"line {line} is not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists within lists without end
        return Item(name, line, {}, f"line {line} is not JSON that can be read: {error}")
    if not isinstance(content, dict):
        return Item(name, line, {}, f'line {line} must be an object such as {{"prompt": "..."}}')
    given = content.pop("name", None)
    given = name if given is None else given
    options = {str(key).replace("-", "_"): value for key, value in content.items()}
    if not isinstance(given, str) or not _LEGAL_NAME.fullmatch(given):
        return Item(name, line, options, f"line {line}: name must be letters, digits, dots and dashes, got {given!r}")
    if given in taken:
        return Item(name, line, options, f"line {line}: the name {given!r} is taken by an earlier line")
    return Item(given, line, options)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose last value would win unseen where a name is there twice."""
    names = [name.replace("-", "_") for name, _ in pairs]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twins)} is there twice")
    return dict(pairs)


def digest(item: Item, settings: Mapping[str, Any]) -> str:
    """What an item's result depends on, as 16 hex digits; settings: the options of the whole batch."""
    text = json.dumps([dict(item.options), dict(settings)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Manifest:
    """The outcomes of a batch folder, one JSON line each, appended as they come; a later line replaces an earlier one."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.expanduser(folder))
        self.path = self.folder / MANIFEST
        self.outcomes: dict[str, Outcome] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").split("\n"):
                self._take(line)

    def _take(self, line: str) -> None:
        try:
            outcome = Outcome(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            return  # the last line of a run that was killed may be half there: its item runs again
        self.outcomes[outcome.name] = outcome

    def is_done(self, name: str, wanted: str) -> bool:
        """Whether an item was done with these very options and its output is there in full."""
        found = self.outcomes.get(name)
        if found is None or found.status != "done" or found.digest != wanted:
            return False
        return output_bytes(self.folder / found.output) == found.bytes

    def add(self, outcome: Outcome) -> None:
        """Append an outcome and make sure that it is on the disk."""
        with self.path.open("ab+") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(asdict(outcome)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.outcomes[outcome.name] = outcome


def output_bytes(path: Path) -> int:
    """Size of a file, or of all files of a folder; -1 where nothing is there."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir())
    return path.stat().st_size if path.is_file() else -1


def pending(items: Iterable[Item], manifest: Manifest, settings: Mapping[str, Any]) -> Iterator[Item]:
    """Items that still need to run."""
    return (item for item in items if not manifest.is_done(item.name, digest(item, settings)))


def attempt(
    item: Item, wanted: str, generate: Callable[[Item], Path], collected: tuple[type[BaseException], ...]
) -> Outcome:
    """Run one item; an exception of the `collected` types becomes its outcome, so that the batch goes on.

    Args:
        item: what to run.
        wanted: its digest.
        generate: writes the item's output and returns where.
        collected: exceptions that concern this item alone.
    """
    started = time.monotonic()
    if item.error is not None:
        return Outcome(item.name, "failed", wanted, error=item.error)
    try:
        output = generate(item)
    except collected as error:
        seconds = round(time.monotonic() - started, 3)
        return Outcome(item.name, "failed", wanted, seconds=seconds, error=f"{type(error).__name__}: {error}")
    seconds = round(time.monotonic() - started, 3)
    return Outcome(item.name, "done", wanted, output.name, output_bytes(output), seconds)
