"""Sampling options: what is refused, with which words, and what is sent."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from minitron_build.repository import pbtxt
from minitron_build.runtime import priority
from minitron_client import InvalidRequestError, InvalidValueError, SamplingParams
from minitron_client.option_names import ALSO_CALLED, NOT_OFFERED, REFUSED_INPUTS
from minitron_client.sampling import DEFAULT_MAX_TOKENS
from minitron_client.vocabulary import TEXT, TOKENS

pytestmark = pytest.mark.unit
MODEL_REPO = Path(__file__).parents[2] / "model_repo"
SPOKEN = {"tensorrt_llm_bls": TEXT, "ensemble": TEXT, "tensorrt_llm": TOKENS}
FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer from 1 to 2147483647, got 0"),
        ({"max_tokens": None}, "max_tokens must be an integer"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
        ({"max_tokens": 1.5}, "max_tokens must be an integer"),
        ({"max_tokens": 2**31}, "max_tokens must be an integer"),
        ({"temperature": -1, "top_p": 0.5}, "temperature must be a number from 0, got -1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"temperature": "1"}, "temperature must be"),
        ({"top_k": -1}, "top_k must be an integer from 0"),
        ({"top_p": 0}, "top_p must be a number above 0 to 1, got 0"),
        ({"top_p": 1.01}, "top_p must be a number above 0 to 1, got 1.01"),
        ({"seed": -1, "top_k": 5}, "seed must be"),
        ({"seed": 2**64, "top_k": 5}, "seed must be"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty must be a number, got inf"),
        ({"min_tokens": -1}, "min_tokens must be"),
        ({"end_id": -1}, "end_id must be"),
        ({"stop_words": "END"}, "stop_words must be a list of strings, got 'END'"),
        ({"stop_words": ["ok", ""]}, "stop_words must hold non-empty strings, got ''"),
        ({"bad_words": [3]}, "bad_words must hold non-empty strings, got 3"),
        ({"return_log_probs": 1}, "return_log_probs must be True or False, got 1"),
        # contradictions
        ({"temperature": 0.7}, "temperature=0.7 has no effect on greedy decoding; give top_p or top_k too"),
        ({"temperature": 0.7, "top_k": 0}, "temperature=0.7 has no effect"),
        ({"temperature": 0.7, "top_k": 1}, "temperature=0.7 has no effect"),
        ({"temperature": 0, "top_p": 0.9}, "temperature=0 asks for greedy decoding"),
        ({"temperature": 0, "top_k": 40}, "temperature=0 asks for greedy decoding"),
        ({"seed": 7}, "seed=7 has no effect on greedy decoding"),
        ({"seed": 0}, "seed=0 has no effect on greedy decoding"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens=5 exceeds max_tokens=4"),
        (
            {"embedding_bias_words": ["a"]},
            "embedding_bias_words has 1 words and embedding_bias_weights 0 weights; give one weight",
        ),
        ({"embedding_bias_words": "a", "embedding_bias_weights": [1]}, "must be a list of strings, got 'a'"),
        ({"embedding_bias_words": ["a"], "embedding_bias_weights": 1}, "must be a list of numbers, got 1"),
        ({"embedding_bias_words": ["a"], "embedding_bias_weights": ["1"]}, "finite numbers, got '1'"),
        (
            {"embedding_bias_words": ["a"], "embedding_bias_weights": [float("inf")]},
            "finite numbers, got inf",
        ),
        ({"priority_level": 0}, "priority_level must be an integer from 1"),
        # no options
        ({"beam_width": 2}, "beam_width is no sampling option: the server generates without beam search"),
        ({"n": 2}, "n is no sampling option: a completion is one sequence; give the prompt several times"),
        (
            {"do_sample": True},
            "do_sample is no sampling option: sampling is on where top_p or top_k is given",
        ),
        ({"stop": ["x"]}, "Texts that end are stop_words"),
        (
            {"logprobs": 1},
            "unknown sampling option logprobs; did you mean return_log_probs? known: max_tokens, ",
        ),
        ({"top_logprobs": 1}, "unknown sampling option top_logprobs; did you mean return_log_probs? known: "),
        ({"max_new_tokens": 1}, "unknown sampling option max_new_tokens; did you mean max_tokens? known: "),
        ({"max_length": 1}, "unknown sampling option max_length; did you mean max_tokens? known: "),
        ({"max_token": 2}, "unknown sampling option max_token; did you mean max_tokens? known: max_tokens, "),
        ({"colour": 2}, "unknown sampling option colour; known: max_tokens, "),
    ],
)
def test_refused_in_one_sentence(options: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        SamplingParams.of(options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, (ValueError, InvalidRequestError))
    assert not caught.value.retryable


def test_only_what_differs_from_the_server_s_own_choice_is_sent() -> None:
    assert SamplingParams().given() == {"max_tokens": DEFAULT_MAX_TOKENS, "exclude_input_in_output": True}


def test_zero_is_a_value_for_a_seed_and_an_id_but_not_for_top_k_or_temperature() -> None:
    given = SamplingParams(top_p=0.9, top_k=0, seed=0, end_id=0, presence_penalty=0.0, min_tokens=0).given()
    assert given["seed"] == 0
    assert given["end_id"] == 0
    assert "top_k" not in given
    assert "temperature" not in SamplingParams(temperature=0).given()


def test_every_option_reaches_the_request_under_the_server_s_name() -> None:
    options = {
        "max_tokens": 9, "temperature": 0.5, "top_k": 4, "top_p": 0.5, "seed": 3, "repetition_penalty": 1.1,
        "presence_penalty": 0.1, "frequency_penalty": -0.2, "min_tokens": 2, "stop_words": ("a", "b"),
        "bad_words": ("c",), "embedding_bias_words": ("d",), "embedding_bias_weights": (2.5,),
        "priority_level": 3, "end_id": 1, "pad_id": 2, "exclude_input_in_output": False,
        "return_log_probs": True, "return_output_ids": True,
    }  # fmt: skip
    assert SamplingParams.of(options).given() == options


@pytest.mark.parametrize(
    ("options", "is_greedy"),
    [
        ({}, True),
        ({"temperature": 1}, True),
        ({"temperature": 0}, True),
        ({"top_k": 1}, True),
        ({"top_k": 0}, True),
        ({"top_k": 2}, False),
        ({"top_p": 1.0}, False),
        ({"top_p": 0.3, "top_k": 0}, False),
    ],
)
def test_greedy_as_the_server_means_it(options: dict[str, object], is_greedy: bool) -> None:
    assert SamplingParams.of(options).is_greedy is is_greedy


def test_numpy_scalars_and_lists_become_plain_values() -> None:
    sampling = SamplingParams(max_tokens=np.int64(5), top_p=np.float32(0.5), stop_words=["x"])  # type: ignore[arg-type]
    assert (type(sampling.max_tokens), type(sampling.top_p)) == (int, float)
    assert sampling.stop_words == ("x",)
    assert hash(sampling) == hash(SamplingParams(max_tokens=5, top_p=0.5, stop_words=("x",)))


def inputs_of(model: str) -> set[str]:
    config = pbtxt.read_config(MODEL_REPO / model)
    return {tensor.name for tensor in pbtxt.tensors(config, "input")}


@pytest.mark.parametrize("model", SPOKEN)
def test_every_input_of_the_served_models_is_an_option_or_refused_with_a_reason(model: str) -> None:
    vocabulary, listed = SPOKEN[model], inputs_of(model)
    options = set(vocabulary.inputs.values())
    the_clients = {vocabulary.prompt, vocabulary.stream, "input_lengths"}  # it fills these itself
    assert options <= listed
    assert not options & (REFUSED_INPUTS.keys() | the_clients)
    assert listed - options - the_clients <= REFUSED_INPUTS.keys()
    assert set(vocabulary.inputs) | set(vocabulary.parameters) <= FIELDS
    for name in listed & REFUSED_INPUTS.keys():
        with pytest.raises(InvalidValueError, match=f"^{name} is no sampling option: "):
            SamplingParams.of({name: 1})


def test_nothing_is_refused_that_no_served_model_lists() -> None:
    assert set().union(*map(inputs_of, SPOKEN)) >= REFUSED_INPUTS.keys()


def test_other_names_lead_to_options_that_are_there() -> None:
    assert set(ALSO_CALLED.values()) <= FIELDS
    tables = [*ALSO_CALLED, *NOT_OFFERED, *REFUSED_INPUTS]
    assert len(tables) == len(set(tables))
    assert not FIELDS & set(tables)


def test_the_priority_goes_under_the_name_that_the_served_models_read() -> None:
    assert TEXT.parameters == TOKENS.parameters == {priority.NAME: priority.NAME}
    for model in SPOKEN:
        assert int(pbtxt.get_parameters(pbtxt.read_config(MODEL_REPO / model))["priority_levels"]) > 1
