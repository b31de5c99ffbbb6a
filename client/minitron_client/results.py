"""What a caller gets back: chunks, completions, usage, timings and health, as frozen values.

It knows nothing of tensors or gRPC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias, get_args

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
FINISH_REASONS: tuple[str, ...] = get_args(FinishReason)


class Chunk(NamedTuple):
    """One piece of a streamed completion; it may hold several tokens, or none.

    A tuple, because one is made for each token.

    Attributes:
        text: new text, never the prompt; "" where the server is still holding back half a character.
        token_ids: its new token ids; empty unless `return_output_ids` was asked for.
        finish_reason: set on the last piece, where the server tells it.
        log_probs: log probability of each new token; empty unless `return_log_probs` was asked for.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    log_probs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request; None where the server does not count them."""

    input_tokens: int | None
    output_tokens: int | None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds as the client saw them, from the moment the request was sent for the first time.

    What came before (imports, connecting, the model's metadata) is in none of them; what failed and was sent
    again is.

    Attributes:
        total_s: to the end of the answer.
        ttft_s: to the first non-empty chunk; None without streaming, where one answer brings everything.
        queue_s: on the server, before the first step; None where it does not tell. A stream tells it with
            `return_perf_metrics`.
    """

    total_s: float
    ttft_s: float | None
    queue_s: float | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole completion.

    Attributes:
        text: the completion; behind the prompt where `exclude_input_in_output=False`.
        finish_reason: "stop" (end id or stop word), "length" (max_tokens) or "cancelled"; None where the
            server does not tell.
        usage: token counts.
        timings: client-side seconds.
        request_id: id under which the server logged it.
        token_ids: output ids, None unless `return_output_ids`.
        log_probs: one per output token, None unless `return_log_probs`.
    """

    text: str
    finish_reason: FinishReason | None
    usage: Usage
    timings: Timings
    request_id: str
    token_ids: tuple[int, ...] | None = None
    log_probs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """State of a server, or of several that stand in for each other: what any of them can do.

    Attributes:
        live: the process answers.
        ready: every model it was asked to load is loaded.
        models: model name -> ready.
        reason: why it is not live, "" otherwise.
        advice: what to do where it is not live, "" otherwise.
        servers: address -> state of that server alone; empty in the state of one alone.
    """

    live: bool
    ready: bool
    models: Mapping[str, bool] = field(default_factory=dict)
    reason: str = ""
    advice: str = ""
    servers: Mapping[str, Health] = field(default_factory=dict)
