"""The process that holds the pipeline: takes one job after another, tells each step, and may be killed at any moment."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltxkern.service.fields import Offer

if TYPE_CHECKING:
    from ltxkern.pipeline.generator import HQTwoStagePipeline
    from ltxkern.pipeline.results.preview import LatentColors
    from ltxkern.pipeline.run.progress import ProgressEvent

logger = logging.getLogger(__name__)

RESULT, WORK, PREVIEWS, IMAGES = "result.mp4", "work", "previews", "images"
_SEEN_OF_A_STAGE = 8
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Task:
    """A job as its worker needs it.

    Attributes:
        id: of the job.
        folder: of the job.
        request: its fields.
    """

    id: str
    folder: Path
    request: Mapping[str, Any]


class CancelledError(Exception):
    """The job at work is to end."""


def pictures(folder: Path) -> list[Path]:
    """The files of a job's images, in order."""
    place = folder / IMAGES
    return sorted(place.iterdir()) if place.is_dir() else []


def sentence(error: BaseException, folder: Path) -> str:
    """What an error says, without the server's own paths."""
    return str(error).replace(f"{folder}/", "")


def main(pipe: Connection, offer: Offer, folder: Path) -> None:
    """Serve jobs until the server is gone.

    Args:
        pipe: to the server. From it: ("run", Task), ("cancel", id). To it: ("ready", device bytes, host bytes) that were free
            before anything was loaded, ("progress", id, event), and (status, id, error) of a job that has ended.
        offer: the model.
        folder: of the server.
    """
    # The server decides what Ctrl-C means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # One that a killed server left behind may still be about to notice.
    with (folder / "worker.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _Worker(pipe, offer).serve()


class _Worker:
    def __init__(self, pipe: Connection, offer: Offer) -> None:
        self._pipe = pipe
        self._offer = offer
        self._sending = threading.Lock()
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._cancelled: set[str] = set()
        self._colors: LatentColors | None = None

    def serve(self) -> None:
        from ltxkern.pipeline.memory.host_memory import device_available, host_available

        threading.Thread(target=self._listen, daemon=True).start()
        free = device_available(self._offer.chosen.device), host_available()
        with self._offer.chosen.open() as pipeline:
            self._send("ready", *free)
            while True:
                task = self._tasks.get()
                self._send(*self._outcome(pipeline, task))

    def _listen(self) -> None:
        """Take what the server says; without a server there is nothing left to do."""
        try:
            while True:
                word, what = self._pipe.recv()
                if word == "run":
                    self._tasks.put(what)
                else:
                    self._cancelled.add(what)
        except (EOFError, OSError):
            os._exit(0)

    def _send(self, *message: Any) -> None:
        with self._sending:
            self._pipe.send(message)

    def _outcome(self, pipeline: HQTwoStagePipeline, task: Task) -> tuple[str, str, str | None]:
        from ltxkern.dispatch import BackendError

        try:
            self._run(pipeline, task)
        except CancelledError:
            return "cancelled", task.id, None
        except (ValueError, TypeError, OSError, ArithmeticError, BackendError) as error:
            return "failed", task.id, sentence(error, task.folder)
        except Exception as error:
            # Memory that ran out or a device that failed: what comes next begins in a fresh process.
            logger.exception("job %s", task.id)
            self._send("failed", task.id, f"{type(error).__name__}: {sentence(error, task.folder)}")
            raise SystemExit(1) from error
        return "done", task.id, None

    def _run(self, pipeline: HQTwoStagePipeline, task: Task) -> None:
        from ltxkern.pipeline.run.progress import ProgressClock
        from ltxkern.pipeline.work.folder import WorkFolder

        def tell(event: ProgressEvent) -> None:
            if task.id in self._cancelled:
                raise CancelledError
            self._send("progress", task.id, event)

        result = task.folder / RESULT
        if not result.exists():
            request = self._offer.request(task.request, pictures(task.folder))
            frames = ProgressClock(tell)
            with WorkFolder(task.folder / WORK, is_cache=True) as work:
                seen = self._previews(pipeline, request, task.folder / PREVIEWS)
                how: dict[str, Any] = {"output_type": "stream", "callback": seen, "progress": tell}
                output = pipeline.generate(request, work_dir=work, **how)
                output.save(result, progress=lambda done: frames("writing", done, request.num_frames))
        shutil.rmtree(task.folder / WORK, ignore_errors=True)

    def _previews(self, pipeline: HQTwoStagePipeline, request: Any, folder: Path) -> Any:
        from ltxkern.pipeline.results.preview import Previews

        every = max(1, max(stage.steps for stage in request.stages(pipeline.geometry)) // _SEEN_OF_A_STAGE)
        previews = Previews.of(pipeline, request, folder, every, self._colors)
        self._colors = previews.colors
        return previews
