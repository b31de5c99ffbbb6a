"""What a request to the `tensorrt_llm_bls` model asks for, and the engine requests it becomes.

It knows the text model's tensor names, TensorRT-LLM's, and the translation between them. It knows nothing of
Triton's objects, of streaming and of how the answer is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .inputs import Array, Inputs
from .prompts import PromptEncoder
from .status import invalid
from .word_lists import pack

ROWS_OF = "text_input"  # the tensor every request must have: it says how many rows there are
MAX_SEQUENCES = 256
SEED_RANGE = 2**64
FORMER_SEED = "random_seed"
"""What upstream once called `seed`; clients in the field still send it."""

PASSED_ON: dict[str, tuple[str, type[np.generic]]] = {
    "temperature": ("temperature", np.float32),
    "top_k": ("runtime_top_k", np.int32),
    "top_p": ("runtime_top_p", np.float32),
    "length_penalty": ("len_penalty", np.float32),
    "repetition_penalty": ("repetition_penalty", np.float32),
    "presence_penalty": ("presence_penalty", np.float32),
    "frequency_penalty": ("frequency_penalty", np.float32),
    "min_tokens": ("min_tokens", np.int32),
}
"""Our input -> the engine model's input and dtype. An absent one stays absent: the engine's default holds."""

FLAGS = (
    "return_log_probs",
    "return_context_logits",
    "return_generation_logits",
    "return_perf_metrics",
    "return_num_input_tokens",
    "return_num_output_tokens",
    "return_output_ids",
)
ENGINE_FLAGS = (
    "return_log_probs",
    "return_context_logits",
    "return_generation_logits",
    "return_perf_metrics",
)
"""Those that the engine must hear of; token counts and ids are known on this side."""


@dataclass(frozen=True, slots=True)
class TextSequence:
    """One sequence to generate from one row of the request."""

    batch_index: int
    sequence_index: int
    prompt: str
    input_tokens: int
    min_tokens: int
    stop_words: tuple[str, ...]
    end_ids: tuple[int, ...]
    engine_inputs: dict[str, Array]
    """Tensors for the engine model, batch 1."""


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One request: how to answer, and the sequences to generate."""

    streaming: bool
    exclude_input: bool
    flags: frozenset[str]
    sequences: tuple[TextSequence, ...]


def is_stop(inputs: Inputs) -> bool:
    """Whether the request only asks to stop another one with the same id."""
    return bool(inputs.same("stop", False))


def read_text_request(inputs: Inputs, encoder: PromptEncoder) -> TextRequest:
    """Read a request to generate and tokenise its texts.

    Raises:
        StatusError: INVALID_ARGUMENT with the tensor, what it holds and what was expected.
    """
    beam_width = inputs.same("beam_width", 1)
    if beam_width != 1:
        raise invalid(f"beam_width is {beam_width}; text is generated without beam search, expected 1")
    num_sequences = int(inputs.same("num_return_sequences", 1))
    if num_sequences < 1 or num_sequences * inputs.batch_size > MAX_SEQUENCES:
        raise invalid(
            f"num_return_sequences is {num_sequences} for {inputs.batch_size} prompts; "
            f"expected at least 1 and at most {MAX_SEQUENCES} sequences in all"
        )
    streaming = bool(inputs.same("stream", False))
    flags = frozenset(name for name in FLAGS if inputs.same(name, False))
    sequences = tuple(
        sequence
        for row in range(inputs.batch_size)
        for sequence in _read_row(inputs, row, encoder, num_sequences, streaming, flags)
    )
    return TextRequest(streaming, bool(inputs.same("exclude_input_in_output", False)), flags, sequences)


def _read_row(
    inputs: Inputs,
    row: int,
    encoder: PromptEncoder,
    num_sequences: int,
    streaming: bool,
    flags: frozenset[str],
) -> list[TextSequence]:
    prompt = inputs.text("text_input", row)
    ids = encoder.prompt(prompt)
    stop_words = inputs.texts("stop_words", row)
    end_ids = encoder.end_ids(inputs.scalar("end_id", row))
    tensors = _prompt_tensors(inputs, row, encoder, ids) | _end_tensors(inputs, row, encoder, end_ids)
    tensors |= {name: _bool(name in flags) for name in ENGINE_FLAGS if name in flags}
    # Stop words are matched on the text, so it must be seen while it grows.
    tensors |= {"streaming": _bool(streaming or bool(stop_words)), "exclude_input_in_output": _bool(True)}
    return [
        TextSequence(
            batch_index=row,
            sequence_index=place,
            prompt=prompt,
            input_tokens=len(ids),
            min_tokens=inputs.scalar("min_tokens", row, 0),
            stop_words=stop_words,
            end_ids=end_ids,
            engine_inputs=tensors | _seed(inputs, row, place),
        )
        for place in range(num_sequences)
    ]


def _prompt_tensors(inputs: Inputs, row: int, encoder: PromptEncoder, ids: list[int]) -> dict[str, Array]:
    tensors: dict[str, Array] = {
        "input_ids": np.array([ids], dtype=np.int32),  # [1, prompt]
        "input_lengths": _value(len(ids), np.int32),
        "request_output_len": _value(inputs.required("max_tokens", row), np.int32),
    }
    for name, (engine_name, dtype) in PASSED_ON.items():
        value = inputs.scalar(name, row)
        if value is not None:
            tensors[engine_name] = _value(value, dtype)
    bias = encoder.bias(inputs.texts("embedding_bias_words", row), inputs.row("embedding_bias_weights", row))
    return tensors if bias is None else tensors | {"embedding_bias": bias[None]}  # [1, vocab]


def _end_tensors(
    inputs: Inputs, row: int, encoder: PromptEncoder, end_ids: tuple[int, ...]
) -> dict[str, Array]:
    tensors = {"pad_id": _value(inputs.scalar("pad_id", row, encoder.pad_id), np.int32)}
    if end_ids:
        tensors["end_id"] = _value(end_ids[0], np.int32)
    if end_ids[1:]:
        tensors["stop_words_list"] = pack([[(end_id,) for end_id in end_ids[1:]]])
    bad_words = encoder.word_ids(inputs.texts("bad_words", row))
    return tensors | {"bad_words_list": pack([bad_words])} if bad_words else tensors


def _seed(inputs: Inputs, row: int, place: int) -> dict[str, Array]:
    """The sequences of one prompt differ by their seed alone; the first has the seed asked for."""
    seed = inputs.scalar("seed", row, inputs.scalar(FORMER_SEED, row))
    if seed is None and place == 0:
        return {}
    return {"seed": _value(((seed or 0) + place) % SEED_RANGE, np.uint64)}


def _value(value: Any, dtype: type[np.generic]) -> Array:
    return np.array([[value]], dtype=dtype)  # [batch 1, 1]


def _bool(value: bool) -> Array:
    return _value(value, np.bool_)
