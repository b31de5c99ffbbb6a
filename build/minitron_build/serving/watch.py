"""Watches a server that is up: tokens keep coming, or it says what has gone wrong.

Triton's own health stays green when a model process has died or hangs. Here, a token is what counts: while
counters move, nothing is asked; while they stand still, one token is asked for now and then. This module
knows nothing of processes and signals; what is done about trouble is serve.py's.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from minitron_build.errors import PlanError, StageError, UsageError
from minitron_build.serving.token_probe import engine_is_down, read_progress
from minitron_build.serving.triton_server import TritonServer

Probe = Callable[[TritonServer, float], None]
"""Asks a server for a token, within so many seconds; raises StageError when none comes."""

CHECK_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """How a server is watched.

    Attributes:
        stall_timeout_s: without a token for so long, the server is given up; 0: not watched.
        probe_interval_s: an idle server is asked for a token so often.

    Raises:
        PlanError: a number that makes no sense.
    """

    stall_timeout_s: float = 0.0
    probe_interval_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.stall_timeout_s < math.inf:
            raise PlanError(
                f"--stall-timeout-s {self.stall_timeout_s:g}", expected="seconds; 0 does not watch"
            )
        if not 0 < self.probe_interval_s < math.inf:
            raise PlanError(f"--probe-interval-s {self.probe_interval_s:g}", expected="seconds above 0")
        if 0 < self.stall_timeout_s <= self.probe_interval_s:
            raise UsageError(
                f"--stall-timeout-s {self.stall_timeout_s:g}",
                expected=f"more than --probe-interval-s, {self.probe_interval_s:g}",
            )


class TokenWatch:
    """Watches one server on a thread of its own, from `start` to `stop`.

    Args:
        server: one that is ready and has just given a token.
        probe: asks it for another.
        settings: how often, and for how long none may come.
    """

    def __init__(self, server: TritonServer, probe: Probe, settings: WatchSettings) -> None:
        self._server, self._probe, self._settings = server, probe, settings
        self._token_s = time.monotonic()
        self._series: dict[str, float] | None = None
        self._last_words = "its counters stand still"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="token-watch", daemon=True)
        self.trouble: str | None = None
        """What has gone wrong, in words; nothing is watched after it."""

    def start(self) -> None:
        """Begin, unless the settings say not to."""
        if self._settings.stall_timeout_s:
            self._thread.start()

    def stop(self) -> None:
        """End; does not wait for an answer that is awaited."""
        self._stopping.set()

    def _watch(self) -> None:
        while not self._stopping.wait(CHECK_INTERVAL_S) and self.trouble is None:
            self.trouble = self._check()

    def _check(self) -> str | None:
        series = read_progress(self._server)
        if series is not None and engine_is_down(series):
            return "the engine's thread has ended"
        if series is not None and series != self._series:
            self._series, self._token_s = series, time.monotonic()
        elif self._silent_s >= self._settings.probe_interval_s:
            self._ask()
        if self._silent_s < self._settings.stall_timeout_s:
            return None
        return f"no token came for {self._silent_s:.0f} s: {self._last_words}"

    @property
    def _silent_s(self) -> float:
        return time.monotonic() - self._token_s

    def _ask(self) -> None:
        try:
            self._probe(self._server, max(CHECK_INTERVAL_S, self._settings.stall_timeout_s - self._silent_s))
        except StageError as error:
            self._last_words = str(error)
        else:
            self._token_s = time.monotonic()
