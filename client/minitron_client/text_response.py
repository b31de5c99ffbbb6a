"""A text model's responses as chunks, and chunks as one completion.

It knows the output tensors of `tensorrt_llm_bls` and `ensemble`. It knows nothing of connections or
clocks: the times come from the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from minitron_client.errors import ProtocolError
from minitron_client.results import FINISH_REASONS, Chunk, Completion, FinishReason, Timings, Usage
from minitron_client.sampling import SamplingParams
from minitron_client.tensors import InferResponse, Scalar


@dataclass(slots=True)
class CompletionBuilder:
    """Collects the responses of one request.

    Attributes:
        sampling: what was asked for; decides which parts of the completion are None.
    """

    sampling: SamplingParams
    _chunks: list[Chunk] = field(default_factory=list)
    _finish_reason: FinishReason | None = None
    _input_tokens: int | None = None
    _output_tokens: int | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(chunk.text for chunk in self._chunks)

    @property
    def usage(self) -> Usage:
        """The token counts so far, where the server gives them along the way."""
        return Usage(self._input_tokens, self._output_tokens)

    def add(self, response: InferResponse) -> Chunk | None:
        """Take one response; None where it holds nothing new, as a bare final response does.

        Raises:
            ProtocolError: an output is missing or cannot be read.
        """
        if not response.tensors:
            return None
        chunk = chunk_of(response)
        self._count(response)
        if not (chunk.text or chunk.token_ids or chunk.finish_reason):
            return None
        self._chunks.append(chunk)
        self._finish_reason = chunk.finish_reason or self._finish_reason
        return chunk

    def cancel(self) -> None:
        """The caller left early."""
        self._finish_reason = self._finish_reason or "cancelled"

    def completion(self, timings: Timings, request_id: str) -> Completion:
        """What came, as one completion."""
        ids = tuple(token for chunk in self._chunks for token in chunk.token_ids)
        log_probs = tuple(value for chunk in self._chunks for value in chunk.log_probs)
        return Completion(
            text=self.text,
            finish_reason=self._finish_reason,
            usage=self.usage,
            timings=timings,
            request_id=request_id,
            token_ids=ids if self.sampling.return_output_ids else None,
            log_probs=log_probs if self.sampling.return_log_probs else None,
        )

    def _count(self, response: InferResponse) -> None:
        """Each response counts all tokens up to its own, so the last count stands."""
        inputs, outputs = _ints(response, "num_input_tokens"), _ints(response, "num_output_tokens")
        if inputs:
            self._input_tokens = inputs[0]
        if outputs:
            self._output_tokens = outputs[0]


def chunk_of(response: InferResponse) -> Chunk:
    """The piece of text that a response with outputs carries.

    Raises:
        ProtocolError: `text_output` is missing or more than one, or the finish reason is unknown.
    """
    texts = _values(response, "text_output")
    if texts is None:
        raise ProtocolError(f"a response without text_output; it has {', '.join(sorted(response.tensors))}")
    if len(texts) > 1 or not all(isinstance(text, str) for text in texts):
        raise ProtocolError(f"text_output should be one string, got {len(texts)} values: {texts[:2]!r}")
    return Chunk(
        text=str(texts[0]) if texts else "",
        token_ids=_ints(response, "output_ids"),
        finish_reason=_finish_reason(response),
        log_probs=tuple(float(value) for value in _values(response, "output_log_probs") or ()),
    )


def _finish_reason(response: InferResponse) -> FinishReason | None:
    told = [str(value) for value in _values(response, "finish_reason") or () if value]
    if not told:  # not the last piece, or a server that does not tell
        return None
    if told[0] not in FINISH_REASONS:
        raise ProtocolError(f"finish_reason is {told[0]!r}, expected one of {', '.join(FINISH_REASONS)}")
    return cast(FinishReason, told[0])


def _ints(response: InferResponse, name: str) -> tuple[int, ...]:
    return tuple(int(value) for value in _values(response, name) or ())


def _values(response: InferResponse, name: str) -> tuple[Scalar, ...] | None:
    tensor = response.tensors.get(name)
    return None if tensor is None else tensor.values()
