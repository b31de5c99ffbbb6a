"""The state of `minitron serve`, and the small HTTP endpoint that tells it: /ready and /live.

Ready means that a token came and tokens keep coming, which Triton's own health does not say. This module
knows nothing of how the state is found out.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from minitron_build.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from http.server import BaseHTTPRequestHandler

OK, NOT_FOUND, UNAVAILABLE = 200, 404, 503


class Phase(Enum):
    """Where a served bundle stands."""

    STARTING = "starting"
    """Models load, or the first token has not come."""
    READY = "ready"
    RED = "red"
    """Something went wrong; a restart follows, or the end."""
    DRAINING = "draining"
    """Told to stop: requests in flight finish, new ones belong elsewhere."""


@dataclass(slots=True)
class ServeState:
    """What is told; written by one thread, read by others.

    Attributes:
        phase: where it stands.
        reason: what is wrong until it is ready again; "" if nothing is.
        restarts: how often Triton was started again.
        last_loss: what the last of them was for; "" without any.
        since_s: `time.monotonic()` of the last change of phase.
    """

    phase: Phase = Phase.STARTING
    reason: str = ""
    restarts: int = 0
    last_loss: str = ""
    since_s: float = 0.0

    def enter(self, phase: Phase, reason: str | None = None) -> None:
        """Change phase; the reason stays until another is given, or nothing is wrong any more."""
        self.phase, self.since_s = phase, time.monotonic()
        if reason is not None or phase is Phase.READY:
            self.reason = reason or ""

    def start_again(self, reason: str) -> None:
        """Count a restart."""
        self.restarts, self.last_loss = self.restarts + 1, reason

    def document(self) -> dict[str, Any]:
        """What an answer holds."""
        return {
            "state": self.phase.value,
            "for_s": round(time.monotonic() - self.since_s, 1),
            "restarts": self.restarts,
            "reason": self.reason,
            "last_loss": self.last_loss,
        }


@contextmanager
def telling(state: ServeState, address: str, port: int | None) -> Iterator[None]:
    """Tell the state over HTTP until the block ends; no port: to nobody.

    Raises:
        MachineError: the port is taken.
    """
    if port is None:
        yield
        return
    from http.server import ThreadingHTTPServer

    try:
        server = ThreadingHTTPServer((address, port), _handler(state))
    except OSError as error:
        raise MachineError(
            f"cannot listen on {address}:{port}: {error.strerror}", where="--health-port", todo="give another"
        ) from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="health", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(state: ServeState) -> type[BaseHTTPRequestHandler]:
    from http.server import BaseHTTPRequestHandler

    class Handler(BaseHTTPRequestHandler):
        timeout = 5.0  # a caller that sends nothing holds its thread no longer

        def do_GET(self) -> None:
            codes = {"/live": OK, "/ready": OK if state.phase is Phase.READY else UNAVAILABLE}
            body = (json.dumps(state.document()) + "\n").encode()
            self.send_response(codes.get(self.path, NOT_FOUND))
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            """A probe every few seconds is no news."""

    return Handler
