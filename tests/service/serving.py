"""A server of the random demo model in this process, its worker in one of its own, and a client that speaks plain HTTP."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import uvicorn

from ltxkern.commands.options import ModelOptions
from ltxkern.pipeline.files.found import FoundModel
from ltxkern.pipeline.run.presets import find_preset
from ltxkern.service.fields import Offer
from ltxkern.service.guard import PromptProtocol
from ltxkern.service.jobs import Settings
from ltxkern.service.server import guarded

SMALL = {"prompt": "a kite", "height": 64, "width": 128, "num_frames": 9, "steps": 2}
# Long enough to be killed or cancelled at work.
LONG = SMALL | {"steps": 16}


@functools.cache
def offer() -> Offer:
    model = FoundModel.of("demo-random")
    chosen = ModelOptions(
        model=model,
        preset=find_preset("hq"),
        device=torch.device("cpu"),
        dtype=torch.float32,
        device_mode="auto",
        attention="auto",
        policy="rounded",
        audio_stream=False,
        backends=(),
        loras=(),
        distilled_lora=None,
        distilled_strengths=find_preset("hq").distilled_strengths,
        embedding_cache=False,
    )
    return Offer(chosen, chosen.sizes)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])


class Client:
    """Speaks to a port of this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body, named = json.dumps(body).encode(), {"content-type": "application/json"} | named
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=180)
        with contextlib.closing(connection):
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def submit(self, **fields: Any) -> str:
        answer = self("POST", "/v1/videos", fields)
        assert answer.status == 202, answer
        return str(answer.json["id"])

    def events(self, video: str) -> Iterator[dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=180)
        with contextlib.closing(connection):
            connection.request("GET", f"/v1/videos/{video}/events")
            for line in connection.getresponse():
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])

    def ended(self, video: str) -> dict[str, Any]:
        *_, last = self.events(video)
        return last

    def raw(self, first: bytes = b"", rest: Iterable[bytes] = ()) -> bytes:
        """What comes back, until the other end closes, for bytes sent as they are and when they are."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as wire:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for part in chain((first,), rest):
                    wire.sendall(part)
            found = b""
            with contextlib.suppress(ConnectionResetError):
                while more := wire.recv(65536):
                    found += more
            return found


def until(condition: Callable[[], Any], seconds: float = 180.0) -> Any:
    """What a condition gives once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def listening(app: Any) -> Iterator[int]:
    """The port on which an application is served until the block ends."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            app, http=PromptProtocol, ws="none", log_config=None, timeout_keep_alive=1, timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        until(lambda: server.started)
        yield bound.getsockname()[1]
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[tuple[Client, Any]]:
    """A client of a server that is ready, and its service."""
    service, guard = guarded(Settings(folder, **settings), offer())
    service._problem = lambda *_: None  # a plan takes two seconds, and one test has it
    with listening(guard) as port:
        client = Client(port)
        until(lambda: client("GET", "/health").status == 200)
        yield client, service
        service.close_streams()
