"""Acknowledgements from a model that reads another model's responses to the model that sends them.

Triton's Python backend deadlocks when a second response for a reader arrives while the reader, woken by
the first, still waits for the interpreter's lock and a third thread begins a request: each holds what the
next one needs. With one response under way per reader that cannot happen. The way back is a datagram socket
between the two processes of one server. This module knows nothing of tensors.
"""

from __future__ import annotations

import os
import socket

PARAMETER = "acknowledged"
"""Set on a request whose sender acknowledges every response before it expects the next."""
_MAX_ID_BYTES = 256


def _address(model_name: str) -> str:
    # Both processes are children of the same server; a leading NUL keeps the name off the file system.
    return f"\0minitron_runtime.{os.getppid()}.{model_name}"


class AckReceiver:
    """The end of the model that sends responses.

    Args:
        model_name: its name; readers address it by that.
    """

    def __init__(self, model_name: str) -> None:
        self._address = _address(model_name)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._address)

    def receive(self) -> str:
        """Wait for the id of the next request whose response was read; "" after `wake`."""
        return self._socket.recv(_MAX_ID_BYTES).decode()

    def wake(self) -> None:
        """Make a waiting `receive` return ""."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(b"", self._address)

    def close(self) -> None:
        """Give the address back."""
        self._socket.close()


class AckSender:
    """The end of the model that reads responses.

    Args:
        model_name: the model they come from.
    """

    def __init__(self, model_name: str) -> None:
        self._address = _address(model_name)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def send(self, request_id: str) -> None:
        """Tell that a response of this request has been read.

        Raises:
            OSError: the other model is gone.
        """
        self._socket.sendto(request_id.encode(), self._address)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
