"""Where results go: the suffix decides the kind, and a result appears under its name only once it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ltxkern.whole_files import beside, replacing, sync

OutputKind = Literal["mp4", "latents", "frames"]

AUDIO_FILE = "audio.wav"
_PROBE_BYTES = 4096
_OWN_FILE = re.compile(r"frame_\d{5,}\.png|" + re.escape(AUDIO_FILE))
_LEGAL = "name a .mp4 file, a .safetensors file (latents), or a folder (PNG frames and wav)"
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file grew too big",
}


def output_kind(path: str | Path) -> OutputKind:
    """What `path` asks for: "mp4", "latents" (.safetensors) or "frames" (a folder: no suffix, a trailing slash, or there).

    Raises:
        ValueError: any other suffix, with the legal ones.
    """
    file = Path(os.path.expanduser(path))
    if file.name.lower() in (".mp4", ".safetensors"):
        raise ValueError(f"output {str(path)!r} has no name before the suffix: {_LEGAL}")
    if os.path.isdir(file) or str(path).endswith(("/", os.sep)) or not file.suffix:
        return "frames"
    suffix = file.suffix.lower()
    if suffix == ".mp4":
        return "mp4"
    if suffix == ".safetensors":
        return "latents"
    raise ValueError(f"output {str(path)!r} has the unknown suffix {file.suffix!r}: {_LEGAL}")


def output_target(path: str | Path) -> Path:
    """The file or folder that a result named `path` is: ~ is the home folder, and what a symbolic link leads to is written.

    Raises:
        ValueError: links that lead in a circle, a name that no file can bear, or something there that must not be replaced: a
            device, a pipe, a read-only file.
    """
    target = Path(os.path.realpath(os.path.expanduser(path)))
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return target
    except UnicodeEncodeError as error:
        raise ValueError(f"output {str(path)!r}: the file system cannot hold this name: use another") from error
    except NotADirectoryError as error:
        raise ValueError(f"output {str(path)!r}: the folder {str(target.parent)!r} does not exist") from error
    except OSError as error:
        raise ValueError(f"output {str(path)!r} cannot be written ({error.strerror}): use another name") from error
    if stat.S_ISLNK(mode):
        raise ValueError(f"output {str(path)!r} is a link that leads in a circle: name a file")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"output {str(path)!r} is a device or a pipe: name a file")
    if stat.S_ISREG(mode) and not mode & 0o222:
        raise ValueError(f"output {str(path)!r} is read-only: make it writable or name another file")
    return target


def writable_output(path: str | Path, needed_bytes: int = 0) -> OutputKind:
    """Check, before any work, that a result can be written to `path`; nothing is created or changed.

    An existing file is legal and stays until the new one is complete. An existing folder must be empty or hold an earlier
    result only, so that no other file is ever removed.

    Args:
        needed_bytes: what the result will take; refused where the disk has less.

    Returns:
        The kind of output that the suffix asks for.

    Raises:
        ValueError: one sentence: unknown suffix, missing or unwritable folder, full disk, or a folder with other files in it.
    """
    kind = output_kind(path)
    target = output_target(path)
    if kind == "frames" and target.exists():
        if not target.is_dir():
            raise ValueError(f"output {str(path)!r} is a file: {_LEGAL}")
        foreign = next((entry.name for entry in sorted(target.iterdir()) if not _OWN_FILE.fullmatch(entry.name)), None)
        if foreign is not None:
            raise ValueError(f"output folder {str(path)!r} already holds {foreign!r}: name an empty or a new folder")
    _require_room(path, target.parent, needed_bytes)
    return kind


def writable_file(path: str | Path) -> Path:
    """`writable_output` for a file of any suffix.

    Returns:
        What is to be written: what links lead to.

    Raises:
        ValueError: one sentence.
    """
    target = output_target(path)
    if target.is_dir():
        raise ValueError(f"output {str(path)!r} is a folder: name a file in it")
    _require_room(path, target.parent, _PROBE_BYTES)
    return target


def _require_room(path: str | Path, folder: Path, needed_bytes: int) -> None:
    """Refuse a folder that is not there, cannot be written, or has less room; ValueError names `path`."""
    if not folder.is_dir():
        raise ValueError(
            f"output {str(path)!r}: the folder {str(folder)!r} does not exist: make it or name another folder"
        )
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(min(needed_bytes, _PROBE_BYTES)))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise ValueError(
            f"output {str(path)!r}: the folder {str(folder)!r} is not writable "
            f"({_FULL.get(error.errno or 0, error.strerror)}): name another folder"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ValueError(
            f"output {str(path)!r} needs about {needed_bytes >> 20} MiB, the disk has {free >> 20} MiB free: "
            "make room or name another folder"
        )


@contextlib.contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """`whole_files.replacing` for what `path` leads to.

    Raises:
        OSError: one sentence that names `path` where the disk is full or whatever writes there gave up.
    """
    target = output_target(path)
    with _in_words(path), replacing(target) as temporary:
        yield temporary


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """`replacing_file` for a folder: hand out a new folder beside `path`, swap it in on success, remove it otherwise."""
    target = output_target(path)
    with _in_words(path), beside(target, folder=True) as temporary:
        yield temporary
        for entry in temporary.iterdir():
            sync(entry)
        if target.is_dir():
            for entry in target.iterdir():
                if _OWN_FILE.fullmatch(entry.name):
                    entry.unlink()
            target.rmdir()
        temporary.replace(target)
        sync(target.parent)


@contextlib.contextmanager
def _in_words(path: str | Path) -> Iterator[None]:
    """An error of the disk or of what writes there, which names no file, as a sentence that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL and (error.filename is not None or not error.strerror):
            raise
        reason = _FULL.get(error.errno or 0, error.strerror)
        raise OSError(error.errno, f"writing {str(path)!r} failed: {reason}; nothing was written there") from error
