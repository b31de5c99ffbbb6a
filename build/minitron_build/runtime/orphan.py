"""A model process does not outlive its server.

A killed tritonserver leaves its model processes running, computing for nobody and holding gigabytes. Each of
them therefore watches its server. It knows nothing else.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

CHECK_INTERVAL_S = 1.0
_SERVER_PID_ARGUMENT = 5
"""Where a model process's command line names the server: stub, model, region, its size, its growth, PID."""


def end_with_parent() -> None:
    """End this process within CHECK_INTERVAL_S of its server's end; call it once, at load time."""
    watched = (os.getppid(), server_pid(Path("/proc/self/cmdline").read_bytes()))
    threading.Thread(target=_watch, args=watched, name="orphan-watch", daemon=True).start()


def server_pid(command_line: bytes) -> int | None:
    """The server's PID by the model process's own command line; None where it names none.

    The parent at load time is not enough: a server that is killed while its models load is gone by then.
    """
    words = command_line.split(b"\0")
    word = words[_SERVER_PID_ARGUMENT] if len(words) > _SERVER_PID_ARGUMENT else b""
    return int(word) if word.isdigit() and int(word) > 0 else None


def _watch(parent_pid: int, server: int | None) -> None:
    # Polling, because PR_SET_PDEATHSIG follows the thread that forked, and Triton's loader threads end.
    while os.getppid() == parent_pid and (server is None or Path(f"/proc/{server}").exists()):
        time.sleep(CHECK_INTERVAL_S)
    os._exit(1)
