"""What a request to the `tensorrt_llm` model asks for: tensors to engine requests.

It knows TensorRT-LLM's tensor names and what the reference engine can do; what the engine cannot do is
refused, never approximated. It knows nothing of text and of Triton's objects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .inputs import Inputs
from .reference_engine import GenerationRequest, SamplingConfig
from .status import invalid
from .word_lists import unpack

ROWS_OF = "input_lengths"  # the tensor every request must have: it says how many rows there are
MAX_SEQUENCES = 256
SEED_RANGE = 2**64

SAMPLING_TENSORS = {
    "temperature": "temperature",
    "top_k": "runtime_top_k",
    "top_p": "runtime_top_p",
    "seed": "seed",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "min_tokens": "min_tokens",
}
"""Field of `SamplingConfig` -> tensor. An absent tensor leaves the field's own default, which is
upstream's."""

ONLY_VALUE: dict[str, tuple[Any, str]] = {
    "beam_width": (1, "this engine does not do beam search"),
    "runtime_top_p_decay": (1.0, "this engine does not change top_p while it generates"),
}
"""Tensors with one accepted value. Other tensors of beam search and top_p decay have no effect without
these."""


@dataclass(frozen=True, slots=True)
class Returns:
    """Which optional outputs the caller asked for; a field is `return_<name>` on the wire."""

    log_probs: bool = False
    context_logits: bool = False
    generation_logits: bool = False
    perf_metrics: bool = False
    num_input_tokens: bool = False
    num_output_tokens: bool = False

    @classmethod
    def read(cls, inputs: Inputs) -> Returns:
        """Read the flags, which hold for the whole request."""
        return cls(**{name: bool(inputs.same(f"return_{name}", False)) for name in cls.__dataclass_fields__})

    @property
    def wants_arrays(self) -> bool:
        """Whether anything but token ids, log-probs and counts was asked for."""
        return self.context_logits or self.generation_logits or self.perf_metrics


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to generate, and its place in the request it belongs to."""

    batch_index: int
    sequence_index: int
    generation: GenerationRequest


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """One request to the `tensorrt_llm` model: how to answer, and the sequences to generate."""

    streaming: bool
    exclude_input: bool
    returns: Returns
    sequences: tuple[SequenceRequest, ...]


def is_stop(inputs: Inputs) -> bool:
    """Whether the request only asks to stop another one with the same id."""
    return bool(inputs.same("stop", False))


def read_token_request(
    inputs: Inputs, *, key: str, exclude_input_default: bool, priority_level: int = 1
) -> TokenRequest:
    """Read a request to generate.

    Args:
        inputs: the request's tensors.
        key: beginning of the engine keys; unique among open requests.
        exclude_input_default: the model's setting where the request has none.
        priority_level: 1 is the first.

    Raises:
        StatusError: INVALID_ARGUMENT with the tensor, what it holds and what was expected.
    """
    _check_only_values(inputs)
    returns = Returns.read(inputs)
    num_sequences = int(inputs.same("num_return_sequences", 1))
    if num_sequences < 1 or num_sequences * inputs.batch_size > MAX_SEQUENCES:
        raise invalid(
            f"num_return_sequences is {num_sequences} for {inputs.batch_size} prompts; "
            f"expected at least 1 and at most {MAX_SEQUENCES} sequences in all"
        )
    sequences = tuple(
        SequenceRequest(
            row,
            place,
            replace(
                _read_generation(inputs, row, place, f"{key}.{row}.{place}", returns),
                priority_level=priority_level,
            ),
        )
        for row in range(inputs.batch_size)
        for place in range(num_sequences)
    )
    return TokenRequest(
        streaming=bool(inputs.same("streaming", False)),
        exclude_input=bool(inputs.same("exclude_input_in_output", exclude_input_default)),
        returns=returns,
        sequences=sequences,
    )


def _check_only_values(inputs: Inputs) -> None:
    for name, (accepted, reason) in ONLY_VALUE.items():
        value = inputs.same(name, accepted)
        if value != accepted:
            raise invalid(f"{name} is {value}; {reason}, expected {accepted}")


def _read_generation(inputs: Inputs, row: int, place: int, key: str, returns: Returns) -> GenerationRequest:
    bias = inputs.row("embedding_bias", row)
    return GenerationRequest(
        key=key,
        input_ids=_read_prompt(inputs, row),
        max_tokens=inputs.required("request_output_len", row),
        end_id=inputs.scalar("end_id", row),
        sampling=_read_sampling(inputs, row, place),
        stop_sequences=unpack(inputs.row("stop_words_list", row), "stop_words_list"),
        bad_sequences=unpack(inputs.row("bad_words_list", row), "bad_words_list"),
        embedding_bias=None if bias is None else np.array(bias, dtype=np.float32),  # outlives Triton's memory
        return_log_probs=returns.log_probs,
        return_context_logits=returns.context_logits,
        return_generation_logits=returns.generation_logits,
    )


def _read_prompt(inputs: Inputs, row: int) -> tuple[int, ...]:
    ids = inputs.row("input_ids", row)
    if ids is None:
        raise invalid("input_ids is missing or empty; expected the prompt's token ids")
    length = inputs.required("input_lengths", row)
    if not 1 <= length <= ids.size:
        raise invalid(
            f"input_lengths is {length} in row {row}; input_ids holds {ids.size}, expected 1 to {ids.size}"
        )
    return tuple(ids.reshape(-1)[:length].tolist())


def _read_sampling(inputs: Inputs, row: int, place: int) -> SamplingConfig:
    fields = {
        field: value
        for field, tensor in SAMPLING_TENSORS.items()
        if (value := inputs.scalar(tensor, row)) is not None
    }
    # The sequences of one prompt differ by their seed alone; the first is what one sequence would have been.
    fields["seed"] = (fields.get("seed", SamplingConfig().seed) + place) % SEED_RANGE
    return SamplingConfig(**fields)
