"""Tensors on the wire, and the text model's requests and responses made of them; no connection."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_client import InvalidValueError, ModelMetadata, ProtocolError, SamplingParams, UnsupportedError
from minitron_client.results import Chunk, Timings, Usage
from minitron_client.tensors import InferResponse, Tensor, TensorSpec
from minitron_client.text_request import stop_request, text_request
from minitron_client.text_response import CompletionBuilder, chunk_of

pytestmark = pytest.mark.unit

INPUTS = {
    "text_input": "BYTES", "max_tokens": "INT32", "stream": "BOOL", "stop": "BOOL", "temperature": "FP32",
    "top_p": "FP32", "seed": "UINT64", "stop_words": "BYTES", "exclude_input_in_output": "BOOL",
    "return_log_probs": "BOOL", "return_output_ids": "BOOL", "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL", "embedding_bias_words": "BYTES", "embedding_bias_weights": "FP32",
}  # fmt: skip
OUTPUTS = {
    "text_output": "BYTES", "finish_reason": "BYTES", "num_input_tokens": "INT32",
    "num_output_tokens": "INT32", "output_ids": "INT32", "output_log_probs": "FP32",
}  # fmt: skip


def metadata(*, without: tuple[str, ...] = ()) -> ModelMetadata:
    def specs(table: dict[str, str]) -> dict[str, TensorSpec]:
        return {name: TensorSpec(name, kind, (-1, 1)) for name, kind in table.items() if name not in without}

    return ModelMetadata("tensorrt_llm_bls", ("1",), "python", specs(INPUTS), specs(OUTPUTS))


def output(name: str, *values: bool | int | float | str) -> Tensor:
    return Tensor.of(TensorSpec(name, OUTPUTS[name], (-1, 1)), values)


def response(*tensors: Tensor, is_final: bool | None = False) -> InferResponse:
    return InferResponse.of(tensors, is_final)


@given(st.lists(st.text(), max_size=4))
def test_strings_survive_the_wire_with_zeros_and_all(texts: list[str]) -> None:
    tensor = Tensor.of(TensorSpec("stop_words", "BYTES", (-1, -1)), texts)
    assert tensor.values() == tuple(texts)
    assert tensor.shape == (1, len(texts))


@given(st.integers(min_value=0, max_value=2**64 - 1))
def test_a_seed_survives_the_wire(seed: int) -> None:
    assert Tensor.of(TensorSpec("seed", "UINT64", (-1, 1)), [seed]).values() == (seed,)


@pytest.mark.parametrize(("shape", "sent"), [((-1, 1), (1, 1)), ((1,), (1,)), ((-1, 1, 1), (1, 1, 1))])
def test_the_rank_is_the_one_the_server_lists(shape: tuple[int, ...], sent: tuple[int, ...]) -> None:
    assert Tensor.of(TensorSpec("max_tokens", "INT32", shape), [5]).shape == sent


@pytest.mark.parametrize(
    ("datatype", "value", "words"),
    [
        ("INT8", 300, "does not fit the server's INT8"),
        ("UINT64", -1, "does not fit the server's UINT64"),
        ("BF16", 1.0, "listed as BF16, which cannot be sent"),
        ("BYTES", "a\ud800", "not valid Unicode: a lone surrogate at position 1"),
    ],
)
def test_what_cannot_be_sent_is_refused(datatype: str, value: int | float | str, words: str) -> None:
    with pytest.raises(InvalidValueError, match=words):
        Tensor.of(TensorSpec("x", datatype, (-1, 1)), [value])


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (Tensor("x", "INT32", (1,), b"abc"), "3 bytes are no whole INT32s"),
        (Tensor("x", "INT32", (2,), b"abcd"), "has 1 elements, its shape"),
        (Tensor("x", "BYTES", (1,), b"\x09\0\0\0abc"), "ends inside a string of 9 bytes"),
        (Tensor("x", "BYTES", (1,), b"\x09\0"), "ends inside a length"),
        (Tensor("x", "BYTES", (1,), b"\x01\0\0\0\xff"), "not UTF-8 at byte 0"),
        (Tensor("x", "WORDS", (1,), b"abcd"), "unknown datatype WORDS"),
    ],
)
def test_an_answer_that_cannot_be_read_is_refused(tensor: Tensor, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        tensor.values()


def test_a_request_holds_the_listed_tensors_that_were_asked_for_and_no_others() -> None:
    sampling = SamplingParams(max_tokens=7, top_p=0.5, seed=3, stop_words=("a", "bc"))
    request = text_request(metadata(), "hi", sampling, request_id="r1", is_streaming=True)
    assert {tensor.name: tensor.values() for tensor in request.inputs} == {
        "text_input": ("hi",), "max_tokens": (7,), "top_p": (0.5,), "seed": (3,), "stop_words": ("a", "bc"),
        "exclude_input_in_output": (True,), "stream": (True,), "return_num_input_tokens": (True,),
        "return_num_output_tokens": (True,),
    }  # fmt: skip
    assert request.outputs == ("text_output", "finish_reason", "num_input_tokens", "num_output_tokens")
    assert request.parameters == {"triton_enable_empty_final_response": True}


def test_a_priority_is_a_parameter_of_the_request_and_a_bias_two_tensors() -> None:
    sampling = SamplingParams(
        priority_level=1, embedding_bias_words=("a", "b"), embedding_bias_weights=(0.5, -2.0)
    )
    request = text_request(metadata(), "hi", sampling, request_id="r1", is_streaming=True)
    assert request.parameters == {"triton_enable_empty_final_response": True, "priority_level": 1}
    sent = {tensor.name: (tensor.shape, tensor.values()) for tensor in request.inputs}
    assert sent["embedding_bias_words"] == ((1, 2), ("a", "b"))
    assert sent["embedding_bias_weights"] == ((1, 2), (0.5, -2.0))
    assert "priority_level" not in sent


def test_an_older_server_gets_only_what_it_lists() -> None:
    older = metadata(without=("finish_reason", "return_num_output_tokens", "num_input_tokens", "stream"))
    request = text_request(older, "hi", SamplingParams(), request_id="r1", is_streaming=False)
    assert {tensor.name for tensor in request.inputs} == {
        "text_input",
        "max_tokens",
        "exclude_input_in_output",
    }
    assert request.outputs == ("text_output",)


@pytest.mark.parametrize(
    ("without", "options", "is_streaming", "words"),
    [
        ("seed", {"seed": 1, "top_p": 0.5}, False, "has no input seed, which this request needs; it takes "),
        ("return_log_probs", {"return_log_probs": True}, False, "has no input return_log_probs"),
        ("output_log_probs", {"return_log_probs": True}, False, "has no output output_log_probs"),
        ("output_ids", {"return_output_ids": True}, False, "has no output output_ids"),
        ("stream", {}, True, "has no input stream"),
        ("exclude_input_in_output", {}, False, "has no input exclude_input_in_output"),
        (
            "text_input",
            {},
            False,
            "speaks no vocabulary of this client; expected inputs text",
        ),
        ("text_output", {}, False, "has no output text_output"),
    ],
)
def test_a_feature_that_the_server_lacks_is_refused(
    without: str, options: dict[str, object], is_streaming: bool, words: str
) -> None:
    sampling = SamplingParams.of(options)
    with pytest.raises(UnsupportedError, match=words):
        text_request(metadata(without=(without,)), "hi", sampling, request_id="r1", is_streaming=is_streaming)


def test_an_echo_while_streaming_and_a_prompt_that_is_no_text_are_refused() -> None:
    echo = SamplingParams(exclude_input_in_output=False)
    with pytest.raises(
        InvalidValueError, match="exclude_input_in_output=False has no effect while streaming"
    ):
        text_request(metadata(), "hi", echo, request_id="r1", is_streaming=True)
    with pytest.raises(InvalidValueError, match="prompt must be a string, got bytes"):
        text_request(metadata(), b"hi", echo, request_id="r1", is_streaming=False)  # type: ignore[arg-type]


def test_a_stop_request_goes_only_where_the_model_lists_it() -> None:
    request = stop_request(metadata(), "r1")
    assert request is not None
    assert request.request_id == "r1"
    assert {tensor.name: tensor.values() for tensor in request.inputs}["stop"] == (True,)
    assert stop_request(metadata(without=("stop",)), "r1") is None


def test_responses_become_chunks_and_one_completion() -> None:
    builder = CompletionBuilder(SamplingParams(return_output_ids=True, return_log_probs=True))
    first = response(
        output("text_output", "ab"), output("output_ids", 1, 2), output("output_log_probs", -0.5, -0.25),
        output("num_input_tokens", 3), output("num_output_tokens", 2), output("finish_reason", ""),
    )  # fmt: skip
    last = response(
        output("text_output", ""), output("output_ids", 9), output("output_log_probs", -1.0),
        output("num_output_tokens", 3), output("finish_reason", "stop"), is_final=True,
    )  # fmt: skip
    assert builder.usage == Usage(None, None)
    assert builder.add(first) == Chunk("ab", (1, 2), None, (-0.5, -0.25))
    assert builder.usage == Usage(3, 2)
    assert builder.add(last) == Chunk("", (9,), "stop", (-1.0,))
    assert builder.add(response(is_final=True)) is None
    completion = builder.completion(Timings(2.0, 1.0), "r1")
    assert (completion.text, completion.finish_reason) == ("ab", "stop")
    assert completion.usage == Usage(3, 3)
    assert (completion.token_ids, completion.log_probs) == ((1, 2, 9), (-0.5, -0.25, -1.0))


def test_what_was_not_asked_for_or_not_told_is_none() -> None:
    builder = CompletionBuilder(SamplingParams())
    builder.add(response(output("text_output", "x")))
    completion = builder.completion(Timings(1.0, None), "r1")
    assert completion.usage == Usage(None, None)
    assert (completion.finish_reason, completion.token_ids, completion.log_probs) == (None, None, None)


def test_a_piece_with_nothing_in_it_is_not_shown() -> None:
    assert CompletionBuilder(SamplingParams()).add(response(output("text_output", ""))) is None
    assert chunk_of(response(output("text_output"))) == Chunk("")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([output("output_ids", 1)], "a response without text_output; it has output_ids"),
        ([output("text_output", "a", "b")], "text_output should be one string, got 2 values"),
        ([Tensor("text_output", "INT32", (1,), b"abcd")], "text_output should be one string"),
        (
            [output("text_output", "a"), output("finish_reason", "bored")],
            "finish_reason is 'bored', expected",
        ),
    ],
)
def test_a_response_that_makes_no_sense_is_refused(tensors: list[Tensor], words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        chunk_of(response(*tensors))
