"""The queue on disk: one row a job in SQLite, written through to the disk before anybody is told of it."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUEUED, RUNNING, DONE, FAILED, CANCELLED = STATES = ("queued", "running", "done", "failed", "cancelled")
ENDED = (DONE, FAILED, CANCELLED)
# Raised whenever rows change their meaning.
FORMAT = 1
_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, status TEXT NOT NULL, request TEXT NOT NULL,
    images INTEGER NOT NULL, key TEXT UNIQUE, digest TEXT NOT NULL, created REAL NOT NULL, started REAL, ended REAL,
    error TEXT, lives INTEGER NOT NULL DEFAULT 0, cancel INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, sequence);
"""


class QueueFullError(Exception):
    """No room for another job."""


@dataclass(frozen=True)
class Job:
    """One video that was asked for.

    Attributes:
        sequence: orders jobs.
        id: random; also the name of its folder.
        status: one of STATES.
        request: fields that the client gave.
        images: files that came with it.
        digest: of all of these.
        created, started, ended: seconds since 1970.
        error: why it failed.
        lives: workers that took it up since a step of it was last done.
        cancel: whether it is to end early.
    """

    sequence: int
    id: str
    status: str
    request: Mapping[str, Any]
    images: int
    digest: str
    created: float
    started: float | None
    ended: float | None
    error: str | None
    lives: int
    cancel: bool


class Store:
    """The jobs of one server; any thread may call."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._base = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._base.row_factory = sqlite3.Row
        for setting in ("journal_mode = WAL", "synchronous = FULL", "busy_timeout = 5000"):
            self._base.execute(f"PRAGMA {setting}")
        (found,) = self._base.execute("PRAGMA user_version").fetchone()
        if found not in (0, FORMAT):
            raise ValueError(f"{path} is of format {found}, this version reads {FORMAT}: name another folder")
        self._base.executescript(_TABLE)
        self._base.execute(f"PRAGMA user_version = {FORMAT}")

    def _all(self, statement: str, *values: Any) -> list[Job]:
        with self._lock:
            return [_job(row) for row in self._base.execute(statement, values).fetchall()]

    def _one(self, statement: str, *values: Any) -> Job | None:
        return next(iter(self._all(statement, *values)), None)

    def add(
        self, name: str, request: Mapping[str, Any], images: int, digest: str, key: str | None, most: int
    ) -> tuple[Job, bool]:
        """Queue a job; or the one that was queued under this key before, and False.

        Raises:
            QueueFullError: `most` are waiting.
        """
        row = (name, QUEUED, json.dumps(request), images, key, digest, time.time())
        added = self._one(
            "INSERT INTO jobs (id, status, request, images, key, digest, created) SELECT ?, ?, ?, ?, ?, ?, ? "
            "WHERE (SELECT count(*) FROM jobs WHERE status = 'queued') < ? ON CONFLICT (key) DO NOTHING RETURNING *",
            *row,
            most,
        )
        if added is not None:
            return added, True
        found = None if key is None else self.under(key)
        if found is None:
            raise QueueFullError
        return found, False

    def under(self, key: str) -> Job | None:
        """The job of a client's key."""
        return self._one("SELECT * FROM jobs WHERE key = ?", key)

    def find(self, name: str) -> Job | None:
        """A job by its id."""
        return self._one("SELECT * FROM jobs WHERE id = ?", name)

    def page(self, most: int, before: int | None = None) -> list[Job]:
        """The latest jobs, newest first; those before a sequence number."""
        return self._all(
            "SELECT * FROM jobs WHERE sequence < ? ORDER BY sequence DESC LIMIT ?",
            2**62 if before is None else before,
            most,
        )

    def ahead(self, job: Job) -> int:
        """How many are to run before a job that waits."""
        return self._count(
            "id != ? AND (status = 'running' OR (status = 'queued' AND sequence < ?))", job.id, job.sequence
        )

    def waiting(self) -> int:
        """How many wait."""
        return self._count("status = 'queued'")

    def counts(self) -> dict[str, int]:
        """Jobs in each state."""
        return {status: self._count("status = ?", status) for status in STATES}

    def _count(self, condition: str, *values: Any) -> int:
        with self._lock:
            (found,) = self._base.execute(f"SELECT count(*) FROM jobs WHERE {condition}", values).fetchone()
        return int(found)

    def claim(self) -> Job | None:
        """The next job, which is running from now on."""
        return self._one(
            "UPDATE jobs SET status = 'running', started = coalesce(started, ?), lives = lives + 1 WHERE sequence = "
            "(SELECT min(sequence) FROM jobs WHERE status = 'queued') RETURNING *",
            time.time(),
        )

    def advanced(self, name: str) -> None:
        """A step of a running job was done: it does not end its workers."""
        self._all("UPDATE jobs SET lives = 0 WHERE id = ?", name)

    def end(self, name: str, status: str, error: str | None = None) -> Job | None:
        """A running job has ended; None where it is not running."""
        return self._one(
            "UPDATE jobs SET status = ?, error = ?, ended = ? WHERE id = ? AND status = 'running' RETURNING *",
            status,
            error,
            time.time(),
            name,
        )

    def recover(self) -> None:
        """No worker is alive: what was running waits again where it stood, or is cancelled where it was to be."""
        self._all(
            "UPDATE jobs SET status = CASE WHEN cancel THEN 'cancelled' ELSE 'queued' END, "
            "ended = CASE WHEN cancel THEN ? END WHERE status = 'running'",
            time.time(),
        )

    def cancel(self, name: str) -> Job | None:
        """Ask a job to end early: one that waits ends now, one that runs is told. None where it is not there or has ended."""
        return self._one(
            "UPDATE jobs SET cancel = 1, ended = CASE status WHEN 'queued' THEN ? END, "
            "status = CASE status WHEN 'queued' THEN 'cancelled' ELSE status END "
            "WHERE id = ? AND status IN ('queued', 'running') RETURNING *",
            time.time(),
            name,
        )

    def remove(self, name: str) -> Job | None:
        """Forget a job that has ended."""
        return self._one(
            "DELETE FROM jobs WHERE id = ? AND status NOT IN ('queued', 'running') RETURNING *",
            name,
        )

    def oldest_ended(self, kept: int) -> list[Job]:
        """All jobs that have ended but the latest `kept`."""
        return self._all(
            "SELECT * FROM jobs WHERE status NOT IN ('queued', 'running') ORDER BY sequence DESC LIMIT -1 OFFSET ?",
            kept,
        )

    def names(self) -> set[str]:
        """Ids of all jobs."""
        with self._lock:
            return {row["id"] for row in self._base.execute("SELECT id FROM jobs")}

    def close(self) -> None:
        """Let the file go."""
        with self._lock:
            self._base.close()


def _job(row: sqlite3.Row) -> Job:
    values = {name: row[name] for name in row.keys() if name != "key"}  # noqa: SIM118
    return Job(**{**values, "request": json.loads(row["request"]), "cancel": bool(row["cancel"])})
