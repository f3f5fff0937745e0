"""The folder that keeps one run: its manifest, a lock that dies with its process, and the names of its records."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from ltxkern.pipeline.results.atomic import replacing_file
from ltxkern.pipeline.work.facts import changeable, differences, differing
from ltxkern.pipeline.work.record import SUFFIX

logger = logging.getLogger(__name__)

MANIFEST, LOCK = "manifest.json", "lock"
# Where a run can be taken up anew, and the records that are made from there on.
STAGES = {
    "text": ("text", "stage1", "steps-stage1", "stage2", "steps-stage2", "decode", "chunk"),
    "stage1": ("stage1", "steps-stage1", "stage2", "steps-stage2", "decode", "chunk"),
    "stage2": ("stage2", "steps-stage2", "decode", "chunk"),
    "decode": ("decode", "chunk"),
}
# Raised whenever records or facts change their meaning, so that older folders are refused by name.
FORMAT = 1


class WorkFolderError(ValueError):
    """A work folder that cannot be used for this run; one sentence that names it and says what to do."""


@dataclass(frozen=True)
class Manifest:
    """What a work folder holds.

    Attributes:
        run: name of the run; every record bears it.
        facts: what the result depends on, as plain data; None before the first run.
        command: options of the command line that started it; None from Python.
        earlier: by stage that was made with other facts than those of today, what it was made with.
        finished: whether the result was written.
        format: of the folder.
    """

    run: str
    facts: Mapping[str, Any] | None = None
    command: Mapping[str, Any] | None = None
    earlier: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    finished: bool = False
    format: int = FORMAT


def read_manifest(folder: str | Path) -> Manifest | None:
    """What a folder holds; None where it holds no run.

    Raises:
        WorkFolderError: it cannot be read, or is of another version.
    """
    path = Path(folder) / MANIFEST
    try:
        found = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise WorkFolderError(f"{path} cannot be read ({error}): remove the folder, or name another") from error
    if found.format != FORMAT:
        raise WorkFolderError(
            f"work folder {str(folder)!r} is of format {found.format}, this version reads {FORMAT}: name another"
        )
    return found


class WorkFolder:
    """A work folder that this process holds: `with WorkFolder(path) as folder`, or until `close`.

    Args:
        path: made where it is not there; an existing one must be empty or hold a run.
        command: options that started the run, for `ltxkern resume`.
        is_cache: a run that is finished, or was made with other facts, makes room for the one at hand.
        restart: "text", "stage1", "stage2" or "decode": what is there from this stage on is made anew, and may be made with other
            settings, where these do not reach into earlier stages.

    Raises:
        WorkFolderError: another process holds it, it holds something else, or it cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        command: Mapping[str, Any] | None = None,
        restart: str | None = None,
        is_cache: bool = False,
    ) -> None:
        if restart is not None and restart not in STAGES:
            raise WorkFolderError(f"from must be one of {', '.join(STAGES)}, got {restart!r}")
        self._restart = restart
        self.is_cache = is_cache
        self.path = Path(os.path.expanduser(path)).absolute()
        self._lock = self._claim()
        try:
            self._manifest = read_manifest(self.path) or Manifest(uuid.uuid4().hex)
        except WorkFolderError:
            if not is_cache:
                self.close()
                raise
            self.clear()
        self._remove_temporaries()
        if command is not None:
            self._command: Mapping[str, Any] | None = command
        else:
            self._command = self._manifest.command

    def _claim(self) -> IO[bytes]:
        try:
            foreign = self.path.is_dir() and not (self.path / LOCK).exists() and any(self.path.iterdir())
            if foreign:
                raise WorkFolderError(
                    f"work folder {str(self.path)!r} holds other files than a run's: name an empty or a new folder"
                )
            # Prompts are nobody else's.
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A file object: who forgets the folder gives it back.
            lock = (self.path / LOCK).open("a+b", buffering=0)
        except OSError as error:
            raise WorkFolderError(
                f"work folder {str(self.path)!r} cannot be written ({error.strerror}): name another, or use --no-work-dir"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read(32).decode(errors="replace").strip()
            lock.close()
            raise WorkFolderError(
                f"work folder {str(self.path)!r} is in use by process {holder or '?'}: wait for it, or name another"
            ) from error
        try:
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n".encode())
        except OSError as error:
            lock.close()
            raise WorkFolderError(
                f"work folder {str(self.path)!r} cannot be written ({error.strerror}): make room, or use --no-work-dir"
            ) from error
        return lock

    def _remove_temporaries(self) -> None:
        """Of a process that was killed: nobody else writes here."""
        for left in self.path.glob(".ltxkern-*"):
            left.unlink(missing_ok=True)

    @property
    def manifest(self) -> Manifest:
        """What it holds."""
        return self._manifest

    def begins(self, facts: Mapping[str, Any]) -> bool:
        """Say what the run depends on, before its first record; False where a folder of the cache cannot keep it.

        Raises:
            WorkFolderError: the folder holds a run with other facts; each is named.
            OSError: the manifest cannot be written.
        """
        wanted = json.loads(json.dumps(facts))
        if self.is_cache and self._restart is None and (self._manifest.finished or self._manifest.facts != wanted):
            self.clear()
        held = self._manifest.facts
        other = [] if held is None else differing(held, wanted)
        fixed = [name for name in other if self._restart is None or not changeable(name, self._restart)]
        if held is not None and fixed:
            found = "; ".join(differences(held, wanted, fixed))
            raise WorkFolderError(
                f"work folder {str(self.path)!r} holds a run that differs in {found}: {self._advice(fixed)}"
            )
        earlier = dict(self._manifest.earlier)
        if held is not None and self._restart is not None:
            for prefix in STAGES[self._restart]:
                self.remove(prefix)
            for stage in list(STAGES)[: list(STAGES).index(self._restart)]:
                earlier[stage] = {name: held.get(name) for name in other} | dict(earlier.get(stage, {}))
            earlier = {stage: then for stage, then in earlier.items() if then and self.record(stage).exists()}
        self._restart = None
        changed = replace(self._manifest, facts=wanted, command=self._command, earlier=earlier, finished=False)
        try:
            if changed != self._manifest:
                self._write(changed)
        except OSError as error:
            if not self.is_cache:
                raise
            logger.warning("the run is not kept: %s", error)
            return False
        return True

    def _advice(self, fixed: list[str]) -> str:
        stages = [stage for stage in STAGES if all(changeable(name, stage) for name in fixed)]
        if stages[-1] == "text":
            return "name another folder"
        return (
            f"name another folder, or keep what lies before: ltxkern resume {self.path} --from {stages[-1]} --set ..."
        )

    def start_over(self, first: str, **options: Any) -> None:
        """The next run makes everything from stage `first` on anew, with these options of the command in place of the old."""
        self._restart = first
        if self._command is not None:
            self._command = {**self._command, **options}

    def clear(self) -> None:
        """Forget the run; the folder is as new."""
        self.remove("")
        (self.path / MANIFEST).unlink(missing_ok=True)
        self._manifest = Manifest(uuid.uuid4().hex)

    def finish(self) -> None:
        """The result is written: what only a run in progress needs is removed."""
        self.remove("steps-")
        self.remove("chunk")
        try:
            self._write(replace(self._manifest, finished=True))
        except OSError as error:
            logger.warning("work folder %s does not say that its run is finished: %s", self.path, error)

    def _write(self, manifest: Manifest) -> None:
        with replacing_file(self.path / MANIFEST) as temporary:
            temporary.write_text(json.dumps(asdict(manifest), indent=1, sort_keys=True), encoding="utf-8")
        self._manifest = manifest

    def record(self, name: str) -> Path:
        """Where a record of this name lies, or would lie."""
        return self.path / f"{name}{SUFFIX}"

    def names(self, prefix: str) -> list[str]:
        """Records whose names begin so, in order."""
        return sorted(path.name.removesuffix(SUFFIX) for path in self.path.glob(f"{prefix}*{SUFFIX}"))

    def remove(self, prefix: str) -> None:
        """The records whose names begin so."""
        for name in self.names(prefix):
            self.record(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let others have it."""
        self._lock.close()

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
