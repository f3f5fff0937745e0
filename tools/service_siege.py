"""Besieges a server of the random demo model and counts its answers: `python -m tools.service_siege`.

Heads that trickle in over 200 connections, bodies of 1 GB with and without a length, 10,000 requests for a queue of ten, wrong
tokens, paths that lead out, bodies that are not JSON. Each must get its status, and who asks properly meanwhile must be served.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.service_load import SMALL, Server

TOKEN = "a token for the siege"
BODY = 10**9
BLOCK = b" " * 2**20


class Besieged(Server):
    """A server that asks for a token."""

    def status(self, method: str, path: str, body: object = None, token: str = TOKEN) -> int:
        """That of an answer."""
        return self.ask(method, path, body, authorization=f"Bearer {token}")[0]

    def connect(self) -> socket.socket:
        """A connection of one's own."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def memory(self) -> int:
        """MiB that the process holds."""
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) >> 10


def trickle(server: Besieged, seconds: float, ended: list[float]) -> None:
    """A head, a line every second; when the server had enough of it."""
    began = time.monotonic()
    with server.connect() as wire:
        try:
            wire.sendall(b"GET /v1/videos HTTP/1.1\r\nHost: localhost\r\n")
            while time.monotonic() < began + seconds:
                time.sleep(1)
                wire.sendall(b"X-A: b\r\n")
        except OSError:
            ended.append(time.monotonic() - began)


def large(server: Besieged, chunked: bool) -> int:
    """The status for a body of 1 GB, and how much of it was sent before it came."""
    how = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % BODY
    head = (
        b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAuthorization: Bearer %b\r\n"
    )
    with server.connect() as wire:
        wire.sendall(head % TOKEN.encode() + how + b"\r\n\r\n")
        wire.settimeout(0.01)
        found = b""
        for _ in range(BODY // len(BLOCK)):
            try:
                found = wire.recv(65536)
                break
            except TimeoutError:
                pass
            wire.settimeout(10)
            wire.sendall(b"%x\r\n%b\r\n" % (len(BLOCK), BLOCK) if chunked else BLOCK)
            wire.settimeout(0.01)
        return int(found.split()[1]) if found else 0


def siege(server: Besieged, count: int, slow: int) -> list[str]:
    """What was not as it should be."""
    wrong: list[str] = []

    def expect(what: str, found: object, *wanted: object) -> None:
        print(f"{what}: {found}", flush=True)
        if found not in wanted:
            wrong.append(what)

    ended: list[float] = []
    threads = [threading.Thread(target=trickle, args=(server, 40.0, ended)) for _ in range(slow)]
    for thread in threads:
        thread.start()
    before = server.memory()
    waits, answers = [], Counter[int]()
    for _ in range(20):
        began = time.monotonic()
        answers[server.status("GET", "/v1/videos")] += 1
        waits.append(time.monotonic() - began)
    expect("lists meanwhile", dict(answers), {200: 20})
    expect("1 GB with its length", large(server, chunked=False), 413)
    expect("1 GB without", large(server, chunked=True), 413)
    for thread in threads:
        thread.join()
    expect(f"of {slow} heads that trickle cut off", len(ended), slow)
    print(f"after {min(ended):.1f} to {max(ended):.1f} s; lists took {max(waits):.2f} s at most meanwhile")
    expect("wrong token", {server.status("GET", "/v1/videos", token="wrong") for _ in range(100)}, {401})
    tricks = ("/v1/videos/..%2f..%2fetc%2fpasswd/content", "/v1/videos/%2e%2e/content", "/../../etc/passwd")
    expect("paths that lead out", {server.status("GET", path) for path in tricks}, {404})
    raw = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    raw.request("POST", "/v1/videos", b"{", {"content-type": "application/json", "authorization": f"Bearer {TOKEN}"})
    expect("no JSON", raw.getresponse().status, 400)
    with ThreadPoolExecutor(8) as pool:
        work: Callable[[int], int] = lambda seed: server.status("POST", "/v1/videos", SMALL | {"seed": seed})  # noqa: E731
        answers = Counter(pool.map(work, range(count)))
    expect(f"answers to {count} requests, queue of 10", set(answers), {202, 429})
    print(dict(answers))
    held = json.loads(server.ask("GET", "/v1/videos?limit=200", authorization=f"Bearer {TOKEN}")[1])["videos"]
    expect("accepted and kept", len(held), answers[202])
    expect("health", server.ask("GET", "/health")[0], 200)
    print(f"memory of the server: {before} MiB before, {server.memory()} MiB after")
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Besiege it; the status says whether it stood."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--slow", type=int, default=200, help="connections whose heads trickle in")
    arguments = parser.parse_args(argv)
    os.environ["LTXKERN_SERVE_TOKEN"] = TOKEN
    with tempfile.TemporaryDirectory(prefix="siege-") as name:
        server = Besieged(Path(name), queue=10, keep=10**5)
        server.start()
        assert server.process is not None
        try:
            while server.ask("GET", "/health")[0] != 200:
                time.sleep(0.2)
            wrong = siege(server, arguments.requests, arguments.slow)
        finally:
            server.process.terminate()
            server.process.wait(60)
    print(f"{len(wrong)} wrong", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
