"""Processes that drive their shares of a load point, where one core cannot drive all of it.

Each has a client and an event loop of its own. The parent says what to drive, waits until all have made their
prompts, gives the moment to begin, and joins what they bring back. Processes are spawned, not forked: gRPC's
event loop does not survive a fork. It knows pipes and what goes through them.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from minitron_client.bench.generator import Generator, PointRun
from minitron_client.bench.load import Extent, LoadPoint
from minitron_client.bench.refusal import BenchError
from minitron_client.bench.shares import Share, joined, shares
from minitron_client.bench.sweep import BenchSettings, arrivals_of, stream_of
from minitron_client.bench.workload import Workload
from minitron_client.errors import MinitronClientError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from minitron_client import AsyncMinitronClient

LEAD_S = 0.05
"""From the word to begin to the beginning: every process has heard it by then."""
END_S = 5.0
"""A process that is told to end has so long."""
_READY, _STOP, _GONE = "ready", "stop", "gone"


@dataclass(frozen=True, slots=True)
class _Part:
    """What one process drives; point and settings are the whole's."""

    share: Share
    point: LoadPoint
    workload: Workload
    run: tuple[int, int]
    settings: BenchSettings
    is_exact: bool


class Fleet:
    """The processes; enter it to start them.

    Args:
        processes: how many.
        options: arguments of each one's client.
    """

    def __init__(self, processes: int, options: dict[str, Any]) -> None:
        self._num, self._options = processes, options
        self._members: list[_Member] = []

    async def __aenter__(self) -> Fleet:
        """Start the processes."""
        with _ignoring_ctrl_c():
            self._members = [_Member(self._options) for _ in range(self._num)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(member.end() for member in self._members))

    def driver(
        self,
        point: LoadPoint,
        workload: Workload,
        run: tuple[int, int],
        settings: BenchSettings,
        *,
        is_exact: bool,
    ) -> FleetDriver:
        """What drives one load point, as a `Generator` does."""
        parts = [
            _Part(share, point, workload, run, settings, is_exact)
            for share in shares(point, settings.extent, self._num)
        ]
        return FleetDriver(list(zip(self._members, parts, strict=False)), settings.extent)


class FleetDriver:
    """One load point, driven once by several processes.

    Args:
        members: the processes and what each drives.
        extent: for how long, all together.
    """

    def __init__(self, members: Sequence[tuple[_Member, _Part]], extent: Extent) -> None:
        self._members, self._extent = members, extent
        self.run = PointRun()

    async def drive(self) -> PointRun:
        """Until every share has ended; cancelled, it breaks off and leaves `run` marked as partial.

        Raises:
            MinitronClientError: a process has failed, or has gone.
        """
        for member, part in self._members:
            member.begin(part)
        try:
            await asyncio.gather(*(member.ready() for member, _ in self._members))
            start_s = time.perf_counter() + LEAD_S
            for member, _ in self._members:
                member.send(start_s)
            await self._join()
        except asyncio.CancelledError:
            for member, _ in self._members:
                member.send(_STOP)
            await self._join()
            raise
        return self.run

    async def _join(self) -> None:
        runs = await asyncio.gather(*(member.result() for member, _ in self._members))
        parts = [part.share for _, part in self._members]
        self.run = joined(list(zip(parts, runs, strict=True)), self._extent)


class _Inbox:
    """What comes through a pipe, read by a thread of its own; `_GONE` when the other side has."""

    def __init__(self, pipe: Connection[Any, Any]) -> None:
        self._pipe, self._loop = pipe, asyncio.get_running_loop()
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        threading.Thread(target=self._read, name="bench-pipe", daemon=True).start()

    def _read(self) -> None:
        message: Any = None
        while message != _GONE:
            try:
                message = self._pipe.recv()
            except (EOFError, OSError):
                message = _GONE
            try:
                self._loop.call_soon_threadsafe(self.queue.put_nowait, message)
            except RuntimeError:  # the loop has been closed: nobody waits any more
                return


class _Member:
    """The parent's side of one process."""

    def __init__(self, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_child, args=(theirs, options), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is seen here
        self._inbox = _Inbox(self._pipe)
        self._result: PointRun | None = None

    def begin(self, part: _Part) -> None:
        """Let it make its prompts."""
        self._result = None
        self.send(part)

    def send(self, message: Any) -> None:
        """A message; one that has gone is found out when its answer is waited for."""
        with contextlib.suppress(OSError):
            self._pipe.send(message)

    async def ready(self) -> None:
        """Wait until its prompts are made.

        Raises:
            MinitronClientError: it has failed, or has gone.
        """
        _checked(await self._inbox.queue.get())

    async def result(self) -> PointRun:
        """What it has driven; kept, so that a cancelled wait loses nothing.

        Raises:
            MinitronClientError: it has failed, or has gone.
        """
        while self._result is None:
            message = _checked(await self._inbox.queue.get())
            self._result = message if isinstance(message, PointRun) else None
        return self._result

    async def end(self) -> None:
        """Let it go, whatever it does."""
        self.send(_GONE)
        await asyncio.to_thread(self._process.join, END_S)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join)


def _checked(message: Any) -> Any:
    if isinstance(message, MinitronClientError):
        raise message
    if message == _GONE:
        raise BenchError("one of the --processes has ended unexpectedly; run again with fewer")
    return message


@contextlib.contextmanager
def _ignoring_ctrl_c() -> Iterator[None]:
    """What is started meanwhile does not hear Ctrl-C, from its first moment: the parent tells it to stop."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# --- the other side


def _child(pipe: Connection[Any, Any], options: dict[str, Any]) -> None:
    """Drive what comes through the pipe until the parent ends it, or has ended."""
    asyncio.run(_serve(pipe, options))


async def _serve(pipe: Connection[Any, Any], options: dict[str, Any]) -> None:
    from minitron_client import AsyncMinitronClient

    inbox = _Inbox(pipe)
    async with AsyncMinitronClient(**options) as client:
        while isinstance(part := await inbox.queue.get(), _Part):
            try:
                answer: Any = await _drive(client, part, pipe, inbox)
            except MinitronClientError as error:
                answer = error
            except Exception as error:
                answer = BenchError(f"one of the --processes failed: {type(error).__name__}: {error}")
            with contextlib.suppress(OSError):  # the parent has gone
                pipe.send(answer)


async def _drive(
    client: AsyncMinitronClient, part: _Part, pipe: Connection[Any, Any], inbox: _Inbox
) -> PointRun:
    await client.metadata()  # the connection is made before the clock runs
    share, due_s = part.share, arrivals_of(part.settings, part.point, part.run)
    generator = Generator(
        stream_of(client, part.settings, is_exact=part.is_exact),
        share.point(part.point),
        share.extent(part.settings.extent, part.point),
        share.of(part.workload.asks(part.run)),
        share.of(due_s) if due_s is not None else None,
    )
    pipe.send(_READY)
    start_s = await inbox.queue.get()
    if not isinstance(start_s, float):
        generator.run.is_partial = True
        return generator.run
    work = asyncio.ensure_future(generator.drive(start_s))
    word = asyncio.ensure_future(inbox.queue.get())
    await asyncio.wait((work, word), return_when=asyncio.FIRST_COMPLETED)
    word.cancel()
    if not work.done():  # told to stop
        work.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work
    return generator.run
