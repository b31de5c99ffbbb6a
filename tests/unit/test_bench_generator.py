"""The load generator against streams that play a plan: what is in flight, what counts, what is noted.

Run with: pytest tests/unit/test_bench_generator.py
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from minitron_client import Chunk, Completion, OverloadedError, Timings, Usage
from minitron_client.bench import generator as generator_module
from minitron_client.bench.generator import Generator, PointRun
from minitron_client.bench.load import Extent, LoadPoint
from minitron_client.bench.measure import measure
from minitron_client.bench.watch import GeneratorHealth, Watch
from minitron_client.bench.workload import Ask

pytestmark = pytest.mark.unit
CHUNK_S = 0.004


class PlayedStream:
    """Answers with `num_chunks` chunks of one token, `CHUNK_S` apart."""

    in_flight = 0

    def __init__(self, server: PlayedServer, num_chunks: int) -> None:
        self.server, self.num_chunks, self.num_sent = server, num_chunks, 0

    @property
    def usage(self) -> Usage:
        return Usage(7, self.num_sent if self.server.counts_along else None)

    async def __aenter__(self) -> PlayedStream:
        self.server.in_flight += 1
        self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        return self

    async def __aexit__(self, *exit: object) -> None:
        self.server.in_flight -= 1
        self.server.num_cancelled += self.num_sent < self.num_chunks

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        for number in range(self.num_chunks):
            await asyncio.sleep(self.server.chunk_s)
            if self.server.error is not None:
                raise self.server.error
            self.num_sent += 1
            yield Chunk("" if number == 0 and self.server.holds_back else "x")

    async def final(self) -> Completion:
        return Completion("", "length", Usage(7, self.num_sent), Timings(0.0, None), "r")


class PlayedServer:
    """Starts streams, and knows how many were open at once."""

    def __init__(self) -> None:
        self.in_flight = self.most_in_flight = self.num_cancelled = 0
        self.chunk_s = CHUNK_S
        self.counts_along, self.holds_back = True, False
        self.error: Exception | None = None
        self.asks: list[Ask] = []

    def start(self, ask: Ask) -> PlayedStream:
        self.asks.append(ask)
        return PlayedStream(self, ask.output_tokens)


def asks(output_tokens: int = 4) -> Any:
    return (Ask(number, "The", 1, output_tokens) for number in itertools.count())


def closed(concurrency: int) -> LoadPoint:
    return LoadPoint("closed", concurrency)


@pytest.fixture
def server() -> PlayedServer:
    return PlayedServer()


async def drive(
    server: PlayedServer, point: LoadPoint, extent: Extent, due_s: Any = None, **options: Any
) -> PointRun:
    return await Generator(server.start, point, extent, asks(**options), due_s).drive()


async def test_a_closed_loop_keeps_its_concurrency(server: PlayedServer) -> None:
    run = await drive(server, closed(5), Extent(20))
    assert server.most_in_flight == 5
    assert len(run.records) == 25
    assert run.num_warmup == 5
    assert [record.index for record in run.measured] == list(range(5, 25))
    assert all(record.is_ok and record.output_tokens == 4 for record in run.records)
    assert run.start_s == run.records[5].scheduled_s
    assert run.end_s == max(record.ended_s or 0 for record in run.records)
    assert not run.is_partial


async def test_no_request_starts_after_the_duration(server: PlayedServer) -> None:
    run = await drive(server, closed(2), Extent(None, 0.1, warmup_requests=2))
    assert run.end_s - run.start_s == pytest.approx(0.1)
    assert all(record.scheduled_s < run.end_s for record in run.records)
    assert all(record.is_ok for record in run.records)
    assert len(run.measured) >= 2


@pytest.mark.parametrize(("loop", "window_s"), [("open", 5.0), ("trace", 0.05)])
async def test_a_trace_that_is_over_early_ends_the_window(
    server: PlayedServer, loop: Any, window_s: float
) -> None:
    point = LoadPoint(loop, 20.0, "constant" if loop == "open" else "")
    extent = Extent(None, 5.0, warmup_requests=0)
    generator = Generator(server.start, point, extent, asks(1), iter([0.0, 0.05]))
    run = await generator.drive()
    assert generator.num_ended == 2
    assert window_s <= run.end_s - run.start_s <= window_s + 2


async def test_an_open_loop_does_not_wait_for_answers(server: PlayedServer) -> None:
    server.chunk_s = 0.1
    due_s = [0.0, 0.01, 0.02, 0.03, 0.04]
    run = await drive(
        server, LoadPoint("open", 100, "constant"), Extent(5, warmup_requests=0), iter(due_s), output_tokens=1
    )
    assert server.most_in_flight == 5
    start_s = run.records[0].scheduled_s
    assert [record.scheduled_s - start_s for record in run.records] == pytest.approx(due_s)
    assert all(record.sent_s >= record.scheduled_s for record in run.records)


async def test_latencies_count_from_when_a_request_was_due(server: PlayedServer) -> None:
    """The generator is held up for 60 ms: what was due meanwhile is late, and that is not forgiven."""

    def start(ask: Ask) -> PlayedStream:
        if ask.index == 0:
            time.sleep(0.06)
        return server.start(ask)

    point, due_s = LoadPoint("open", 100, "constant"), iter([0.0, 0.01, 0.02])
    run = await Generator(start, point, Extent(3, warmup_requests=0), asks(1), due_s).drive()
    late = run.records[1]
    assert late.send_delay_s > 0.03
    assert (late.ttft_s or 0) > late.send_delay_s
    assert (late.request_latency_s or 0) >= (late.ttft_s or 0)
    assert run.health is not None
    assert run.health.send_delay_p99_s > 0.03
    assert any("after they were due" in warning for warning in run.health.warnings)
    assert any("event loop was" in warning for warning in run.health.warnings)


async def test_a_stall_of_the_server_is_seen_by_all_who_were_due_in_it(server: PlayedServer) -> None:
    """Coordinated omission: a closed loop asks once during a stall of 150 ms, an open one goes on asking."""
    stall_ends_s = 0.0

    class Stalling(PlayedStream):
        async def __aenter__(self) -> PlayedStream:
            await asyncio.sleep(max(0.0, stall_ends_s - time.perf_counter()))
            return await super().__aenter__()

    async def slow(point: LoadPoint) -> int:
        nonlocal stall_ends_s
        stall_ends_s = time.perf_counter() + 0.15
        due_s = iter(number / 100 for number in range(20))
        start = lambda ask: Stalling(server, 1)  # noqa: E731
        run = await Generator(start, point, Extent(20, warmup_requests=0), asks(), due_s).drive()
        return sum((record.request_latency_s or 0) > 0.03 for record in run.records)

    server.chunk_s = 0.001
    seen_closed, seen_open = await slow(closed(1)), await slow(LoadPoint("open", 100, "constant"))
    assert seen_open >= 10
    assert seen_closed < seen_open  # one, and what a busy machine adds


async def test_prompts_that_take_long_to_make_are_made_in_passing(
    server: PlayedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator_module, "PREPARE_S", 0.0)
    await drive(server, closed(1), Extent(3, warmup_requests=0))
    assert [ask.index for ask in server.asks] == [0, 1, 2]


async def test_an_arrival_process_without_end_is_ended(server: PlayedServer) -> None:
    due_s = (number / 200 for number in itertools.count())
    run = await drive(
        server,
        LoadPoint("open", 200, "constant"),
        Extent(None, 0.1, warmup_requests=4),
        due_s,
        output_tokens=1,
    )
    assert len(run.measured) == pytest.approx(20, abs=2)


async def test_first_text_and_counts_are_noted(server: PlayedServer) -> None:
    server.holds_back = True
    run = await drive(server, closed(1), Extent(1, warmup_requests=0))
    (record,) = run.records
    assert record.first_text == 1
    assert record.first_chunk_tokens == 2
    assert len(record.icl_s) == 2
    assert record.input_tokens == 7
    assert record.finish_reason == "length"


async def test_failures_are_records_and_slots_rest_after_them(
    server: PlayedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator_module, "ERROR_PAUSE_S", 0.03)
    server.error = OverloadedError("queue is full")
    started_s = time.perf_counter()
    run = await drive(server, closed(1), Extent(3, warmup_requests=0))
    assert time.perf_counter() - started_s > 3 * 0.03
    assert [record.error for record in run.records] == ["OverloadedError"] * 3
    found = measure(run, ())
    assert (found.num_ok, found.error_share) == (0, 1.0)
    assert found.errors["OverloadedError"].example == "queue is full"
    assert found.ttft_s is None


async def test_a_mistake_of_ours_is_not_counted_as_a_failure(server: PlayedServer) -> None:
    server.error = ZeroDivisionError("ours")
    for point, due_s in ((closed(2), None), (LoadPoint("open", 9, "constant"), iter([0.0, 0.01]))):
        with pytest.raises(ZeroDivisionError):
            await drive(server, point, Extent(2, warmup_requests=0), due_s)


@pytest.mark.parametrize("point", [closed(3), LoadPoint("open", 100, "constant")])
async def test_broken_off_it_keeps_what_was_measured(server: PlayedServer, point: LoadPoint) -> None:
    due_s = (number / 100 for number in itertools.count())
    generator = Generator(server.start, point, Extent(None, 30, warmup_requests=0), asks(), due_s)
    task = asyncio.ensure_future(generator.drive())
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    run = generator.run
    assert run.is_partial
    assert server.in_flight == 0
    assert server.num_cancelled == sum(record.ended_s is None for record in run.records) > 0
    found = measure(run, ())
    assert found.is_partial
    assert found.num_ok > 0
    assert found.num_ok + found.num_unfinished == found.num_requests
    assert 0 < found.window_s < 1


async def test_nothing_is_left_running(server: PlayedServer, no_threads_left: Callable[[], None]) -> None:
    await drive(server, LoadPoint("open", 50, "constant"), Extent(3), (n / 50 for n in itertools.count()))
    assert asyncio.all_tasks() == {asyncio.current_task()}
    no_threads_left()


@pytest.fixture
def no_threads_left() -> Callable[[], None]:
    import threading

    before = set(threading.enumerate())

    def check() -> None:
        assert set(threading.enumerate()) <= before

    return check


# --- the generator's own health ---


def health(**changes: Any) -> GeneratorHealth:
    usual = {
        "cpu_share": 0.5, "cpu_s_per_chunk": 4e-5, "chunks_per_s": 12_500.0, "lag_p99_s": 0.002,
        "lag_max_s": 0.004, "send_delay_p99_s": 0.001, "machine_load": 1.0, "machine_cores": 2,
    }  # fmt: skip
    return GeneratorHealth(**{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"cpu_share": 0.97}, ["97% of a core at 12500 chunks/s: it may have been the bottleneck"]),
        ({"lag_p99_s": 0.0071}, ["event loop was 7.1 ms late"]),
        ({"send_delay_p99_s": 0.2}, ["sent 200.0 ms after they were due"]),
    ],
)
def test_a_generator_that_is_the_bottleneck_says_so(changes: dict[str, float], words: list[str]) -> None:
    found = health(**changes).warnings
    assert len(found) == len(words)
    assert all(word in warning for word, warning in zip(words, found, strict=True))


def test_of_several_repeats_the_worst_is_told() -> None:
    worst = GeneratorHealth.worst([health(lag_p99_s=0.02), health(cpu_share=0.95), health()])
    assert worst == health(cpu_share=0.95, lag_p99_s=0.02)


async def test_cpu_and_lag_are_measured() -> None:
    watch = Watch()
    watch.start()
    await asyncio.sleep(0.05)
    idle = watch.health(10, [0.1] * 99 + [0.2])
    assert idle.cpu_share < 0.5
    assert idle.send_delay_p99_s == 0.2
    watch.open_window()
    end_s = time.perf_counter() + 0.1
    while time.perf_counter() < end_s:
        pass
    await asyncio.sleep(0.02)
    busy = watch.health(100, [])
    await watch.stop()
    assert busy.cpu_share > idle.cpu_share
    assert busy.lag_max_s > 0.05
    assert busy.cpu_s_per_chunk is not None
    assert busy.cpu_s_per_chunk > 0
