"""What a request may hold, what is ignored, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from minitron_client.openai.api_errors import ApiError
from minitron_client.openai.chat import check_chat
from minitron_client.openai.completions import check_completion
from minitron_client.openai.fields import (
    IGNORED,
    REFUSED,
    ChatFields,
    CompletionFields,
    SamplingFields,
    read_fields,
)
from minitron_client.openai.sampling import sampling_params

USER = [{"role": "user", "content": "hi"}]


def completion(**fields: Any) -> CompletionFields:
    return read_fields(CompletionFields, json.dumps({"prompt": "x"} | fields).encode())


def chat(**fields: Any) -> ChatFields:
    return read_fields(ChatFields, json.dumps({"messages": USER} | fields).encode())


def said(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        check_completion(completion(**fields))
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (CompletionFields, completion_create_params.CompletionCreateParamsBase),
        (ChatFields, chat_create_params.CompletionCreateParamsBase),
    ],
)
def test_every_field_of_the_sdk_is_decided(kind: type[SamplingFields], params: type) -> None:
    decided = set(kind.model_fields) | IGNORED | set(REFUSED)
    assert set(get_type_hints(params)) - decided == set()


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_what_cannot_change_the_text_is_ignored(name: str) -> None:
    assert completion(**{name: "anything"}) == completion()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_change_it_is_refused(name: str) -> None:
    with pytest.raises(ApiError, match=f"^{name} is not supported: ") as caught:
        chat(**{name: {"a": 1}})
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize("name", [name for name, (neutral, _) in REFUSED.items() if neutral])
def test_a_value_that_asks_for_nothing_is_taken(name: str) -> None:
    assert chat(**{name: REFUSED[name][0][0]}) == chat()


def test_null_is_the_same_as_nothing() -> None:
    assert completion(**dict.fromkeys([*REFUSED, *IGNORED, "stop", "seed", "logprobs", "n"])) == completion()


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tempratur": 1}, "tempratur", "unrecognized request argument: tempratur"),
        ({"foo-bar": 1}, "foo-bar", "unrecognized request argument: foo-bar"),
        ({"temperature": 2.1}, "temperature", "temperature must be less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "temperature must be a valid number"),
        ({"top_p": -0.1}, "top_p", "top_p must be greater than or equal to 0"),
        (
            {"max_tokens": 0},
            "max_tokens",
            "max_tokens is 0, which asks for the log probabilities of the prompt",
        ),
        ({"max_tokens": 0, "echo": True, "logprobs": 1}, "max_tokens", "give at least 1"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens must be greater than or equal to 0"),
        ({"logprobs": True}, "logprobs", "logprobs must be a valid integer"),
        ({"n": 0}, "n", "n must be greater than or equal to 1"),
        ({"logit_bias": {"50256": -100}}, "logit_bias", "takes a bias for words, not for token ids"),
        ({"suffix": "end"}, "suffix", "this model cannot fill in the middle"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens must be a valid integer"),
        ({"n": True}, "n", "n must be a valid integer"),
        ({"n": 129}, "n", "n must be less than or equal to 128"),
        ({"presence_penalty": 3}, "presence_penalty", "presence_penalty must be less than or equal to 2"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed with stream=true"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"stop": ["a", 1]}, "stop", "a text or a list of texts"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": ["a"], "min_tokens": 2}, "min_tokens", "cannot be given together with stop"),
        ({"stop": ["a"], "ignore_eos": True}, "ignore_eos", "cannot be given together with stop"),
        ({"prompt": []}, "prompt", "must be a text, a list of texts"),
        ({"prompt": [[]]}, "prompt", "lists of token ids"),
        ({"prompt": [-1]}, "prompt", "token ids from 0"),
        ({"prompt": [True]}, "prompt", "token ids from 0"),
        ({"prompt": 3}, "prompt", "must be a text"),
        ({"prompt": ["x"] * 65, "n": 2}, "prompt", "makes 130 choices"),
        ({"best_of": 1, "n": 2}, "best_of", "below n=2"),
        ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"logprobs": 0, "echo": True}, "logprobs", "not together with echo"),
        ({"logprobs": 1}, "logprobs", "give 0, or 1 with temperature=0"),
        ({"logprobs": 2, "temperature": 0}, "logprobs", "give 0, or 1 with temperature=0"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"seed": 2**64}, "seed", "less than 18446744073709551616"),
    ],
)
def test_refused(fields: dict[str, Any], param: str, says: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert says in error.message
    assert error.message.startswith((param, "unrecognized"))
    assert error.kind == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": []}, "messages", "messages must not be empty"),
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'user' or 'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
            "list of text parts",
        ),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content", "list of text parts"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "give one"),
        ({"top_logprobs": 1}, "top_logprobs", "only allowed with logprobs=true"),
        ({"logprobs": True, "top_logprobs": 5}, "top_logprobs", "give 0, or 1 with temperature=0"),
    ],
)
def test_refused_in_a_chat(fields: dict[str, Any], param: str | None, says: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_chat(chat(**fields))
    assert says in caught.value.message
    assert param is None or caught.value.param == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object(body: bytes) -> None:
    with pytest.raises(ApiError, match="the body is"):
        read_fields(CompletionFields, body)


NAMES = sorted({*CompletionFields.model_fields, *ChatFields.model_fields, *REFUSED, *IGNORED, "other"})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6), st.booleans())
def test_whatever_comes_is_read_or_refused(raw: dict[str, Any], is_chat: bool) -> None:
    """No body makes the door fail, and every refusal can be sent."""
    kind: type[SamplingFields] = ChatFields if is_chat else CompletionFields
    raw = (raw | {"messages": USER}) if is_chat else (raw | {"prompt": "x"})
    try:
        sampling_params(read_fields(kind, json.dumps(raw).encode()), 16, 0, with_log_probs=False)
    except ApiError as refused:
        error = refused
    else:
        return
    assert error.status == 400
    json.dumps(error.body(), ensure_ascii=False).encode()


def test_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    fields = chat(messages=[{"role": "developer", "content": parts, "name": "n"}])
    assert fields.messages[0].for_template() == {"role": "system", "content": "ab"}


# --- what the fields become


def test_silence_means_sampling_with_a_new_seed() -> None:
    """OpenAI's default; the server's own would be greedy with seed 0."""
    first, second = (sampling_params(completion(), 16, 0, with_log_probs=False) for _ in range(2))
    assert (first.temperature, first.top_p, first.is_greedy) == (1.0, 1.0, False)
    assert first.seed != second.seed


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"top_p": 0}, {"top_k": 1}])
def test_greedy(fields: dict[str, Any]) -> None:
    params = sampling_params(completion(seed=3, **fields), 16, 0, with_log_probs=False)
    assert params.is_greedy
    assert params.seed is None


def test_choices_differ_by_their_seed() -> None:
    fields = completion(seed=-1, n=2)
    seeds = [sampling_params(fields, 16, place, with_log_probs=False).seed for place in range(2)]
    assert seeds == [2**64 - 1, 0]


def test_everything_is_passed_on() -> None:
    fields = completion(
        temperature=0.5, top_p=0.9, top_k=40, seed=1, stop=["a"], presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.1,
    )  # fmt: skip
    params = sampling_params(fields, 16, 0, with_log_probs=True)
    given = params.given()
    assert given == {
        "max_tokens": 16, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "seed": 1, "stop_words": ("a",),
        "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.1,
        "exclude_input_in_output": True, "return_log_probs": True, "return_output_ids": True,
    }  # fmt: skip


def test_the_end_is_ignored_by_asking_for_as_many_tokens() -> None:
    assert sampling_params(completion(ignore_eos=True), 16, 0, with_log_probs=False).min_tokens == 16
    assert sampling_params(completion(min_tokens=4), 16, 0, with_log_probs=False).min_tokens == 4


def test_a_contradiction_is_refused() -> None:
    with pytest.raises(ApiError, match="min_tokens=9 exceeds max_tokens=4"):
        sampling_params(completion(min_tokens=9), 4, 0, with_log_probs=False)
