"""The door's own Prometheus metrics, in a registry of their own.

Names begin with `minitron_openai_`; no label holds anything that a caller chooses.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)


class DoorMetrics:
    """Counters, gauges and histograms of one door."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "minitron_openai_requests", "Requests answered", ["endpoint", "status"], registry=self.registry
        )
        self.in_flight = Gauge(
            "minitron_openai_requests_in_flight", "Requests not answered yet", registry=self.registry
        )
        self.disconnects = Counter(
            "minitron_openai_disconnects",
            "Callers that left before the end of their answer",
            registry=self.registry,
        )
        self.duration = self._histogram("request_seconds", "To the end of the answer", _SECONDS)
        self.ttft = self._histogram("time_to_first_token_seconds", "To the first text of a stream", _SECONDS)
        self.tpot = self._histogram(
            "time_per_output_token_seconds", "Of a stream, after its first text", _TOKEN_SECONDS
        )
        self.prompt_tokens = Counter("minitron_openai_prompt_tokens", "Prompt tokens", registry=self.registry)
        self.completion_tokens = Counter(
            "minitron_openai_completion_tokens", "Generated tokens", registry=self.registry
        )

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def count_tokens(self, usage: dict[str, int] | None) -> None:
        """Count an answer's tokens; nothing where the server does not tell them."""
        if usage is not None:
            self.prompt_tokens.inc(usage["prompt_tokens"])
            self.completion_tokens.inc(usage["completion_tokens"])

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"minitron_openai_{name}", text, buckets=buckets, registry=self.registry)
