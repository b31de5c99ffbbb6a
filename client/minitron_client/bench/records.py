"""What happened to each request, as times on one clock; nothing is computed here but differences.

It knows neither the client nor statistics. Every time is in seconds of `time.perf_counter`.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class RequestRecord:
    """One request, written to while it runs.

    Attributes:
        index: its number in the load point, warm-up included.
        scheduled_s: when it was due: in an open loop by the arrival process, in a closed one when its slot
            was free. Latencies count from here, so that a late generator or a full server is not forgiven.
        sent_s: when the client was told to send it.
        ended_s: when its end was known; None while it runs or when it was broken off.
        chunk_times: arrival of each chunk that has text or ends the answer.
        first_text: place in `chunk_times` of the first chunk with text; None where there was none.
        counted_first: output tokens up to the first chunk with text; None where the server does not tell.
        input_tokens: as the server counted, else None.
        output_tokens: as the server counted, else None; of a failed request, those that had come.
        finish_reason: as the server told, else "".
        error: kind of the failure, "" where there was none.
        error_text: its sentence.
    """

    index: int
    scheduled_s: float
    sent_s: float = 0.0
    ended_s: float | None = None
    chunk_times: array[float] = field(default_factory=lambda: array("d"))
    first_text: int | None = None
    counted_first: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str = ""
    error: str = ""
    error_text: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether it came to its own end."""
        return self.ended_s is not None and not self.error

    @property
    def send_delay_s(self) -> float:
        """How late the generator was."""
        return self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: due -> first chunk with text."""
        return None if self.first_text is None else self.chunk_times[self.first_text] - self.scheduled_s

    @property
    def request_latency_s(self) -> float | None:
        """Due -> last chunk; where no chunk came, due -> end."""
        if self.ended_s is None:
            return None
        return (self.chunk_times[-1] if self.chunk_times else self.ended_s) - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (latency - TTFT) / (output tokens - 1)."""
        return self._per_token(1)

    @property
    def itl_s(self) -> float | None:
        """Inter-token latency: (latency - TTFT) / (output tokens - tokens in the first chunk).

        None where it is not known how many tokens the first chunk held.
        """
        first = self.first_chunk_tokens
        return None if first is None else self._per_token(first)

    @property
    def first_chunk_tokens(self) -> int | None:
        """Tokens up to the first chunk with text; one where chunks and tokens are as many."""
        if self.counted_first is not None or self.first_text is None:
            return self.counted_first
        return 1 if self.output_tokens == len(self.chunk_times) and self.first_text == 0 else None

    @property
    def icl_s(self) -> Sequence[float]:
        """Inter-chunk latencies: the gaps between chunks, from the first with text on."""
        times = self.chunk_times[self.first_text or 0 :]
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    def tokens_within(self, start_s: float, end_s: float) -> float:
        """Output tokens that arrived in a span of time.

        The first chunk's are counted where they are known; of the others, each stands for the same share.
        """
        if not self.chunk_times or not self.output_tokens:
            return 0.0
        tokens, last = self.output_tokens, len(self.chunk_times) - 1
        place, first = self.first_text or 0, float(self.first_chunk_tokens or 0)
        if place == last:
            first = tokens
        elif not first:  # not known: every chunk holds the same
            place, first = 0, tokens / (last + 1)
        share = max(tokens - first, 0) / (last - place) if last > place else 0.0
        inside = [at for at, time_s in enumerate(self.chunk_times) if start_s <= time_s <= end_s]
        return sum(first if at == place else share for at in inside if at >= place)

    def _per_token(self, first: int) -> float | None:
        latency_s, ttft_s = self.request_latency_s, self.ttft_s
        if latency_s is None or ttft_s is None or self.output_tokens is None or self.output_tokens <= first:
            return None
        return (latency_s - ttft_s) / (self.output_tokens - first)
