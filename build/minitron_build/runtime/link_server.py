"""The engine process's end of the link to the text models: requests in, steps of many sequences out.

Whatever waits when a text model is ready to read goes out as one frame, and nothing waits for more to come.
It knows connections and threads; what a request means it hands to its owner.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable
from typing import Any

from .link_frames import READ_BYTES, FrameReader, address, is_own_user, to_frame

BIND_INTERVAL_S = 0.05
FLUSH_WAIT_S = 1.0


class LinkConnection:
    """One text model's process. `put` may be called from any thread."""

    def __init__(self, peer: socket.socket) -> None:
        self._socket = peer
        self._ready = threading.Condition()
        self._items: list[Any] = []
        self._is_open = True
        self._writer = threading.Thread(target=self._write, name="link-writer", daemon=True)
        self._writer.start()

    def put(self, item: Any) -> None:
        """Send an item as soon as the other end takes it; once that is gone, drop it."""
        with self._ready:
            if self._is_open:
                self._items.append(item)
                self._ready.notify()

    @property
    def num_waiting(self) -> int:
        """Items that the other end has not been sent yet."""
        return len(self._items)

    def fileno(self) -> int:
        """The socket's descriptor, -1 when closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Send what has been put and hang up."""
        with self._ready:
            self._is_open = False
            self._ready.notify()

    def wait_until_sent(self) -> None:
        """After `close`: give the other end a moment to take what has been put."""
        self._writer.join(FLUSH_WAIT_S)

    def receive(self, reader: FrameReader) -> list[Any] | None:
        """The next messages; None when the other end is gone."""
        try:
            data = self._socket.recv(READ_BYTES)
        except OSError:
            return None
        return reader.feed(data) if data else None

    def _write(self) -> None:
        try:
            while items := self._take():
                self._socket.sendall(to_frame(items))
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the reading side notices too, and tells the owner
            self.close()
        finally:
            self._socket.close()

    def _take(self) -> list[Any]:
        with self._ready:
            while self._is_open and not self._items:
                self._ready.wait()
            items, self._items = self._items, []
            return items


class LinkServer:
    """Listens for the text models of this server.

    Args:
        model_name: the engine model; text models address it by that.
        on_message: called with the connection and each message, from that connection's own thread.
        on_gone: called when a connection has ended.
    """

    def __init__(
        self,
        model_name: str,
        on_message: Callable[[LinkConnection, Any], None],
        on_gone: Callable[[LinkConnection], None],
    ) -> None:
        self._address = address(model_name)
        self._on_message, self._on_gone = on_message, on_gone
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connections: set[LinkConnection] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="link-listener", daemon=True)
        if self._try_to_bind():
            self._listener.listen()
        self._thread.start()

    def close(self) -> None:
        """Hang up on every text model, after what has been put, and give the address back."""
        self._closing.set()
        # Closing alone does not wake a thread that waits in accept.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as own:
            own.connect_ex(self._address)
        self._thread.join()
        self._listener.close()
        connections = list(self._connections)
        for connection in connections:
            connection.close()
        for connection in connections:
            connection.wait_until_sent()

    def _try_to_bind(self) -> bool:
        try:
            self._listener.bind(self._address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # a reload: the model's former process still answers there
                raise
            return False
        return True

    def _listen(self) -> None:
        while not self._listener.getsockname():
            if self._closing.wait(BIND_INTERVAL_S):
                return
            if self._try_to_bind():
                self._listener.listen()
        while not self._closing.is_set():
            peer, _ = self._listener.accept()
            if self._closing.is_set() or not is_own_user(peer):
                peer.close()
                continue
            connection = LinkConnection(peer)
            self._connections.add(connection)
            threading.Thread(target=self._read, args=(connection,), name="link-reader", daemon=True).start()

    def _read(self, connection: LinkConnection) -> None:
        reader = FrameReader()
        while (messages := connection.receive(reader)) is not None:
            for message in messages:
                self._on_message(connection, message)
        self._connections.discard(connection)
        connection.close()
        self._on_gone(connection)
