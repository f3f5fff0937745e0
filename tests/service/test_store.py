"""The queue on disk: order, states, keys, bounds; and what another server finds there after a kill."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from ltxkern.service.store import CANCELLED, DONE, FAILED, QUEUED, RUNNING, Job, QueueFullError, Store


def add(store: Store, name: str, key: str | None = None, most: int = 100, **request: Any) -> tuple[Job, bool]:
    return store.add(name, request, 0, f"digest of {request}", key, most)


def status(store: Store, name: str) -> str:
    job = store.find(name)
    assert job is not None
    return job.status


def test_jobs_run_in_order_and_one_that_was_interrupted_first(tmp_path: Path) -> None:
    store = Store(tmp_path / "jobs")
    for name in "abc":
        assert add(store, name, seed=3)[1]
    first = store.claim()
    assert first is not None
    assert (first.id, first.status, first.request, first.lives) == ("a", RUNNING, {"seed": 3}, 1)
    waiting = store.find("c")
    assert waiting is not None
    assert store.ahead(waiting) == 2
    # Another server on the same file: the one before was killed and closed nothing.
    later = Store(tmp_path / "jobs")
    later.recover()
    again = later.claim()
    assert again is not None
    assert (again.id, again.lives, again.started) == ("a", 2, first.started)
    later.advanced("a")
    assert later.end("a", DONE) is not None
    assert later.end("a", FAILED, "too late") is None
    found = later.find("a")
    assert found is not None
    assert (found.status, found.lives, found.error) == (DONE, 0, None)
    assert [job.id for job in later.page(2)] == ["c", "b"]
    assert [job.id for job in later.page(9, before=2)] == ["a"]


def test_what_waits_is_cancelled_now_and_what_runs_when_its_worker_is_gone(tmp_path: Path) -> None:
    store = Store(tmp_path / "jobs")
    add(store, "a")
    add(store, "b")
    assert store.claim() is not None
    for name, expected in (("a", RUNNING), ("b", CANCELLED)):
        job = store.cancel(name)
        assert job is not None
        assert (job.status, job.cancel) == (expected, True)
    assert store.remove("a") is None
    store.recover()
    assert status(store, "a") == CANCELLED
    assert store.cancel("a") is None
    assert store.claim() is None
    assert store.counts() == {QUEUED: 0, RUNNING: 0, DONE: 0, FAILED: 0, CANCELLED: 2}
    assert [job.id for job in store.oldest_ended(1)] == ["a"]
    assert store.remove("a") is not None
    assert store.names() == {"b"}


def test_the_queue_is_bounded_and_a_key_stands_for_one_job(tmp_path: Path) -> None:
    store = Store(tmp_path / "jobs")
    first, added = add(store, "a", key="k", most=1)
    assert added
    with pytest.raises(QueueFullError):
        add(store, "b", most=1)
    assert add(store, "c", key="k", most=1) == (first, False)  # even where it is full
    assert store.names() == {"a"}


def test_another_format_and_a_folder_that_cannot_be_written_are_said(tmp_path: Path) -> None:
    Store(tmp_path / "jobs").close()
    with sqlite3.connect(tmp_path / "jobs") as base:
        assert base.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        base.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="is of format 99, this version reads 1: name another folder"):
        Store(tmp_path / "jobs")
