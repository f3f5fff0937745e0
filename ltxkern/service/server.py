"""Binds, guards and runs the application until it is told to stop."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from ltxkern.service.app import make_app
from ltxkern.service.fields import Offer
from ltxkern.service.guard import Guard, PromptProtocol
from ltxkern.service.jobs import Service, Settings

TOKEN_VARIABLE = "LTXKERN_SERVE_TOKEN"
_SHORTEST_TOKEN = 16
# Connections, and requests at work: more are told to come back, and the files of the process stay enough.
_MOST_CONNECTIONS = 512


def find_token(host: str, file: str | None) -> str | None:
    """The token of a file, or of the environment; None where there is none and none is needed.

    Raises:
        ValueError: others could reach the server and there is no token, or it is short.
    """
    if file is not None:
        with open(file, encoding="utf-8") as opened:
            token: str | None = opened.read(4096).strip()
    else:
        token = os.environ.get(TOKEN_VARIABLE)
    if token is not None and (len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise ValueError(f"the token must have at least {_SHORTEST_TOKEN} plain characters, got {len(token)}")
    if token is None and not _is_local(host):
        raise ValueError(
            f"host {host!r} lets others reach the server: set {TOKEN_VARIABLE} or --token-file, or use 127.0.0.1"
        )
    return token


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """The folder of a server, which no other may have; nor does another user read there what was asked for."""
    before = os.umask(0o077)
    with contextlib.ExitStack() as held:
        held.callback(os.umask, before)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((folder / "server.lock").open("ab"))
        except OSError as error:
            raise ValueError(
                f"data folder {str(folder)!r} cannot be written ({error.strerror}): name another"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"data folder {str(folder)!r} is in use by another server: name another") from error
        yield


class _Server(uvicorn.Server):
    """uvicorn's, which ends streams of events when it is told to stop, rather than wait for them."""

    service: Service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.close_streams()
        await super().shutdown(sockets)


def guarded(settings: Settings, offer: Offer) -> tuple[Service, Guard]:
    """A service, and the application that serves it."""
    service = Service(settings, offer)
    app = make_app(service)
    app.state.guard = Guard(app, settings.token, settings.most_bytes)
    return service, app.state.guard


def serve(settings: Settings, offer: Offer, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        settings: of the service.
        offer: the model.
        host, port: where; port 0 takes a free one.
        say: is told the address.

    Raises:
        ValueError: the address cannot be had, another server has the folder, or it cannot be written.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with _claimed(settings.folder), socket.socket(family, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"nothing can listen at {host!r}, port {port} ({error.strerror}): use port 0 for a free one"
            ) from error
        service, guard = guarded(settings, offer)
        config = uvicorn.Config(
            guard,
            http=PromptProtocol,
            ws="none",
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=5,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            log_config=None,
        )
        shown = f"[{host}]" if ":" in host else host
        say(f"http://{shown}:{bound.getsockname()[1]}")
        server = _Server(config)
        server.service = service
        server.run(sockets=[bound])
