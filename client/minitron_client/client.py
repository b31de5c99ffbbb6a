"""The blocking client: shared by threads, one channel to each server, a request for each thread at a time.

A thin shell: what a request is and when it is tried again is `exchange.py`'s, what goes over the wire is
`_blocking.py`'s; this module knows only the order of calls.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from types import TracebackType
from typing import TYPE_CHECKING

from minitron_client._fork import new_lock
from minitron_client._triton import Headers
from minitron_client.batch import Batch, BatchProgress, PlainPrompt, Prompt
from minitron_client.endpoints import EndpointPool
from minitron_client.errors import (
    AuthError,
    ClientClosedError,
    MinitronClientError,
    NotFoundError,
    ServerConnectionError,
    UnavailableError,
)
from minitron_client.exchange import (
    STALE_METADATA_ERRORS,
    STOP_TIMEOUT_S,
    Exchange,
    call_headers,
    chosen_sampling,
)
from minitron_client.readiness import KNOWN_MODELS, ReadyWait, merge_health
from minitron_client.results import Chunk, Completion, Health, Usage
from minitron_client.sampling import SamplingParams
from minitron_client.settings import (
    DEFAULT_CONNECT_TIMEOUT_S,
    DEFAULT_MAX_RETRIES,
    DEFAULT_MODEL,
    DEFAULT_TIMEOUT_S,
    ClientSettings,
    TlsConfig,
    checked_seconds,
)
from minitron_client.tensors import ModelMetadata
from minitron_client.text_request import stop_request
from minitron_client.tokenizer import (
    TEXT_MODEL,
    TOKENIZER_MODEL,
    Tokenizer,
    TokenRules,
    read_tokenizer,
    tokenizer_request,
)

if TYPE_CHECKING:
    from minitron_client._blocking import Connection, Responses

_log = logging.getLogger("minitron_client")
_LEAVE_INTERVAL_S = 0.05
_CLOSED = "the client was closed while the request ran"


class MinitronClient:
    """A client of one server, or of several that stand in for each other; safe to share between threads.

        with MinitronClient("127.0.0.1:8001") as client:
            print(client.generate("def add(a, b):", max_tokens=32).text)
            with client.stream("Once upon a time", top_p=0.9, seed=7) as stream:
                for chunk in stream:
                    print(chunk.text, end="", flush=True)

    After a fork the child makes channels of its own at its first call. Prompts are logged only where the
    variable MINITRON_LOG_PROMPTS is 1.

    Args:
        url: HOST:PORT of the server's gRPC port, or several of them (a list, or commas between): asked in
            turn, those that fail left out for a while. Default: environment variable MINITRON_URL, else
            127.0.0.1:8001. Nothing is sent before the first call.
        model: model that answers: "tensorrt_llm_bls", "ensemble", or any that speaks one of the three
            vocabularies of `text_request.py`.
        timeout_s: deadline of a request over all attempts, from sending to the last response.
        connect_timeout_s: deadline of the small calls that come first (is anyone there).
        max_retries: further attempts at a request that failed before its first token for a reason that
            may pass: not there, not ready, overloaded.
        tls: default: the MINITRON_TLS* variables, else plain text.
        api_key: sent as the header that Triton's `--grpc-restricted-protocol` compares. Default:
            MINITRON_API_KEY.
        headers: further gRPC metadata of every call, for what stands between.

    Raises:
        InvalidValueError: an argument or variable cannot be used; says which.
    """

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        *,
        model: str = DEFAULT_MODEL,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        connect_timeout_s: float = DEFAULT_CONNECT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
        tls: TlsConfig | None = None,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.settings = ClientSettings.of(
            url, model=model, timeout_s=timeout_s, connect_timeout_s=connect_timeout_s,
            max_retries=max_retries, tls=tls, api_key=api_key, headers=headers,
        )  # fmt: skip
        self._pool = EndpointPool(self.settings.urls)
        self._connections: dict[str, Connection] = {}
        self._is_closed = False
        self._metadata: dict[tuple[str, str], ModelMetadata] = {}
        self._rules: dict[str, TokenRules] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        self._streams: weakref.WeakSet[TextStream] = weakref.WeakSet()
        self._lock = new_lock()

    @property
    def url(self) -> str:
        """HOST:PORT of the server; of all of them with commas between."""
        return ",".join(self.settings.urls)

    @property
    def model(self) -> str:
        """The model that answers."""
        return self.settings.model

    def generate(
        self,
        prompt: PlainPrompt,
        *,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **options: object,
    ) -> Completion:
        """One completion, when it is whole.

        Args:
            prompt: text to go on from, or its token ids (model "tensorrt_llm").
            sampling: options as a value; or give them by name (`max_tokens=64, top_p=0.9`).
            timeout_s: deadline of this request; default: the client's.
            request_id: default: a new unique one.
            headers: further gRPC metadata of this request.
            **options: fields of `SamplingParams`.

        Raises:
            InvalidValueError: refused before anything was sent.
            MinitronClientError: see `minitron_client.errors` for the causes.
        """
        exchange = Exchange(
            self.settings, self._pool, prompt, chosen_sampling(sampling, options), is_streaming=False,
            timeout_s=timeout_s, request_id=request_id, headers=headers,
        )  # fmt: skip
        with TextStream(self, exchange) as stream:
            return stream.final()

    def stream(
        self,
        prompt: PlainPrompt,
        *,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **options: object,
    ) -> TextStream:
        """One completion, piece by piece; arguments and errors as in `generate`.

        Returns:
            An iterator of `Chunk`, to be used in a `with` block: leaving it early cancels the request
            on the server. The request is on its way when this returns.
        """
        exchange = Exchange(
            self.settings, self._pool, prompt, chosen_sampling(sampling, options), is_streaming=True,
            timeout_s=timeout_s, request_id=request_id, headers=headers,
        )  # fmt: skip
        return TextStream(self, exchange)

    def generate_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 32,
        sampling: SamplingParams | None = None,
        on_progress: Callable[[BatchProgress], None] | None = None,
        timeout_s: float | None = None,
        **options: object,
    ) -> list[Completion | MinitronClientError]:
        """Completions of many prompts, in their order; an item that failed is its error.

        Args:
            prompts: texts or token ids; or pairs of one and its own `SamplingParams`.
            concurrency: requests in flight at most, one thread each.
            sampling: options of the prompts that have none of their own; or give them by name.
            on_progress: called after each item with a `BatchProgress`.
            timeout_s: deadline of each request; default: the client's.
            **options: fields of `SamplingParams`.

        Raises:
            InvalidValueError: an option or the concurrency is refused; nothing was sent.
        """
        batch = Batch(
            prompts, chosen_sampling(sampling, options), concurrency=concurrency, on_progress=on_progress
        )
        running: set[TextStream] = set()
        if not batch.num_workers:
            return []
        with ThreadPoolExecutor(batch.num_workers, "minitron-batch") as pool:
            workers = [pool.submit(self._work, batch, timeout_s, running) for _ in range(batch.num_workers)]
            try:
                for worker in as_completed(workers):
                    worker.result()
            except BaseException:  # Ctrl-C, or on_progress failed: nothing may go on behind the caller's back
                batch.abandon()
                left = set(workers)
                while left:
                    for stream in list(running):
                        stream.close()
                    left = wait(left, timeout=_LEAVE_INTERVAL_S).not_done
                raise
        return batch.results()

    def metadata(self, model: str | None = None) -> ModelMetadata:
        """Inputs and outputs that the server lists for a model; asked once for each server.

        Raises:
            NotFoundError: the server has no such model.
            ServerConnectionError: no server at the address.
        """
        headers, limit_s = call_headers(self.settings), self.settings.connect_timeout_s
        return self._describe(self._pool.pick(), model or self.model, limit_s, headers)

    def parameters(self, model: str | None = None) -> dict[str, str]:
        """Parameters in a model's configuration, by name; asked anew each time.

        Raises:
            NotFoundError: the server has no such model.
            ServerConnectionError: no server at the address.
        """
        headers, limit_s = call_headers(self.settings), self.settings.connect_timeout_s
        return self._connection(self._pool.pick()).parameters(model or self.model, limit_s, headers)

    def tokenize(self, text: str) -> list[int]:
        """The token ids that the server makes of a prompt, BOS included; its tokenizer is fetched once.

        Raises:
            UnsupportedError: the server does not hand out its tokenizer.
        """
        return self.tokenizer().encode(text)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids as the server would give it.

        Raises:
            UnsupportedError: the server does not hand out its tokenizer.
        """
        return self.tokenizer().decode(token_ids)

    def tokenizer(self) -> Tokenizer:
        """The served model's tokenizer with all of its files; fetched once.

        Raises:
            UnsupportedError: the server does not hand out its tokenizer.
        """
        return self._tokenizer(self._pool.pick(), call_headers(self.settings))

    def health(self, *, timeout_s: float | None = None) -> Health:
        """State of the server and of each model in its repository; of several servers, what any can do.

        A server that is not there is a state (`live` False, with the reason), not an error; the state of
        each is in `servers`.
        """
        limit_s = checked_seconds(
            "timeout_s", self.settings.connect_timeout_s if timeout_s is None else timeout_s
        )
        return merge_health({url: self._health_of(url, limit_s) for url in self.settings.urls})

    def wait_until_ready(self, timeout_s: float) -> Health:
        """Wait until a server and this client's model are ready.

        Args:
            timeout_s: how long to wait at most.

        Raises:
            DeadlineError: not ready in time; says what was still missing.
            NotFoundError: the server is ready and does not have the model.
        """
        wait = ReadyWait(self.url, self.model, timeout_s)
        while True:
            health = self.health(timeout_s=min(wait.left_s, self.settings.connect_timeout_s))
            pause_s = wait.pause_s(health)
            if pause_s is None:
                return health
            time.sleep(pause_s)

    def close(self) -> None:
        """Cancel what runs and close the channels; takes a second at most.

        May be called twice and from any thread.
        """
        ended = [stream._leave(ClientClosedError(_CLOSED)) for stream in list(self._streams)]
        stops = [self._open_stop(exchange) for exchange in ended if exchange is not None]
        for stop in stops:  # all were sent a moment ago, each with a second to go
            _read_stop(stop)
        with self._lock:
            self._is_closed = True
            connections = list(self._connections.values())
        for connection in connections:
            connection.close()

    def __enter__(self) -> MinitronClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self, batch: Batch, timeout_s: float | None, running: set[TextStream]) -> None:
        """One thread's share of a batch."""
        for index, prompt, chosen in batch:
            try:
                exchange = Exchange(
                    self.settings, self._pool, prompt, chosen, is_streaming=False, timeout_s=timeout_s
                )
                with TextStream(self, exchange, running) as stream:
                    batch.done(index, stream.final())
            except MinitronClientError as error:
                batch.done(index, error)

    def _health_of(self, url: str, limit_s: float) -> Health:
        headers, connection = call_headers(self.settings), self._connection(url)
        try:
            live = connection.ask("ServerLive", limit_s, headers)
            ready = live and connection.ask("ServerReady", limit_s, headers)
            return Health(live, ready, self._models_of(connection, limit_s, headers))
        except (ServerConnectionError, UnavailableError) as error:
            return Health(live=False, ready=False, reason=error.message, advice=error.advice)

    def _models_of(self, connection: Connection, limit_s: float, headers: Headers) -> dict[str, bool]:
        try:
            models: dict[str, bool] = connection.ask("RepositoryIndex", limit_s, headers)
        except AuthError:  # open to the administrator alone
            names = dict.fromkeys((self.model, *KNOWN_MODELS))
            models = {name: connection.ask("ModelReady", limit_s, headers, name=name) for name in names}
            models = {name: ready for name, ready in models.items() if ready or name == self.model}
        return models

    def _connection(self, url: str) -> Connection:
        with self._lock:
            if self._is_closed:
                raise ClientClosedError(f"the client for {self.url} was closed; make a new one")
            if url not in self._connections:
                from minitron_client._blocking import Connection

                self._connections[url] = Connection(url, self.settings.tls)
            return self._connections[url]

    def _describe(self, url: str, model: str, limit_s: float, headers: Headers) -> ModelMetadata:
        key = (url, model)
        with self._lock:
            known = self._metadata.get(key)
        if known is None:
            known = self._connection(url).describe(model, limit_s, headers)
            with self._lock:
                self._metadata[key] = known
        return known

    def _rules_of(self, url: str, headers: Headers) -> TokenRules:
        """What surrounds the engine on this server; nothing where it has no text models."""
        with self._lock:
            known = self._rules.get(url)
        if known is None:
            asked = [self._parameters(url, model, headers) for model in (TOKENIZER_MODEL, TEXT_MODEL)]
            known = TokenRules.of(*asked)
            with self._lock:
                self._rules[url] = known
        return known

    def _parameters(self, url: str, model: str, headers: Headers) -> dict[str, str]:
        try:
            return self._connection(url).parameters(model, self.settings.connect_timeout_s, headers)
        except NotFoundError:
            return {}

    def _tokenizer(self, url: str, headers: Headers) -> Tokenizer:
        with self._lock:
            known = self._tokenizers.get(url)
        if known is None:
            limit_s, timeout_s = self.settings.connect_timeout_s, self.settings.timeout_s
            request = tokenizer_request(self._describe(url, TOKENIZER_MODEL, limit_s, headers))
            responses = self._connection(url).open(request, timeout_s, headers, is_streamed=False)
            known = read_tokenizer(responses.read(), self._rules_of(url, headers))
            with self._lock:
                self._tokenizers[url] = known
        return known

    def _open(self, exchange: Exchange) -> Responses:
        """One attempt at a request."""
        url, headers = exchange.next_url(), exchange.headers
        metadata = self._describe(url, self.model, exchange.connect_timeout_s, headers)
        rules = self._rules_of(url, headers) if exchange.needs_rules(metadata) else None
        tokenizer = self._tokenizer(url, headers) if exchange.needs_tokenizer(metadata) else None
        return self._connection(url).open(
            exchange.request(metadata, rules, tokenizer),
            exchange.left_s(),
            exchange.headers,
            timeout_s=exchange.timeout_s,
            is_streamed=metadata.is_decoupled is not False,
        )

    def _forget(self, url: str) -> None:
        with self._lock:
            self._metadata.pop((url, self.model), None)

    def _send_stop(self, exchange: Exchange) -> None:
        """Free the slot on the server; takes a second at most, and a failure is only logged."""
        _read_stop(self._open_stop(exchange))

    def _open_stop(self, exchange: Exchange) -> Responses | None:
        with self._lock:
            metadata = self._metadata.get((exchange.url, self.model))
        request = stop_request(metadata, exchange.request_id) if metadata else None
        if request is None:
            return None
        try:
            return self._connection(exchange.url).open(request, STOP_TIMEOUT_S, exchange.headers)
        except MinitronClientError as error:
            _log.debug("stop of request %s: %s", exchange.request_id, error)
            return None


class TextStream:
    """One running request: an iterator of chunks and a context manager.

    Leaving the `with` block, or `close()`, before the end cancels the request on the server.
    Iterate in one thread; `close()` may be called from any.
    """

    def __init__(
        self, client: MinitronClient, exchange: Exchange, running: set[TextStream] | None = None
    ) -> None:
        self.request_id = exchange.request_id
        self._client, self._exchange = client, exchange
        self._running = running if running is not None else set()
        self._responses: Responses | None = None
        self._left = threading.Event()
        self._running.add(self)
        client._streams.add(self)
        exchange.start()
        while self._responses is None and not exchange.has_ended:
            try:
                self._responses = self._open()
            except MinitronClientError as error:
                self._recover(error)
                if exchange.error is not None:
                    raise exchange.error from None
            except BaseException:
                self.close()
                raise

    @property
    def text(self) -> str:
        """The text so far."""
        return self._exchange.text

    @property
    def usage(self) -> Usage:
        """The token counts so far: with each chunk, where the server counts along; else None."""
        return self._exchange.usage

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        """The next piece of text.

        Raises:
            MinitronClientError: the request failed; raised again by every later call.
        """
        exchange = self._exchange
        while True:
            if exchange.has_ended:
                raise exchange.error or StopIteration
            try:
                if self._responses is None:
                    self._responses = self._open()
                response = self._responses.read()
                if response is not None:
                    chunk = exchange.take(response)
                    if chunk is not None:
                        return chunk
                elif exchange.error is None:
                    held_back = exchange.finish()
                    if held_back is not None:
                        return held_back
            except MinitronClientError as error:
                self._recover(error)

    def final(self) -> Completion:
        """Read to the end and give the whole completion; after an early close, what had come.

        Raises:
            MinitronClientError: the request failed.
        """
        for _ in self:
            pass
        return self._exchange.completion()

    def close(self) -> None:
        """Cancel the request on the server unless it has ended; may be called twice."""
        self._running.discard(self)
        left = self._leave(None)
        if left is not None:
            self._client._send_stop(left)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _recover(self, error: MinitronClientError) -> None:
        """Make way for the next attempt, or note the failure."""
        responses, self._responses = self._responses, None
        if responses is not None:
            responses.cancel()
        pause_s = self._exchange.pause_before_retry_s(error)
        if pause_s is None and self._exchange.fail(error):
            self._client._send_stop(self._exchange)
        if isinstance(error, STALE_METADATA_ERRORS):
            self._client._forget(self._exchange.url)
        if pause_s is not None:
            self._left.wait(pause_s)

    def _open(self) -> Responses:
        responses = self._client._open(self._exchange)
        if self._exchange.has_ended:  # left meanwhile
            responses.cancel()
            self._client._send_stop(self._exchange)
        return responses

    def _leave(self, error: MinitronClientError | None) -> Exchange | None:
        """The caller goes, or the client is closed; the exchange where the server is to be told."""
        if not self._exchange.cancel():
            return None
        if error is not None:
            self._exchange.fail(error)
        self._left.set()
        if self._responses is None:
            return None
        self._responses.cancel()
        return self._exchange


def _read_stop(responses: Responses | None) -> None:
    """Read the answer to a stop to its end; a failure is only logged."""
    try:
        for _ in responses or ():
            pass
    except MinitronClientError as error:
        _log.debug("a stop was not answered: %s", error)
