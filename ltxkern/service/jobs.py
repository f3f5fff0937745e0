"""The jobs of a server: how they are let in, what is seen of them, and who waits for news of which."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import math
import secrets
import shutil
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from starlette.concurrency import run_in_threadpool

from ltxkern.pipeline.model.pictures import read_picture
from ltxkern.pipeline.run.request import GenerationRequest
from ltxkern.service import worker
from ltxkern.service.fields import Offer, RefusedError, body_model, read_body
from ltxkern.service.store import ENDED, QUEUED, Job, QueueFullError, Store
from ltxkern.service.supervisor import Supervisor
from ltxkern.whole_files import sync

# Events without news: they show that both ends are there.
HEARTBEAT = 15.0
Sent = Sequence[tuple[str, BinaryIO]]


@dataclass(frozen=True)
class Settings:
    """How a server serves.

    Attributes:
        folder: of its queue, results and work.
        token: that requests must bear.
        queue: jobs that may wait.
        keep: jobs that stay once they have ended.
        most_bytes: of a request with pictures.
    """

    folder: Path
    token: str | None = None
    queue: int = 100
    keep: int = 200
    most_bytes: int = 64 * 2**20


class Service:
    """The queue, the worker, and who waits for news of which job."""

    def __init__(self, settings: Settings, offer: Offer) -> None:
        self.settings, self.offer = settings, offer
        self.model = body_model(offer.defaults)
        self.store = Store(settings.folder / "jobs.sqlite")
        self.supervisor = Supervisor(self.store, offer, settings.folder, settings.keep, self._tell)
        self.supervisor.tidy()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.closing = False
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        # Plans and pictures take memory and a core for a moment: one at a time.
        self._heavy = threading.Lock()
        self._problem = functools.lru_cache(1024)(self._check_plan)

    def _tell(self, name: str) -> None:
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._wake, self._waiting.get(name, ()))

    @staticmethod
    def _wake(waiting: Iterable[asyncio.Event]) -> None:
        for news in waiting:
            news.set()

    def view(self, job: Job) -> dict[str, Any]:
        """A job as clients see it."""
        event = self.supervisor.progress.get(job.id)
        shown: dict[str, Any] = {name: getattr(job, name) for name in ("id", "status", "created", "started", "ended")}
        shown |= {"cancel": job.cancel, "error": job.error, "request": dict(job.request), "images": job.images}
        shown["progress"] = None if event is None or job.status in ENDED else asdict(event)
        shown["ahead"] = self.store.ahead(job) if job.status == QUEUED else 0
        return shown

    def find(self, name: str) -> Job:
        """A job by its id."""
        job = self.store.find(name)
        if job is None:
            raise RefusedError(404, "there is no such video")
        return job

    def submit(self, body: bytes, sent: Sent, key: str | None) -> tuple[Job, bool]:
        """Queue what a body asks for, with its pictures; or find what the same key queued before."""
        given = read_body(self.model, body)
        asked = hashlib.sha256(json.dumps(given, sort_keys=True).encode())
        for _, file in sent:
            content = hashlib.sha256()
            while block := file.read(2**20):
                content.update(block)
            asked.update(content.digest())
        digest = asked.hexdigest()
        job = None if key is None else self.store.under(key)
        if job is not None:
            return self._same(job, digest), False
        if self.store.waiting() >= self.settings.queue:
            raise self._full()
        name = secrets.token_hex(16)
        folder = self.supervisor.folder_of(name)
        with contextlib.ExitStack() as refused:
            refused.callback(shutil.rmtree, folder, ignore_errors=True)
            files = self._keep_pictures(folder, sent)
            self._admit(given, folder, files)
            try:
                job, added = self.store.add(name, given, len(files), digest, key, self.settings.queue)
            except QueueFullError as full:
                raise self._full() from full
            if not added:
                return self._same(job, digest), False
            refused.pop_all()
        self.supervisor.wake()
        return job, True

    def _same(self, job: Job, digest: str) -> Job:
        if job.digest != digest:
            raise RefusedError(422, "Idempotency-Key was used for another request: use a new one")
        return job

    def _full(self) -> RefusedError:
        wait = str(math.ceil(self.supervisor.wait_for()))
        return RefusedError(429, f"{self.settings.queue} videos wait already: try again later", retry_after=wait)

    def _keep_pictures(self, folder: Path, sent: Sent) -> list[Path]:
        """Pictures on the disk, under names of ours, once they are known to be pictures."""
        place = folder / worker.IMAGES
        place.mkdir(parents=True)
        files = []
        for index, (said, file) in enumerate(sent):
            path = place / f"{index:02d}"
            file.seek(0)
            with path.open("xb") as copy:
                shutil.copyfileobj(file, copy)
            sync(path)
            try:
                with self._heavy:
                    read_picture(path)
            except ValueError as error:
                raise RefusedError(422, str(error).replace(str(path), said or f"images[{index}]")) from error
            files.append(path)
        for parent in (place, folder, folder.parent):
            sync(parent)
        return files

    def _admit(self, given: dict[str, Any], folder: Path, files: list[Path]) -> None:
        try:
            request = self.offer.request(given, files)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise RefusedError(422, worker.sentence(error, folder)) from error
        # What neither memory nor a picture's content depends on is left out, so that a plan serves many requests.
        pictures = [replace(image, path="") for image in request.images[:1]]
        plain = replace(request, prompt="any", negative_prompt="any", seed=0, steps=None, eta=None, images=pictures)
        with self._heavy:
            problem = self._problem(plain, self.supervisor.free)
        if problem is not None:
            raise RefusedError(422, problem)

    def _check_plan(self, request: GenerationRequest, free: tuple[int, int] | None) -> str | None:
        if free is None:
            raise RefusedError(503, "the model is not loaded yet: try again later", retry_after="5")
        try:
            self.offer.chosen.plan(request, device_free=free[0], host_free=free[1]).check()
        except ValueError as error:
            return str(error)
        return None

    def delete(self, name: str) -> Job:
        """Cancel a job, or forget one that has ended."""
        job = self.store.cancel(name)
        if job is not None:
            self.supervisor.cancel(name)
            self._tell(name)
            return job
        job = self.find(name)
        self.supervisor.forget(job)
        return job

    async def events(self, name: str) -> AsyncIterator[str]:
        """Server-sent events: the job whenever there is news of it, until it has ended."""
        news = asyncio.Event()
        self._waiting[name].add(news)
        try:
            while not self.closing:
                news.clear()
                job = await run_in_threadpool(self.store.find, name)
                if job is None:
                    return
                shown = await run_in_threadpool(self.view, job)
                yield f"event: video\ndata: {json.dumps(shown)}\n\n"
                if job.status in ENDED:
                    return
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(news.wait(), HEARTBEAT)
        finally:
            self._waiting[name].discard(news)
            if not self._waiting[name]:
                del self._waiting[name]

    @contextlib.asynccontextmanager
    async def life(self, _: object) -> AsyncIterator[None]:
        """From the start of the server to its end."""
        self.loop = asyncio.get_running_loop()
        self.supervisor.start()
        yield
        self.close_streams()
        await run_in_threadpool(self.supervisor.stop)
        self.store.close()

    def close_streams(self) -> None:
        """End all streams of events."""
        self.closing = True
        for waiting in self._waiting.values():
            self._wake(waiting)
