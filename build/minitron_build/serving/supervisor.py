"""Keeps one Triton serving until a signal: proves it by a token, watches it, starts it again when it is lost.

It knows what each signal does, what ends a server's service and how often it may be started again. How the
bundle was chosen and what the flags are called is serve.py's; what a token proves is watch.py's.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

from minitron_build.errors import PlanError, StageError
from minitron_build.serving.health_endpoint import Phase, ServeState, telling
from minitron_build.serving.triton_log import exit_words
from minitron_build.serving.triton_server import ServerOptions, TritonServer
from minitron_build.serving.watch import Probe, TokenWatch, WatchSettings

EXIT_DRAINED, EXIT_INTERRUPTED = 0, 130
POLL_INTERVAL_S = 0.2
MIN_PROBE_TIMEOUT_S = 10.0
FIRST_WAIT_S, MAX_WAIT_S = 1.0, 30.0
"""Before the first restart, and at most; each wait is twice the one before."""
FORGIVEN_AFTER_S = 600.0
"""A server that was ready for so long has its restarts back."""

FAULTS = tuple(-number for number in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS))
"""Exit codes of a Triton that crashed, and did not end of its own will."""

Announce = Callable[[TritonServer, float], None]
"""Told once the first server is ready, with the seconds since its start."""


class ServerLostError(StageError):
    """A server that was serving, or was started again, serves no more."""


@dataclass(frozen=True, slots=True)
class Care:
    """How a server is looked after.

    Attributes:
        restarts: how often in a row it is started again when it is lost.
        watch: whether tokens keep coming.
        health_port: where /ready and /live are told; None: nowhere.

    Raises:
        PlanError: a number that makes no sense.
    """

    restarts: int = 0
    watch: WatchSettings = field(default_factory=WatchSettings)
    health_port: int | None = None

    def __post_init__(self) -> None:
        if self.restarts < 0:
            raise PlanError(f"--restarts {self.restarts}", expected="0 or more")
        if self.health_port is not None and not 1 <= self.health_port <= 65535:
            raise PlanError(f"--health-port {self.health_port}", expected="a port between 1 and 65535")


class RestartBudget:
    """How many restarts are left, and how long to wait before each.

    Args:
        limit: restarts in a row.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    def next_wait_s(self, ready_s: float) -> float | None:
        """Take one; the seconds to wait before it, None when none is left.

        Args:
            ready_s: how long the lost server had been ready.
        """
        if ready_s >= FORGIVEN_AFTER_S:
            self.used = 0
        if self.used >= self.limit:
            return None
        self.used += 1
        return float(min(FIRST_WAIT_S * 2 ** (self.used - 1), MAX_WAIT_S))


def serve(options: ServerOptions, probe: Probe, announce: Announce, care: Care | None = None) -> int:
    """Start Triton, probe it, announce it, and stay until a signal or until it is lost for good.

    SIGTERM and SIGINT drain: streams in flight finish. A second one, or one before it is ready, kills.

    Args:
        options: how to run Triton.
        probe: raises StageError when the server, ready by its own word, gives no token.
        announce: told when the first one is ready.
        care: restarts, watching and where health is told; None: none of them.

    Returns:
        0 after a clean drain, 130 when it was told to stop before it was ready or while it drained.

    Raises:
        MachineError: refused before the start.
        StageError: it did not start, did not answer, was lost with no restart left, or did not drain in time.
            A start that crashed is a loss; one that was refused is not tried again.
    """
    supervisor = _Supervisor(options, probe, announce, care or Care())
    with _Signals() as signals, telling(supervisor.state, options.address, supervisor.care.health_port):
        return supervisor.run(signals)


class _Supervisor:
    """One call of `serve`: a server at a time."""

    def __init__(self, options: ServerOptions, probe: Probe, announce: Announce, care: Care) -> None:
        self.options, self.probe, self.announce, self.care = options, probe, announce, care
        self.state = ServeState(since_s=time.monotonic())
        self._budget = RestartBudget(care.restarts)
        self._ready_at_s: float | None = None
        self._is_announced = False

    def run(self, signals: _Signals) -> int:
        while True:
            try:
                return self._serve_once(signals)
            except ServerLostError as error:
                if not self._wait_for_restart(error, signals):
                    return EXIT_INTERRUPTED

    def _serve_once(self, signals: _Signals) -> int:
        signals.is_ready = False
        self._ready_at_s = None
        self.state.enter(Phase.STARTING)
        server = TritonServer.start(self.options, on_log=_print_log)
        signals.server = server
        try:
            if not self._come_up(server, signals):
                return EXIT_INTERRUPTED
            self._stay(server, signals)
            self.state.enter(Phase.DRAINING)
            return _drain(server, signals)
        finally:
            server.stop(timeout_s=0)

    def _come_up(self, server: TritonServer, signals: _Signals) -> bool:
        """Whether it came up; False when a signal ended it before."""
        if signals.have_come():  # while the process was being spawned
            return False
        try:
            server.wait_until_ready()
            self.probe(server, max(MIN_PROBE_TIMEOUT_S, self.options.start_timeout_s))
        except StageError as error:
            if signals.have_come():  # the kill was asked for: what failed of it is no news
                return False
            if self.state.restarts or _ended_by_fault(server):
                raise ServerLostError(str(error)) from error
            raise
        self._is_up(server, signals)
        return True

    def _is_up(self, server: TritonServer, signals: _Signals) -> None:
        signals.is_ready = True
        self._ready_at_s = time.monotonic()
        self.state.enter(Phase.READY)
        ready_s = time.monotonic() - server.started_s
        if self._is_announced:
            say(f"ready again after {ready_s:.1f} s, process {server.pid}")
        else:
            self.announce(server, ready_s)
            self._is_announced = True

    def _stay(self, server: TritonServer, signals: _Signals) -> None:
        """Until a signal comes.

        Raises:
            ServerLostError: the server, a model's process or the tokens are gone.
        """
        watch = TokenWatch(server, self.probe, self.care.watch)
        watch.start()
        try:
            while not signals.have_come():
                if (trouble := _trouble(server, watch)) is not None:
                    self.state.enter(Phase.RED, trouble)
                    raise ServerLostError(trouble)
                time.sleep(POLL_INTERVAL_S)
        finally:
            watch.stop()

    def _wait_for_restart(self, error: ServerLostError, signals: _Signals) -> bool:
        """Whether the wait is over; False when a signal came.

        Raises:
            StageError: no restart is left.
        """
        self.state.enter(Phase.RED, str(error))
        ready_s = 0.0 if self._ready_at_s is None else time.monotonic() - self._ready_at_s
        wait_s = self._budget.next_wait_s(ready_s)
        if wait_s is None:
            done = f"{self._budget.limit} restarts did not help" if self._budget.limit else "no --restarts"
            raise StageError(f"{error}; {done}: start minitron serve again") from error
        say(f"{error}; restart {self._budget.used} of {self._budget.limit} in {wait_s:g} s")
        self.state.start_again(str(error))
        return not signals.wait(wait_s)


def _ended_by_fault(server: TritonServer) -> bool:
    """Whether it crashed; seldom, on a busy machine, Triton 24.10 does so while it starts its models."""
    return server.exit_code in FAULTS


def _trouble(server: TritonServer, watch: TokenWatch) -> str | None:
    if server.stub_died:
        return server.stub_died
    if not server.is_running:
        return f"Triton ended by itself with {exit_words(server.exit_code)}: {server.failure_reason}"
    return watch.trouble


def _drain(server: TritonServer, signals: _Signals) -> int:
    drain_s = server.options.drain_timeout_s
    say(f"draining for at most {drain_s:g} s; a second signal stops at once")
    code = server.stop()
    if signals.count > 1:
        return EXIT_INTERRUPTED
    if code != 0:
        raise StageError(f"requests in flight did not finish within --drain-timeout-s {drain_s:g}: cut off")
    return EXIT_DRAINED


class _Signals:
    """SIGTERM and SIGINT while Triton runs: counted; one before it is ready, or a second one, kills it."""

    def __init__(self) -> None:
        self.count = 0
        self.is_ready = False
        self.server: TritonServer | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def have_come(self) -> bool:
        """Whether any has come."""
        return self.count > 0

    def wait(self, wait_s: float) -> bool:
        """Wait; True when a signal came, at once then."""
        deadline_s = time.monotonic() + wait_s
        while not self.count and time.monotonic() < deadline_s:
            time.sleep(POLL_INTERVAL_S)
        return self.count > 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.server and (self.count > 1 or not self.is_ready):
            self.server.kill()


def _print_log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def say(words: str) -> None:
    """One line of progress for a person."""
    print(f"minitron: {words}", file=sys.stderr, flush=True)
