"""What a request may hold: OpenAI's fields, a few of the server's own, and what becomes of the rest.

A field that cannot change the text is ignored, as OpenAI ignores it; one that would is refused by name, and
so is a field nobody knows. `null` is the same as leaving a field out. It knows nothing of the server.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from minitron_client.openai.api_errors import ApiError, invalid, unsupported

MAX_CHOICES = 128
MAX_STOP_WORDS = 16
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
UINT64 = 2**64

# They say who asks, what is kept and what is paid: the text is the same without them.
IGNORED = frozenset(
    {
        "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
    }
)  # fmt: skip

# Field -> the values that ask for nothing special, and why any other is refused
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "this model gives text only"),
    "function_call": (("none", "auto"), "this model calls no functions"),
    "functions": (([],), "this model calls no functions"),
    "logit_bias": (({},), "the server takes a bias for words, not for token ids"),
    "min_p": ((0,), "the server has no such sampling"),
    "modalities": ((["text"],), "this model gives text only"),
    "moderation": ((), "nothing is moderated here"),
    "reasoning_effort": (("none",), "this is no reasoning model"),
    "response_format": (({"type": "text"},), "the output cannot be forced into a format"),
    "suffix": (("",), "this model cannot fill in the middle"),
    "tool_choice": (("none", "auto"), "this model calls no tools"),
    "tools": (([],), "this model calls no tools"),
    "verbosity": (("medium",), "this model has no such setting"),
    "web_search_options": ((), "this server does not search the web"),
}

Prompt: TypeAlias = str | tuple[int, ...]


def _as_prompts(value: Any) -> Any:
    """The four shapes of OpenAI's prompt as a tuple of prompts."""
    if isinstance(value, str) or (_is_list(value) and value and all(_is_id(item) for item in value)):
        value = [value]
    if not _is_list(value) or not value:
        raise ValueError("must be a text, a list of texts, a list of token ids or a list of such lists")
    return tuple(_as_prompt(item) for item in value)


def _as_prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return value
    if not _is_list(value) or not value or not all(_is_id(item) for item in value):
        raise ValueError("must hold texts, or lists of token ids from 0 to 2147483647")
    return tuple(value)


def _as_stop_words(value: Any) -> Any:
    words = [value] if isinstance(value, str) else value
    if not _is_list(words) or not all(isinstance(word, str) and word for word in words):
        raise ValueError("must be a text or a list of texts, none of them empty")
    if len(words) > MAX_STOP_WORDS:
        raise ValueError(f"has {len(words)} texts, at most {MAX_STOP_WORDS} are taken")
    return tuple(words)


def _as_text(value: Any) -> Any:
    """A message's content, a text or a list of text parts, as one text."""
    if isinstance(value, str):
        return value
    parts = value if _is_list(value) else [value]
    texts = [_text_of_part(part) for part in parts]
    if not texts or None in texts:
        raise ValueError("must be a text or a list of text parts; this model reads nothing else")
    return "".join(filter(None, texts))


def _text_of_part(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    return text if isinstance(text, str) else None


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(_Fields):
    """How a stream is told."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted: chunks are not padded here, whatever it says."""


class SamplingFields(_Fields):
    """What both endpoints share; defaults are OpenAI's."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=UINT64)
    stop: Annotated[tuple[str, ...], BeforeValidator(_as_stop_words)] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    # Not OpenAI's: the server's own, by the names that other servers gave them.
    top_k: int = Field(0, ge=-1)
    repetition_penalty: float = Field(1.0, gt=0)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False

    @property
    def is_greedy(self) -> bool:
        """The likeliest token each time; a seed has no effect then."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionFields(SamplingFields):
    """`POST /v1/completions`."""

    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(_as_prompts)]
    max_tokens: int = Field(DEFAULT_COMPLETION_TOKENS, ge=0)
    """0, which OpenAI takes to score a prompt, is refused with the reason."""
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)


class Message(_Fields):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text)]
    """Parts are joined."""
    name: str | None = None
    """Accepted; templates of this family have no place for it."""

    def for_template(self) -> dict[str, str]:
        """The message as templates know it: "developer" is OpenAI's newer word for "system"."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatFields(SamplingFields):
    """`POST /v1/chat/completions`."""

    messages: tuple[Message, ...] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


FieldsT = TypeVar("FieldsT", bound=SamplingFields)


def read_fields(kind: type[FieldsT], body: bytes) -> FieldsT:
    """The fields of a request's body.

    Raises:
        ApiError: 400, not a JSON object, or a field is unknown, refused, missing or out of range.
    """
    raw = _without_nulls(_json_object(body))
    for name, value in list(raw.items()):
        if name in IGNORED:
            del raw[name]
        elif name in REFUSED and name not in kind.model_fields:
            neutral, why = REFUSED[name]
            if value not in neutral or isinstance(value, bool):
                raise unsupported(name, why)
            del raw[name]
    try:
        fields = kind.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise _first_error(error) from None
    _check_together(fields)
    return fields


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ApiError(f"the body is {type(raw).__name__}, expected a JSON object")
    return raw


def _without_nulls(raw: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if value is not None}


def _first_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = ".".join(ascii(part).strip("'") for part in first["loc"]) or "body"
    if first["type"] == "extra_forbidden":
        return ApiError(f"unrecognized request argument: {name}", param=name, code="unknown_parameter")
    if first["type"] == "too_short":
        return invalid(name, "must not be empty")
    if first["type"] == "missing":
        return ApiError(f"{name} is missing", param=name, code="missing_required_parameter")
    return invalid(name, _sentence(first["msg"]))


def _sentence(message: str) -> str:
    """Pydantic's message as the end of a sentence that begins with the field's name."""
    text = message.removeprefix("Value error, ")
    return text.replace("Input should be", "must be", 1) if text == message else text


def _check_together(fields: SamplingFields) -> None:
    if fields.stream_options is not None and not fields.stream:
        raise invalid("stream_options", "is only allowed with stream=true")
    if fields.stop and (fields.min_tokens or fields.ignore_eos):
        name = "min_tokens" if fields.min_tokens else "ignore_eos"
        raise unsupported(name, "it cannot be given together with stop")
