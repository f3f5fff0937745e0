"""Loads and kills a server of demo-random: `python -m tools.service_load --jobs 200 --clients 8 --kills 5`.

Clients ask for videos, each under a key of its own, again and again until they are accepted. Meanwhile SIGKILL ends the server,
which is started again, or its worker. In the end every accepted job must have ended, done or failed with a reason, under the id
that its client was given, and none may be there twice. Results of the same request must have the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMALL = {"prompt": "a kite", "height": 64, "width": 128, "num_frames": 9, "steps": 2}
SEEDS = 4  # so many different requests: the same one must give the same bytes
PATIENCE = 600.0


class Server:
    """A server process that is started again whenever it was killed."""

    def __init__(self, folder: Path, queue: int, keep: int) -> None:
        options = ["--port", "0", "--data", str(folder / "data"), "--queue", str(queue), "--keep", str(keep)]
        model = ["--model", "demo-random", "--device", "cpu"]
        self._command = [sys.executable, "-m", "ltxkern", "serve", *model, *options]
        self._log = (folder / "log").open("ab")
        self.process: subprocess.Popen[str] | None = None
        self.port = 0
        self.starts = 0

    def start(self) -> None:
        """Start it, and learn its port."""
        self.starts += 1
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("listening on "):
            raise SystemExit(f"the server did not start: {line!r}")
        self.port = int(line.rsplit(":", 1)[1])

    def worker(self) -> int | None:
        """The process with the lock of workers."""
        assert self.process is not None
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                held = any(os.readlink(file).endswith("worker.lock") for file in (entry / "fd").iterdir())
                if held and self._is_ours(int(entry.name)):
                    return int(entry.name)
        return None

    def _is_ours(self, pid: int) -> bool:
        assert self.process is not None
        while pid > 1:
            if pid == self.process.pid:
                return True
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[1])
        return False

    def kill(self, what: str) -> bool:
        """SIGKILL the server, which is started again, or its worker; whether there was one."""
        if what == "worker":
            worker = self.worker()
            if worker is not None:
                os.kill(worker, signal.SIGKILL)
            return worker is not None
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.start()
        return True

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """Status and body of an answer; status 0 where the server was not there."""
        named = {name.replace("_", "-"): value for name, value in headers.items()} | {
            "content-type": "application/json"
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            with contextlib.closing(connection):
                connection.request(method, path, None if body is None else json.dumps(body), named)
                answer = connection.getresponse()
                return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b""


class Load:
    """The clients, and what they were told."""

    def __init__(self, server: Server, jobs: int) -> None:
        self._server = server
        self._left = list(range(jobs))
        self._lock = threading.Lock()
        self.accepted: dict[int, str] = {}
        self.statuses: Counter[int] = Counter()

    def client(self) -> None:
        """Ask for one video after another until none is left."""
        while True:
            with self._lock:
                if not self._left:
                    return
                number = self._left.pop()
            while number not in self.accepted:
                request = SMALL | {"seed": number % SEEDS}
                status, body = self._server.ask("POST", "/v1/videos", request, idempotency_key=f"job {number}")
                with self._lock:
                    self.statuses[status] += 1
                    if status in (200, 202):
                        self.accepted[number] = json.loads(body)["id"]
                if status not in (200, 202):
                    time.sleep(0.1)


def listed(server: Server) -> list[dict[str, Any]]:
    """All jobs of a server, page by page."""
    found: list[dict[str, Any]] = []
    while True:
        before = f"&before={found[-1]['id']}" if found else ""
        status, body = server.ask("GET", f"/v1/videos?limit=200{before}")
        if status != 200:
            time.sleep(0.2)
            continue
        page = json.loads(body)["videos"]
        if not page:
            return found
        found += page


def judged(server: Server, accepted: dict[int, str]) -> list[str]:
    """What is wrong in the end; nothing, it is to be hoped."""
    jobs = listed(server)
    wrong = [f"{job['id']} is {job['status']}" for job in jobs if job["status"] not in ("done", "failed")]
    wrong += [f"{job['id']} failed without a reason" for job in jobs if job["status"] == "failed" and not job["error"]]
    ids = [job["id"] for job in jobs]
    wrong += [
        f"job {number} was accepted as {name} and is lost" for number, name in accepted.items() if name not in ids
    ]
    wrong += [f"{name} is there twice" for name, count in Counter(ids).items() if count > 1]
    wrong += [f"{name} was accepted by nobody" for name in set(ids) - set(accepted.values())]
    if len(set(accepted.values())) != len(accepted):
        wrong.append("two requests were given the same job")
    contents: dict[int, set[str]] = {}
    for job in jobs:
        if job["status"] == "done":
            status, body = server.ask("GET", f"/v1/videos/{job['id']}/content")
            contents.setdefault(job["request"]["seed"], set()).add(f"{status} {hashlib.sha256(body).hexdigest()}")
    wrong += [f"seed {seed} has {len(found)} different results" for seed, found in contents.items() if len(found) > 1]
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Load, kill, and judge; the status says whether nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--queue", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    arguments = parser.parse_args(argv)
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="load-") as name:
        server = Server(Path(name), arguments.queue, 10 * arguments.jobs)
        server.start()
        began = time.monotonic()
        load = Load(server, arguments.jobs)
        clients = [threading.Thread(target=load.client) for _ in range(arguments.clients)]
        for client in clients:
            client.start()
        # The kills fall where so many jobs have ended.
        moments = sorted(draw.sample(range(arguments.jobs), arguments.kills))
        deadline, ended = time.monotonic() + PATIENCE + 10 * arguments.jobs, 0
        while ended < arguments.jobs and time.monotonic() < deadline:
            time.sleep(draw.uniform(0.05, 0.3))
            ended = sum(job["status"] in ("done", "failed") for job in listed(server))
            if moments and ended >= moments[0]:
                # In turns, so that both are hit.
                what = ("worker", "server")[len(moments) % 2]
                if server.kill(what):
                    print(f"killed the {what} with {ended} of {arguments.jobs} ended", flush=True)
                    moments.pop(0)
        for client in clients:
            client.join()
        wrong = judged(server, load.accepted)
        jobs = Counter(job["status"] for job in listed(server))
        assert server.process is not None
        server.process.terminate()
        server.process.wait(60)
        if wrong:
            print((Path(name) / "log").read_text()[-4000:])
    print(*wrong, sep="\n")
    answers = ", ".join(f"{count} of {status or 'no answer'}" for status, count in sorted(load.statuses.items()))
    print(f"answers to {arguments.clients} clients: {answers}")
    print(
        f"{len(load.accepted)} accepted, {dict(jobs)}, {arguments.kills - len(moments)} kills, {len(wrong)} wrong, "
        f"{time.monotonic() - began:.0f} s"
    )
    return 1 if wrong or moments else 0


if __name__ == "__main__":
    sys.exit(main())
