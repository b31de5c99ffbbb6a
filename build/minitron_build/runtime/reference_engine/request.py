"""What goes into the engine and what comes out: requests, sampling settings, limits, outputs, refusals.

The fields mean what TensorRT-LLM means by them. Nothing here runs a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

MAX_SEED = 2**64 - 1
FINISH_REASONS = ("stop", "length", "cancelled", "error")


class RequestError(ValueError):
    """The request can never be served as it is; `str()` is one sentence that says why."""


class QueueFullError(RuntimeError):
    """The waiting queue is full; the same request may succeed later."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The limits an engine is built with, in TensorRT-LLM's words.

    Raises:
        ValueError: a limit below 1, or a prompt limit above the sequence limit.
    """

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int
    """Tokens computed per step: one per running sequence plus the prompt tokens of the step."""

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
        if self.max_input_len > self.max_seq_len:
            raise ValueError(
                f"max_input_len {self.max_input_len} is above max_seq_len {self.max_seq_len}; lower it"
            )


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How the next token is chosen; the defaults are TensorRT-LLM's meaning of unset, which is greedy.

    Penalties count every occurrence in prompt and output, as upstream's kernel does.

    Raises:
        RequestError: a value outside its range.
    """

    temperature: float = 1.0
    """0 means greedy."""
    top_k: int = 0
    """0: no limit; 1: greedy. `top_k` 0 with `top_p` 0 is greedy."""
    top_p: float = 0.0
    """0 with a `top_k`: no nucleus (as 1)."""
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    """Until so many tokens are out, `end_id` and stop sequences do not end the output."""

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise RequestError(f"{name} is {getattr(self, name)}; expected a finite number")
        if self.temperature < 0:
            raise RequestError(f"temperature is {self.temperature}; expected 0 (greedy) or more")
        if not 0 <= self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}; expected a number between 0 and 1")
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}; expected 0 (no limit) or more")
        if self.repetition_penalty <= 0:
            raise RequestError(f"repetition_penalty is {self.repetition_penalty}; expected more than 0")
        if not 0 <= self.seed <= MAX_SEED:
            raise RequestError(f"seed is {self.seed}; expected a whole number from 0 to 2^64-1")
        if self.min_tokens < 0:
            raise RequestError(f"min_tokens is {self.min_tokens}; expected 0 or more")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0 or self.top_k == 1 or (self.top_k == 0 and self.top_p == 0)

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens seen so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """One prompt and how to continue it.

    Raises:
        RequestError: an empty prompt, `max_tokens` below 1, or an empty stop or bad sequence.
    """

    key: str
    """Unique among the requests open in the engine."""
    input_ids: tuple[int, ...]
    max_tokens: int
    end_id: int | None
    """None or negative: nothing ends the output but `max_tokens` and stop sequences."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    """The output ends with the first of these it contains."""
    bad_sequences: tuple[tuple[int, ...], ...] = ()
    """Never completed in the output; the beginning of one may lie in the prompt."""
    embedding_bias: npt.NDArray[np.float32] | None = None
    """[vocab_size] float32, added to the logits."""
    priority_level: int = 1
    """Of the requests that wait, those with the lowest level run first, and of these the oldest."""
    return_log_probs: bool = False
    return_context_logits: bool = False
    return_generation_logits: bool = False

    def __post_init__(self) -> None:
        if not self.input_ids:
            raise RequestError("the prompt is empty; expected at least one token")
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}; expected at least 1")
        for name in ("stop_sequences", "bad_sequences"):
            if any(len(sequence) == 0 for sequence in getattr(self, name)):
                raise RequestError(f"{name} holds an empty sequence; expected at least one token in each")

    def check_against(self, limits: EngineLimits, vocab_size: int) -> None:
        """Check the request against one engine.

        Raises:
            RequestError: too long, an id outside the vocabulary, or a bias of the wrong shape.
        """
        _check_ids(self.input_ids, vocab_size, "the prompt")
        for sequence in self.stop_sequences:
            _check_ids(sequence, vocab_size, "a stop sequence")
        for sequence in self.bad_sequences:
            _check_ids(sequence, vocab_size, "a bad sequence")
        if self.end_id is not None and self.end_id >= vocab_size:
            raise RequestError(f"end_id is {self.end_id}; the vocabulary has {vocab_size} ids")
        self._check_length(limits)
        self._check_bias(vocab_size)

    def _check_length(self, limits: EngineLimits) -> None:
        prompt_tokens = len(self.input_ids)
        if prompt_tokens > limits.max_input_len:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens; max_input_len is {limits.max_input_len}"
            )
        if prompt_tokens + self.max_tokens > limits.max_seq_len:
            raise RequestError(
                f"prompt ({prompt_tokens} tokens) plus max_tokens ({self.max_tokens}) is "
                f"{prompt_tokens + self.max_tokens}; max_seq_len is {limits.max_seq_len}"
            )

    def _check_bias(self, vocab_size: int) -> None:
        if self.embedding_bias is None:
            return
        if self.embedding_bias.shape != (vocab_size,):
            shape = list(self.embedding_bias.shape)
            raise RequestError(f"embedding_bias has shape {shape}; expected [{vocab_size}]")
        if np.isnan(self.embedding_bias).any() or np.isposinf(self.embedding_bias).any():
            raise RequestError("embedding_bias holds NaN or +infinity; expected numbers or -infinity")
        if np.isneginf(self.embedding_bias).all():
            raise RequestError("embedding_bias is -infinity for every token; expected one that may be chosen")


def _check_ids(ids: Sequence[int], vocab_size: int, where: str) -> None:
    lowest, highest = min(ids), max(ids)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise RequestError(f"{where} holds token id {wrong}; the vocabulary has ids 0 to {vocab_size - 1}")


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """When things happened to one request, in nanoseconds of `time.time_ns`; 0 = not yet."""

    arrival_ns: int
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class EngineOutput:
    """What one step gave one request; exactly one output of a request has a `finish_reason`, its last."""

    key: str
    token_ids: tuple[int, ...]
    """New tokens; includes the end id when that ended the output."""
    finish_reason: str | None
    """None, or one of `FINISH_REASONS`."""
    times: RequestTimes
    log_probs: tuple[float, ...] = ()
    """Of `token_ids`, when asked for: log-softmax over the whole vocabulary of the logits sampled from
    (after bias, temperature, penalties and bans; before top-k and top-p)."""
    cum_log_prob: float = 0.0
    """Sum of all log-probs of the request so far, when asked for."""
    kv_blocks: int = 0
    """Blocks of KV cache the request has, `TOKENS_PER_BLOCK` tokens each; 0 when it gave no token."""
    kv_new_blocks: int | None = None
    """How many of them were computed for it; None: all."""
    kv_reused_blocks: int = 0
    """How many of them another request had left."""
    context_logits: npt.NDArray[np.float32] | None = None
    """[prompt_tokens, vocab_size], raw, on the first output only."""
    generation_logits: npt.NDArray[np.float32] | None = None
    """[new, vocab_size], raw: what the model gave, before bias and penalties."""
    error: str | None = None
    """What went wrong, with finish_reason "error"."""
