"""Files and folders that appear under their name only once they are whole: written beside it, then put in its place.

And the user's cache folder, where most of them lie.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def beside(target: Path) -> Path:
    """A name that nothing beside the target has; not made from its own, which may be as long as a name can be."""
    return target.with_name(f".ltxkern-{secrets.token_hex(8)}{target.suffix}")


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Hand out an empty file beside the target; it takes the target's place on success, and is removed on any exception or Ctrl-C.

    Raises:
        OSError: it cannot be written.
    """
    temporary = beside(target)
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        # Some file systems report a full disk only here.
        with temporary.open("rb+") as opened:
            os.fsync(opened.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """LTXKERN_CACHE, else `ltxkern` in the user's cache folder."""
    if chosen := os.environ.get("LTXKERN_CACHE"):
        return Path(os.path.expanduser(chosen))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ltxkern"
