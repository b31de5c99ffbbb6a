"""Which of a name's addresses take connections: what grpc's sentence leaves open.

grpc tries every address of a name and tells the failure of one of them. Where that one refused, another may
have a server that dropped the connection for another reason. It knows sockets, and nothing of gRPC.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import time

_LIMIT_S = 0.5
"""For all addresses together; looking up the name is the system's, and grpc has done it a moment ago."""


def is_name(url: str) -> bool:
    """Whether the host of HOST:PORT is a name, which may stand for several addresses."""
    host = url.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


def find_listener(url: str) -> str | None:
    """The first address of HOST:PORT that takes a connection, as IP:PORT; None where none does."""
    host, _, port = url.rpartition(":")
    until_s = time.monotonic() + _LIMIT_S
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            return None
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as tried:
            tried.settimeout(left_s)
            tried.connect(address)
            return f"[{address[0]}]:{port}" if family == socket.AF_INET6 else f"{address[0]}:{port}"
    return None
