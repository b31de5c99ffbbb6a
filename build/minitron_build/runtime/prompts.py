"""What a text request becomes before an engine sees it: prompt ids, word ids, end ids and biases.

`preprocessing` and `tensorrt_llm_bls` share it, so both make the same ids of the same text. It knows
nothing of Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .parameters import Parameters
from .status import invalid
from .tokenizer import TextTokenizer
from .word_lists import IdSequences


class PromptEncoder:
    """Turns the texts of a request into ids.

    Args:
        parameters: a model's parameters `tokenizer_dir`, `add_special_tokens`, `eos_token_ids`,
        `pad_token_id`.

    Raises:
        ParameterError: one of them is missing or wrong.
        TokenizerFileError: the tokenizer cannot be used.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.tokenizer = TextTokenizer(parameters.folder("tokenizer_dir"))
        self.pad_id = parameters.number("pad_token_id")
        self._add_special_tokens = parameters.flag("add_special_tokens")
        self._eos_token_ids = parameters.token_ids("eos_token_ids")

    def prompt(self, text: str) -> list[int]:
        """The ids of a prompt, BOS first when the model's parameters say so.

        Raises:
            StatusError: the prompt is empty.
        """
        if not text:
            raise invalid("the prompt is empty; expected at least one character")
        return self.tokenizer.encode(text, add_special_tokens=self._add_special_tokens)

    def word_ids(self, words: Sequence[str]) -> IdSequences:
        """The ids of stop or bad words, each on its own and without special tokens added."""
        return tuple(tuple(self.tokenizer.encode(word, add_special_tokens=False)) for word in words)

    def end_ids(self, asked: int | None) -> tuple[int, ...]:
        """The ids that end a sequence: the one the request names (negative: none), else the model's own."""
        if asked is None:
            return self._eos_token_ids
        return (asked,) if asked >= 0 else ()

    def bias(self, words: Sequence[str], weights: npt.NDArray[Any] | None) -> npt.NDArray[np.float32] | None:
        """What to add to the logits, [vocab_size]: each word's weight on each of its tokens.

        Raises:
            StatusError: not one weight per word.
        """
        num_weights = 0 if weights is None else weights.size
        if len(words) != num_weights:
            raise invalid(
                f"embedding_bias_words has {len(words)} words and embedding_bias_weights {num_weights} "
                "weights; expected one weight per word"
            )
        if weights is None:
            return None
        bias = np.zeros(self.tokenizer.vocab_size, dtype=np.float32)
        for ids, weight in zip(self.word_ids(words), weights.reshape(-1).tolist(), strict=True):
            np.add.at(bias, list(ids), np.float32(weight))
        return bias
