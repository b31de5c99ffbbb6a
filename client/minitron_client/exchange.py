"""One request from its first attempt to its end, without a connection.

It knows which server to ask, what to send, what a response adds, whether a failure may be tried again,
the caller's deadline and the clock. Sending, reading, waiting and threads are the clients'.
"""

from __future__ import annotations

import logging
import sys
import time
import uuid
from collections.abc import Mapping, Sequence

from minitron_client._fork import new_lock
from minitron_client.endpoints import EndpointPool
from minitron_client.errors import (
    DeadlineError,
    InvalidRequestError,
    InvalidValueError,
    MinitronClientError,
    NotFoundError,
    ProtocolError,
    ServerConnectionError,
    UnavailableError,
    UnsupportedError,
)
from minitron_client.results import Chunk, Completion, Timings, Usage
from minitron_client.retries import RetryPolicy
from minitron_client.sampling import SamplingParams
from minitron_client.settings import ClientSettings, checked_headers, checked_seconds
from minitron_client.tensors import InferRequest, InferResponse, ModelMetadata
from minitron_client.text_request import check_prompt, text_request
from minitron_client.text_response import CompletionBuilder
from minitron_client.tokenizer import Tokenizer, TokenRules
from minitron_client.vocabulary import vocabulary_of

_log = logging.getLogger("minitron_client")
STOP_TIMEOUT_S = 1.0
# After these the server may be another one, or may have loaded another model.
STALE_METADATA_ERRORS = (
    InvalidRequestError, NotFoundError, ProtocolError, ServerConnectionError, UnsupportedError,
)  # fmt: skip


class Exchange:
    """The state of one request; `end` may be called from any thread, the rest from one.

    Args:
        settings: the client's.
        pool: the client's servers.
        prompt: text to go on from, or token ids.
        sampling: how.
        is_streaming: chunks are wanted as they come.
        timeout_s: deadline of the request over all attempts; None: the client's.
        request_id: None for a new one.
        headers: further headers of this request.

    Raises:
        InvalidValueError: an argument cannot be used.
    """

    def __init__(
        self,
        settings: ClientSettings,
        pool: EndpointPool,
        prompt: str | Sequence[int],
        sampling: SamplingParams,
        *,
        is_streaming: bool,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        check_prompt(prompt)
        if request_id is not None and not isinstance(request_id, str):
            raise InvalidValueError(
                f"request_id must be a string, got {request_id!r}; leave it out for a new one"
            )
        self.request_id = request_id or uuid.uuid4().hex
        self.url = ""
        self.error: MinitronClientError | None = None
        self.has_ended = False
        """The answer is whole, or the request failed or was cancelled."""
        self.headers = call_headers(settings, headers)
        self._settings, self._pool, self._prompt, self._sampling = settings, pool, prompt, sampling
        self._is_streaming = is_streaming
        self.timeout_s = checked_seconds("timeout_s", settings.timeout_s if timeout_s is None else timeout_s)
        self._builder = CompletionBuilder(sampling)
        self._policy = RetryPolicy(settings.max_retries)
        self._num_failed = 0
        self._started_s = time.monotonic()
        self._sent_s: float | None = None  # of the first attempt: metadata and connection came before it
        self._ttft_s: float | None = None
        self._total_s: float | None = None  # set at the end, whichever end it is
        self._lock = new_lock()
        if settings.log_prompts:
            _log.info("request %s: prompt %r", self.request_id, prompt)

    @property
    def text(self) -> str:
        """The text so far."""
        return self._builder.text

    @property
    def usage(self) -> Usage:
        """The token counts so far."""
        return self._builder.usage

    @property
    def connect_timeout_s(self) -> float:
        """Deadline of the small calls that come first."""
        return min(self._settings.connect_timeout_s, self.left_s())

    def start(self) -> None:
        """The request is on its way: the clock runs from here."""
        self._started_s = time.monotonic()

    def left_s(self) -> float:
        """Seconds until the deadline.

        Raises:
            DeadlineError: none are left.
        """
        left_s = self.timeout_s - self._elapsed_s()
        if left_s <= 0:
            raise DeadlineError(
                f"not answered within timeout_s={self.timeout_s:g}, in {self._num_failed + 1} attempts; "
                "allow more time",
                request_id=self.request_id,
            )
        return left_s

    def next_url(self) -> str:
        """The server of the next attempt."""
        self.url = self._pool.pick()
        _log.debug("request %s: attempt %d at %s", self.request_id, self._num_failed + 1, self.url)
        return self.url

    def needs_rules(self, metadata: ModelMetadata) -> bool:
        """Whether the model takes token ids, so that what ends a text must be known here."""
        return vocabulary_of(metadata).is_token_ids

    def needs_tokenizer(self, metadata: ModelMetadata) -> bool:
        """Whether the model takes token ids and the prompt is a text."""
        return self.needs_rules(metadata) and isinstance(self._prompt, str)

    def request(
        self, metadata: ModelMetadata, rules: TokenRules | None = None, tokenizer: Tokenizer | None = None
    ) -> InferRequest:
        """The request as this server's model takes it.

        Args:
            metadata: of the model.
            rules: where `needs_rules`.
            tokenizer: where `needs_tokenizer`.

        Raises:
            InvalidValueError: the prompt or an option cannot be sent.
            UnsupportedError: the model lacks what was asked for.
        """
        if self._is_streaming and metadata.is_decoupled is False:
            raise UnsupportedError(
                f"model {metadata.name} is not decoupled, so it answers once and cannot stream; "
                "use generate(), or set decoupled: true in its config.pbtxt",
                request_id=self.request_id,
            )
        prompt, sampling = self._prompt, self._sampling
        end_ids = rules.eos_token_ids if rules is not None else ()
        self._builder = CompletionBuilder(sampling, vocabulary_of(metadata), end_ids=end_ids)
        if tokenizer is not None and isinstance(prompt, str):
            prompt = tokenizer.encode(prompt)
            self._builder.text_of = tokenizer.stream()
        if not isinstance(prompt, str):
            self._builder.set_input_tokens(len(prompt))
        made = text_request(
            metadata,
            prompt,
            sampling,
            request_id=self.request_id,
            is_streaming=self._is_streaming,
            end_ids=end_ids,
        )
        self._sent_s = time.monotonic() if self._sent_s is None else self._sent_s
        return made

    def take(self, response: InferResponse) -> Chunk | None:
        """One response; None where it holds nothing new.

        Raises:
            ProtocolError: it cannot be read.
        """
        chunk = self._builder.add(response)
        if self._ttft_s is None and self._is_streaming and chunk is not None and self._has_token(chunk):
            self._ttft_s = self._since_sent_s()
        return chunk

    def pause_before_retry_s(self, error: MinitronClientError) -> float | None:
        """Seconds to wait before the next attempt; None where the error is the request's end."""
        self._num_failed += 1
        error.request_id = error.request_id or self.request_id
        if self.url and isinstance(error, (ServerConnectionError, UnavailableError)):
            self._pool.failed(self.url)
        if not error.retryable or self.has_ended:
            return None
        left_s = self.timeout_s - self._elapsed_s()
        pause_s = self._policy.pause_s(self._num_failed, left_s, has_other=self._pool.has_other(self.url))
        if pause_s is not None:
            _log.info("request %s: %s; again in %.2f s", self.request_id, error, pause_s)
        return pause_s

    def end(self) -> bool:
        """Note the end, whichever it is; False if it was noted before."""
        with self._lock:
            if self.has_ended:
                return False
            self._total_s = self._since_sent_s()
            self.has_ended = True
        return True

    def finish(self) -> Chunk | None:
        """The answer is whole; what was held back until now."""
        if not self.end():
            return None
        self._pool.succeeded(self.url)
        _log.debug("request %s: done in %.3f s", self.request_id, self._total_s)
        return self._builder.finish()

    def fail(self, error: MinitronClientError) -> bool:
        """The request failed for good; whether the server may still be at work on it."""
        error.request_id = error.request_id or self.request_id
        self.error = self.error or error
        self.end()
        _log.debug("request %s: %s", self.request_id, error)
        return isinstance(error, (DeadlineError, ProtocolError))

    def cancel(self) -> bool:
        """The caller leaves; False where the request has ended already."""
        if not self.end():
            return False
        self._builder.cancel()
        return True

    def completion(self) -> Completion:
        """What came, as one completion."""
        total_s = self._total_s if self._total_s is not None else self._since_sent_s()
        return self._builder.completion(Timings(total_s, self._ttft_s), self.request_id)

    def _has_token(self, chunk: Chunk) -> bool:
        return bool(chunk.text) or (bool(chunk.token_ids) and self._builder.text_of is None)

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def _since_sent_s(self) -> float:
        return time.monotonic() - (self._started_s if self._sent_s is None else self._sent_s)


def chosen_sampling(sampling: SamplingParams | None, options: dict[str, object]) -> SamplingParams:
    """Sampling options as a value, however they were given.

    Raises:
        InvalidValueError: both ways at once, another type, an unknown name, or a value that is refused.
    """
    if sampling is None:
        return SamplingParams.of(options)
    if options:
        raise InvalidValueError(f"give sampling= or {', '.join(sorted(options))}=, not both")
    if not isinstance(sampling, SamplingParams):
        raise InvalidValueError(
            f"sampling must be SamplingParams, got {type(sampling).__name__}; "
            "give SamplingParams(...), or the options by name"
        )
    return sampling


def call_headers(
    settings: ClientSettings, headers: Mapping[str, str] | None = None
) -> tuple[tuple[str, str], ...]:
    """The client's headers, the call's own, and the trace that is active, if any."""
    own = checked_headers(headers) if headers is not None else {}
    return tuple({**settings.headers, **_trace_context(), **own}.items())


def _trace_context() -> dict[str, str]:
    """OpenTelemetry's headers of the active span; a span can only be active where it was imported."""
    if "opentelemetry.trace" not in sys.modules:
        return {}
    from opentelemetry.propagate import inject

    carrier: dict[str, str] = {}
    inject(carrier)
    return carrier
