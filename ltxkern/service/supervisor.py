"""Keeps a worker process alive and hands it one job after another; what a worker was at when it died waits for the next."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltxkern.service import worker
from ltxkern.service.fields import Offer
from ltxkern.service.store import CANCELLED, DONE, FAILED, Job, Store

if TYPE_CHECKING:
    from ltxkern.pipeline.run.progress import ProgressEvent

logger = logging.getLogger(__name__)

MOST_LIVES = 3
# Between workers that die before they are ready.
_LONGEST_PAUSE = 60.0
# A worker that tells nothing for so long hangs. Reading a large model, or one step of a long video, takes minutes.
SILENCE = 1800.0


class Supervisor(threading.Thread):
    """The thread that talks to the worker.

    Args:
        store: of the jobs.
        offer: the model.
        folder: of the server.
        keep: results that stay.
        tell: called with a job's id whenever there is something new about it, from this thread.

    Attributes:
        free: bytes of device and host that were free before the model was loaded; None until a first worker was ready.
        starts: workers so far.
        ended: jobs that ended, by how; and the seconds of those that were done.
    """

    def __init__(self, store: Store, offer: Offer, folder: Path, keep: int, tell: Callable[[str], None]) -> None:
        super().__init__(name="supervisor", daemon=True)
        self._store, self._offer, self._folder, self._keep, self._tell = store, offer, folder, keep, tell
        # A process that has imported everything and touched no device forks off worker after worker.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["ltxkern.service.worker", "ltxkern.pipeline.generator"])
        self._ear, self._mouth = self._context.Pipe(duplex=False)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._pipe: Connection | None = None
        self._running: str | None = None
        self._advanced = False
        self._process: Any = None
        self.ready = threading.Event()
        self.progress: dict[str, ProgressEvent] = {}
        self.free: tuple[int, int] | None = None
        self.starts = 0
        self.ended: Counter[str] = Counter()
        self.seconds = 0.0

    def folder_of(self, name: str) -> Path:
        """Where the files of a job lie."""
        return self._folder / "jobs" / name

    def wake(self) -> None:
        """There is a job to do."""
        with self._lock:
            if not self._ear.poll():
                self._mouth.send_bytes(b"!")

    def cancel(self, name: str) -> None:
        """Tell the worker that a job is to end, which the store knows already."""
        with self._lock:
            if self._running == name and self._pipe is not None:
                self._to_worker("cancel", name)

    def stop(self) -> None:
        """Kill the worker, whose job waits for the next server, and end."""
        self._stopping.set()
        self.wake()
        self.join()

    def run(self) -> None:
        """One worker after another until `stop`."""
        pause = 0.0
        while not self._stopping.wait(pause):
            self.ready.clear()
            try:
                self._store.recover()
                self._life()
            except sqlite3.Error:
                logger.exception("the queue cannot be read or written: trying again")
                self.ready.clear()
            pause = 0.0 if self.ready.is_set() else min(_LONGEST_PAUSE, 2 * pause + 1)

    def _life(self) -> None:
        """One worker from start to death."""
        self.starts += 1
        ours, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=worker.main, args=(theirs, self._offer, self._folder), name="worker", daemon=True
        )
        try:
            self._process.start()
            theirs.close()
            with self._lock:
                self._pipe = ours
            while not self._stopping.is_set():
                if self._running is None and self.ready.is_set():
                    self._hand_out()
                idle = self._running is None and self.ready.is_set()
                if self._ear in wait([ours, self._ear], None if idle else SILENCE):
                    self._ear.recv_bytes()
                elif ours.poll():
                    self._hear(*ours.recv())
                else:
                    logger.error("the worker said nothing for %g s and is killed", SILENCE)
                    break
        except (EOFError, OSError) as error:
            if self._process.pid is None:
                logger.error("no worker could be started (%s): trying again", error)
            elif not self._stopping.is_set():
                logger.warning("the worker has died; the next one goes on")
        finally:
            theirs.close()
            if self._process.pid is not None:
                self._process.kill()
                self._process.join()
            with self._lock:
                name, self._running, self._pipe = self._running, None, None
                ours.close()
            if name is not None:
                if self._stopping.is_set():
                    self._store.advanced(name)
                self._store.recover()
                self.progress.pop(name, None)
                self._tell(name)

    def _to_worker(self, *message: Any) -> None:
        assert self._pipe is not None
        try:
            self._pipe.send(message)
        except OSError:
            logger.info("the worker is not there any more")

    def _hand_out(self) -> None:
        job = self._store.claim()
        if job is None:
            return
        with self._lock:
            self._running, self._advanced = job.id, False
        if job.lives > MOST_LIVES:
            self._end(job.id, FAILED, f"{MOST_LIVES} workers in a row died before one step of it was done")
            return self._hand_out()
        task = worker.Task(job.id, self.folder_of(job.id), job.request)
        with self._lock:
            self._to_worker("run", task)
        self._tell(job.id)
        # Between the claim and now somebody may have cancelled it, and not have found it running.
        now = self._store.find(job.id)
        if now is not None and now.cancel:
            self.cancel(job.id)

    def _hear(self, word: str, *what: Any) -> None:
        if word == "ready":
            self.free = (what[0], what[1])
            self.ready.set()
        elif word == "progress":
            name, event = what
            if event.done and not self._advanced:
                self._advanced = True
                self._store.advanced(name)
            self.progress[name] = event
            self._tell(name)
        elif word in (DONE, FAILED, CANCELLED):
            self._end(what[0], word, what[1])

    def _end(self, name: str, status: str, error: str | None) -> None:
        job = self._store.end(name, status, error)
        with self._lock:
            self._running = None
        self.progress.pop(name, None)
        if job is not None:
            self.ended[status] += 1
            if status == DONE:
                self.seconds += max(0.0, (job.ended or 0.0) - (job.started or 0.0))
            else:
                shutil.rmtree(self.folder_of(name) / worker.WORK, ignore_errors=True)
        self._tell(name)
        for old in self._store.oldest_ended(self._keep):
            self.forget(old)

    def forget(self, job: Job) -> None:
        """Remove a job that has ended, with its files."""
        if self._store.remove(job.id) is not None:
            shutil.rmtree(self.folder_of(job.id), ignore_errors=True)

    def tidy(self) -> None:
        """Remove what a killed server left of jobs that were not accepted or are forgotten."""
        known = self._store.names()
        place = self._folder / "jobs"
        place.mkdir(parents=True, exist_ok=True)
        for folder in place.iterdir():
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)

    def wait_for(self) -> float:
        """Seconds after which a full queue has likely moved."""
        done = self.ended[DONE]
        return min(600.0, max(1.0, self.seconds / done)) if done else 5.0
