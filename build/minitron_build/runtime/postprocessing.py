"""The Triton model `postprocessing`: whole sequences of token ids to text.

It is stateless, so a sequence cut in the middle of a character gives U+FFFD at the cut: streams are decoded
by `tensorrt_llm_bls`, which keeps the state. It knows nothing of how the ids were made.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import tensors
from .inputs import Array
from .orphan import end_with_parent
from .parameters import Parameters
from .status import invalid
from .tokenizer import TextTokenizer


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
        self._tokenizer = TextTokenizer(parameters.folder("tokenizer_dir"))
        self._skip_special_tokens = parameters.flag("skip_special_tokens")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request; a bad one is refused and the others go on."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            arrays = tensors.read_arrays(request)
            return tensors.response(
                {"OUTPUT": self._decode(arrays["TOKENS_BATCH"], arrays["SEQUENCE_LENGTH"])}
            )
        except Exception as error:
            return tensors.error_response(tensors.as_status(error, "postprocessing"))

    def _decode(self, ids: Array, lengths: Array) -> Array:
        """[batch, beam, longest] ids and [batch, beam] lengths to [batch, beam] strings."""
        if ids.ndim != 3 or lengths.shape != ids.shape[:2]:
            raise invalid(
                f"TOKENS_BATCH has shape {list(ids.shape)} and SEQUENCE_LENGTH {list(lengths.shape)}; "
                "expected [batch, beam, longest] and [batch, beam]"
            )
        if lengths.size and (lengths.min() < 0 or lengths.max() > ids.shape[2]):
            raise invalid(
                f"SEQUENCE_LENGTH is {lengths.tolist()}; TOKENS_BATCH holds {ids.shape[2]} ids per sequence"
            )
        texts = np.empty(lengths.shape, dtype=np.object_)
        for place in np.ndindex(lengths.shape):
            kept = self._known(ids[place][: lengths[place]].tolist())
            texts[place] = self._tokenizer.decode(kept, skip_special_tokens=self._skip_special_tokens).encode(
                "utf-8"
            )
        return texts

    def _known(self, ids: list[int]) -> list[int]:
        wrong = next((token_id for token_id in ids if not 0 <= token_id < self._tokenizer.vocab_size), None)
        if wrong is not None:
            raise invalid(
                f"TOKENS_BATCH holds token id {wrong}; "
                f"the vocabulary has ids 0 to {self._tokenizer.vocab_size - 1}"
            )
        return ids
