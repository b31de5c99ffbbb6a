"""What a fork leaves of this process's calls to servers.

grpc goes on working in a forked child only where no call ran when it was forked. Where one ran, grpc may skip
its own preparation ("Other threads are currently calling into gRPC, skipping fork() handlers"), and a child
that calls after that dies of a signal now and then, or reads from the parent's connection (grpcio 1.85: one
child in some hundreds of a parent with two busy streams). So the calls are counted here, and such a child is
told.

It knows no connection and imports no grpc.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from types import TracebackType
from typing import Any

from minitron_client.errors import ClientClosedError

_log = logging.getLogger("minitron_client")

_running: weakref.WeakSet[CallMark] = weakref.WeakSet()
_locks: weakref.WeakSet[Any] = weakref.WeakSet()


class CallMark:
    """One call to a server, from its start to its end; also a context manager around a short one.

    Raises:
        ClientClosedError: no call can be made in this process.
    """

    __slots__ = ("__weakref__", "_process")

    def __init__(self) -> None:
        if _Process.is_spoilt:
            raise ClientClosedError(
                "this process was forked while a request of its parent ran, which grpc does not survive; "
                "fork before the first request or between two, or start the process with spawn"
            )
        self._process = _Process.number
        _running.add(self)

    def end(self) -> None:
        """The call has ended; may be told twice."""
        _running.discard(self)

    @property
    def is_foreign(self) -> bool:
        """Whether the call is that of a parent process, so that it has to be left alone."""
        return self._process != _Process.number

    def check(self) -> None:
        """Refuse a parent's call.

        Raises:
            ClientClosedError: the call was begun before the fork that made this process.
        """
        if self.is_foreign:
            raise ClientClosedError("the request is that of the process which forked this one; make another")

    def __enter__(self) -> CallMark:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class _Process:
    """This process, as one of a line of forks."""

    number = 0
    """How many forks made it, counted from the process that imported this module."""
    is_spoilt = False
    """Whether a call ran when it was forked off, here or further up the line."""
    num_running = 0
    """Calls that ran at the last fork."""


def new_lock() -> threading.Lock:
    """A lock that is free in a forked child, whoever held it in the parent."""
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def _before() -> None:
    _Process.num_running = num = len(_running)
    if num:
        _log.warning(
            "forked while %d request%s: grpc may lose what runs, and the child can ask nothing; "
            "fork between requests, or start processes with spawn",
            num,
            " runs" if num == 1 else "s run",
        )


def _after_in_child() -> None:
    _Process.number += 1
    _Process.is_spoilt = _Process.is_spoilt or _Process.num_running > 0
    _running.clear()
    for lock in list(_locks):
        lock._at_fork_reinit()  # as logging and threading do with theirs


os.register_at_fork(before=_before, after_in_child=_after_in_child)
