"""Checksums of the files that a request reads, against what the hub says of them, or what an earlier look recorded."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ltxkern.pipeline.files.checkpoint import component_paths, is_present
from ltxkern.pipeline.files.found import FoundModel
from ltxkern.pipeline.files.hub import local_lora
from ltxkern.pipeline.model.components import COMPONENT_NAMES
from ltxkern.whole_files import cache_folder, replacing

logger = logging.getLogger(__name__)

_AT_ONCE = 2**23  # bytes
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Checked(NamedTuple):
    """One file, its SHA-256 in hex, whether it is what it should be, and by what."""

    path: Path
    sha256: str
    is_whole: bool
    verdict: str


def files_of(model: FoundModel, loras: Iterable[str | Path] = ()) -> list[Path]:
    """Every file that a model and LoRAs are read from; downloads what is not on this machine. The random demo has none."""
    places: list[Path] = []
    if not model.is_random:
        files = model.files
        places = [
            place for name in COMPONENT_NAMES if is_present(files, name) for place in component_paths(files, name)
        ]
    places += [local_lora(path) for path in loras]
    found = (file for place in places for file in (sorted(place.rglob("*")) if place.is_dir() else [place]))
    return [file for file in dict.fromkeys(found) if file.is_file() and not file.name.startswith(".")]


def record_file() -> Path:
    """Where checksums are kept, in the user's cache folder."""
    return cache_folder() / "checksums.json"


def check_files(paths: Iterable[Path]) -> Iterator[Checked]:
    """Read each file whole and judge it; what nobody has a checksum of is recorded for the next time.

    Raises:
        OSError: a file cannot be read.
    """
    record = _recorded()
    for path in paths:
        found = _sha256(path)
        hub = hub_sha256(path)
        name, before = os.path.realpath(path), record.get(os.path.realpath(path))
        if hub is not None:
            told = "as the hub says" if hub == found else f"damaged, the hub says {hub}: download it again"
            yield Checked(path, found, hub == found, told)
            continue
        if before is None:
            _keep(record | {name: found})
            record = _recorded()
            yield Checked(path, found, True, "recorded now")
        else:
            told = (
                "as recorded"
                if before == found
                else f"changed, it was {before}: if it should be, remove that from {record_file()}"
            )
            yield Checked(path, found, before == found, told)


def hub_sha256(path: Path) -> str | None:
    """The checksum by which the hub knows a large file that was downloaded; None where nothing tells it.

    The hub's cache names such a file by it; beside a download into a folder it stands in the second line of a description.
    """
    blob = Path(os.path.realpath(path))
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    for folder in path.absolute().parents:
        described = folder / ".cache/huggingface/download" / f"{path.absolute().relative_to(folder)}.metadata"
        try:
            words = described.read_text(encoding="utf-8").split()
        except (OSError, ValueError):
            continue
        return words[1] if len(words) > 1 and _SHA256.fullmatch(words[1]) else None
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


def _recorded() -> dict[str, Any]:
    try:
        found = json.loads(record_file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read and is begun anew: %s", record_file(), error)
        return {}
    return found if isinstance(found, dict) else {}


def _keep(record: Mapping[str, Any]) -> None:
    try:
        record_file().parent.mkdir(parents=True, exist_ok=True)
        with replacing(record_file()) as temporary:
            temporary.write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
    except OSError as error:
        logger.warning("checksums are not recorded: %s", error)
