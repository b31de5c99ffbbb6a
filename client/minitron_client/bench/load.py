"""How hard the server is driven, and for how long: one load point after the other.

    closed   `concurrency` requests in flight: the next one starts when one ends
    open     requests arrive `request_rate` times a second, whatever the server does
    trace    requests arrive at the trace's own timestamps

It knows no client and no clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from minitron_client.bench.arrivals import ARRIVALS
from minitron_client.bench.refusal import BenchUsageError

Loop: TypeAlias = Literal["closed", "open", "trace"]
MAX_CONCURRENCY, MAX_RATE, MAX_DURATION_S = 100_000, 100_000.0, 86_400.0


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """One level of load.

    Attributes:
        loop: "closed", "open" or "trace".
        level: requests in flight, or arrivals per second; a trace's mean arrivals per second (gaps over the
            time from its first request to its last), 0 where all arrive at once.
        arrival: a name of ARRIVALS for "open", "" otherwise.
    """

    loop: Loop
    level: float
    arrival: str = ""

    def __post_init__(self) -> None:
        if self.loop == "open" and self.arrival not in ARRIVALS:
            raise BenchUsageError(f"--arrival {self.arrival!r}: expected one of {', '.join(ARRIVALS)}")

    @property
    def label(self) -> str:
        """Words for a table row."""
        if self.loop == "trace" and not self.level:
            return "trace, all at once"
        words = {"closed": "concurrency", "open": "request rate", "trace": "trace, request rate"}
        return f"{words[self.loop]} {self.level:g}"


@dataclass(frozen=True, slots=True)
class Extent:
    """How long a load point lasts: exactly one of the two is set.

    Attributes:
        num_requests: measured requests.
        duration_s: seconds in which requests are started.
        warmup_requests: requests before them that are sent and not measured; None leaves it to the point.
    """

    num_requests: int | None = None
    duration_s: float | None = None
    warmup_requests: int | None = None

    def __post_init__(self) -> None:
        if (self.num_requests is None) == (self.duration_s is None):
            raise BenchUsageError("--num-requests and --duration-s contradict one another; give one of them")
        if self.num_requests is not None and self.num_requests < 1:
            raise BenchUsageError(f"--num-requests {self.num_requests}: expected at least 1")
        if self.duration_s is not None and not 0 < self.duration_s <= MAX_DURATION_S:
            raise BenchUsageError(
                f"--duration-s {self.duration_s:g}: expected above 0, up to {MAX_DURATION_S:.0f}"
            )
        if self.warmup_requests is not None and self.warmup_requests < 0:
            raise BenchUsageError(f"--warmup-requests {self.warmup_requests}: expected 0 or more")

    def num_warmup(self, point: LoadPoint) -> int:
        """Requests before the measured ones.

        Left out: one for each in flight, or a second of arrivals; none for a trace, whose requests all count.
        """
        if self.warmup_requests is not None:
            return self.warmup_requests
        return 0 if point.loop == "trace" else max(1, math.ceil(point.level))


def closed_points(text: str) -> tuple[LoadPoint, ...]:
    """`1,8,64`: a closed loop of each.

    Raises:
        BenchUsageError: not whole numbers from 1, or one twice.
    """
    levels = _numbers("--concurrency", text)
    for level in levels:
        if not 1 <= level <= MAX_CONCURRENCY or level != int(level):
            raise BenchUsageError(
                f"--concurrency {level:g}: expected a whole number from 1 to {MAX_CONCURRENCY}"
            )
    return tuple(LoadPoint("closed", level) for level in levels)


def open_points(text: str, arrival: str) -> tuple[LoadPoint, ...]:
    """`0.5,2,10`: an open loop of each.

    Raises:
        BenchUsageError: not numbers above 0, or one twice.
    """
    levels = _numbers("--request-rate", text)
    for level in levels:
        if not 0 < level <= MAX_RATE:
            raise BenchUsageError(
                f"--request-rate {level:g}: expected requests per second, above 0 and up to {MAX_RATE:.0f}; "
                "for as fast as it goes, give --concurrency"
            )
    return tuple(LoadPoint("open", level, arrival) for level in levels)


def _numbers(flag: str, text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise BenchUsageError(
            f"{flag} {text!r}: expected numbers with commas between them, such as 1,8,64"
        ) from None
    if len(set(found)) != len(found):
        raise BenchUsageError(f"{flag} {text!r} has a level twice; for more runs of each give --repeats")
    return found
