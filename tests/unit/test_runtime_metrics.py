"""What a model counts: sums, buckets and gauges, and when they are handed over. No server runs here.

Run with: pytest tests/unit/test_runtime_metrics.py
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

import pytest

from minitron_build.runtime import metrics
from minitron_build.runtime.metrics import (
    COUNTER,
    ENGINE_METRICS,
    GAUGE,
    HISTOGRAM,
    REQUEST_METRICS,
    MetricBook,
    MetricInfo,
    RequestMeter,
    TokenMeter,
)
from minitron_build.runtime.status import STATUSES


class Server:
    """Takes series as Triton does, and counts the calls, which are what costs."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}
        self.calls = 0

    def make(self, name: str, description: str, kind: str) -> Any:
        assert description
        assert kind in (COUNTER, GAUGE)
        return lambda labels: Line(self, (name, *(f"{key}={labels[key]}" for key in sorted(labels))))


class Line:
    def __init__(self, server: Server, key: tuple[str, ...]) -> None:
        assert key not in server.values, "each series is made once"
        self._server, self._key = server, key
        server.values[key] = 0.0

    def increment(self, value: float) -> None:
        assert value > 0
        self._server.calls += 1
        self._server.values[self._key] += value

    def set(self, value: float) -> None:
        self._server.calls += 1
        self._server.values[self._key] = value


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def book(server: Server) -> MetricBook:
    return MetricBook(REQUEST_METRICS, {"model": "m"}, server.make)


def _value(server: Server, name: str, **labels: str) -> float:
    return server.values[
        (name, *(f"{key}={value}" for key, value in sorted({"model": "m", **labels}.items())))
    ]


def test_every_outcome_is_there_before_the_first_request(server: Server, book: MetricBook) -> None:
    outcomes = {key[-1] for key in server.values if key[0] == "minitron_requests_total"}
    assert len(outcomes) == len(STATUSES) + 1
    assert "outcome=completed" in outcomes
    assert "outcome=cancelled" in outcomes


def test_a_request_from_arrival_to_end(server: Server, book: MetricBook) -> None:
    request = RequestMeter(book, time.monotonic() - 0.3)
    tokens = TokenMeter(book, request)
    request.accepted(7)
    request.scheduled(0.02)
    book.flush()
    assert _value(server, "minitron_waiting_requests") == 1
    tokens.tokens(1)
    book.flush()
    assert _value(server, "minitron_waiting_requests") == 0
    assert _value(server, "minitron_running_requests") == 1
    tokens.tokens(4)
    tokens.tokens(0)
    request.end()
    request.end("INTERNAL")
    book.flush()
    assert _value(server, "minitron_running_requests") == 0
    assert _value(server, "minitron_requests_total", outcome="completed") == 1
    assert _value(server, "minitron_requests_total", outcome="internal") == 0
    assert _value(server, "minitron_prompt_tokens_total") == 7
    assert _value(server, "minitron_output_tokens_total") == 5
    assert _value(server, "minitron_queue_time_seconds_bucket", le="0.01") == 0
    assert _value(server, "minitron_queue_time_seconds_bucket", le="0.025") == 1
    assert _value(server, "minitron_queue_time_seconds_bucket", le="+Inf") == 1
    assert _value(server, "minitron_time_to_first_token_seconds_sum") == pytest.approx(0.3, abs=0.1)
    assert _value(server, "minitron_inter_token_seconds_count") == 4, "four tokens share one gap"
    assert _value(server, "minitron_request_duration_seconds_count") == 1


def test_request_that_ends_before_its_first_token_waits_no_more(server: Server, book: MetricBook) -> None:
    request = RequestMeter(book, time.monotonic())
    request.end("CANCELLED")
    TokenMeter(book, request).tokens(1)  # one that was under way
    book.flush()
    assert _value(server, "minitron_waiting_requests") == 0
    assert _value(server, "minitron_running_requests") == 0
    assert _value(server, "minitron_requests_total", outcome="cancelled") == 1


def test_refused_request_is_counted(server: Server, book: MetricBook) -> None:
    book.refused("INVALID_ARGUMENT")
    book.flush()
    assert _value(server, "minitron_requests_total", outcome="invalid_argument") == 1


def test_buckets_are_cumulative(server: Server, book: MetricBook) -> None:
    for value in (0.0004, 0.0005, 0.02, 0.02, 99.0):
        book.observe("minitron_inter_token_seconds", value)
    book.flush()
    read = {
        le: _value(server, "minitron_inter_token_seconds_bucket", le=le)
        for le in ("0.0005", "0.02", "1", "+Inf")
    }
    assert read == {"0.0005": 2, "0.02": 4, "1": 4, "+Inf": 5}
    assert _value(server, "minitron_inter_token_seconds_sum") == pytest.approx(99.0409)


def test_a_thousand_tokens_cost_as_many_calls_as_one(server: Server, book: MetricBook) -> None:
    tokens = TokenMeter(book, RequestMeter(book, time.monotonic()))
    tokens.tokens(1)
    for _ in range(1000):
        tokens.tokens(1)
    book.flush()
    assert _value(server, "minitron_output_tokens_total") == 1001
    assert server.calls < 60
    calls = server.calls
    book.flush()
    assert server.calls == calls, "nothing has changed"


def test_gauges_are_collected_at_each_hand_over(server: Server) -> None:
    book = MetricBook(
        ENGINE_METRICS, {"model": "m"}, server.make, lambda book: book.set("minitron_engine_slots", 8)
    )
    book.flush()
    assert _value(server, "minitron_engine_slots") == 8


def test_gauges_are_right_from_the_start(server: Server) -> None:
    """A reader takes an engine that is not up for a dead one."""
    book = MetricBook(
        ENGINE_METRICS, {"model": "m"}, server.make, lambda book: book.set("minitron_engine_up", 1)
    )
    book.start()
    assert _value(server, "minitron_engine_up") == 1
    book.close()


def test_thread_hands_over_by_itself_and_at_the_end(
    server: Server, book: MetricBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "FLUSH_INTERVAL_S", 0.01)
    book.start()
    book.refused("INTERNAL")
    deadline_s = time.monotonic() + 5
    while not _value(server, "minitron_requests_total", outcome="internal"):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    book.refused("INTERNAL")
    book.close()
    assert _value(server, "minitron_requests_total", outcome="internal") == 2
    assert not [thread for thread in threading.enumerate() if thread.name == "metrics"]


def test_server_that_takes_no_more_ends_the_thread_with_a_word(
    book: MetricBook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(line: Line, value: float) -> None:
        raise RuntimeError("gone")

    book.start()
    monkeypatch.setattr(Line, "increment", refuse)
    book.refused("INTERNAL")
    book.close()
    assert "metrics stand still" in caplog.text


@pytest.mark.parametrize(
    ("name", "kind", "buckets"),
    [
        ("minitron_x", COUNTER, ()),
        ("minitron_x_total", GAUGE, ()),
        ("minitron_x_seconds", HISTOGRAM, ()),
        ("minitron_x_seconds", HISTOGRAM, (1.0, 0.5)),
        ("minitron_x", GAUGE, (1.0,)),
    ],
)
def test_metric_that_prometheus_would_misread_is_refused(
    name: str, kind: str, buckets: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match="metric minitron_x"):
        MetricInfo(name, kind, "words", buckets=buckets)


def test_names_are_given_once() -> None:
    names = [info.name for info in (*REQUEST_METRICS, *ENGINE_METRICS)]
    assert len(names) == len(set(names))


def test_nothing_of_the_server_is_held_once_it_is_closed() -> None:
    """What the interpreter frees as it ends takes the process down; series go before their families."""
    freed: list[str] = []

    class Held:
        def __init__(self, kind: str) -> None:
            weakref.finalize(self, freed.append, kind)

        def increment(self, value: float) -> None: ...

        def set(self, value: float) -> None: ...

    def make(name: str, description: str, kind: str) -> Any:
        family = Held("family")
        return lambda labels: (family, Held("series"))[1]

    book = MetricBook(REQUEST_METRICS, {"model": "m"}, make)
    book.start()
    assert freed == []
    book.close()
    first_family = freed.index("family")
    assert set(freed[:first_family]) == {"series"}
    assert set(freed[first_family:]) == {"family"}
    book.refused(STATUSES[0])  # a late one is counted and reaches nobody
    book.flush()
