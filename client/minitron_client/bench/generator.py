"""Drives one load point: starts requests when they are due and writes down what comes back.

A closed loop has as many workers as requests in flight. An open loop starts a task an arrival, on a thread's
clock, and waits for none before it starts the next. It knows the client's `stream` and no statistics.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from minitron_client.bench.load import Extent, LoadPoint
from minitron_client.bench.records import RequestRecord
from minitron_client.bench.watch import GeneratorHealth, Watch
from minitron_client.bench.workload import Ask
from minitron_client.errors import MinitronClientError
from minitron_client.results import Completion

PREPARED_ASKS, PREPARE_S = 2000, 1.0
"""Prompts made before the clock runs, as many as the time allows; those after them are made in passing."""
ERROR_PAUSE_S = 0.1
"""A closed loop's slot rests this long after a failure: a server that refuses at once is not hammered."""


StartStream = Callable[[Ask], Any]
"""A request's `AsyncTextStream`, or what does as it does."""


@dataclass(slots=True)
class PointRun:
    """What a load point left behind.

    Attributes:
        records: every request that was started, in order, warm-up included.
        num_warmup: how many of them are warm-up.
        start_s: when the measured window began: the first measured request was due.
        end_s: when it ended: the duration was over; of a number of requests, the last one was, and of an open
            loop or a trace not before `next_due_s`: so many requests over as many gaps, not over one less.
        health: the generator's own.
        is_partial: it was broken off.
        next_due_s: when one more than the number of requests would have been due; None where nobody tells.
    """

    records: list[RequestRecord] = field(default_factory=list)
    num_warmup: int = 0
    start_s: float = 0.0
    end_s: float = 0.0
    health: GeneratorHealth | None = None
    is_partial: bool = False
    next_due_s: float | None = None

    @property
    def measured(self) -> list[RequestRecord]:
        """Requests that were due in the window."""
        return self.records[self.num_warmup :]


class Generator:
    """One load point, driven once.

    Args:
        start_stream: how a request is sent.
        point: what load.
        extent: for how long.
        asks: what to ask, without end.
        due_s: an open loop's arrival times after its start; ignored by a closed one.
    """

    def __init__(
        self,
        start_stream: StartStream,
        point: LoadPoint,
        extent: Extent,
        asks: Iterator[Ask],
        due_s: Iterator[float] | None = None,
    ) -> None:
        self._start_stream, self._point, self._extent, self._due_s = start_stream, point, extent, due_s
        self.run = PointRun(num_warmup=extent.num_warmup(point))
        self.num_ended = 0
        """Requests that have ended, for whoever shows progress."""
        self._watch = Watch()
        self._start_s: float | None = None
        self._is_over = False
        self._tasks: set[asyncio.Task[None]] = set()
        prepared = min(PREPARED_ASKS, self._num_requests or PREPARED_ASKS)
        self._asks = itertools.chain(_prepared(asks, prepared), asks)

    async def drive(self, start_s: float | None = None) -> PointRun:
        """Until the extent is reached and every request that was started has ended.

        Cancelled, it breaks off what runs and leaves `run` marked as partial.

        Args:
            start_s: when to begin, of `time.perf_counter`; None is now.
        """
        self._start_s = start_s
        self._watch.start()
        try:
            await (self._drive_closed() if self._point.loop == "closed" else self._drive_open())
        except asyncio.CancelledError:
            self.run.is_partial = True
            raise
        finally:
            self._is_over = True
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._close_window()
            await self._watch.stop()
        return self.run

    # closed loop

    async def _drive_closed(self) -> None:
        if self._start_s is not None:
            await asyncio.sleep(max(0.0, self._start_s - time.perf_counter()))
        for _ in range(int(self._point.level)):
            self._spawn(self._work())
        await asyncio.gather(*self._tasks)

    async def _work(self) -> None:
        while True:
            now_s = time.perf_counter()
            if self._is_complete(now_s):
                return
            record = self._admit(now_s)
            await self._ask(next(self._asks), record)
            if record.error:
                await asyncio.sleep(ERROR_PAUSE_S)

    # open loop

    async def _drive_open(self) -> None:
        """Arrivals come from a thread: an event loop's own timers are a millisecond coarse."""
        loop, over, done = asyncio.get_running_loop(), threading.Event(), asyncio.Event()
        start_s = time.perf_counter() if self._start_s is None else self._start_s

        def arrive(due_s: float) -> None:
            if self._is_complete(due_s):
                over.set()
            else:
                self._spawn(self._ask(next(self._asks), self._admit(due_s)))

        def keep_time() -> None:
            for number, due_s in enumerate(self._due_s or ()):
                if number == self._num_requests:
                    self.run.next_due_s = start_s + due_s
                    break
                if over.wait(max(0.0, start_s + due_s - time.perf_counter())):
                    break
                loop.call_soon_threadsafe(arrive, start_s + due_s)
            loop.call_soon_threadsafe(done.set)

        clock = threading.Thread(target=keep_time, name="bench-arrivals", daemon=True)
        clock.start()
        try:
            await done.wait()
            await asyncio.gather(*self._tasks)
        finally:
            over.set()
            clock.join()  # at once: it waits on `over` only

    # both

    @property
    def _num_requests(self) -> int | None:
        """Requests in all, warm-up included; None within a duration."""
        measured = self._extent.num_requests
        return None if measured is None else self.run.num_warmup + measured

    def _is_complete(self, now_s: float) -> bool:
        """Whether a request that is due now would come after the extent's end."""
        if self._is_over:
            return True
        num_measured = len(self.run.records) - self.run.num_warmup
        if self._extent.num_requests is not None:
            return num_measured >= self._extent.num_requests
        return num_measured > 0 and now_s >= self.run.start_s + (self._extent.duration_s or 0.0)

    def _admit(self, due_s: float) -> RequestRecord:
        record = RequestRecord(len(self.run.records), due_s)
        self.run.records.append(record)
        if record.index == self.run.num_warmup:
            self.run.start_s = due_s
            self._watch.open_window()
        return record

    async def _ask(self, ask: Ask, record: RequestRecord) -> None:
        """One request, to its end; what goes wrong is the record's."""
        clock, times = time.perf_counter, record.chunk_times
        record.sent_s = clock()
        stream = None
        try:
            async with self._start_stream(ask) as stream:
                async for chunk in stream:
                    times.append(clock())
                    if record.first_text is None and chunk.text:
                        record.first_text = len(times) - 1
                        record.counted_first = stream.usage.output_tokens
                _note_end(record, await stream.final())
        except MinitronClientError as error:
            record.error, record.error_text = type(error).__name__, error.message
        finally:
            if record.output_tokens is None and stream is not None:
                with contextlib.suppress(MinitronClientError):
                    record.output_tokens = stream.usage.output_tokens
        record.ended_s = clock()
        self.num_ended += 1

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._drop)

    def _drop(self, task: asyncio.Task[None]) -> None:
        """A finished task is forgotten; one that failed by a mistake of ours stays for `gather` to raise."""
        if task.cancelled() or task.exception() is None:
            self._tasks.discard(task)

    def _close_window(self) -> None:
        run = self.run
        ended_s = [record.ended_s or 0.0 for record in run.records]
        run.end_s = max([run.start_s, *ended_s, 0.0 if run.is_partial else run.next_due_s or 0.0])
        if self._extent.duration_s is not None and not run.is_partial:
            time_is_over_s = run.start_s + self._extent.duration_s
            # a trace may end before its time: then nothing is due any more, and nothing to be counted
            run.end_s = min(run.end_s, time_is_over_s) if self._point.loop == "trace" else time_is_over_s
        num_chunks = sum(
            sum(time_s >= run.start_s for time_s in record.chunk_times) for record in run.records
        )
        run.health = self._watch.health(num_chunks, [record.send_delay_s for record in run.measured])


def _prepared(asks: Iterator[Ask], count: int) -> list[Ask]:
    found: list[Ask] = []
    until_s = time.perf_counter() + PREPARE_S
    while len(found) < count and time.perf_counter() < until_s:
        found.append(next(asks))
    return found


def _note_end(record: RequestRecord, completion: Completion) -> None:
    record.input_tokens = completion.usage.input_tokens
    record.output_tokens = completion.usage.output_tokens
    record.finish_reason = completion.finish_reason or ""
