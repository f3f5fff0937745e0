"""Where runs are kept that nobody named a folder for, and how much of the disk they may take."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ltxkern.pipeline.work.facts import key
from ltxkern.pipeline.work.folder import MANIFEST, WorkFolder, WorkFolderError
from ltxkern.whole_files import cache_folder

# Some thirty production runs that were not finished, hundreds that were.
LIMIT_GIB = 16.0


def default_folder(command: Mapping[str, Any]) -> Path:
    """Of the user's cache folder, by what was asked for."""
    return root() / key(command)


def root() -> Path:
    """The folder of all runs that nobody named a folder for."""
    return cache_folder() / "work"


def limit_bytes() -> int:
    """LTXKERN_WORK_LIMIT in GiB.

    Raises:
        ValueError: it is not a number of at least 0.
    """
    text = os.environ.get("LTXKERN_WORK_LIMIT") or str(LIMIT_GIB)
    try:
        gib = float(text)
    except ValueError:
        gib = -1.0
    if not 0 <= gib < float("inf"):
        raise ValueError(f"LTXKERN_WORK_LIMIT must be a number of GiB, got {text!r}: use {LIMIT_GIB:g}")
    return int(gib * 2**30)


def trim(spare: Path, limit: int) -> list[Path]:
    """Remove runs, the one that was written to longest ago first, until all take no more than `limit` bytes.

    Args:
        spare: a run that stays.
        limit: bytes; a run that another process holds stays, whatever it takes.

    Returns:
        The folders that went.
    """
    folders = [folder for folder in root().glob("*") if folder.is_dir() and not folder.is_symlink()]
    sizes = {folder: _bytes(folder) for folder in folders}
    total, gone = sum(sizes.values()), []
    for folder in sorted(set(folders) - {spare}, key=_last_written):
        if total <= limit:
            break
        try:
            with WorkFolder(folder, is_cache=True):
                shutil.rmtree(folder)
        except (WorkFolderError, OSError):
            continue
        total -= sizes[folder]
        gone.append(folder)
    return gone


def _bytes(folder: Path) -> int:
    total = 0
    for file in folder.iterdir():
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # its run is at work
            continue
    return total


def _last_written(folder: Path) -> float:
    try:
        return max(file.stat().st_mtime for file in (folder, folder / MANIFEST) if file.exists())
    except FileNotFoundError:
        return 0.0
