"""The three vocabularies that models speak: which tensor means what, as tables.

It knows tensor names of this toolkit's and NVIDIA's text models, of NVIDIA's LLM-API model, and of the
engine model that takes token ids. It knows nothing of bytes or connections.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from minitron_client.errors import UnsupportedError
from minitron_client.tensors import ModelMetadata, Scalar


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Names of tensors for the same meanings.

    Attributes:
        name: what errors call it.
        mark: an input that every model of this vocabulary has, and no other.
        prompt: input that holds the prompt.
        answer: output that holds what is generated.
        stream: input that asks for one response for each piece.
        inputs: field of `SamplingParams` -> input. What is in neither of these two cannot be asked for.
        parameters: field of `SamplingParams` -> parameter of the request, which no model lists.
        asked: flags set wherever the server offers both: input -> output.
        features: field of `SamplingParams` -> output that carries what it asks for.
        told: outputs that need no flag, asked for wherever the server lists them.
        stop: a request's inputs that stop the running one of the same id.
        is_token_ids: prompt and answer are token ids.
        is_cumulative: each streamed answer repeats the ones before it.
    """

    name: str
    mark: str
    prompt: str
    answer: str
    stream: str
    inputs: Mapping[str, str]
    stop: Mapping[str, Scalar]
    parameters: Mapping[str, str] = field(default_factory=dict)
    asked: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, str] = field(default_factory=dict)
    told: tuple[str, ...] = ()
    is_token_ids: bool = False
    is_cumulative: bool = False


_SAME_NAMES = (
    "max_tokens", "temperature", "top_k", "top_p", "seed", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "min_tokens", "stop_words", "bad_words", "end_id", "pad_id",
    "embedding_bias_words", "embedding_bias_weights", "exclude_input_in_output", "return_log_probs",
    "return_output_ids", "return_perf_metrics",
)  # fmt: skip
_PRIORITY = {"priority_level": "priority_level"}
_COUNTS = {"return_num_input_tokens": "num_input_tokens", "return_num_output_tokens": "num_output_tokens"}

TEXT = Vocabulary(
    name="text",
    mark="max_tokens",
    prompt="text_input",
    answer="text_output",
    stream="stream",
    inputs={name: name for name in _SAME_NAMES},
    parameters=_PRIORITY,
    asked=_COUNTS,
    features={"return_log_probs": "output_log_probs", "return_output_ids": "output_ids"},
    told=("finish_reason",),
    stop={"text_input": "", "max_tokens": 1, "stop": True},
)
"""`tensorrt_llm_bls` and `ensemble`, ours and NVIDIA's."""

LLM_API = Vocabulary(
    name="LLM API",
    mark="sampling_param_max_tokens",
    prompt="text_input",
    answer="text_output",
    stream="streaming",
    inputs={
        **{
            name: f"sampling_param_{name}"
            for name in (
                "max_tokens", "temperature", "top_k", "top_p", "seed", "presence_penalty",
                "frequency_penalty", "return_perf_metrics",
            )
        },
        "stop_words": "sampling_param_stop",
        "exclude_input_in_output": "sampling_param_exclude_input_from_output",
    },
    asked={"return_finish_reason": "finish_reason"},
    stop={"text_input": "", "stop": True},
    is_cumulative=True,
)  # fmt: skip
"""NVIDIA's model `tensorrt_llm` on the LLM API, which has no engine."""

TOKENS = Vocabulary(
    name="token ids",
    mark="request_output_len",
    prompt="input_ids",
    answer="output_ids",
    stream="streaming",
    inputs={
        **{
            name: name
            for name in (
                "temperature", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty",
                "min_tokens", "end_id", "pad_id", "exclude_input_in_output", "return_log_probs",
                "return_perf_metrics",
            )
        },
        "max_tokens": "request_output_len",
        "top_k": "runtime_top_k",
        "top_p": "runtime_top_p",
    },
    parameters=_PRIORITY,
    features={"return_log_probs": "output_log_probs"},
    told=("sequence_length",),
    stop={"input_ids": 0, "input_lengths": 1, "request_output_len": 1, "stop": True},
    is_token_ids=True,
)  # fmt: skip
"""The engine model `tensorrt_llm`."""

VOCABULARIES: tuple[Vocabulary, ...] = (TEXT, LLM_API, TOKENS)
QUEUE_OUTPUTS = ("arrival_time_ns", "first_scheduled_time_ns")
"""What `return_perf_metrics` brings and the client reads: the time between them was spent waiting."""


def vocabulary_of(metadata: ModelMetadata) -> Vocabulary:
    """The vocabulary a model speaks.

    Raises:
        UnsupportedError: it speaks none of them.
    """
    for vocabulary in VOCABULARIES:
        if vocabulary.mark in metadata.inputs and vocabulary.prompt in metadata.inputs:
            return vocabulary
    marks = ", ".join(f"{one.prompt} and {one.mark}" for one in VOCABULARIES)
    raise UnsupportedError(
        f"model {metadata.name} speaks no vocabulary of this client; expected inputs {marks}, "
        f"it takes {', '.join(sorted(metadata.inputs)) or 'none'}"
    )
