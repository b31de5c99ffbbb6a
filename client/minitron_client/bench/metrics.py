"""Every number a load point yields: its name, unit, which way is better, and exactly what it means.

The table feeds the screen, the CSV, the report and the comparison. Data is in seconds, screens show
milliseconds.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

DISTRIBUTION_FIELDS = ("mean", "p50", "p90", "p95", "p99", "max")


class Metric(NamedTuple):
    """A number of a load point, or a distribution of them.

    Attributes:
        label: short words for a column.
        unit: of the data; "s" is shown as ms.
        better: which way is an improvement; "" where neither is.
        is_distribution: a `Distribution` and not one number.
        meaning: its definition.
    """

    label: str
    unit: str
    better: Literal["lower", "higher", ""]
    is_distribution: bool
    meaning: str


METRICS: dict[str, Metric] = {
    "output_tokens_per_s": Metric(
        "output tokens/s", "tokens/s", "higher", False,
        "output tokens that arrived in the measured window, by the server's count, over its length; all "
        "requests in flight count, those of the warm-up too",
    ),
    "requests_per_s": Metric(
        "requests/s", "requests/s", "higher", False,
        "requests that ended well in the measured window over its length. It begins when the first measured "
        "request is due and ends when --duration-s is over; with --num-requests, or a trace played to its "
        "end, when the last one has ended, but of an open loop or a trace not before one more would be due",
    ),
    "goodput": Metric(
        "goodput", "requests/s", "higher", False,
        "requests that ended well in the measured window and met every SLO, over its length",
    ),
    "goodput_share": Metric(
        "within SLOs", "", "higher", False, "share of the measured requests that ended well and met every SLO"
    ),
    "error_share": Metric("failed", "", "lower", False, "share of the measured requests that failed"),
    "output_tokens_per_s_per_user": Metric(
        "tokens/s/user", "tokens/s", "higher", False,
        "1 / mean ITL, or 1 / mean TPOT where the ITL is not known",
    ),
    "ttft_s": Metric(
        "TTFT", "s", "lower", True,
        "time to first token: due -> first chunk with text; chunks without text are not counted",
    ),
    "itl_s": Metric(
        "ITL", "s", "lower", True,
        "inter-token latency, one number a request, AIPerf's definition: (request latency - TTFT) / (output "
        "tokens - tokens in the first chunk); not known where nobody counts tokens chunk by chunk",
    ),
    "tpot_s": Metric(
        "TPOT", "s", "lower", True,
        "time per output token, one number a request: (request latency - TTFT) / (output tokens - 1)",
    ),
    "icl_s": Metric(
        "ICL", "s", "lower", True,
        "inter-chunk latency: the gaps between chunks, those of all requests together (vLLM calls these ITL)",
    ),
    "request_latency_s": Metric(
        "latency", "s", "lower", True, "end-to-end: due -> last chunk"
    ),
    "input_tokens": Metric("prompt tokens", "tokens", "", True, "prompt tokens by the server's own count"),
    "output_tokens": Metric("output tokens", "tokens", "", True, "output tokens by the server's own count"),
}  # fmt: skip

DUE = {
    "closed": "A closed loop: a request is due when its slot is free, so a slow server is asked less often. "
    "Read its latencies as those of so many patient users, not of a given traffic. When the time is over, "
    "the last requests run with fewer beside them.",
    "open": "An open loop: requests are due by the arrival process, whatever the server does, and latencies "
    "count from when a request was due, not from when it was sent (no coordinated omission).",
    "trace": "A trace: requests are due at the trace's timestamps, whatever the server does, and latencies "
    "count from when a request was due, not from when it was sent (no coordinated omission).",
}
HEADLINES: tuple[tuple[str, str], ...] = (
    ("output_tokens_per_s", ""), ("requests_per_s", ""), ("goodput", ""),
    ("ttft_s", "p50"), ("ttft_s", "p99"),
    ("itl_s", "p50"), ("itl_s", "p99"), ("tpot_s", "p50"), ("icl_s", "p50"), ("icl_s", "p99"),
    ("request_latency_s", "p50"), ("request_latency_s", "p99"),
)  # fmt: skip
"""(metric, field of its distribution) of what is compared and given noise bounds."""


def headline_label(name: str, field: str) -> str:
    """Words for a headline, with the unit that `shown` gives."""
    metric = METRICS[name]
    unit = " ms" if metric.unit == "s" else ""
    return f"{metric.label} {field}{unit}".replace("  ", " ").strip()


def shown(name: str, value: float) -> float:
    """A number as a screen shows it: seconds as milliseconds."""
    return 1000 * value if METRICS[name].unit == "s" else value
