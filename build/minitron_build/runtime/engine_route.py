"""How a text model reaches the engine model: what every way there can do, and the way over the link.

It knows numbers, named arrays and steps. It knows nothing of text. The way through Triton, for an engine
model that has no link, is `triton_route.py`.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Mapping
from typing import Any, Protocol

from .engine_step import EngineStep
from .inputs import Array
from .link_frames import READ_BYTES, FrameReader, address, from_plain, is_own_user, to_frame, to_plain
from .status import UNAVAILABLE, StatusError

Steps = list[tuple[int, EngineStep]]
"""Number of a sequence, and what it was given; in order."""


class EngineRoute(Protocol):
    """A way to the engine model. `take` is called by one thread, everything else by any."""

    def ask(self, number: int, arrays: Mapping[str, Array], outputs: list[str], priority_level: int) -> None:
        """Begin a sequence; its steps come through `take`, the last of them is marked.

        Args:
            number: what its steps are marked with; never used again.
            arrays: the engine model's inputs.
            outputs: the engine model's outputs that are wanted.
            priority_level: 1 is the first.

        Raises:
            StatusError: UNAVAILABLE, the engine model cannot be reached.
        """

    def stop(self, number: int, *, is_whole: bool = False) -> None:
        """End a sequence early; its last step still comes. Does nothing when it has ended.

        Args:
            is_whole: nothing is lost by it: the sequence has all that was asked for.
        """

    def take(self, timeout_s: float | None) -> Steps:
        """Wait for steps; empty after the timeout and after `wake`."""

    def wake(self) -> None:
        """Make a waiting `take` return."""

    def close(self) -> None:
        """Let go of everything; nothing may be open any more."""


class LinkRoute:
    """Over the socket of an engine model that runs in a process of this server.

    Args:
        model_name: the engine model.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._open: set[int] = set()
        self._reader = FrameReader()
        self._waker = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def ask(self, number: int, arrays: Mapping[str, Array], outputs: list[str], priority_level: int) -> None:
        """Begin a sequence. `outputs` follow from the flags among the arrays, so they are not sent."""
        frame = to_frame(("ask", number, to_plain(arrays), priority_level))
        with self._lock:
            try:
                if self._socket is None:
                    self._connect()
                self._open.add(number)
                self._send(frame)
            except OSError as error:
                self._open.discard(number)
                raise self._gone(str(error)) from error

    def stop(self, number: int, *, is_whole: bool = False) -> None:
        """End a sequence early; the engine is told whether that completes it."""
        with self._lock:
            if number in self._open and self._socket is not None:
                try:
                    self._send(to_frame(("stop", number, is_whole)))
                except OSError:  # the engine is gone, which `take` notices
                    self.wake()

    def take(self, timeout_s: float | None) -> Steps:
        """Wait for steps; everything that has come is taken at once."""
        link = self._socket
        poll = select.poll()
        poll.register(self._waker, select.POLLIN)
        if link is not None:
            poll.register(link, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1e3)}
        if self._waker in ready:
            os.eventfd_read(self._waker)
        if link is None or link.fileno() not in ready:
            return []
        return self._receive(link)

    def wake(self) -> None:
        """Make a waiting `take` return."""
        os.eventfd_write(self._waker, 1)

    def close(self) -> None:
        """Hang up."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
        os.close(self._waker)

    def _connect(self) -> None:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.connect(address(self._model_name))
            if not is_own_user(link):
                raise OSError("another user's process answers in its place")
        except OSError:
            link.close()
            raise
        self._reader = FrameReader()
        self._socket = link
        self.wake()  # `take` must wait for this one too

    def _send(self, frame: bytes) -> None:
        if self._socket is not None:
            self._socket.sendall(frame)

    def _receive(self, link: socket.socket) -> Steps:
        try:
            data = link.recv(READ_BYTES)
        except OSError:
            data = b""
        if not data:
            return self._hang_up(link)
        steps = [_step(item) for frame in self._reader.feed(data) for item in frame]
        ended = {number for number, step in steps if step.is_last}
        if ended:
            with self._lock:
                self._open -= ended
        return steps

    def _hang_up(self, link: socket.socket) -> Steps:
        with self._lock:
            link.close()
            self._socket = None
            lost, self._open = sorted(self._open), set()
        gone = EngineStep(error=self._gone("its process has ended"))
        return [(number, gone) for number in lost]

    def _gone(self, reason: str) -> StatusError:
        return StatusError(UNAVAILABLE, f"model {self._model_name} is gone ({reason}); try again later")


def _step(item: Any) -> tuple[int, EngineStep]:
    number, token_ids, log_probs, arrays, finish_reason, error = item
    named = from_plain(arrays) if arrays else {}
    failure = None if error is None else StatusError.read(error)
    return number, EngineStep(token_ids, log_probs, named, finish_reason, failure)
