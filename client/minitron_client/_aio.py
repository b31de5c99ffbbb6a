"""Awaited calls to one server over one grpc.aio channel, and the responses to one of them.

Imported at the first call, because grpc takes its time. It knows grpc.aio and its traps. Messages, channel
options and what a failure means are `_triton.py`'s.
"""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from typing import Any, ClassVar

import grpc
import grpc.aio

from minitron_client._triton import (
    DRAIN_S,
    SMALL_CALLS,
    Headers,
    ResponseReader,
    make_stub,
    messages,
    read_metadata,
    read_parameters,
    request_message,
    small_call_error,
    status_of,
)
from minitron_client.errors import AuthError, ClientClosedError, MinitronClientError, UnsupportedError
from minitron_client.settings import TlsConfig
from minitron_client.tensors import InferRequest, InferResponse, ModelMetadata

_log = logging.getLogger("minitron_client")
_LOCAL_CANCELLATION = "Locally cancelled by application!"
"""grpc.aio's sentence for its own cancel; one from the server raises the same exception."""


class AioConnection:
    """One channel to one server; belongs to the event loop it was made in.

    Args:
        url: HOST:PORT. Nothing is sent before the first call.
        tls: None for plain text.

    Raises:
        ClientClosedError: this process is the child of one that had such a channel open when it forked.
    """

    _alive: ClassVar[weakref.WeakSet[AioConnection]] = weakref.WeakSet()
    _is_fork: ClassVar[bool] = False

    def __init__(self, url: str, tls: TlsConfig | None = None) -> None:
        if self._is_fork:
            raise ClientClosedError(
                "this process was forked while grpc.aio was in use, which does not survive a fork; use "
                "MinitronClient here, or start the process with spawn"
            )
        self._alive.add(self)
        self.url = url
        self._channel, self._stub = make_stub(grpc.aio, url, tls)

    async def ask(self, name: str, timeout_s: float, headers: Headers = (), /, **fields: str) -> Any:
        """One of `SMALL_CALLS`, read.

        Raises:
            MinitronClientError: the call failed.
        """
        request_type, read = SMALL_CALLS[name]
        message = getattr(messages(), request_type)(**fields)
        try:
            return read(await getattr(self._stub, name)(message, timeout=timeout_s, metadata=headers))
        except grpc.RpcError as error:
            raise small_call_error(*status_of(error), self.url, timeout_s) from None

    async def describe(self, model: str, timeout_s: float, headers: Headers = ()) -> ModelMetadata:
        """What the model takes and gives, and whether it is decoupled.

        Raises:
            NotFoundError: the server has no such model.
        """
        answer, is_decoupled = await asyncio.gather(
            self.ask("ModelMetadata", timeout_s, headers, name=model),
            self._is_decoupled(model, timeout_s, headers),
        )
        return read_metadata(answer, is_decoupled)

    async def _is_decoupled(self, model: str, timeout_s: float, headers: Headers) -> bool | None:
        try:
            config = await self.ask("ModelConfig", timeout_s, headers, name=model)
        except (AuthError, UnsupportedError):  # closed to callers: a stream works for either kind
            return None
        except MinitronClientError:  # the metadata's error is the one to tell
            return None
        return bool(config.model_transaction_policy.decoupled)

    async def parameters(self, model: str, timeout_s: float, headers: Headers = ()) -> dict[str, str]:
        """The parameters in the model's configuration, by name.

        Raises:
            NotFoundError: the server has no such model.
        """
        return read_parameters(await self.ask("ModelConfig", timeout_s, headers, name=model))

    async def open(
        self,
        request: InferRequest,
        left_s: float,
        headers: Headers = (),
        *,
        timeout_s: float | None = None,
        is_streamed: bool = True,
    ) -> AioResponses:
        """Send one request, on a stream of its own that is closed for sending, or as a unary call.

        Args:
            request: what to ask.
            left_s: deadline of the call.
            headers: gRPC metadata.
            timeout_s: what the caller gave for all attempts, for the error that names it.
            is_streamed: False for a model that answers once.
        """
        message = request_message(request)
        reader = ResponseReader(self.url, request.request_id, left_s if timeout_s is None else timeout_s)
        if not is_streamed:
            return AioAnswer(self._stub.ModelInfer(message, timeout=left_s, metadata=headers), reader)
        # One stream per request: the end of the RPC is then the end of the answer, whatever is flagged.
        call = self._stub.ModelStreamInfer(iter((message,)), timeout=left_s, metadata=headers)
        return AioResponses(call, reader)

    async def close(self) -> None:
        """Close the channel; calls that still run are cancelled."""
        self._alive.discard(self)
        await self._channel.close(None)

    @classmethod
    def _after_fork(cls) -> None:
        cls._is_fork = cls._is_fork or len(cls._alive) > 0


os.register_at_fork(after_in_child=AioConnection._after_fork)


class AioResponses:
    """The responses to one request, in order; read by one task, cancelled by any."""

    def __init__(self, call: Any, reader: ResponseReader) -> None:
        self._call, self._reader = call, reader
        # Cheaper for each message than call.read(); a unary call has none.
        self._messages: Any = call.__aiter__() if hasattr(call, "__aiter__") else None
        self._is_cancelled = False

    async def read(self) -> InferResponse | None:
        """The next response; None once the RPC has been read to its end, or after `cancel`.

        Raises:
            MinitronClientError: the server's error, the deadline, or a connection that went.
            asyncio.CancelledError: the reading task was cancelled, and with it the RPC.
        """
        try:
            message = await self._messages.__anext__()
        except StopAsyncIteration:
            if not self._is_cancelled:
                self._reader.check_whole()
            return None
        except grpc.RpcError as error:
            if self._is_cancelled:
                return None
            raise self._reader.error(*status_of(error)) from None
        except asyncio.CancelledError:
            if self._is_cancelled:
                return None
            await self._raise_if_the_server_s()
            raise
        if message.error_message:
            await self._drain()
            raise self._reader.refusal(message.error_message)
        return self._reader.take(message.infer_response)

    def cancel(self) -> None:
        """End the RPC; the reading stops without an error."""
        self._is_cancelled = True
        self._call.cancel()

    async def _raise_if_the_server_s(self) -> None:
        if not self._call.done():
            return
        code, details = await self._call.code(), await self._call.details()
        if details != _LOCAL_CANCELLATION:
            raise self._reader.error(code.name, details or "") from None

    async def _drain(self) -> None:
        """Read on to the end of the RPC after an error, for a moment at most."""
        try:
            await asyncio.wait_for(self._read_on(), DRAIN_S)
        except (grpc.RpcError, asyncio.TimeoutError) as error:
            _log.debug("after an error the stream went on: %s", type(error).__name__)
            self._call.cancel()

    async def _read_on(self) -> None:
        async for _ in self._messages:
            pass


class AioAnswer(AioResponses):
    """The one response to a unary call."""

    async def read(self) -> InferResponse | None:
        """The response, then None; errors as on a stream."""
        if self._reader.num_responses:
            return None
        try:
            return self._reader.take(await self._call)
        except grpc.RpcError as error:
            if self._is_cancelled:
                return None
            raise self._reader.error(*status_of(error)) from None
        except asyncio.CancelledError:
            if self._is_cancelled:
                return None
            await self._raise_if_the_server_s()
            raise
