"""What stands before the routes: tokens, strangers' pages, bodies that are too large or too slow, heads that never end."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ltxkern.service import guard
from ltxkern.service.fields import RefusedError
from ltxkern.service.guard import Guard
from ltxkern.service.jobs import Settings
from ltxkern.service.server import find_token, serve
from tests.service.serving import Client, listening, offer

TOKEN = "a token of some length"


async def counts(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the number of bytes of a body, which it never holds."""
    if scope["type"] != "http":
        return
    taken, more = 0, True
    while more:
        message = await receive()
        taken += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d" % taken})


@contextmanager
def guarded(token: str | None = None, most: int = 1000) -> Iterator[Client]:
    with listening(Guard(counts, token, most)) as port:
        yield Client(port)


@pytest.mark.parametrize(
    ("token", "path", "headers", "status"),
    [
        (None, "/v1/videos", {}, 200),
        (None, "/v1/videos", {"host": "localhost:80"}, 200),
        (None, "/v1/videos", {"host": "[::1]:80"}, 200),
        (None, "/v1/videos", {"host": "evil.example"}, 403),
        (None, "/v1/videos", {"origin": "http://evil.example"}, 403),
        (None, "/v1/videos", {"origin": "null"}, 403),
        (None, "/v1/videos", {"host": "localhost", "origin": "http://localhost"}, 200),
        (TOKEN, "/", {}, 200),
        (TOKEN, "/health", {}, 200),
        (TOKEN, "/metrics", {}, 401),
        (TOKEN, "/v1/videos", {}, 401),
        (TOKEN, "/v1/videos", {"authorization": "Bearer wrong"}, 401),
        (TOKEN, "/v1/videos", {"authorization": f"Basic {TOKEN}"}, 401),
        (TOKEN, "/v1/videos", {"authorization": f"Bearer {TOKEN}x"}, 401),
        (TOKEN, "/v1/videos", {"authorization": "Bearer \xff"}, 401),
        (TOKEN, "/v1/videos", {"authorization": f"bearer {TOKEN}", "host": "far.example"}, 200),
    ],
)
def test_who_may_ask(
    token: str | None, path: str, headers: dict[str, str], status: int, both: dict[bool, Client]
) -> None:
    answer = both[token is not None]("GET", path, **headers)
    assert answer.status == status
    if status != 200:
        assert answer.error
    if status == 401:
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.fixture(scope="module")
def both() -> Iterator[dict[bool, Client]]:
    with guarded() as open_to_all, guarded(TOKEN) as closed:
        yield {False: open_to_all, True: closed}


def test_a_body_that_is_too_large_is_not_read(both: dict[bool, Client]) -> None:
    client = both[False]
    assert client("POST", "/", b"a" * 1000).body == b"1000"
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
    told = client.raw(head + b"Content-Length: 1000000000\r\nConnection: close\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 413")
    assert b"the body must have at most 1000 bytes, got 1000000000" in told
    # One that does not say how long it is.
    chunk = b"%x\r\n%b\r\n" % (600, b"a" * 600)
    told = client.raw(head + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n", (chunk, chunk))
    assert told.startswith(b"HTTP/1.1 413")


def test_what_trickles_in_ends_and_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\n"

    def drip() -> Iterator[bytes]:
        for _ in range(100):
            time.sleep(0.02)
            yield b"X-A: b\r\n"

    with guarded() as client:
        began = time.monotonic()
        assert client.raw() == b""  # nothing at all is said
        assert client.raw(head, drip()) == b""
        assert client.raw(head + b"Connection: close\r\nContent-Length: 10\r\n\r\n1").startswith(b"HTTP/1.1 408")
        # What is left of a refused body is not waited for either, nor a second head.
        assert client.raw(head + b"Content-Length: 9999\r\n\r\n", drip()).startswith(b"HTTP/1.1 413")
        assert client.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", (b"GET / HT",)).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - began < 10
        assert client.raw(b"\x16\x03\x01\x02\x00").startswith(b"HTTP/1.1 400")
        assert client("POST", "/", b"a" * 100).body == b"100"


@pytest.mark.parametrize(
    ("host", "given", "sentence"),
    [
        ("127.0.0.1", None, None),
        ("::1", None, None),
        ("localhost", None, None),
        ("0.0.0.0", TOKEN, None),
        ("0.0.0.0", None, "host '0.0.0.0' lets others reach the server: set LTXKERN_SERVE_TOKEN or --token-file"),
        ("example.org", None, "host 'example.org' lets others reach"),
        ("127.0.0.1", "short", "the token must have at least 16 plain characters, got 5"),
    ],
)
def test_others_need_a_token(
    host: str, given: str | None, sentence: str | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is None:
        monkeypatch.delenv("LTXKERN_SERVE_TOKEN", raising=False)
    else:
        monkeypatch.setenv("LTXKERN_SERVE_TOKEN", given)
    if sentence is None:
        assert find_token(host, None) == given
        (tmp_path / "token").write_text(TOKEN + "\n")
        assert find_token(host, str(tmp_path / "token")) == TOKEN
    else:
        with pytest.raises(ValueError, match=re.escape(sentence)):
            find_token(host, None)


def test_a_place_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    """The folder is its user's alone, since prompts are."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"nothing can listen at '127\.0\.0\.1', port {port} \(.*in use\): use port 0"
        ):
            serve(Settings(tmp_path / "a"), offer(), "127.0.0.1", port, print)
    assert [path.stat().st_mode & 0o77 for path in (tmp_path / "a", *(tmp_path / "a").iterdir())] == [0, 0]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data folder '.*file' cannot be written \(File exists\): name another"):
        serve(Settings(tmp_path / "file"), offer(), "127.0.0.1", 0, print)


def test_a_refusal_has_its_headers() -> None:
    assert RefusedError(429, "full", retry_after="3").headers == {"retry-after": "3"}
