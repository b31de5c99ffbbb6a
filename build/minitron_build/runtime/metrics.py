"""What a model counts and times, and how Prometheus gets it.

It knows the names, units and buckets of every metric, and when in a request's life each is taken. A change
of a metric costs Triton 20-70 us, so requests only add to plain numbers here; a thread hands the sums over
once in FLUSH_INTERVAL_S, whatever the load. It knows nothing of Triton's objects: a series is any object with
`increment` and `set`, and the caller makes them.

Histograms are sums of buckets: Triton's own kind takes one value at a time, which per token costs more than
the token. `histogram_quantile` and `rate` read `<name>_bucket{le=…}`, `<name>_sum` and `<name>_count` as any
other histogram's.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from .status import CANCELLED, DEADLINE_EXCEEDED, INTERNAL, INVALID_ARGUMENT, UNAVAILABLE

logger = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 0.5

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

COMPLETED = "completed"
OUTCOMES = {
    None: COMPLETED,
    CANCELLED: "cancelled",
    INVALID_ARGUMENT: "invalid_argument",
    UNAVAILABLE: "unavailable",
    DEADLINE_EXCEEDED: "deadline_exceeded",
    INTERNAL: "internal",
}
"""Status a request ended with (None: none) -> label `outcome`. A `stop` request cancels, too."""

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """One metric: what it is called and what it says.

    Attributes:
        name: as Prometheus sees it; ends with its unit.
        kind: COUNTER, GAUGE or HISTOGRAM.
        description: what is counted, with its unit.
        outcomes: one series per outcome of a request.
        buckets: upper bounds, for a histogram.

    Raises:
        ValueError: a counter that does not end in `_total`, or buckets that do not rise.
    """

    name: str
    kind: str
    description: str
    outcomes: bool = False
    buckets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if (self.kind == COUNTER) != self.name.endswith("_total"):
            raise ValueError(f"metric {self.name} is a {self.kind}; counters, and no others, end in _total")
        if (self.kind == HISTOGRAM) != bool(self.buckets) or list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"metric {self.name} is a {self.kind} with buckets {self.buckets}")


REQUEST_METRICS = (
    MetricInfo("minitron_requests_total", COUNTER, "Requests that have ended, by outcome.", outcomes=True),
    MetricInfo("minitron_prompt_tokens_total", COUNTER, "Tokens of the prompts of accepted requests."),
    MetricInfo("minitron_output_tokens_total", COUNTER, "Tokens generated for requests."),
    MetricInfo("minitron_running_requests", GAUGE, "Requests that have had a token and go on."),
    MetricInfo("minitron_waiting_requests", GAUGE, "Requests that are here and have had no token yet."),
    MetricInfo(
        "minitron_queue_time_seconds",
        HISTOGRAM,
        "Seconds from a request's arrival at this model until it was handed on or scheduled.",
        buckets=SECONDS_BUCKETS,
    ),
    MetricInfo(
        "minitron_time_to_first_token_seconds",
        HISTOGRAM,
        "Seconds from a request's arrival at this model to its first token.",
        buckets=SECONDS_BUCKETS,
    ),
    MetricInfo(
        "minitron_inter_token_seconds",
        HISTOGRAM,
        "Seconds between tokens of one sequence; tokens that come together share their gap.",
        buckets=TOKEN_BUCKETS,
    ),
    MetricInfo(
        "minitron_request_duration_seconds",
        HISTOGRAM,
        "Seconds from a request's arrival at this model to its end, whatever the outcome.",
        buckets=SECONDS_BUCKETS,
    ),
)
"""Of each model that generates; label `model` tells them apart, as a text request passes through two."""

ENGINE_METRICS = (
    MetricInfo("minitron_engine_steps_total", COUNTER, "Steps the engine has made."),
    MetricInfo("minitron_engine_running_requests", GAUGE, "Sequences in the running batch."),
    MetricInfo("minitron_engine_waiting_requests", GAUGE, "Sequences that wait for a place in the batch."),
    MetricInfo("minitron_engine_slots", GAUGE, "Sequences that may run together."),
    MetricInfo("minitron_kv_cache_used_tokens", GAUGE, "Tokens whose keys and values are held."),
    MetricInfo("minitron_kv_cache_reserved_tokens", GAUGE, "Tokens that running sequences may come to hold."),
    MetricInfo("minitron_kv_cache_capacity_tokens", GAUGE, "Tokens that the KV cache has room for."),
    MetricInfo("minitron_engine_stalled_seconds", GAUGE, "Seconds since the last step while work is open."),
    MetricInfo("minitron_engine_up", GAUGE, "1 while the engine's thread runs, else 0."),
)
"""Of the reference engine; TensorRT-LLM's backend has its own, `nv_trt_llm_*`."""


class Series(Protocol):
    """One line of Prometheus' text."""

    def increment(self, value: float) -> None:
        """Add to a counter."""

    def set(self, value: float) -> None:
        """Set a gauge."""


MakeFamily = Callable[[str, str, str], Callable[[Mapping[str, str]], Series]]
"""(name, description, COUNTER or GAUGE) -> a maker of series from labels."""


class _Counter:
    """A number that only grows, and how much of it has been handed over."""

    __slots__ = ("_handed", "_series", "value")

    def __init__(self, series: Series) -> None:
        self.value, self._handed = 0.0, 0.0
        self._series: Series | None = series

    def flush(self) -> None:
        change = self.value - self._handed
        if change and self._series is not None:
            self._handed += change
            self._series.increment(change)

    def release(self) -> None:
        """Let the series go; the number stays."""
        self._series = None


class _Gauge:
    """A number as it is, handed over when it has changed."""

    __slots__ = ("_handed", "_series", "value")

    def __init__(self, series: Series) -> None:
        self.value, self._handed = 0.0, 0.0
        self._series: Series | None = series

    def flush(self) -> None:
        value = self.value
        if value != self._handed and self._series is not None:
            self._handed = value
            self._series.set(value)

    def release(self) -> None:
        """Let the series go; the number stays."""
        self._series = None


class _Histogram:
    """Counts per bucket; made cumulative, as Prometheus wants them, when they are handed over."""

    __slots__ = ("_bounds", "_buckets", "_count", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...], series: Mapping[str, Series]) -> None:
        self._bounds, self._counts = bounds, [0.0] * (len(bounds) + 1)
        self._buckets = [_Counter(series[_bound_text(bound)]) for bound in (*bounds, float("inf"))]
        self._sum, self._count = _Counter(series["sum"]), _Counter(series["count"])

    def observe(self, value: float, times: int) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum.value += value * times
        self._count.value += times

    def flush(self) -> None:
        for bucket, so_far in zip(self._buckets, itertools.accumulate(self._counts), strict=True):
            bucket.value = so_far
            bucket.flush()
        self._sum.flush()
        self._count.flush()

    def release(self) -> None:
        """Let every series go; the numbers stay."""
        for counter in (*self._buckets, self._sum, self._count):
            counter.release()


class MetricBook:
    """All metrics of one model instance.

    Args:
        infos: the metrics to keep.
        labels: labels of every series.
        make_family: makes the series; called here only.
        collect: called before each hand-over, to set gauges.
    """

    def __init__(
        self,
        infos: Iterable[MetricInfo],
        labels: Mapping[str, str],
        make_family: MakeFamily,
        collect: Callable[[MetricBook], None] | None = None,
    ) -> None:
        self._labels, self._make_family, self._collect = dict(labels), make_family, collect
        self._lock = threading.Lock()
        self._counters: dict[tuple[str, str], _Counter] = {}
        self._gauges: dict[str, _Gauge] = {}
        self._histograms: dict[str, _Histogram] = {}
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._makers: list[object] = []  # a family that is dropped takes its series along
        for info in infos:
            self._add_metric(info)

    def _add_family(self, name: str, description: str, kind: str) -> Callable[[Mapping[str, str]], Series]:
        make = self._make_family(name, description, kind)
        self._makers.append(make)
        return make

    def _add_metric(self, info: MetricInfo) -> None:
        if info.kind == HISTOGRAM:
            self._histograms[info.name] = _Histogram(info.buckets, self._histogram_series(info))
            return
        make = self._add_family(info.name, info.description, info.kind)
        if info.kind == GAUGE:
            self._gauges[info.name] = _Gauge(make(self._labels))
        elif info.outcomes:
            for outcome in OUTCOMES.values():
                series = make(self._labels | {"outcome": outcome})
                self._counters[info.name, outcome] = _Counter(series)
        else:
            self._counters[info.name, ""] = _Counter(make(self._labels))

    def _histogram_series(self, info: MetricInfo) -> dict[str, Series]:
        make = {
            part: self._add_family(f"{info.name}_{part}", info.description, COUNTER)
            for part in ("bucket", "sum", "count")
        }
        bounds = (_bound_text(bound) for bound in (*info.buckets, float("inf")))
        series = {bound: make["bucket"](self._labels | {"le": bound}) for bound in bounds}
        return series | {part: make[part](self._labels) for part in ("sum", "count")}

    def add(self, name: str, value: float = 1.0, outcome: str = "") -> None:
        """Add to a counter."""
        with self._lock:
            self._counters[name, outcome].value += value

    def refused(self, status: str) -> None:
        """Count a request that never became one."""
        self.add("minitron_requests_total", outcome=OUTCOMES[status])

    def count_to(self, name: str, total: float) -> None:
        """Bring a counter to a total that is counted elsewhere."""
        with self._lock:
            self._counters[name, ""].value = total

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._gauges[name].value = value

    def change(self, name: str, by: int) -> None:
        """Change a gauge by so much."""
        with self._lock:
            self._gauges[name].value += by

    def observe(self, name: str, value: float, times: int = 1) -> None:
        """Put a value into a histogram, so many times."""
        with self._lock:
            self._histograms[name].observe(value, times)

    def start(self) -> None:
        """Hand over now, so that no gauge is read unset, and every FLUSH_INTERVAL_S on an own thread."""
        self.flush()
        self._thread = threading.Thread(target=self._flush_work, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hand over what is left, end the thread, and let the series go; later counts reach nobody.

        A series or family that the server's library frees only as the interpreter ends takes the model's
        process down with SIGSEGV, so none is left for then. Series go before the families they belong to.
        """
        self._closing.set()
        if self._thread:
            self._thread.join()
        for metric in self._metrics():
            metric.release()
        self._makers.clear()

    def flush(self) -> None:
        """Hand over what has changed; called from one thread at a time."""
        if self._collect:
            self._collect(self)
        for metric in self._metrics():  # outside the lock: each hand-over is a round trip to the server
            metric.flush()

    def _metrics(self) -> list[_Counter | _Gauge | _Histogram]:
        return [*self._counters.values(), *self._gauges.values(), *self._histograms.values()]

    def _flush_work(self) -> None:
        try:
            while not self._closing.wait(FLUSH_INTERVAL_S):
                self.flush()
            self.flush()
        except Exception:
            logger.exception("metrics stand still from here on: the server did not take them")


class RequestMeter:
    """One request that was read and understood, until its end; a thread at a time.

    Args:
        book: where it is counted.
        arrived_s: `time.monotonic()` when it reached the model.
    """

    __slots__ = ("_arrived_s", "_book", "_has_token", "_is_open")

    def __init__(self, book: MetricBook, arrived_s: float) -> None:
        self._book, self._arrived_s = book, arrived_s
        self._has_token, self._is_open = False, True
        book.change("minitron_waiting_requests", 1)

    def accepted(self, prompt_tokens: int) -> None:
        """The request is handed on; its prompts have so many tokens in all."""
        self._book.add("minitron_prompt_tokens_total", prompt_tokens)

    def scheduled(self, waited_s: float | None = None) -> None:
        """Its wait is over: now, or after so many seconds."""
        waited_s = time.monotonic() - self._arrived_s if waited_s is None else waited_s
        self._book.observe("minitron_queue_time_seconds", max(0.0, waited_s))

    def first_token(self) -> None:
        """A token came; the first one is timed."""
        if self._has_token or not self._is_open:
            return
        self._has_token = True
        self._book.observe("minitron_time_to_first_token_seconds", time.monotonic() - self._arrived_s)
        self._book.change("minitron_waiting_requests", -1)
        self._book.change("minitron_running_requests", 1)

    def end(self, status: str | None = None) -> None:
        """It is over; only the first word counts.

        Args:
            status: what it ended with, None when it got all that it asked for.
        """
        if not self._is_open:
            return
        self._is_open = False
        gauge = "minitron_running_requests" if self._has_token else "minitron_waiting_requests"
        self._book.change(gauge, -1)
        self._book.add("minitron_requests_total", outcome=OUTCOMES[status])
        self._book.observe("minitron_request_duration_seconds", time.monotonic() - self._arrived_s)


class TokenMeter:
    """The tokens of one sequence of a request."""

    __slots__ = ("_book", "_last_s", "_request")

    def __init__(self, book: MetricBook, request: RequestMeter) -> None:
        self._book, self._request, self._last_s = book, request, 0.0

    def tokens(self, count: int) -> None:
        """So many came now."""
        if count < 1:
            return
        now_s = time.monotonic()
        self._book.add("minitron_output_tokens_total", count)
        if self._last_s:
            self._book.observe("minitron_inter_token_seconds", (now_s - self._last_s) / count, count)
        else:
            self._request.first_token()
        self._last_s = now_s


def _bound_text(bound: float) -> str:
    return "+Inf" if bound == float("inf") else f"{bound:g}"
