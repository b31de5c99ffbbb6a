"""OpenAI's sampling words as the server's.

The two disagree on silence: unset, OpenAI samples at temperature 1 and draws a new seed each time, the server
is greedy and its seed is 0. Here OpenAI's meaning holds. It knows nothing of HTTP or gRPC.
"""

from __future__ import annotations

import secrets

from minitron_client.errors import InvalidValueError
from minitron_client.openai.api_errors import invalid
from minitron_client.openai.fields import UINT64, SamplingFields
from minitron_client.sampling import SamplingParams


def sampling_params(
    fields: SamplingFields, max_tokens: int, place: int, *, with_log_probs: bool
) -> SamplingParams:
    """The server's options for one choice.

    Args:
        fields: the request.
        max_tokens: tokens to generate at most.
        place: which of the prompt's `n` choices; they differ by their seed alone.
        with_log_probs: whether log probabilities are wanted.

    Raises:
        ApiError: 400, a value that the server cannot take.
    """
    options: dict[str, object] = {
        "max_tokens": max_tokens,
        "stop_words": fields.stop,
        "return_log_probs": with_log_probs,
        "return_output_ids": with_log_probs,
        # The end id is barred until so many tokens are out.
        "min_tokens": max_tokens if fields.ignore_eos else fields.min_tokens or None,
        "presence_penalty": fields.presence_penalty or None,
        "frequency_penalty": fields.frequency_penalty or None,
        "repetition_penalty": None if fields.repetition_penalty == 1 else fields.repetition_penalty,
    }
    if not fields.is_greedy:
        # top_p is sent even where it is 1: without it the server would be greedy.
        options |= {"temperature": fields.temperature, "top_p": fields.top_p, "seed": _seed(fields, place)}
        options["top_k"] = fields.top_k if fields.top_k > 1 else None
    try:
        return SamplingParams.of(options)
    except InvalidValueError as error:
        raise invalid("request", f"cannot be served: {error.message}") from None


def _seed(fields: SamplingFields, place: int) -> int:
    return secrets.randbits(63) if fields.seed is None else (fields.seed + place) % UINT64
