"""Awaited calls to one server over one grpc.aio channel, and the responses to one of them.

Imported at the first call, because grpc takes its time. It knows grpc.aio and its traps. Messages, channel
options and what a failure means are `_triton.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ClassVar, NoReturn

import grpc
import grpc.aio

from minitron_client._fork import CallMark
from minitron_client._triton import (
    DRAIN_S,
    SMALL_CALLS,
    Headers,
    ResponseReader,
    leaves_addresses_open,
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
            with CallMark():
                return read(await getattr(self._stub, name)(message, timeout=timeout_s, metadata=headers))
        except grpc.RpcError as error:
            told = (*status_of(error), self.url, timeout_s)
            if leaves_addresses_open(told[1], self.url):
                raise await asyncio.to_thread(small_call_error, *told) from None
            raise small_call_error(*told) from None

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
        mark, message = CallMark(), request_message(request)
        reader = ResponseReader(self.url, request.request_id, left_s if timeout_s is None else timeout_s)
        # One stream per request: the end of the RPC is then the end of the answer, whatever is flagged.
        call = (self._stub.ModelStreamInfer if is_streamed else self._stub.ModelInfer)(
            message, timeout=left_s, metadata=headers
        )
        return (AioResponses if is_streamed else AioAnswer)(call, reader, mark)

    async def close(self) -> None:
        """Close the channel; calls that still run are cancelled."""
        self._alive.discard(self)
        await self._channel.close(None)

    @classmethod
    def _after_fork(cls) -> None:
        cls._is_fork = cls._is_fork or len(cls._alive) > 0


os.register_at_fork(after_in_child=AioConnection._after_fork)


class AioResponses:
    """The responses to one request, in order; read by one task, cancelled by any.

    `read` is all that most callers need. It is made of three steps, and a stream takes them itself: a
    coroutine more for each token is a tenth of what the client adds to it.

    Attributes:
        next_message: awaited, gives the next message as it came; an exception is for `end_by`.
    """

    def __init__(self, call: Any, reader: ResponseReader, mark: CallMark) -> None:
        self._call, self._reader, self._mark = call, reader, mark
        self._is_cancelled = False
        self.next_message = self._messages()

    async def read(self) -> InferResponse | None:
        """The next response; None once the RPC has been read to its end, or after `cancel`.

        Raises:
            MinitronClientError: the server's error, the deadline, or a connection that went.
            asyncio.CancelledError: the reading task was cancelled, and with it the RPC.
        """
        try:
            message = await self.next_message()
        except BaseException as error:
            await self.end_by(error)
            return None
        return self.take(message) or await self.refuse(message)

    def take(self, message: Any) -> InferResponse | None:
        """The response that a message brings; None where it brings an error, for `refuse`.

        Raises:
            ProtocolError: as `ResponseReader.take`.
        """
        return None if message.error_message else self._reader.take(message.infer_response)

    async def refuse(self, message: Any) -> NoReturn:
        """Raise the error that a message brings, when the RPC has been read to its end.

        Raises:
            MinitronClientError: always.
        """
        await self._drain()
        self._mark.end()
        raise self._reader.refusal(message.error_message)

    async def end_by(self, error: BaseException) -> None:
        """What the exception means that `next_message` ended by: it returns at the end of the answer.

        Raises:
            MinitronClientError: the deadline, a connection that went, or an answer that is not whole.
            asyncio.CancelledError: the reading task was cancelled, and with it the RPC.
        """
        self._mark.end()
        if isinstance(error, asyncio.CancelledError) and _is_task_cancelled():
            raise error
        ends = (StopAsyncIteration, grpc.RpcError, asyncio.CancelledError)
        if self._is_cancelled and isinstance(error, ends):
            return
        if isinstance(error, StopAsyncIteration):
            self._reader.check_whole()
            return
        if isinstance(error, grpc.RpcError):
            raise self._reader.error(*status_of(error)) from None
        if isinstance(error, asyncio.CancelledError):
            await self._raise_if_the_server_s()
        raise error

    def cancel(self) -> None:
        """End the RPC; the reading stops without an error."""
        self._is_cancelled = True
        self._mark.end()
        self._call.cancel()

    def _messages(self) -> Callable[[], Awaitable[Any]]:
        messages: AsyncIterator[Any] = self._call.__aiter__()  # cheaper for each message than call.read()
        return messages.__anext__

    async def _raise_if_the_server_s(self) -> None:
        if not self._call.done():
            return
        code, details = await self._call.code(), await self._call.details()
        # Any other code is that of a call which ended in the moment that the task was cancelled.
        if code is grpc.StatusCode.CANCELLED and details != _LOCAL_CANCELLATION:
            raise self._reader.error(code.name, details or "") from None

    async def _drain(self) -> None:
        """Read on to the end of the RPC after an error, for a moment at most."""
        reading = asyncio.create_task(self._read_on())
        try:
            await asyncio.wait({reading}, timeout=DRAIN_S)  # wait_for() may lose a cancel
        finally:
            if not reading.done():
                _log.debug("after an error the stream went on")
                self._call.cancel()
                reading.cancel()

    async def _read_on(self) -> None:
        with contextlib.suppress(StopAsyncIteration, grpc.RpcError):
            while True:
                await self.next_message()


def _is_task_cancelled() -> bool:
    """Whether the running task is being cancelled; Python 3.10 does not tell, and the call's end decides."""
    task = asyncio.current_task()
    return bool(getattr(task, "cancelling", int)())


class AioAnswer(AioResponses):
    """The one response to a unary call."""

    def take(self, message: Any) -> InferResponse:
        """The response; errors as on a stream."""
        return self._reader.take(message)

    def _messages(self) -> Callable[[], Awaitable[Any]]:
        async def answer() -> Any:
            if self._reader.num_responses:
                raise StopAsyncIteration
            return await self._call

        return answer
