"""What a server is doing, read from its Prometheus metrics: requests, KV cache, tokens per second.

It knows Prometheus' text and the names that this toolkit's models and TensorRT-LLM's backend give their
metrics. It knows nothing of gRPC and of how anything is printed.
"""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from minitron_client.errors import InvalidValueError, ServerConnectionError

DEFAULT_METRICS_PORT = 8002
_LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)(?: \d+)?$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Labels = Mapping[str, str]
Series = list[tuple[str, dict[str, str], float]]

ENGINE_MODEL = "tensorrt_llm"


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """What a server is doing; None where its metrics do not tell.

    Attributes:
        running_requests: requests that are being generated.
        waiting_requests: requests that wait for their first token or for a place.
        kv_cache_used: share of the KV cache in use, 0 to 1.
        kv_cache_tokens: tokens that the KV cache has room for.
        output_tokens_per_s: tokens generated per second, over `interval_s`.
        requests_per_s: requests ended per second, over `interval_s`.
        interval_s: seconds between the two readings that the rates are of.
        outcomes: outcome -> requests that ended so since the server's start.
    """

    running_requests: int | None
    waiting_requests: int | None
    kv_cache_used: float | None
    kv_cache_tokens: int | None
    output_tokens_per_s: float | None
    requests_per_s: float | None
    interval_s: float
    outcomes: Mapping[str, int]


def read_load(url: str, *, interval_s: float = 1.0, timeout_s: float = 5.0) -> ServerLoad:
    """Read the metrics twice.

    Args:
        url: such as http://127.0.0.1:8002/metrics.
        interval_s: seconds between the readings.

    Raises:
        InvalidValueError: the URL is not one of HTTP.
        ServerConnectionError: nobody answers there, or not with metrics.
    """
    first, first_s = scrape(url, timeout_s), time.monotonic()
    time.sleep(interval_s)
    second = scrape(url, timeout_s)
    return load_of(first, second, time.monotonic() - first_s)


def scrape(url: str, timeout_s: float) -> Series:
    """All series of a server, in their order; raises as `read_load`."""
    if not url.startswith(("http://", "https://")):
        raise InvalidValueError(f"metrics url {url!r} is not one of HTTP; give http://HOST:8002/metrics")
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            text = answer.read().decode("utf-8", errors="replace")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ServerConnectionError(
            f"no metrics from {url}: {reason}; is it the server's metrics port?"
        ) from error
    return parse(text)


def parse(text: str) -> Series:
    """Prometheus' text as (name, labels, value); lines that are none are left out."""
    found = (_LINE.match(line) for line in text.splitlines() if not line.startswith("#"))
    return [
        (match["name"], dict(_LABEL.findall(match["labels"] or "")), float(match["value"]))
        for match in found
        if match
    ]


def load_of(first: Series, second: Series, interval_s: float) -> ServerLoad:
    """What two readings say; the rates are of the time between them."""
    return ServerLoad(
        running_requests=_count(second, "running", "active"),
        waiting_requests=_count(second, "waiting", "waiting"),
        kv_cache_used=_kv_cache_used(second),
        kv_cache_tokens=_kv_cache_tokens(second),
        output_tokens_per_s=_rate(first, second, "minitron_output_tokens_total", interval_s),
        requests_per_s=_rate(first, second, "minitron_requests_total", interval_s),
        interval_s=round(interval_s, 3),
        outcomes=_outcomes(second),
    )


def _count(series: Series, ours: str, theirs: str) -> int | None:
    """Of the engine, where it tells; else of the text models."""
    for name, labels in (
        (f"minitron_engine_{ours}_requests", {}),
        ("nv_trt_llm_request_metrics", {"request_type": theirs}),
        (f"minitron_{ours}_requests", {}),
    ):
        if (value := _sum(series, name, labels)) is not None:
            return int(value)
    return None


def _kv_cache_used(series: Series) -> float | None:
    used, capacity = (_sum(series, f"minitron_kv_cache_{kind}_tokens") for kind in ("used", "capacity"))
    if used is None or capacity is None:
        used, capacity = (_blocks(series, kind) for kind in ("used", "max"))
    return None if used is None or not capacity else used / capacity


def _kv_cache_tokens(series: Series) -> int | None:
    tokens = _sum(series, "minitron_kv_cache_capacity_tokens")
    blocks, per_block = (_blocks(series, kind) for kind in ("max", "tokens_per"))
    if tokens is None and blocks is not None and per_block is not None:
        tokens = blocks * per_block
    return None if tokens is None else int(tokens)


def _blocks(series: Series, kind: str) -> float | None:
    return _sum(series, "nv_trt_llm_kv_cache_block_metrics", {"kv_cache_block_type": kind})


def _rate(first: Series, second: Series, name: str, interval_s: float) -> float | None:
    before, after = (_once(series, name) for series in (first, second))
    if after is None or interval_s <= 0:
        return None
    return max(0.0, after - (before or 0.0)) / interval_s


def _once(series: Series, name: str) -> float | None:
    """A request for text passes through two models: of the engine's, where it counts, else of the others."""
    engine = _sum(series, name, {"model": ENGINE_MODEL})
    return _sum(series, name) if engine is None else engine


def _outcomes(series: Series) -> dict[str, int]:
    names = dict.fromkeys(
        labels["outcome"] for name, labels, _ in series if name == "minitron_requests_total"
    )
    found = {}
    for outcome in names:
        by_model = {"model": ENGINE_MODEL, "outcome": outcome}
        text = _sum(series, "minitron_requests_total", {"outcome": outcome}) or 0.0
        # What the text models end, with a refusal or a success, is what callers see of theirs.
        engine = _sum(series, "minitron_requests_total", by_model) or 0.0
        found[outcome] = int(max(text - engine, engine))
    return found


def _sum(series: Series, name: str, labels: Labels | None = None) -> float | None:
    wanted = (labels or {}).items()
    values = [value for own, found, value in series if own == name and wanted <= found.items()]
    return sum(values) if values else None
