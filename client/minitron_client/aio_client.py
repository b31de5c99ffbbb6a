"""The awaited client: the same methods as `MinitronClient`, thousands of requests at once on one event loop.

A thin shell: what a request is and when it is tried again is `exchange.py`'s, what goes over the wire is
`_aio.py`'s; this module knows only what to await in which order.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from minitron_client._triton import Headers, messages, small_call_error
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
from minitron_client.tensors import InferRequest, ModelMetadata
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
    from minitron_client._aio import AioConnection, AioResponses

_log = logging.getLogger("minitron_client")
_T = TypeVar("_T")


class AsyncMinitronClient:
    """A client of one server, or of several that stand in for each other; belongs to one event loop.

        async with AsyncMinitronClient("127.0.0.1:8001") as client:
            print((await client.generate("def add(a, b):", max_tokens=32)).text)
            async with client.stream("Once upon a time", top_p=0.9, seed=7) as stream:
                async for chunk in stream:
                    print(chunk.text, end="", flush=True)

    Arguments, environment and errors are those of `MinitronClient`.
    """

    _is_loaded: ClassVar[bool] = False
    """grpc has been imported."""

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
        self._connections: dict[str, AioConnection] = {}
        self._metadata: dict[tuple[str, str], ModelMetadata] = {}
        self._rules: dict[tuple[str, str], TokenRules] = {}
        self._tokenizers: dict[tuple[str, str], Tokenizer] = {}
        self._asking: dict[tuple[str, str], asyncio.Task[Any]] = {}
        self._streams: weakref.WeakSet[AsyncTextStream] = weakref.WeakSet()
        self._stops: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._is_closed = False

    @property
    def url(self) -> str:
        """HOST:PORT of the server; of all of them with commas between."""
        return ",".join(self.settings.urls)

    @property
    def model(self) -> str:
        """The model that answers."""
        return self.settings.model

    async def generate(
        self,
        prompt: PlainPrompt,
        *,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **options: object,
    ) -> Completion:
        """One completion, when it is whole; see `MinitronClient.generate`."""
        chosen = chosen_sampling(sampling, options)
        exchange = Exchange(
            self.settings, self._pool, prompt, chosen, is_streaming=False,
            timeout_s=timeout_s, request_id=request_id, headers=headers,
        )  # fmt: skip
        async with AsyncTextStream(self, exchange) as stream:
            return await stream.final()

    def stream(
        self,
        prompt: PlainPrompt,
        *,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **options: object,
    ) -> AsyncTextStream:
        """One completion, piece by piece; not awaited itself. See `MinitronClient.stream`.

        Returns:
            An asynchronous iterator of `Chunk`, to be used in an `async with` block: leaving it early
            cancels the request on the server. The request is sent on entering.
        """
        exchange = Exchange(
            self.settings, self._pool, prompt, chosen_sampling(sampling, options), is_streaming=True,
            timeout_s=timeout_s, request_id=request_id, headers=headers,
        )  # fmt: skip
        return AsyncTextStream(self, exchange)

    async def generate_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 32,
        sampling: SamplingParams | None = None,
        on_progress: Callable[[BatchProgress], None] | None = None,
        timeout_s: float | None = None,
        **options: object,
    ) -> list[Completion | MinitronClientError]:
        """Completions of many prompts, in their order; see `MinitronClient.generate_batch`."""
        batch = Batch(
            prompts, chosen_sampling(sampling, options), concurrency=concurrency, on_progress=on_progress
        )

        async def work() -> None:
            for index, prompt, chosen in batch:
                try:
                    batch.done(index, await self.generate(prompt, sampling=chosen, timeout_s=timeout_s))
                except MinitronClientError as error:
                    batch.done(index, error)

        workers = [asyncio.create_task(work()) for _ in range(batch.num_workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return batch.results()

    async def metadata(self, model: str | None = None) -> ModelMetadata:
        """Inputs and outputs that the server lists for a model; asked once for each server."""
        headers, limit_s = call_headers(self.settings), self.settings.connect_timeout_s
        return await self._describe(self._pool.pick(), model or self.model, limit_s, headers)

    async def parameters(self, model: str | None = None) -> dict[str, str]:
        """Parameters in a model's configuration, by name; see `MinitronClient.parameters`."""
        headers, limit_s = call_headers(self.settings), self.settings.connect_timeout_s
        return await self._connection(self._pool.pick()).parameters(model or self.model, limit_s, headers)

    async def tokenize(self, text: str) -> list[int]:
        """The token ids that the server makes of a prompt; see `MinitronClient.tokenize`."""
        return (await self.tokenizer()).encode(text)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids as the server would give it; see `MinitronClient.detokenize`."""
        return (await self.tokenizer()).decode(token_ids)

    async def tokenizer(self) -> Tokenizer:
        """The served model's tokenizer; see `MinitronClient.tokenizer`."""
        return await self._tokenizer(self._pool.pick(), call_headers(self.settings))

    async def health(self, *, timeout_s: float | None = None) -> Health:
        """State of the server and of each model in its repository; see `MinitronClient.health`."""
        limit_s = checked_seconds(
            "timeout_s", self.settings.connect_timeout_s if timeout_s is None else timeout_s
        )
        urls = self.settings.urls
        states = await asyncio.gather(*(self._health_of(url, limit_s) for url in urls))
        return merge_health(dict(zip(urls, states, strict=True)))

    async def wait_until_ready(self, timeout_s: float) -> Health:
        """Wait until a server and this client's model are ready; see `MinitronClient.wait_until_ready`."""
        wait = ReadyWait(self.url, self.model, timeout_s)
        while True:
            health = await self.health(timeout_s=min(wait.left_s, self.settings.connect_timeout_s))
            pause_s = wait.pause_s(health)
            if pause_s is None:
                return health
            await asyncio.sleep(pause_s)

    async def close(self) -> None:
        """Cancel what runs and close the channels; takes a second at most. May be called twice."""
        self._is_closed = True
        for stream in list(self._streams):
            stream._abandon(ClientClosedError("the client was closed while the request ran"))
        for task in list(self._asking.values()):
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)
        if self._stops:
            await asyncio.wait(self._stops, timeout=STOP_TIMEOUT_S)
        for stop in list(self._stops):
            stop.cancel()
        await asyncio.gather(*self._stops, return_exceptions=True)
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            await connection.close()

    async def __aenter__(self) -> AsyncMinitronClient:
        await self._load()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _health_of(self, url: str, limit_s: float) -> Health:
        headers, connection = call_headers(self.settings), self._connection(url)
        try:
            live = await connection.ask("ServerLive", limit_s, headers)
            ready = live and await connection.ask("ServerReady", limit_s, headers)
            return Health(live, ready, await self._models_of(connection, limit_s, headers))
        except (ServerConnectionError, UnavailableError) as error:
            return Health(live=False, ready=False, reason=error.message, advice=error.advice)

    async def _models_of(
        self, connection: AioConnection, limit_s: float, headers: Headers
    ) -> dict[str, bool]:
        try:
            models: dict[str, bool] = await connection.ask("RepositoryIndex", limit_s, headers)
        except AuthError:  # open to the administrator alone
            names = dict.fromkeys((self.model, *KNOWN_MODELS))
            asked = (connection.ask("ModelReady", limit_s, headers, name=name) for name in names)
            models = dict(zip(names, await asyncio.gather(*asked), strict=True))
            models = {name: ready for name, ready in models.items() if ready or name == self.model}
        return models

    async def _describe(self, url: str, model: str, limit_s: float, headers: Headers) -> ModelMetadata:
        async def ask() -> ModelMetadata:
            return await self._connection(url).describe(model, limit_s, headers)

        return await self._once(self._metadata, (url, model), ask, limit_s)

    async def _rules_of(self, url: str, headers: Headers) -> TokenRules:
        """What surrounds the engine on this server; nothing where it has no text models."""
        limit_s = self.settings.connect_timeout_s

        async def ask() -> TokenRules:
            asked = (self._parameters(url, model, headers) for model in (TOKENIZER_MODEL, TEXT_MODEL))
            return TokenRules.of(*await asyncio.gather(*asked))

        return await self._once(self._rules, (url, "rules of tokens"), ask, limit_s)

    async def _parameters(self, url: str, model: str, headers: Headers) -> dict[str, str]:
        try:
            return await self._connection(url).parameters(model, self.settings.connect_timeout_s, headers)
        except NotFoundError:
            return {}

    async def _tokenizer(self, url: str, headers: Headers) -> Tokenizer:
        limit_s, timeout_s = self.settings.connect_timeout_s, self.settings.timeout_s

        async def ask() -> Tokenizer:
            request = tokenizer_request(await self._describe(url, TOKENIZER_MODEL, limit_s, headers))
            responses = await self._connection(url).open(request, timeout_s, headers, is_streamed=False)
            return read_tokenizer(await responses.read(), await self._rules_of(url, headers))

        return await self._once(self._tokenizers, (url, "tokenizer"), ask, timeout_s)

    async def _once(
        self,
        known: dict[tuple[str, str], _T],
        key: tuple[str, str],
        ask: Callable[[], Coroutine[Any, Any, _T]],
        limit_s: float,
    ) -> _T:
        """What is asked of a server once, with one question for all that wait."""
        await self._load()
        self._connection(key[0])  # refuses after close()
        if key in known:
            return known[key]
        task = self._asking.get(key)
        if task is None:
            task = asyncio.create_task(ask())
            self._asking[key] = task
            task.add_done_callback(lambda done: self._answered(key, done))
        await asyncio.wait({task}, timeout=limit_s)
        if task.cancelled():
            raise ClientClosedError("the client was closed while it asked what the server has")
        if not task.done():
            raise small_call_error("DEADLINE_EXCEEDED", "", key[0], limit_s)
        try:
            answer: _T = task.result()
        except MinitronClientError as error:  # each that waits has a request id of its own
            raise copy.copy(error) from None
        known[key] = answer
        return answer

    def _answered(self, key: tuple[str, str], task: asyncio.Task[Any]) -> None:
        self._asking.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen: those who asked may have left

    async def _load(self) -> None:
        """Import grpc beside the event loop, which would stand still for half a second."""
        if AsyncMinitronClient._is_loaded:
            return
        pool = ThreadPoolExecutor(1)  # its own: the loop's would keep a thread for ever
        try:
            await asyncio.get_running_loop().run_in_executor(pool, _import_grpc)
        finally:
            pool.shutdown(wait=False)
        AsyncMinitronClient._is_loaded = True

    def _connection(self, url: str) -> AioConnection:
        loop = asyncio.get_running_loop()
        if self._is_closed:
            raise ClientClosedError(f"the client for {self.url} was closed; make a new one")
        if self._loop is None:
            self._loop, self._pid = loop, os.getpid()
        if self._pid != os.getpid():
            raise ClientClosedError("the client belongs to the process that forked this one; make a new one")
        if self._loop is not loop:
            raise ClientClosedError("the client was first used in another event loop; make one for each loop")
        if url not in self._connections:
            from minitron_client._aio import AioConnection

            self._connections[url] = AioConnection(url, self.settings.tls)
        return self._connections[url]

    async def _open(self, exchange: Exchange) -> AioResponses:
        """One attempt at a request."""
        url, headers = exchange.next_url(), exchange.headers
        metadata = await self._describe(url, self.model, exchange.connect_timeout_s, headers)
        rules = await self._rules_of(url, headers) if exchange.needs_rules(metadata) else None
        tokenizer = await self._tokenizer(url, headers) if exchange.needs_tokenizer(metadata) else None
        return await self._connection(url).open(
            exchange.request(metadata, rules, tokenizer),
            exchange.left_s(),
            exchange.headers,
            timeout_s=exchange.timeout_s,
            is_streamed=metadata.is_decoupled is not False,
        )

    def _forget(self, url: str) -> None:
        self._metadata.pop((url, self.model), None)

    def _send_stop(self, exchange: Exchange) -> None:
        """Free the slot on the server; nobody waits for the outcome, but `close` does, for a moment."""
        metadata = self._metadata.get((exchange.url, self.model))
        request = stop_request(metadata, exchange.request_id) if metadata else None
        connection = self._connections.get(exchange.url)
        if request is None or connection is None:
            return
        task = asyncio.create_task(_stop(connection, request, exchange.headers))
        self._stops.add(task)
        task.add_done_callback(self._stops.discard)


class AsyncTextStream:
    """One running request: an asynchronous iterator of chunks and a context manager.

    Leaving the `async with` block, or `close()`, before the end cancels the request on the server.
    One task iterates.
    """

    def __init__(self, client: AsyncMinitronClient, exchange: Exchange) -> None:
        self.request_id = exchange.request_id
        self._client, self._exchange = client, exchange
        self._responses: AioResponses | None = None
        self._is_started = False
        self._left = asyncio.Event()

    @property
    def text(self) -> str:
        """The text so far."""
        return self._exchange.text

    @property
    def usage(self) -> Usage:
        """The token counts so far: with each chunk, where the server counts along; else None."""
        return self._exchange.usage

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        """The next piece of text.

        Raises:
            MinitronClientError: the request failed; raised again by every later call.
        """
        exchange = self._exchange
        while True:
            if exchange.has_ended:
                raise exchange.error or StopAsyncIteration
            try:
                if self._responses is None:
                    self._responses = await self._start()
                responses = self._responses
                try:
                    message = await responses.next_message()
                except BaseException as error:
                    await responses.end_by(error)
                    chunk = exchange.finish() if exchange.error is None else None
                else:
                    chunk = exchange.take(responses.take(message) or await responses.refuse(message))
                if chunk is not None:
                    return chunk
            except MinitronClientError as error:
                await self._recover(error)

    async def final(self) -> Completion:
        """Read to the end and give the whole completion; after an early close, what had come.

        Raises:
            MinitronClientError: the request failed.
        """
        async for _ in self:
            pass
        return self._exchange.completion()

    async def close(self) -> None:
        """Cancel the request on the server unless it has ended; may be called twice and waits for nothing."""
        self._abandon(None)

    async def __aenter__(self) -> AsyncTextStream:
        """Send the request."""
        while self._responses is None and not self._exchange.has_ended:
            try:
                self._responses = await self._start()
            except MinitronClientError as error:
                await self._recover(error)
                if self._exchange.error is not None:
                    raise self._exchange.error from None
            except BaseException:
                self._abandon(None)
                raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _start(self) -> AioResponses:
        if not self._is_started:
            self._is_started = True
            self._exchange.start()
            self._client._streams.add(self)
        responses = await self._client._open(self._exchange)
        if self._exchange.has_ended:  # left meanwhile
            responses.cancel()
            self._client._send_stop(self._exchange)
        return responses

    async def _recover(self, error: MinitronClientError) -> None:
        """Make way for the next attempt, or note the failure."""
        responses, self._responses = self._responses, None
        if responses is not None:
            responses.cancel()
        pause_s = self._exchange.pause_before_retry_s(error)
        if pause_s is None and self._exchange.fail(error):
            self._client._send_stop(self._exchange)
        if isinstance(error, STALE_METADATA_ERRORS):
            self._client._forget(self._exchange.url)
        if pause_s is None:
            return
        left = asyncio.create_task(self._left.wait())
        try:
            await asyncio.wait({left}, timeout=pause_s)  # wait_for() may lose a cancel
        finally:
            left.cancel()

    def _abandon(self, error: MinitronClientError | None) -> None:
        """Leave the request: the caller goes, or the client is closed."""
        if not self._exchange.cancel():
            return
        if error is not None:
            self._exchange.fail(error)
        self._left.set()
        if self._responses is not None:
            self._responses.cancel()
            self._client._send_stop(self._exchange)


def _import_grpc() -> None:
    import_module("minitron_client._aio")
    messages()


async def _stop(connection: AioConnection, request: InferRequest, headers: Headers) -> None:
    try:
        responses = await connection.open(request, STOP_TIMEOUT_S, headers)
        while await responses.read() is not None:
            pass
    except MinitronClientError as error:
        _log.debug("stop of request %s: %s", request.request_id, error)
