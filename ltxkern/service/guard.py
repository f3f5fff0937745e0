"""What stands before the routes: token, origin, sizes and times, so that a slow, large or strange client costs others nothing."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ltxkern.service.fields import RefusedError

# Seconds for the head of a request; for a body, and for each stretch of an answer that the client is to take.
HEAD_SECONDS, BODY_SECONDS, TAKE_SECONDS = 10.0, 20.0, 60.0
# A body may take longer as it comes at this pace at least.
BYTES_PER_SECOND = 32 * 1024
JSON_BYTES = 2**20
OPEN_PATHS = ("/", "/health", "/openapi.json")
_LOCAL = ("localhost", "127.0.0.1", "[::1]")


class PromptProtocol(H11Protocol):
    """uvicorn's HTTP, which waits for the head of a request no longer than HEAD_SECONDS, however it trickles in.

    Nor does it read longer what is left of a body after the answer.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Go on waiting, unless the head is there."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._stop()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


@dataclass
class _Body:
    """The part of a request that is still to come."""

    receive: Receive
    most: int
    began: float
    taken: int = 0
    is_whole: bool = False

    async def __call__(self) -> Message:
        if self.is_whole:  # what comes now is that the client leaves, at any time
            return await self.receive()
        left = self.began + BODY_SECONDS + self.taken / BYTES_PER_SECOND - time.monotonic()
        try:
            message = await asyncio.wait_for(self.receive(), max(left, 0.001))
        except asyncio.TimeoutError as error:
            raise RefusedError(408, "the body of the request came too slowly") from error
        self.taken += len(message.get("body", b""))
        self.is_whole = not message.get("more_body", False)
        if self.taken > self.most:
            raise RefusedError(413, f"the body must have at most {self.most} bytes")
        return message


class Guard:
    """An ASGI application around another.

    Args:
        app: what is guarded.
        token: that every request must bear, but for the page, the health and the OpenAPI document; None where only this machine
            can ask.
        most_bytes: of a body with pictures.

    Attributes:
        served: answers by method and status.
    """

    def __init__(self, app: ASGIApp, token: str | None, most_bytes: int) -> None:
        self._app = app
        self._token = None if token is None else token.encode()
        self._most_bytes = most_bytes
        self.served: Counter[tuple[str, int]] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.served[scope["method"] if scope["method"] in _METHODS else "other", status] += 1
                message = {**message, "headers": [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]}
            await asyncio.wait_for(send(message), TAKE_SECONDS)

        most = JSON_BYTES if headers.get("content-type", "").startswith("application/json") else self._most_bytes
        try:
            self._admit(scope["path"], headers, most)
            await self._app(scope, _Body(receive, most, time.monotonic()), answer)
        except RefusedError as refusal:
            if status:
                raise
            await refuse(refusal, answer)

    def _admit(self, path: str, headers: Mapping[str, str], most: int) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._token is None and host.rpartition(":")[0] not in _LOCAL and host not in _LOCAL:
            # A name of somebody else's that leads to this machine, by which a page in a browser would read its answers.
            raise RefusedError(403, f"host must be this machine, got {host!r}")
        if origin is not None and origin.partition("://")[2] != host:
            raise RefusedError(403, f"a page of {origin!r} cannot ask for anything here")
        if self._token is not None and path not in OPEN_PATHS:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), self._token):
                raise RefusedError(401, "the bearer token is missing or wrong", www_authenticate="Bearer")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise RefusedError(413, f"the body must have at most {most} bytes, got {length}")


_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


async def refuse(refusal: RefusedError, send: Any) -> None:
    """Answer with the status and the sentence."""
    body = json.dumps({"error": str(refusal)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in refusal.headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
