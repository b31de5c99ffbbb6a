"""The Triton model `preprocessing`: text to the tensors that `tensorrt_llm` takes.

It knows upstream's tensor names. It is stateless, and knows nothing of what the ids are used for. A client
that tokenises by itself fetches the tokenizer's files here, so that it cannot disagree with the server.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import tensors
from .inputs import Array, Inputs
from .orphan import end_with_parent
from .parameters import Parameters
from .prompts import PromptEncoder
from .tokenizer_files import TokenizerFiles
from .word_lists import pack


class TritonPythonModel:
    """What Triton's Python backend loads; the method names are Triton's."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the tokenizer.

        Raises:
            RuntimeError: numpy 2 is installed.
            ParameterError: a parameter is missing or wrong.
            TokenizerFileError: the tokenizer cannot be used.
        """
        tensors.check_numpy()
        end_with_parent()
        parameters = Parameters(args)
        self._encoder = PromptEncoder(parameters)
        self._files = TokenizerFiles(parameters.folder("tokenizer_dir"))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request; a bad one is refused and the others go on."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            inputs = tensors.read_inputs(request, rows_of="QUERY")
            arrays = self._files.arrays() if inputs.same("RETURN_TOKENIZER", False) else self._encode(inputs)
            wanted = set(request.requested_output_names())
            return tensors.response({name: array for name, array in arrays.items() if name in wanted})
        except Exception as error:
            return tensors.error_response(tensors.as_status(error, "preprocessing"))

    def _encode(self, inputs: Inputs) -> dict[str, Array]:
        rows, encoder = range(inputs.batch_size), self._encoder
        prompts = [encoder.prompt(inputs.text("QUERY", row)) for row in rows]
        end_ids = [encoder.end_ids(inputs.scalar("END_ID", row)) for row in rows]
        pad_ids = [inputs.scalar("PAD_ID", row, encoder.pad_id) for row in rows]
        stops = [
            (*encoder.word_ids(inputs.texts("STOP_WORDS_DICT", row)), *((end,) for end in end_ids[row][1:]))
            for row in rows
        ]
        return {
            "INPUT_ID": _padded(prompts, pad_ids),  # [batch, longest prompt]
            "REQUEST_INPUT_LEN": _column([len(prompt) for prompt in prompts]),  # [batch, 1]
            "REQUEST_OUTPUT_LEN": _column([inputs.scalar("REQUEST_OUTPUT_LEN", row) for row in rows]),
            "BAD_WORDS_IDS": pack([encoder.word_ids(inputs.texts("BAD_WORDS_DICT", row)) for row in rows]),
            "STOP_WORDS_IDS": pack(stops),
            "EMBEDDING_BIAS": _biases(encoder, inputs),
            "OUT_END_ID": _column([ids[0] if ids else -1 for ids in end_ids]),
            "OUT_PAD_ID": _column(pad_ids),
        }


def _column(values: list[int]) -> Array:
    return np.array(values, dtype=np.int32).reshape(-1, 1)


def _padded(prompts: list[list[int]], pad_ids: list[int]) -> Array:
    padded = np.repeat(_column(pad_ids), max(map(len, prompts)), axis=1)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    return padded


def _biases(encoder: PromptEncoder, inputs: Inputs) -> Array:
    """[batch, vocab] float32; [batch, 0] when no row has a bias."""
    found = [
        encoder.bias(inputs.texts("EMBEDDING_BIAS_WORDS", row), inputs.row("EMBEDDING_BIAS_WEIGHTS", row))
        for row in range(inputs.batch_size)
    ]
    if all(bias is None for bias in found):
        return np.zeros((inputs.batch_size, 0), dtype=np.float32)
    nothing = np.zeros(encoder.tokenizer.vocab_size, dtype=np.float32)
    return np.stack([nothing if bias is None else bias for bias in found])
