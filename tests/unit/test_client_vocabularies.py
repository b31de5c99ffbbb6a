"""The LLM-API vocabulary and token ids: requests made and responses read; no connection."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_client import InvalidValueError, ModelMetadata, ProtocolError, SamplingParams, UnsupportedError
from minitron_client.results import Chunk, Timings, Usage
from minitron_client.sampling import SamplingParams as Params
from minitron_client.tensors import InferResponse, Scalar, Tensor, TensorSpec
from minitron_client.text_request import stop_request, text_request
from minitron_client.text_response import CompletionBuilder
from minitron_client.tokenizer import Tokenizer, TokenRules, digest_of, read_tokenizer, tokenizer_request
from minitron_client.vocabulary import LLM_API, TEXT, TOKENS, VOCABULARIES, vocabulary_of

pytestmark = pytest.mark.unit

# As NVIDIA's config.pbtxt of the LLM-API model lists them; it has no batch dimension.
LLM_API_INPUTS = {
    "text_input": "BYTES", "streaming": "BOOL", "sampling_param_best_of": "INT32",
    "sampling_param_temperature": "FP32", "sampling_param_top_k": "INT32", "sampling_param_top_p": "FP32",
    "sampling_param_frequency_penalty": "FP32", "sampling_param_presence_penalty": "FP32",
    "sampling_param_max_tokens": "INT32", "sampling_param_stop": "BYTES", "sampling_param_seed": "UINT64",
    "sampling_param_exclude_input_from_output": "BOOL", "return_finish_reason": "BOOL", "stop": "BOOL",
}  # fmt: skip
LLM_API_OUTPUTS = {"text_output": "BYTES", "finish_reason": "BYTES", "cumulative_logprob": "FP32"}
EXCLUDE = "exclude_input_in_output"
TOKEN_INPUTS = {
    "input_ids": (-1, -1), "input_lengths": (-1, 1), "request_output_len": (-1, 1), "end_id": (-1, 1),
    "runtime_top_k": (-1, 1), "stop_words_list": (-1, 2, -1), "streaming": (-1, 1), "stop": (-1, 1),
    "exclude_input_in_output": (-1, 1),
}  # fmt: skip


def metadata(inputs: Mapping[str, TensorSpec], outputs: Mapping[str, str]) -> ModelMetadata:
    specs = {name: TensorSpec(name, kind, (-1,)) for name, kind in outputs.items()}
    return ModelMetadata("tensorrt_llm", ("1",), "python", inputs, specs, True)


LLM_API_MODEL = metadata(
    {name: TensorSpec(name, kind, (-1,)) for name, kind in LLM_API_INPUTS.items()}, LLM_API_OUTPUTS
)
TOKEN_MODEL = metadata(
    {
        name: TensorSpec(
            name, "BOOL" if name in ("streaming", "stop") or "exclude" in name else "INT32", shape
        )
        for name, shape in TOKEN_INPUTS.items()
    },
    {"output_ids": "INT32", "sequence_length": "INT32"},
)


def values(tensors: tuple[Tensor, ...]) -> dict[str, tuple[Scalar, ...]]:
    return {tensor.name: tensor.values() for tensor in tensors}


def response(**outputs: object) -> InferResponse:
    tensors = []
    for name, value in outputs.items():
        listed = value if isinstance(value, tuple) else (value,)
        kind = "BYTES" if isinstance(listed[0] if listed else 0, str) else "INT32"
        tensors.append(Tensor.of(TensorSpec(name, kind, (-1,)), listed))
    return InferResponse.of(tensors, False)


def test_a_model_s_vocabulary_is_read_from_its_inputs() -> None:
    assert vocabulary_of(LLM_API_MODEL) is LLM_API
    assert vocabulary_of(TOKEN_MODEL) is TOKENS
    assert len({one.mark for one in VOCABULARIES}) == 3


def test_every_option_of_sampling_is_in_the_text_vocabulary_under_its_own_name() -> None:
    assert {name: name for name in Params.__dataclass_fields__} == {**TEXT.inputs, **TEXT.parameters}


# --- LLM API ---


def test_an_llm_api_request() -> None:
    sampling = SamplingParams(max_tokens=3, top_p=0.5, seed=1, temperature=0.5, stop_words=("a", "b"))
    request = text_request(LLM_API_MODEL, "hi", sampling, request_id="r", is_streaming=True)
    assert values(request.inputs) == {
        "text_input": ("hi",), "sampling_param_max_tokens": (3,), "sampling_param_top_p": (0.5,),
        "sampling_param_temperature": (0.5,), "sampling_param_seed": (1,), "sampling_param_stop": ("a", "b"),
        "sampling_param_exclude_input_from_output": (True,), "streaming": (True,),
        "return_finish_reason": (True,),
    }  # fmt: skip
    assert {tensor.name: tensor.shape for tensor in request.inputs}["text_input"] == (1,)
    assert request.outputs == ("text_output", "finish_reason")
    stop = stop_request(LLM_API_MODEL, "r")
    assert stop is not None
    assert values(stop.inputs) == {"text_input": ("",), "stop": (True,)}


@pytest.mark.parametrize("option", ["min_tokens", "repetition_penalty", "end_id", "priority_level"])
def test_what_the_llm_api_cannot_do_is_refused(option: str) -> None:
    sampling = SamplingParams.of({option: 2})
    with pytest.raises(UnsupportedError, match=f"{option} cannot be asked of a model of the LLM API"):
        text_request(LLM_API_MODEL, "hi", sampling, request_id="r", is_streaming=False)


def test_a_cumulative_answer_becomes_what_is_new_in_it() -> None:
    builder = CompletionBuilder(SamplingParams(), LLM_API)
    pieces = [
        ("gr", "None"), ("gr\ufffd", "None"), ("größ", "None"), ("größ", "None"), ("größer", "length"),
    ]  # fmt: skip
    chunks = [builder.add(response(text_output=text, finish_reason=reason)) for text, reason in pieces]
    assert chunks == [Chunk("gr"), None, Chunk("öß"), None, Chunk("er", (), "length")]
    assert builder.text == "größer"
    assert builder.finish() is None


def test_a_cumulative_answer_that_takes_back_is_refused() -> None:
    builder = CompletionBuilder(SamplingParams(), LLM_API)
    builder.add(response(text_output="abc"))
    with pytest.raises(ProtocolError, match="took back what was said: 'abc'"):
        builder.add(response(text_output="abd"))


# --- token ids ---


def test_a_token_request() -> None:
    request = text_request(
        TOKEN_MODEL, [5, 6, 7], SamplingParams(max_tokens=3, top_k=4), request_id="r", is_streaming=False,
        end_ids=(9, 10, 11),
    )  # fmt: skip
    assert values(request.inputs) == {
        "input_ids": (5, 6, 7), "input_lengths": (3,), "request_output_len": (3,), "runtime_top_k": (4,),
        "exclude_input_in_output": (True,), "streaming": (False,), "end_id": (9,),
        "stop_words_list": (10, 11, 1, 2),
    }  # fmt: skip
    shapes = {tensor.name: tuple(tensor.shape) for tensor in request.inputs}
    assert (shapes["input_ids"], shapes["stop_words_list"]) == ((1, 3), (1, 2, 2))
    own = SamplingParams(end_id=4)
    request = text_request(TOKEN_MODEL, [5], own, request_id="r", is_streaming=False, end_ids=(9,))
    assert values(request.inputs)["end_id"] == (4,)


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ("hi", {}, InvalidValueError, "prompt must be a list of token ids, got str"),
        ([], {}, InvalidValueError, "the prompt is empty"),
        ([1, -1], {}, InvalidValueError, "prompt must hold token ids, integers from 0, got -1"),
        ([1, True], {}, InvalidValueError, "prompt must hold token ids"),
        ([1, 2.5], {}, InvalidValueError, "prompt must hold token ids"),
        (
            [1],
            {"stop_words": ["x"]},
            UnsupportedError,
            "stop_words are texts, and this model takes",
        ),
        (
            [1],
            {"embedding_bias_words": ["x"], "embedding_bias_weights": [1]},
            UnsupportedError,
            "embedding_bias_words are texts, and this model takes",
        ),
        ([1], {"return_log_probs": True}, UnsupportedError, "has no input return_log_probs"),
    ],
)
def test_what_is_no_token_request_is_refused(
    prompt: object, options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        text_request(
            TOKEN_MODEL, prompt, SamplingParams.of(options), request_id="r", is_streaming=False  # type: ignore[arg-type]
        )  # fmt: skip


def test_token_ids_for_a_text_model_are_refused() -> None:
    with pytest.raises(InvalidValueError, match='token ids go to model="tensorrt_llm"'):
        text_request(LLM_API_MODEL, [1, 2], SamplingParams(), request_id="r", is_streaming=False)


@pytest.mark.parametrize(
    ("ids", "max_tokens", "end_ids", "reason"),
    [
        ((4, 5), 2, (), "length"),
        ((4, 5), 3, (), "stop"),
        ((4, 9), 2, (9,), "stop"),
        ((4, 5), 2, (9,), "length"),
    ],
)
def test_why_token_ids_end_is_inferred(
    ids: tuple[int, ...], max_tokens: int, end_ids: tuple[int, ...], reason: str
) -> None:
    builder = CompletionBuilder(SamplingParams(max_tokens=max_tokens), TOKENS, end_ids=end_ids)
    for token_id in ids:
        assert builder.add(response(output_ids=token_id, sequence_length=1)) == Chunk("", (token_id,))
    assert builder.finish() == Chunk("", (), reason)  # type: ignore[arg-type]
    completion = builder.completion(Timings(1.0, None), "r")
    assert (completion.token_ids, completion.finish_reason) == (ids, reason)
    assert completion.usage == Usage(None, len(ids))


def test_ids_beyond_the_sequence_s_length_are_left_out() -> None:
    builder = CompletionBuilder(SamplingParams(), TOKENS)
    assert builder.add(response(output_ids=(4, 5, 0, 0), sequence_length=2)) == Chunk("", (4, 5))


# --- the tokenizer ---


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    data = Path(__file__).parents[1] / "golden" / "data" / "tiny_minitron"
    return (data / "tokenizer.json").read_text()


@pytest.mark.parametrize("text", ["plain", "größer 👩‍👩‍👧‍👦 汉字", " a  b\n\n", "\u200f\u05e8 ﷽"])
def test_text_survives_token_by_token(tokenizer_json: str, text: str) -> None:
    tokenizer = Tokenizer(tokenizer_json, TokenRules(eos_token_ids=(1,)))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    pieces = [stream.feed((token_id,)) for token_id in ids]
    assert "".join(pieces) + stream.flush() == text
    assert "\ufffd" not in "".join(pieces)


def test_half_a_character_at_the_end_is_told_at_the_end(tokenizer_json: str) -> None:
    tokenizer = Tokenizer(tokenizer_json, TokenRules(add_special_tokens=False))
    ids = tokenizer.encode("a汉")
    stream = tokenizer.stream()
    assert stream.feed(tuple(ids[:-1])) == "a"
    assert set(stream.flush()) == {"\ufffd"}


@pytest.mark.parametrize("text", [None, 3, b"a"])
def test_what_is_no_text_is_not_tokenised(tokenizer_json: str, text: Any) -> None:
    with pytest.raises(InvalidValueError, match=f"the text must be a string, got {type(text).__name__}"):
        Tokenizer(tokenizer_json, TokenRules()).encode(text)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ("abc", "token_ids must be a list of token ids, got 'abc'"),
        (5, "token_ids must be a list of token ids, got 5"),
        (None, "token_ids must be a list of token ids, got None"),
        ([-1], "token_ids must hold token ids, integers from 0, got -1"),
        ([1.0], "token_ids must hold token ids, integers from 0, got 1.0"),
        ([True], "token_ids must hold token ids, integers from 0, got True"),
        (["1"], "token_ids must hold token ids, integers from 0, got '1'"),
        ([5, 999999], "token id 999999 is not in the vocabulary of 512 tokens"),
        ([512], "token id 512 is not in the vocabulary of 512 tokens"),
        ([2**40], "token id 1099511627776 is not in the vocabulary"),
    ],
)
def test_what_are_no_token_ids_has_no_text(tokenizer_json: str, ids: Any, words: str) -> None:
    with pytest.raises(InvalidValueError, match=re.escape(words)):
        Tokenizer(tokenizer_json, TokenRules()).decode(ids)


def test_numpy_s_ids_have_a_text(tokenizer_json: str) -> None:
    tokenizer = Tokenizer(tokenizer_json, TokenRules())
    ids = np.array([*tokenizer.encode("plain"), 511])
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist())
    assert tokenizer.decode(ids).startswith("plain")


def test_rules_are_read_from_the_models_parameters() -> None:
    rules = TokenRules.of(
        {"eos_token_ids": "5,6", "add_special_tokens": "false"}, {"skip_special_tokens": "false"}
    )
    assert rules == TokenRules(add_special_tokens=False, skip_special_tokens=False, eos_token_ids=(5, 6))
    assert TokenRules.of({}, {}) == TokenRules()
    with pytest.raises(ProtocolError, match="eos_token_ids of preprocessing is 'x'"):
        TokenRules.of({"eos_token_ids": "x"}, {})


def answer(tokenizer_json: str, *, digest: str | None = None) -> InferResponse:
    files = {"tokenizer.json": tokenizer_json, "tokenizer_config.json": "{}"}
    return response(
        TOKENIZER_SHA256=digest or digest_of({name: text.encode() for name, text in files.items()}),
        TOKENIZER_FILE_NAMES=tuple(files),
        TOKENIZER_FILES=tuple(files.values()),
    )


def test_a_tokenizer_is_checked_against_its_digest(tokenizer_json: str) -> None:
    assert read_tokenizer(answer(tokenizer_json), TokenRules()).decode([]) == ""
    with pytest.raises(ProtocolError, match="the server tells"):
        read_tokenizer(answer(tokenizer_json, digest="0" * 64), TokenRules())
    with pytest.raises(ProtocolError, match=r"is no tokenizer"):
        read_tokenizer(answer("{}"), TokenRules())
    with pytest.raises(ProtocolError, match="is empty"):
        read_tokenizer(None, TokenRules())


def test_the_digest_is_what_sha256sum_makes_of_sha256sum() -> None:
    lines = f"{hashlib.sha256(b'1').hexdigest()}  a\n{hashlib.sha256(b'2').hexdigest()}  b\n"
    assert digest_of({"b": b"2", "a": b"1"}) == hashlib.sha256(lines.encode()).hexdigest()


def test_a_server_that_keeps_its_tokenizer_is_told_apart() -> None:
    with pytest.raises(UnsupportedError, match="does not hand out its tokenizer"):
        tokenizer_request(TOKEN_MODEL)
