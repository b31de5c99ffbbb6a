"""The blocking client: one server, one shared channel, as many requests at once as threads ask for.

A thin shell: requests are made in `text_request`, responses read in `text_response`, both without a
connection; this module knows only the order of calls, the deadline and the clock.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TypeVar

from minitron_client._triton import Connection, ResponseStream
from minitron_client.errors import (
    DeadlineError,
    InvalidValueError,
    MinitronClientError,
    NotFoundError,
    ProtocolError,
    ServerConnectionError,
    UnavailableError,
)
from minitron_client.results import Chunk, Completion, Health, Timings
from minitron_client.sampling import SamplingParams
from minitron_client.tensors import InferRequest, ModelMetadata
from minitron_client.text_request import stop_request, text_request
from minitron_client.text_response import CompletionBuilder

_log = logging.getLogger("minitron_client")
_Self = TypeVar("_Self", bound="MinitronClient")

URL_VARIABLE = "MINITRON_URL"
DEFAULT_URL = "127.0.0.1:8001"
DEFAULT_MODEL = "tensorrt_llm_bls"
DEFAULT_TIMEOUT_S = 60.0
DEFAULT_CONNECT_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 1.0
_POLL_S, _MAX_POLL_S = 0.05, 0.5


class MinitronClient:
    """A client of one server; safe to share between threads.

        with MinitronClient("127.0.0.1:8001") as client:
            print(client.generate("def add(a, b):", max_tokens=32).text)
            with client.stream("Once upon a time", top_p=0.9, seed=7) as stream:
                for chunk in stream:
                    print(chunk.text, end="", flush=True)

    Args:
        url: HOST:PORT of the server's gRPC port; default: environment variable MINITRON_URL, else
            127.0.0.1:8001. Nothing is sent before the first call.
        model: model that answers: "tensorrt_llm_bls" or "ensemble".
        timeout_s: deadline of a request, from sending to the last response.
        connect_timeout_s: deadline of the small calls that come first (is anyone there).

    Raises:
        InvalidValueError: the url is not HOST:PORT, or a time is not a positive finite number.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        model: str = DEFAULT_MODEL,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        connect_timeout_s: float = DEFAULT_CONNECT_TIMEOUT_S,
    ) -> None:
        self.model = model
        self.timeout_s = _checked_seconds("timeout_s", timeout_s)
        self.connect_timeout_s = _checked_seconds("connect_timeout_s", connect_timeout_s)
        self._connection = Connection(url or os.environ.get(URL_VARIABLE) or DEFAULT_URL)
        self._metadata: dict[str, ModelMetadata] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """HOST:PORT of the server."""
        return self._connection.url

    def generate(
        self,
        prompt: str,
        *,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: object,
    ) -> Completion:
        """One completion, when it is whole.

        Args:
            prompt: text to go on from.
            sampling: options as a value; or give them by name (`max_tokens=64, top_p=0.9`).
            timeout_s: deadline of this request; default: the client's.
            request_id: default: a new unique one.
            **options: fields of `SamplingParams`.

        Raises:
            InvalidValueError: refused before anything was sent.
            MinitronClientError: see `minitron_client.errors` for the causes.
        """
        chosen = _sampling(sampling, options)
        with self._start(prompt, chosen, timeout_s, request_id, is_streaming=False) as stream:
            return stream.final()

    def stream(
        self,
        prompt: str,
        *,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: object,
    ) -> TextStream:
        """One completion, piece by piece; arguments and errors as in `generate`.

        Returns:
            An iterator of `Chunk`, to be used in a `with` block: leaving it early cancels the request
            on the server. The request is on its way when this returns.
        """
        return self._start(prompt, _sampling(sampling, options), timeout_s, request_id, is_streaming=True)

    def metadata(self, model: str | None = None) -> ModelMetadata:
        """Inputs and outputs that the server lists for a model; asked once.

        Raises:
            NotFoundError: the server has no such model.
            ServerConnectionError: no server at the address.
        """
        name = model or self.model
        with self._lock:
            known = self._metadata.get(name)
        if known is None:
            known = self._connection.model_metadata(name, self.connect_timeout_s)
            with self._lock:
                self._metadata[name] = known
        return known

    def health(self, *, timeout_s: float | None = None) -> Health:
        """State of the server and of each model in its repository.

        A server that is not there is a state (`live` False, with the reason), not an error.
        """
        limit_s = _checked_seconds("timeout_s", self.connect_timeout_s if timeout_s is None else timeout_s)
        try:
            live = self._connection.is_server_live(limit_s)
            ready = live and self._connection.is_server_ready(limit_s)
            return Health(live, ready, self._connection.ready_models(limit_s))
        except (ServerConnectionError, UnavailableError) as error:
            return Health(live=False, ready=False, reason=error.message)

    def wait_until_ready(self, timeout_s: float) -> Health:
        """Wait until the server and this client's model are ready.

        Args:
            timeout_s: how long to wait at most.

        Raises:
            DeadlineError: not ready in time; says what was still missing.
            NotFoundError: the server is ready and does not have the model.
        """
        until, pause_s = time.monotonic() + _checked_seconds("timeout_s", timeout_s), _POLL_S
        while True:
            left_s = max(until - time.monotonic(), _POLL_S)
            health = self.health(timeout_s=min(left_s, self.connect_timeout_s))
            if health.ready and health.models.get(self.model):
                return health
            if health.ready and self.model not in health.models:
                served = ", ".join(sorted(health.models)) or "none"
                raise NotFoundError(f"{self.url} has no model {self.model}; it has {served}")
            if time.monotonic() + pause_s > until:
                raise DeadlineError(f"{self.url} is not ready after {timeout_s:g} s: {self._missing(health)}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_POLL_S)

    def close(self) -> None:
        """Cancel what runs and close the channel; may be called twice and from any thread."""
        self._connection.close()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(
        self,
        prompt: str,
        sampling: SamplingParams,
        timeout_s: float | None,
        request_id: str | None,
        *,
        is_streaming: bool,
    ) -> TextStream:
        limit_s = _checked_seconds("timeout_s", self.timeout_s if timeout_s is None else timeout_s)
        metadata = self.metadata()
        key = request_id or uuid.uuid4().hex
        request = text_request(metadata, prompt, sampling, request_id=key, is_streaming=is_streaming)
        return TextStream(
            self._connection.open_stream(request, limit_s),
            CompletionBuilder(sampling),
            request_id=key,
            is_streaming=is_streaming,
            on_cancel=lambda: self._send_stop(stop_request(metadata, key)),
            on_error=self._forget_metadata,
        )

    def _send_stop(self, request: InferRequest | None) -> None:
        """Free the slot on the server; nobody waits for the outcome, so a failure is only logged."""
        if request is None:
            return
        try:
            for _ in self._connection.open_stream(request, _STOP_TIMEOUT_S):
                pass
        except MinitronClientError as error:
            _log.debug("stop of request %s: %s", request.request_id, error)

    def _forget_metadata(self) -> None:
        """After an error the server may be another one: look again before the next request."""
        with self._lock:
            self._metadata.clear()

    def _missing(self, health: Health) -> str:
        if not health.live:
            return health.reason or "the server does not say it is live"
        waiting = sorted(name for name, ready in health.models.items() if not ready)
        return f"models not ready: {', '.join(waiting)}" if waiting else "the server does not say it is ready"


class TextStream:
    """One running request: an iterator of chunks and a context manager.

    Leaving the `with` block, or `close()`, before the end cancels the request on the server.
    Iterate in one thread; `close()` may be called from any.
    """

    def __init__(
        self,
        responses: ResponseStream,
        builder: CompletionBuilder,
        *,
        request_id: str,
        is_streaming: bool,
        on_cancel: Callable[[], None],
        on_error: Callable[[], None],
    ) -> None:
        self.request_id = request_id
        self._responses, self._builder, self._is_streaming = responses, builder, is_streaming
        self._on_cancel, self._on_error = on_cancel, on_error
        self._started_s = time.monotonic()
        self._ttft_s: float | None = None
        self._total_s: float | None = None  # set at the end, whichever end it is
        self._error: MinitronClientError | None = None
        self._lock = threading.Lock()

    @property
    def text(self) -> str:
        """The text so far."""
        return self._builder.text

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        """The next piece of text.

        Raises:
            MinitronClientError: the request failed; raised again by every later call.
        """
        if self._error is not None:
            raise self._error
        if self._total_s is not None:
            raise StopIteration
        try:
            return self._next_chunk()
        except StopIteration:
            self._end()
            raise
        except MinitronClientError as error:
            self._fail(error)
            raise

    def final(self) -> Completion:
        """Read to the end and give the whole completion; after an early close, what had come.

        Raises:
            MinitronClientError: the request failed.
        """
        for _ in self:
            pass
        total_s = self._total_s if self._total_s is not None else self._elapsed_s()
        return self._builder.completion(Timings(total_s, self._ttft_s), self.request_id)

    def close(self) -> None:
        """Cancel the request on the server unless it has ended; may be called twice."""
        if not self._end():
            return
        self._builder.cancel()
        self._responses.cancel()
        self._on_cancel()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next_chunk(self) -> Chunk:
        for response in self._responses:
            chunk = self._builder.add(response)
            if chunk is not None:
                if self._is_streaming and self._ttft_s is None and chunk.text:
                    self._ttft_s = self._elapsed_s()
                return chunk
        raise StopIteration

    def _fail(self, error: MinitronClientError) -> None:
        error.request_id = error.request_id or self.request_id
        self._error = error
        self._end()
        self._responses.cancel()
        if isinstance(error, (DeadlineError, ProtocolError)):  # the server may still be generating
            self._on_cancel()
        self._on_error()

    def _end(self) -> bool:
        """Note the end; False if it was noted before."""
        with self._lock:
            if self._total_s is not None:
                return False
            self._total_s = self._elapsed_s()
            return True

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started_s


def _sampling(sampling: SamplingParams | None, options: dict[str, object]) -> SamplingParams:
    if sampling is None:
        return SamplingParams.of(options)
    if options:
        raise InvalidValueError(f"give sampling= or {', '.join(sorted(options))}=, not both")
    return sampling


def _checked_seconds(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InvalidValueError(f"{name} must be a positive, finite number of seconds, got {value!r}")
    return float(value)
