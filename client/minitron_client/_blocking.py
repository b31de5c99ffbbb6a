"""Blocking calls to one server over one gRPC channel, and the responses to one of them.

Imported at the first call, because grpc takes its time. It knows grpc's threads and its behaviour after a
fork and after an interrupt. Messages, channel options and what a failure means are `_triton.py`'s.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import grpc

from minitron_client._fork import CallMark, new_lock
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
from minitron_client.errors import ClientClosedError, MinitronClientError
from minitron_client.settings import TlsConfig, check_url
from minitron_client.tensors import InferRequest, InferResponse, ModelMetadata

_log = logging.getLogger("minitron_client")

LOCK_ERRORS = ("cannot release un-acquired lock", "release unlocked lock")
"""What Python says, of an RLock and of a Lock, when one is given back that is not held."""


class Connection:
    """One gRPC channel to one server, shared by all threads of a process.

    Args:
        url: HOST:PORT. Nothing is sent before the first call.
        tls: None for plain text.

    Attributes:
        is_closed: `close` was called: what fails from then on, fails by it.
    """

    def __init__(self, url: str, tls: TlsConfig | None = None) -> None:
        self.url = check_url(url)
        self._tls = tls
        self._lock = new_lock()
        self._calls: weakref.WeakSet[Any] = weakref.WeakSet()
        self._channel: Any = None
        self._stub: Any = None
        self._pid = os.getpid()
        self.is_closed = False

    def ask(self, name: str, timeout_s: float, headers: Headers = (), /, **fields: str) -> Any:
        """One of `SMALL_CALLS`, read.

        Raises:
            MinitronClientError: the call failed.
        """
        request_type, read = SMALL_CALLS[name]
        message = getattr(messages(), request_type)(**fields)
        with CallMark():
            stub = self._open()
            try:
                with self._leaving_at_interrupt():
                    return read(getattr(stub, name)(message, timeout=timeout_s, metadata=headers))
            except ValueError as error:  # grpc's way to say that close() came in between
                raise ClientClosedError(f"the client for {self.url} was closed") from error
            except grpc.RpcError as error:
                if self.is_closed:
                    raise ClientClosedError(f"the client for {self.url} was closed while it asked") from None
                raise small_call_error(*status_of(error), self.url, timeout_s) from None

    def describe(self, model: str, timeout_s: float, headers: Headers = ()) -> ModelMetadata:
        """What the model takes and gives, and whether it is decoupled.

        Raises:
            NotFoundError: the server has no such model.
        """
        answer = self.ask("ModelMetadata", timeout_s, headers, name=model)
        is_decoupled: bool | None = None
        try:
            config = self.ask("ModelConfig", timeout_s, headers, name=model)
            is_decoupled = bool(config.model_transaction_policy.decoupled)
        except MinitronClientError as error:  # closed to callers: a stream works for either kind
            _log.debug("configuration of %s: %s", model, error)
        return read_metadata(answer, is_decoupled)

    def parameters(self, model: str, timeout_s: float, headers: Headers = ()) -> dict[str, str]:
        """The parameters in the model's configuration, by name.

        Raises:
            NotFoundError: the server has no such model.
        """
        return read_parameters(self.ask("ModelConfig", timeout_s, headers, name=model))

    def open(
        self,
        request: InferRequest,
        left_s: float,
        headers: Headers = (),
        *,
        timeout_s: float | None = None,
        is_streamed: bool = True,
    ) -> Responses:
        """Send one request, on a stream of its own that is closed for sending, or as a unary call.

        Args:
            request: what to ask.
            left_s: deadline of the call.
            headers: gRPC metadata.
            timeout_s: what the caller gave for all attempts, for the error that names it.
            is_streamed: False for a model that answers once.
        """
        mark, message = CallMark(), request_message(request)
        stub = self._open()
        with self._leaving_at_interrupt():
            try:
                if is_streamed:
                    # One stream per request: its end is the end of the answer, whatever is flagged.
                    call = stub.ModelStreamInfer(message, timeout=left_s, metadata=headers)
                else:
                    call = stub.ModelInfer.future(message, timeout=left_s, metadata=headers)
            except ValueError as error:
                raise ClientClosedError(f"the client for {self.url} was closed") from error
        self._calls.add(call)
        reader = ResponseReader(self.url, request.request_id, left_s if timeout_s is None else timeout_s)
        return (Responses if is_streamed else Answer)(call, reader, self, mark)

    def close(self) -> None:
        """Cancel every open call and close the channel; may be called twice and from any thread."""
        with self._lock:
            self.is_closed = True
            channel, self._channel, self._stub = self._channel, None, None
        if self._pid != os.getpid():  # the parent's: a child has no business with it
            return
        for call in list(self._calls):
            call.cancel()
        if channel is not None:
            channel.close()

    def leave(self, call: Any) -> None:
        """Give the channel up after an interrupt; what comes next makes a new one.

        An exception that a signal handler raises inside grpc can leave a lock of the channel held for ever,
        so that whoever touches it next may wait for ever: a thread that nobody waits for ends the call.
        """
        with self._lock:
            channel, self._channel, self._stub = self._channel, None, None
        if call is not None:
            self._calls.discard(call)
        is_shared = bool(self._calls)  # other threads' calls go on, if they can
        threading.Thread(target=_retire, args=(channel, call, is_shared), daemon=True).start()

    @contextlib.contextmanager
    def _leaving_at_interrupt(self) -> Iterator[None]:
        """Around grpc's own code: an interrupt in it gives the channel up."""
        try:
            yield
        except BaseException as error:
            interrupt = _interrupt_in(error)
            if interrupt is None:
                raise
            self.leave(None)
            raise interrupt from None

    def _open(self) -> Any:
        """The stub, with its channel, made at the first call of each process."""
        with self._lock:
            if self.is_closed:
                raise ClientClosedError(f"the client for {self.url} was closed; make a new one")
            if self._stub is None or self._pid != os.getpid():
                self._pid, self._calls = os.getpid(), weakref.WeakSet()
                self._channel, self._stub = make_stub(grpc, self.url, self._tls)
            return self._stub


class Responses:
    """The responses to one request, in order; read by one thread, cancelled by any."""

    def __init__(self, call: Any, reader: ResponseReader, connection: Connection, mark: CallMark) -> None:
        self._call, self._reader, self._connection, self._mark = call, reader, connection, mark
        self._is_cancelled = False
        self._is_left = False

    def __iter__(self) -> Iterator[InferResponse]:
        return self

    def __next__(self) -> InferResponse:
        """The next response.

        Raises:
            StopIteration: `read` gave None.
            MinitronClientError: as `read`.
        """
        response = self.read()
        if response is None:
            raise StopIteration
        return response

    def read(self) -> InferResponse | None:
        """The next response; None once the RPC has been read to its end, or after `cancel`.

        Raises:
            MinitronClientError: the server's error, the deadline, or a connection that went.
            ClientClosedError: the request is that of the process which forked this one.
        """
        self._mark.check()
        try:
            response = self._next()
        except BaseException as error:
            self._mark.end()
            self._leave_at_interrupt(error)
            raise
        if response is None:
            self._mark.end()
        return response

    def cancel(self) -> None:
        """End the RPC; the reading stops without an error. A parent's goes on."""
        self._is_cancelled = True
        if not self._is_left and not self._mark.is_foreign:
            self._call.cancel()
        self._mark.end()

    def _next(self) -> InferResponse | None:
        try:
            message = next(self._call, None)
        except grpc.RpcError as error:
            self._end_by(*status_of(error))
            return None
        if message is None:
            if not self._is_cancelled:
                self._reader.check_whole()
            return None
        if message.error_message:
            self._drain()
            raise self._reader.refusal(message.error_message)
        return self._reader.take(message.infer_response)

    def _end_by(self, code: str, details: str) -> None:
        """The RPC has ended by this status, which is no error where it was cancelled here."""
        if self._is_cancelled:
            return
        if self._connection.is_closed:
            raise ClientClosedError("the client was closed while the request ran") from None
        raise self._reader.error(code, details) from None

    def _leave_at_interrupt(self, error: BaseException) -> None:
        interrupt = _interrupt_in(error)
        if interrupt is not None:
            self._is_left = True
            self._connection.leave(self._call)
            raise interrupt from None

    def _drain(self) -> None:
        """Read on to the end of the RPC after an error, for a moment at most."""
        timer = threading.Timer(DRAIN_S, self._call.cancel)
        timer.start()
        try:
            for _ in self._call:
                pass
        except grpc.RpcError as error:
            _log.debug("after an error the stream went on: %s", status_of(error)[0])
        finally:
            timer.cancel()
            timer.join()


class Answer(Responses):
    """The one response to a unary call."""

    def _next(self) -> InferResponse | None:
        """The response, then None; errors as on a stream."""
        if self._reader.num_responses:
            return None
        try:
            return self._reader.take(self._call.result())
        except grpc.FutureCancelledError:  # by us: a server's CANCELLED is an RpcError
            self._end_by("CANCELLED", "the call was cancelled")
            return None
        except grpc.RpcError as error:
            self._end_by(*status_of(error))
            return None


def _interrupt_in(error: BaseException) -> BaseException | None:
    """The interrupt that grpc was left by, also when its own tidying failed after it."""
    if isinstance(error, RuntimeError) and str(error) in LOCK_ERRORS:
        error = error.__context__ or error
    return None if isinstance(error, Exception) else error


def _retire(channel: Any, call: Any, is_shared: bool) -> None:
    """End a call on a channel that may have a lock held for ever: this may never return."""
    if call is not None:
        call.cancel()
    if channel is not None and not is_shared:
        channel.close()
