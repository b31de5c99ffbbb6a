"""Service-level objectives: the latencies that a good request stays within.

It knows their spelling on the command line and one request's record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minitron_client.bench.refusal import BenchUsageError

if TYPE_CHECKING:
    from minitron_client.bench.records import RequestRecord

SLO_METRICS: dict[str, str] = {
    "ttft_ms": "ttft_s",
    "itl_ms": "itl_s",
    "tpot_ms": "tpot_s",
    "latency_ms": "request_latency_s",
    "max_icl_ms": "icl_s",
}
"""Name on the command line -> what of a record it bounds; of the gaps between chunks, the longest."""


@dataclass(frozen=True, slots=True)
class Slo:
    """One bound, in seconds."""

    name: str
    limit_s: float

    def is_met(self, record: RequestRecord) -> bool:
        """Whether the request stayed within it.

        What a request does not have cannot break a bound: an answer of one token has no ITL. A missing first
        token does break one on TTFT.
        """
        found = getattr(record, SLO_METRICS[self.name])
        if self.name == "max_icl_ms":
            return max(found, default=0.0) <= self.limit_s
        if found is None:
            return self.name != "ttft_ms"
        return bool(found <= self.limit_s)


def parse_slos(text: str) -> tuple[Slo, ...]:
    """`ttft_ms=200,itl_ms=20`.

    Raises:
        BenchUsageError: an unknown name, one twice, or a bound that is no number above 0.
    """
    slos: dict[str, Slo] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        if name not in SLO_METRICS or not equals:
            raise BenchUsageError(f"--slo {part!r}: expected NAME=MILLISECONDS with {', '.join(SLO_METRICS)}")
        if name in slos:
            raise BenchUsageError(f"--slo gives {name} twice")
        slos[name] = Slo(name, _milliseconds(part, number) / 1000)
    return tuple(slos.values())


def _milliseconds(part: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise BenchUsageError(f"--slo {part!r}: expected milliseconds above 0")
    return value
