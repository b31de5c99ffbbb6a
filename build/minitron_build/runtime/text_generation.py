"""One sequence of text in the making: the engine model's responses in, text responses out.

It decides where the text ends and why. It knows nothing of Triton's objects: it takes and gives named arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .inputs import Array
from .status import StatusError
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
class _Unsent:
    """What has been generated and not been sent yet."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    generation_logits: list[Array] = field(default_factory=list)  # each [tokens, vocab]


class TextGeneration:
    """Follows one sequence from its first token to its finish reason.

    Args:
        sequence: what was asked for.
        tokenizer: the model's tokenizer.
        skip_special_tokens: whether special tokens stay out of the text.
        lead: text that the first response begins with (the prompt, or nothing).
    """

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
        self._unsent = _Unsent(text=lead)
        self._cum_log_prob = 0.0
        self._latest: dict[str, Array] = {}
        self._context_logits: Array | None = None

    def feed(self, arrays: dict[str, Array]) -> None:
        """Take one response of the engine model; what follows the end of the text is ignored.

        Raises:
            StatusError: INTERNAL, the engine model sent several beams.
        """
        if self.finish_reason is not None or not arrays:
            return
        ids = _one_beam(arrays["output_ids"])
        taken = next((place + 1 for place, token_id in enumerate(ids) if self._ends_with(token_id)), len(ids))
        self._unsent.token_ids += ids[:taken]
        if "output_log_probs" in arrays:
            log_probs = arrays["output_log_probs"].reshape(-1)[:taken].tolist()
            self._unsent.log_probs += log_probs
            self._cum_log_prob += sum(log_probs)
        if "generation_logits" in arrays:
            self._unsent.generation_logits.append(arrays["generation_logits"][0, 0, :taken])
        self._context_logits = arrays.get("context_logits", self._context_logits)
        self._latest |= {name: arrays[name] for name in LATEST if name in arrays}

    def finish(self, reason: str) -> None:
        """The engine has ended, or the caller has stopped it; the text's own end, if it had one, stands."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self._unsent.text += self._detokenizer.flush()

    def take(self) -> dict[str, Array] | None:
        """The next response, or None while there is neither new text nor an end to tell.

        Returns:
            Every output this sequence can give; the caller picks what was asked for. Token ids, log-probs and
            logits always belong to the text beside them.
        """
        unsent = self._unsent
        if not unsent.text and self.finish_reason is None:
            return None
        self._unsent = _Unsent()
        arrays = {
            "text_output": _strings(unsent.text),
            "output_ids": np.array([unsent.token_ids], dtype=np.int32),  # [batch 1, new tokens]
            "output_log_probs": np.array(
                [[unsent.log_probs]], dtype=np.float32
            ),  # [batch 1, beam 1, new tokens]
            "cum_log_probs": np.array([[self._cum_log_prob]], dtype=np.float32),  # [batch 1, beam 1]
            "batch_index": _int32(self.sequence.batch_index),
            "sequence_index": _int32(self.sequence.sequence_index),
            "num_input_tokens": _int32(self.sequence.input_tokens),
            "num_output_tokens": _int32(self.output_tokens),
            **self._latest,
        }
        if self.finish_reason is not None:
            arrays["finish_reason"] = _strings(self.finish_reason)
        if unsent.generation_logits:
            # [batch 1, beam 1, new tokens, vocab]
            arrays["generation_logits"] = np.concatenate(unsent.generation_logits)[None, None]
        if self._context_logits is not None:
            arrays["context_logits"], self._context_logits = self._context_logits, None
        return arrays

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
        self._unsent.text += piece[:end]
        if end is not None:
            self.finish_reason = "stop"
        return end is not None


def _one_beam(ids: Array) -> list[int]:
    """[batch 1, beam 1, tokens] to a list; an empty final response has no beam to speak of."""
    if ids.size and ids.shape[:-1] != (1, 1):
        raise StatusError(
            "INTERNAL", f"the engine sent output_ids of shape {list(ids.shape)}; expected one beam"
        )
    return [int(token_id) for token_id in ids.reshape(-1)]


def _strings(value: str) -> Array:
    return np.array([[value.encode("utf-8")]], dtype=np.object_)  # [batch 1, 1]


def _int32(value: int) -> Array:
    return np.array([[value]], dtype=np.int32)
