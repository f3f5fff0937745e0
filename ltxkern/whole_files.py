"""Files and folders that appear under their name only once they are whole: written beside it, then put in its place.

And the user's cache folder, where most of them lie.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def beside(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """Hand out an empty file or folder beside the target, which is removed at the end if it is still there.

    One that a killed process left of the same target is removed first: who writes holds a lock on what he writes, and it dies
    with him. The name is not made from the target's own, which may be as long as a name can be.

    Raises:
        OSError: nothing can be written there.
    """
    prefix = f".ltxkern-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}-"
    for left in target.parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), _locked(left, wait=False):
            _remove(left)
    while True:
        temporary = target.with_name(f"{prefix}{secrets.token_hex(8)}{target.suffix}")
        if folder:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        try:
            with _locked(temporary, wait=True) as is_there:
                # Between its making and its lock another writer may have taken it for one that was left.
                if is_there:
                    yield temporary
                    return
        finally:
            _remove(temporary)


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Lock a file or folder for the block, whatever becomes of its name; hands out whether the name still stands for it.

    Raises:
        OSError: it is not there, or another process holds it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise  # a file system without locks: nobody knows what was left there, and it stays
        yield path.exists() and os.path.samestat(os.fstat(handle), path.stat())
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Hand out an empty file beside the target; it takes the target's place on success, and is removed on any exception or Ctrl-C.

    Raises:
        OSError: it cannot be written.
    """
    with beside(target) as temporary:
        yield temporary
        # Some file systems report a full disk only here.
        sync(temporary)
        temporary.replace(target)
        # A new name outlives a power cut once its folder is on the disk too.
        sync(target.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """LTXKERN_CACHE, else `ltxkern` in the user's cache folder."""
    if chosen := os.environ.get("LTXKERN_CACHE"):
        return Path(os.path.expanduser(chosen))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ltxkern"
