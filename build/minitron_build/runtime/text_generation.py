"""One sequence of text in the making: the engine's steps in, text responses out.

It decides where the text ends and why. It knows nothing of Triton's objects: it takes steps and gives named
arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from .engine_step import EngineStep
from .inputs import Array
from .text_request import TextSequence
from .text_stream import Detokenizer, StopWordMatcher
from .tokenizer import TextTokenizer

LATEST = (
    "arrival_time_ns",
    "first_scheduled_time_ns",
    "first_token_time_ns",
    "last_token_time_ns",
    "kv_cache_alloc_new_blocks",
    "kv_cache_reused_blocks",
    "kv_cache_alloc_total_blocks",
)
"""Engine outputs handed on as they came last."""


@dataclass(slots=True)
class Unsent:
    """What has been generated and not been sent yet."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    generation_logits: list[Array] = field(default_factory=list)  # each [tokens, vocab]


def _text(value: str) -> Array:
    # [1], not [batch 1, 1]: upstream's models send it so, and clients write `text_output[0].decode()`.
    array = np.empty(1, dtype=np.object_)
    array[0] = value.encode("utf-8")
    return array


def _int32(value: int) -> Array:
    return np.array([[value]], dtype=np.int32)


def _finish_reason(text: TextGeneration) -> Array | None:
    return None if text.finish_reason is None else _text(text.finish_reason)[None]  # [batch 1, 1]


def _generation_logits(text: TextGeneration) -> Array | None:
    parts = text.unsent.generation_logits
    return np.concatenate(parts)[None, None] if parts else None  # [batch 1, beam 1, new tokens, vocab]


def _latest(name: str) -> Callable[[TextGeneration], Array | None]:
    return lambda text: text.latest.get(name)


OUTPUTS: dict[str, Callable[[TextGeneration], Array | None]] = {
    "text_output": lambda text: _text(text.unsent.text),
    "finish_reason": _finish_reason,
    "output_ids": lambda text: np.array([text.unsent.token_ids], dtype=np.int32),  # [batch 1, new tokens]
    # [batch 1, beam 1, new tokens]
    "output_log_probs": lambda text: np.array([[text.unsent.log_probs]], dtype=np.float32),
    "cum_log_probs": lambda text: np.array([[text.cum_log_prob]], dtype=np.float32),  # [batch 1, beam 1]
    "batch_index": lambda text: _int32(text.sequence.batch_index),
    "sequence_index": lambda text: _int32(text.sequence.sequence_index),
    "num_input_tokens": lambda text: _int32(text.sequence.input_tokens),
    "num_output_tokens": lambda text: _int32(text.output_tokens),
    "generation_logits": _generation_logits,
    "context_logits": lambda text: text.context_logits,
    **{name: _latest(name) for name in LATEST},
}
"""Every output of a text model, and what it is in the next response; None: nothing to send."""


class TextGeneration:
    """Follows one sequence from its first token to its finish reason.

    Args:
        sequence: what was asked for.
        tokenizer: the model's tokenizer.
        skip_special_tokens: whether special tokens stay out of the text.
        lead: text that the first response begins with (the prompt, or nothing).
    """

    sequence: TextSequence
    output_tokens: int
    unsent: Unsent
    cum_log_prob: float

    def __init__(
        self, sequence: TextSequence, tokenizer: TextTokenizer, *, skip_special_tokens: bool, lead: str = ""
    ) -> None:
        self.sequence = sequence
        self.finish_reason: str | None = None
        self.output_tokens = 0
        self._detokenizer = Detokenizer(
            tokenizer.visible_bytes_of if skip_special_tokens else tokenizer.bytes_of
        )
        self._matcher = StopWordMatcher(sequence.stop_words)
        self.unsent = Unsent(text=lead)
        self.cum_log_prob = 0.0
        self.latest: dict[str, Array] = {}
        self.context_logits: Array | None = None

    def feed(self, step: EngineStep) -> None:
        """Take what the engine gave; what follows the end of the text is ignored."""
        if self.finish_reason is not None:
            return
        ids = step.token_ids
        taken = next((place + 1 for place, token_id in enumerate(ids) if self._ends_with(token_id)), len(ids))
        self.unsent.token_ids += ids[:taken]
        if step.log_probs:
            log_probs = step.log_probs[:taken]
            self.unsent.log_probs += log_probs
            self.cum_log_prob += sum(log_probs)
        if step.arrays:
            self._keep(step.arrays, taken)
        if step.finish_reason is not None:
            self.finish(step.finish_reason)

    def _keep(self, arrays: Mapping[str, Array], taken: int) -> None:
        if "generation_logits" in arrays:
            self.unsent.generation_logits.append(arrays["generation_logits"][0, 0, :taken])
        self.context_logits = arrays.get("context_logits", self.context_logits)
        self.latest |= {name: arrays[name] for name in LATEST if name in arrays}

    def finish(self, reason: str) -> None:
        """The engine has ended, or the caller has stopped it; the text's own end, if it had one, stands."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self.unsent.text += self._detokenizer.flush()

    def take(self, outputs: frozenset[str] = frozenset(OUTPUTS)) -> dict[str, Array] | None:
        """The next response, or None while there is neither new text nor an end to tell.

        Args:
            outputs: names of those to give, of `OUTPUTS`.

        Returns:
            What there is of them. Token ids, log-probs and logits always belong to the text beside them.
        """
        if not self.unsent.text and self.finish_reason is None:
            return None
        arrays = {name: OUTPUTS[name](self) for name in outputs}
        self.unsent, self.context_logits = Unsent(), None
        return {name: array for name, array in arrays.items() if array is not None}

    def _ends_with(self, token_id: int) -> bool:
        """Take one token; True when the text ends with it."""
        self.output_tokens += 1
        may_end = self.output_tokens >= self.sequence.min_tokens
        if may_end and token_id in self.sequence.end_ids:
            self.finish("stop")
            return True
        piece = self._detokenizer.feed(token_id)
        end = None
        if may_end:
            end = self._matcher.feed(piece)
        else:
            self._matcher.skip(piece)
        self.unsent.text += piece[:end]
        if end is not None:
            self.finish_reason = "stop"
        return end is not None
