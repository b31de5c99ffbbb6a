"""A model process does not outlive its server.

A killed tritonserver leaves its model processes running, computing for nobody and holding gigabytes. Each of
them therefore watches its parent. It knows nothing else.
"""

from __future__ import annotations

import os
import threading
import time

CHECK_INTERVAL_S = 1.0


def end_with_parent() -> None:
    """End this process within CHECK_INTERVAL_S of its parent's end; call it once, at load time."""
    parent_pid = os.getppid()
    threading.Thread(target=_watch, args=(parent_pid,), name="orphan-watch", daemon=True).start()


def _watch(parent_pid: int) -> None:
    # Polling, because PR_SET_PDEATHSIG follows the thread that forked, and Triton's loader threads end.
    while os.getppid() == parent_pid:
        time.sleep(CHECK_INTERVAL_S)
    os._exit(1)
