"""How a completion is sampled: the server's options by the server's names, checked against each other.

It knows what the server makes of an option left out (neither top_k nor top_p: greedy, whatever the
temperature). It knows nothing of tensors' datatypes or of gRPC.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import NamedTuple

from minitron_client.errors import InvalidValueError
from minitron_client.option_names import unknown_option

DEFAULT_MAX_TOKENS = 128
_INT32_MAX, _UINT64_MAX = 2**31 - 1, 2**64 - 1


class _Range(NamedTuple):
    """Bounds of a number, both inclusive unless `is_open_below`."""

    kind: type
    low: float
    high: float
    is_open_below: bool = False

    def __str__(self) -> str:
        noun = "an integer" if self.kind is int else "a number"
        if not math.isfinite(self.low):
            return noun
        low = f"above {self.low:g}" if self.is_open_below else f"from {self.low:g}"
        return f"{noun} {low}" + (f" to {int(self.high)}" if math.isfinite(self.high) else "")


_RANGES: dict[str, _Range] = {
    "max_tokens": _Range(int, 1, _INT32_MAX),
    "min_tokens": _Range(int, 0, _INT32_MAX),
    "temperature": _Range(float, 0, math.inf),
    "top_k": _Range(int, 0, _INT32_MAX),
    "top_p": _Range(float, 0, 1, is_open_below=True),
    "seed": _Range(int, 0, _UINT64_MAX),
    "repetition_penalty": _Range(float, 0, math.inf, is_open_below=True),
    "presence_penalty": _Range(float, -math.inf, math.inf),
    "frequency_penalty": _Range(float, -math.inf, math.inf),
    "end_id": _Range(int, 0, _INT32_MAX),
    "pad_id": _Range(int, 0, _INT32_MAX),
    "priority_level": _Range(int, 1, _INT32_MAX),
}
_FLAGS = ("exclude_input_in_output", "return_log_probs", "return_output_ids", "return_perf_metrics")
_WORDS = ("stop_words", "bad_words", "embedding_bias_words")
_WEIGHTS = "embedding_bias_weights"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling options of one request; None leaves the choice to the server.

    Without `top_k` and `top_p` the server takes the likeliest token each time (greedy). What cannot
    have an effect is refused instead of being sent: a temperature or a seed while decoding is greedy.

    Attributes:
        max_tokens: tokens to generate at most.
        temperature: above 1 flattens, below 1 sharpens; 0 asks for greedy decoding.
        top_k: sample from the k likeliest tokens; 1 is greedy, 0 the same as None.
        top_p: sample from the smallest set of tokens whose probabilities reach p.
        seed: makes sampling repeatable.
        repetition_penalty: above 1 discourages tokens that occurred, multiplicatively.
        presence_penalty: subtracted once for a token that occurred.
        frequency_penalty: subtracted for each time it occurred.
        min_tokens: the end id is not taken before this many tokens.
        stop_words: generation ends after any of these texts; the text keeps the word.
        bad_words: texts that are never generated.
        embedding_bias_words: texts whose tokens are made likelier or less likely, each by its weight.
        embedding_bias_weights: what is added to the logits of each of them, above 0 for likelier.
        end_id: token id that ends the text, in place of the model's own.
        pad_id: token id for padding, in place of the model's own.
        priority_level: of the requests that wait, the lowest level runs first, 1 before all; how many levels
            there are is the server's to say (NVIDIA's own models do not look at it).
        exclude_input_in_output: False puts the prompt in front of the text (not while streaming).
        return_log_probs: the log probability of each output token.
        return_output_ids: the output token ids.
        return_perf_metrics: the time in the server's queue, while streaming too.

    Raises:
        InvalidValueError: a value is of the wrong kind, out of range, or contradicts another.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_tokens: int | None = None
    stop_words: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    embedding_bias_words: tuple[str, ...] = ()
    embedding_bias_weights: tuple[float, ...] = ()
    end_id: int | None = None
    pad_id: int | None = None
    priority_level: int | None = None
    exclude_input_in_output: bool = True
    return_log_probs: bool = False
    return_output_ids: bool = False
    return_perf_metrics: bool = False

    def __post_init__(self) -> None:
        for name in _RANGES:
            object.__setattr__(self, name, checked_number(name, getattr(self, name)))
        for name in _WORDS:
            object.__setattr__(self, name, _checked_words(name, getattr(self, name)))
        object.__setattr__(self, _WEIGHTS, _checked_weights(self.embedding_bias_weights))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise InvalidValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_together()

    @property
    def is_greedy(self) -> bool:
        """The likeliest token each time: no randomness, so neither seed nor temperature matters."""
        is_unset = not self.top_k and self.top_p is None
        return is_unset or self.temperature == 0 or self.top_k == 1

    @classmethod
    def of(cls, options: Mapping[str, object]) -> SamplingParams:
        """Sampling options from keyword arguments.

        Raises:
            InvalidValueError: a name is unknown, or a value is refused.
        """
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise InvalidValueError(unknown_option(unknown[0], known))
        return cls(**options)  # type: ignore[arg-type]  # __post_init__ checks each value's kind

    def changed(self, options: Mapping[str, object]) -> SamplingParams:
        """The same options but for these.

        Raises:
            InvalidValueError: a name is unknown, or a value is refused.
        """
        return SamplingParams.of(
            {**{item.name: getattr(self, item.name) for item in fields(self)}, **options}
        )

    def given(self) -> dict[str, int | float | bool | tuple[str, ...] | tuple[float, ...]]:
        """The options to send: what the server would not assume by itself.

        `exclude_input_in_output` always goes, because the server's own default is False. A temperature
        of 0 does not: left out, with top_k and top_p left out, it is greedy on every server.
        """
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if not _is_unset(name, value)}

    def _check_together(self) -> None:
        if self.temperature == 0 and (self.top_p is not None or (self.top_k or 0) > 1):
            raise InvalidValueError(
                "temperature=0 asks for greedy decoding, top_k or top_p for sampling; give one of them"
            )
        if self.is_greedy and self.temperature not in (None, 0, 1):
            raise InvalidValueError(
                f"temperature={self.temperature:g} has no effect on greedy decoding; give top_p or top_k too"
            )
        if self.is_greedy and self.seed is not None:
            raise InvalidValueError(
                f"seed={self.seed} has no effect on greedy decoding; give top_p or top_k too, or leave it out"
            )
        if self.min_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidValueError(
                f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}; lower min_tokens"
            )
        num_words, num_weights = len(self.embedding_bias_words), len(self.embedding_bias_weights)
        if num_words != num_weights:
            raise InvalidValueError(
                f"embedding_bias_words has {num_words} words and embedding_bias_weights {num_weights} "
                "weights; give one weight for each word"
            )


def _is_unset(name: str, value: object) -> bool:
    """Whether the option says the same as leaving it out; a seed or an id of 0 does not."""
    if name == "exclude_input_in_output":
        return False
    return value is None or value is False or value == () or (name in ("temperature", "top_k") and value == 0)


def checked_number(name: str, value: object) -> int | float | None:
    """The value of an option as a plain int or float; numpy's scalars are taken too.

    Raises:
        InvalidValueError: it is of the wrong kind, or out of the option's range.
    """
    if value is None and name != "max_tokens":
        return None
    allowed = _RANGES[name]
    kind = Integral if allowed.kind is int else Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise InvalidValueError(f"{name} must be {allowed}, got {value!r}")
    number: int | float = allowed.kind(value)
    too_low = number <= allowed.low if allowed.is_open_below else number < allowed.low
    if not math.isfinite(number) or too_low or number > allowed.high:
        raise InvalidValueError(f"{name} must be {allowed}, got {value!r}")
    return number


def _checked_words(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise InvalidValueError(f"{name} must be a list of strings, got {value!r}")
    for word in value:
        if not isinstance(word, str) or not word:
            raise InvalidValueError(f"{name} must hold non-empty strings, got {word!r}")
    return tuple(value)


def _checked_weights(value: object) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)):
        raise InvalidValueError(f"{_WEIGHTS} must be a list of numbers, got {value!r}")
    for weight in value:
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise InvalidValueError(f"{_WEIGHTS} must hold finite numbers, got {weight!r}")
    return tuple(float(weight) for weight in value)
