"""A model's responses as chunks, and chunks as one completion, in each vocabulary.

It knows output tensors. It knows nothing of connections or clocks: the times come from the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, cast

from minitron_client.errors import ProtocolError
from minitron_client.results import FINISH_REASONS, Chunk, Completion, FinishReason, Timings, Usage
from minitron_client.sampling import SamplingParams
from minitron_client.tensors import InferResponse
from minitron_client.vocabulary import QUEUE_OUTPUTS, TEXT, Vocabulary

_FOREIGN_REASONS: dict[str, str] = {"None": "", "timeout": "cancelled"}
"""What NVIDIA's LLM-API model says where we say something else."""


_FURTHER_OUTPUTS = frozenset(("output_ids", "output_log_probs"))
"""What a response carries beside its text only where it was asked for."""


class TextOfTokens(Protocol):
    """Turns token ids into text as they come."""

    def feed(self, token_ids: tuple[int, ...]) -> str:
        """The text that these tokens complete."""

    def flush(self) -> str:
        """What the end of the sequence leaves."""


@dataclass(slots=True)
class CompletionBuilder:
    """Collects the responses of one request.

    Attributes:
        sampling: what was asked for; decides which parts of the completion are None.
        vocabulary: of the model that answers.
        text_of: makes text of token ids, where the model gives ids and text was asked for.
        end_ids: ids that end the text, where the model does not tell the reason.
    """

    sampling: SamplingParams
    vocabulary: Vocabulary = TEXT
    text_of: TextOfTokens | None = None
    end_ids: tuple[int, ...] = ()
    _texts: list[str] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    _log_probs: list[float] = field(default_factory=list)
    _finish_reason: FinishReason | None = None
    _input_tokens: int | None = None
    _output_tokens: int | None = None
    _queue_s: float | None = None
    _counted: InferResponse | None = None
    """The last response with counts, as long as they have not been read."""
    _seen: str = ""
    """What a cumulative answer has brought so far."""

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    @property
    def usage(self) -> Usage:
        """The token counts so far, where the server gives them along the way."""
        self._read_counts()
        return Usage(self._input_tokens, self._output_tokens)

    def add(self, response: InferResponse) -> Chunk | None:
        """Take one response; None where it holds nothing new, as a bare final response does.

        Raises:
            ProtocolError: an output is missing or cannot be read.
        """
        places = response.places
        if not places:
            return None
        if "num_output_tokens" in places or QUEUE_OUTPUTS[0] in places:
            self._counted = response  # read once it is the last: there is one for each token
        chunk = self._chunk_of_tokens(response) if self.vocabulary.is_token_ids else chunk_of(response)
        if self.vocabulary.is_cumulative:
            chunk = self._what_is_new(chunk)
        return self._keep(chunk)

    def finish(self) -> Chunk | None:
        """The answer is whole: what was held back, and the reason where the model does not tell it.

        Raises:
            ProtocolError: the counts cannot be read.
        """
        self._read_counts()
        if self._finish_reason is not None:
            return None
        held = self.text_of.flush() if self.text_of is not None else ""
        reason = self._inferred_reason()
        if not self.vocabulary.is_token_ids:  # the reason of a text model without one goes to the completion
            self._finish_reason = reason
            return None
        return self._keep(Chunk(held, (), reason))

    def cancel(self) -> None:
        """The caller left early."""
        self._finish_reason = self._finish_reason or "cancelled"

    def completion(self, timings: Timings, request_id: str) -> Completion:
        """What came, as one completion."""
        self._read_counts()
        wants_ids = self.sampling.return_output_ids or (self.vocabulary.is_token_ids and not self.text_of)
        return Completion(
            text=self.text,
            finish_reason=self._finish_reason,
            usage=self.usage,
            timings=Timings(timings.total_s, timings.ttft_s, self._queue_s),
            request_id=request_id,
            token_ids=tuple(self._token_ids) if wants_ids else None,
            log_probs=tuple(self._log_probs) if self.sampling.return_log_probs else None,
        )

    def set_input_tokens(self, count: int) -> None:
        """The prompt's length, where the client has counted it."""
        self._input_tokens = count

    def _keep(self, chunk: Chunk) -> Chunk | None:
        """Note what the chunk brings, not the chunk: a garbage collector walks what is kept of each token."""
        text, token_ids, finish_reason, log_probs = chunk
        if not (text or token_ids or finish_reason):
            return None
        self._texts.append(text)
        if token_ids:
            self._token_ids += token_ids
        if log_probs:
            self._log_probs += log_probs
        if finish_reason:
            self._finish_reason = finish_reason
        return chunk

    def _chunk_of_tokens(self, response: InferResponse) -> Chunk:
        ids = _ints(response, self.vocabulary.answer)
        told = _ints(response, "sequence_length")
        if told and told[0] < len(ids):  # filled up to the longest of a batch
            ids = ids[: told[0]]
        self._output_tokens = (self._output_tokens or 0) + len(ids)
        log_probs = _floats(response, "output_log_probs")
        text = self.text_of.feed(ids) if self.text_of is not None else ""
        return Chunk(text, ids, None, log_probs[: len(ids)])

    def _what_is_new(self, chunk: Chunk) -> Chunk:
        """The part of a cumulative answer that no answer before it had.

        Raises:
            ProtocolError: it takes back what was said.
        """
        text = chunk.text
        if not chunk.finish_reason:
            text = text.rstrip("\ufffd")  # half a character: the next answer has the whole one
        if not text.startswith(self._seen):
            if self._seen.startswith(text):
                return Chunk("", chunk.token_ids, chunk.finish_reason, chunk.log_probs)
            raise ProtocolError(f"a streamed answer took back what was said: {self._seen[-20:]!r}")
        new, self._seen = text[len(self._seen) :], text
        return Chunk(new, chunk.token_ids, chunk.finish_reason, chunk.log_probs)

    def _inferred_reason(self) -> FinishReason | None:
        """`stop` or `length` from the number of tokens; None where nobody counted them."""
        if self._output_tokens is None:
            return None
        if self._token_ids and self._token_ids[-1] in self.end_ids:
            return "stop"
        return "length" if self._output_tokens >= self.sampling.max_tokens else "stop"

    def _read_counts(self) -> None:
        """Each response counts all tokens up to its own, so the last count stands.

        Raises:
            ProtocolError: a count cannot be read.
        """
        counted, self._counted = self._counted, None
        if counted is None:
            return
        self._input_tokens = (*_ints(counted, "num_input_tokens"), self._input_tokens)[0]
        self._output_tokens = (*_ints(counted, "num_output_tokens"), self._output_tokens)[0]
        arrived, scheduled = (_ints(counted, name) for name in QUEUE_OUTPUTS)
        if arrived and scheduled and 0 < arrived[0] <= scheduled[0]:
            self._queue_s = (scheduled[0] - arrived[0]) / 1e9


def chunk_of(response: InferResponse) -> Chunk:
    """The piece of text that a text model's response with outputs carries.

    Raises:
        ProtocolError: `text_output` is missing or more than one, or the finish reason is unknown.
    """
    places = response.places
    text = response.string("text_output")
    if text is None:
        raise ProtocolError(f"a response without text_output; it has {', '.join(sorted(places))}")
    told = response.string("finish_reason")
    # Empty in all pieces but the last, and missing where the server does not tell.
    finish_reason = _finish_reason(told) if told else None
    if _FURTHER_OUTPUTS.isdisjoint(places):
        return Chunk(text, (), finish_reason)
    return Chunk(text, _ints(response, "output_ids"), finish_reason, _floats(response, "output_log_probs"))


def _finish_reason(told: str) -> FinishReason | None:
    reason = _FOREIGN_REASONS.get(told, told)
    if not reason:
        return None
    if reason not in FINISH_REASONS:
        raise ProtocolError(f"finish_reason is {reason!r}, expected one of {', '.join(FINISH_REASONS)}")
    return cast(FinishReason, reason)


def _ints(response: InferResponse, name: str) -> tuple[int, ...]:
    return tuple(int(value) for value in response.values(name) or ())


def _floats(response: InferResponse, name: str) -> tuple[float, ...]:
    return tuple(float(value) for value in response.values(name) or ())
