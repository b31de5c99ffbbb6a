"""uvicorn around the application: one socket, and SIGTERM lets open answers finish.

It knows sockets, signals and uvicorn; it knows nothing of the application.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from minitron_client.errors import InvalidValueError
from minitron_client.flag_types import UsageError

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_BACKLOG = 2048
_LAST_WORDS_S = 5
"""After the drain, for answers to end by themselves; then connections are cut."""
_KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection, so that none is closed just as it is used again."""


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """Where the door stands.

    Attributes:
        host: address to listen on.
        port: 0 takes a free one.
        drain_timeout_s: how long open answers may go on after SIGTERM.
        tls_cert: PEM file of the certificate chain; None serves plain HTTP.
        tls_key: PEM file of its private key.
    """

    host: str
    port: int
    drain_timeout_s: int
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("HTTPS needs --tls-cert and --tls-key; give both or neither")
        for path in (self.tls_cert, self.tls_key):
            if path is not None:
                path.open("rb").close()

    @property
    def scheme(self) -> str:
        """`http` or `https`."""
        return "https" if self.tls_cert else "http"


def listen(settings: HttpSettings) -> socket.socket:
    """A socket that listens.

    Raises:
        InvalidValueError: the address is taken or is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # Named, because asyncio switches off Nagle's algorithm only for sockets that say they are TCP; with
        # it the first text waits 40 ms for the acknowledgement of the headers.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise InvalidValueError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}"
        ) from error
    return listening


def url_of(settings: HttpSettings, listening: socket.socket) -> str:
    """The door's address, with the port that it really has."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{settings.scheme}://{host}:{listening.getsockname()[1]}"


class _Server(uvicorn.Server):
    """uvicorn that leaves signals alone: ours drain, and the exit status is ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def make_server(app: ASGIApp, settings: HttpSettings) -> uvicorn.Server:
    """A server that has not begun; its own logs go to the "uvicorn.error" logger, requests are not logged."""
    return _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=settings.drain_timeout_s + _LAST_WORDS_S,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
        )
    )


async def serve(
    app: ASGIApp,
    settings: HttpSettings,
    listening: socket.socket,
    *,
    on_drain: Callable[[], None],
    on_drain_over: Callable[[], None],
) -> signal.Signals:
    """Serve until SIGTERM or SIGINT; a second one ends open answers at once, further ones are ignored.

    The process is expected to end after this: both signals stay ignored.

    Args:
        app: what to serve.
        settings: how.
        listening: where.
        on_drain: called when no new request is taken any more.
        on_drain_over: called when open answers must end.

    Returns:
        The signal that ended it.
    """
    server, received = make_server(app, settings), list[signal.Signals]()
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        received.append(number)
        if server.should_exit:
            on_drain_over()
            return
        server.should_exit = True
        on_drain()
        loop.call_later(settings.drain_timeout_s, on_drain_over)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        await server.serve(sockets=[listening])
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(
                number, signal.SIG_IGN
            )  # nothing is left to stop: one more must not change the status
    return received[0]
