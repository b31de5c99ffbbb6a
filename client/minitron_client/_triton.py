"""The one module that imports tritonclient, grpc and protobuf, each at first use.

It turns the client's plain values into Triton's protobuf messages and back, holds the channel, and
turns every gRPC failure into an error of `minitron_client.errors`. It knows no tensor's name.
"""

from __future__ import annotations

import logging
import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from minitron_client.errors import (
    ClientClosedError,
    DeadlineError,
    InvalidValueError,
    MinitronClientError,
    ProtocolError,
    ServerConnectionError,
    StreamBrokenError,
    error_from_sentence,
    error_from_status,
)
from minitron_client.tensors import InferRequest, InferResponse, ModelMetadata, Tensor, TensorSpec

_log = logging.getLogger("minitron_client")
_URL = re.compile(r"^(?:\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):(\d{1,5})$")
_DRAIN_S = 1.0
"""How long a failed stream is read on for its end: a server that is left before it keeps a reference."""

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Triton takes more than two pings within five minutes for an attack and hangs up.
    ("grpc.keepalive_time_ms", 300_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A server that restarts is found again within a second, by this client alone.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # In spite of its name, how long one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
)


def model_config_pb2() -> Any:
    """Triton's generated `model_config_pb2` module: the schema of `config.pbtxt`."""
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2


def check_url(url: str) -> str:
    """The address, if it is HOST:PORT.

    Raises:
        InvalidValueError: it has a scheme or a path, or lacks the port.
    """
    match = _URL.match(url)
    if not match or not 0 < int(match[1]) < 65536:
        raise InvalidValueError(
            f"url {url!r} is not HOST:PORT; give the gRPC address without a scheme, such as 127.0.0.1:8001"
        )
    return url


class Connection:
    """One gRPC channel to one server, shared by all threads.

    Args:
        url: HOST:PORT. Nothing is sent before the first call.
    """

    def __init__(self, url: str) -> None:
        self.url = check_url(url)
        self._lock = threading.Lock()
        self._calls: weakref.WeakSet[Any] = weakref.WeakSet()
        self._channel: Any = None
        self._stub: Any = None
        self._is_closed = False

    def is_server_live(self, timeout_s: float) -> bool:
        """Whether the process answers."""
        return bool(self._unary("ServerLive", _pb().ServerLiveRequest(), timeout_s).live)

    def is_server_ready(self, timeout_s: float) -> bool:
        """Whether every model that the server was asked to load is loaded."""
        return bool(self._unary("ServerReady", _pb().ServerReadyRequest(), timeout_s).ready)

    def is_model_ready(self, model: str, timeout_s: float) -> bool:
        """Whether one model is loaded; False for an unknown one."""
        return bool(self._unary("ModelReady", _pb().ModelReadyRequest(name=model), timeout_s).ready)

    def ready_models(self, timeout_s: float) -> dict[str, bool]:
        """Every model of the repository: name -> whether a version of it is loaded."""
        index = self._unary("RepositoryIndex", _pb().RepositoryIndexRequest(), timeout_s)
        ready: dict[str, bool] = {}
        for model in index.models:
            ready[model.name] = ready.get(model.name, False) or model.state == "READY"
        return ready

    def model_metadata(self, model: str, timeout_s: float) -> ModelMetadata:
        """What the model takes and gives.

        Raises:
            NotFoundError: the server has no such model.
        """
        answer = self._unary("ModelMetadata", _pb().ModelMetadataRequest(name=model), timeout_s)
        return ModelMetadata(
            name=answer.name,
            versions=tuple(answer.versions),
            platform=answer.platform,
            inputs=_specs(answer.inputs),
            outputs=_specs(answer.outputs),
        )

    def model_config(self, model: str, timeout_s: float) -> Any:
        """The model's configuration as a `ModelConfig` message."""
        return self._unary("ModelConfig", _pb().ModelConfigRequest(name=model), timeout_s).config

    def open_stream(self, request: InferRequest, timeout_s: float) -> ResponseStream:
        """Send one request on a stream of its own, which is then closed for sending.

        Args:
            request: what to ask.
            timeout_s: deadline of the whole stream.
        """
        stub = self._open()
        try:
            # One stream per request: the end of the RPC is then the end of the answer, whatever is flagged.
            call = stub.ModelStreamInfer(iter([_request_message(request)]), timeout=timeout_s)
        except ValueError as error:  # grpc's way to say that close() came in between
            raise ClientClosedError(f"the client for {self.url} was closed") from error
        self._calls.add(call)
        return ResponseStream(call, self.url, request.request_id, timeout_s)

    def close(self) -> None:
        """Cancel every open stream and close the channel; may be called twice and from any thread."""
        with self._lock:
            self._is_closed = True
            channel, self._channel, self._stub = self._channel, None, None
        for call in list(self._calls):
            call.cancel()
        if channel is not None:
            channel.close()

    def _open(self) -> Any:
        """The stub, with its channel, made at the first call."""
        with self._lock:
            if self._is_closed:
                raise ClientClosedError(f"the client for {self.url} was closed; make a new one")
            if self._stub is None:
                import grpc
                from tritonclient.grpc import service_pb2_grpc

                self._channel = grpc.insecure_channel(self.url, options=_CHANNEL_OPTIONS)
                self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
            return self._stub

    def _unary(self, name: str, message: Any, timeout_s: float) -> Any:
        import grpc

        stub = self._open()
        try:
            return getattr(stub, name)(message, timeout=timeout_s)
        except ValueError as error:
            raise ClientClosedError(f"the client for {self.url} was closed") from error
        except grpc.RpcError as error:
            code, details = _status(error)
            if code == "DEADLINE_EXCEEDED":  # these calls take milliseconds: nobody is there
                raise ServerConnectionError(
                    f"no answer from {self.url} within {timeout_s:g} s; is a server running there?",
                    code=code,
                ) from None
            raise _error(code, details, self.url) from None


class ResponseStream:
    """The responses to one request, in order; used by one thread, cancelled from any."""

    def __init__(self, call: Any, url: str, request_id: str, timeout_s: float) -> None:
        self._call, self._url, self._request_id, self._timeout_s = call, url, request_id, timeout_s
        self._num_responses = 0
        self._has_flags = False
        self._is_final = False
        self._is_cancelled = False

    def __iter__(self) -> Iterator[InferResponse]:
        return self

    def __next__(self) -> InferResponse:
        """The next response; the RPC is read to its end before StopIteration.

        Raises:
            MinitronClientError: the server's error, the deadline, or a connection that went.
        """
        import grpc

        try:
            message = next(self._call)
        except StopIteration:
            self._check_whole()
            raise
        except grpc.RpcError as error:
            if self._is_cancelled:
                raise StopIteration from None
            raise self._error(*_status(error)) from None
        if message.error_message:
            self._drain()
            raise error_from_sentence(
                message.error_message, request_id=self._request_id, is_mid_stream=self._num_responses > 0
            )
        return self._take(_response(message.infer_response, self._request_id))

    def cancel(self) -> None:
        """End the RPC; the iteration stops without an error."""
        self._is_cancelled = True
        self._call.cancel()

    def _take(self, response: InferResponse) -> InferResponse:
        self._num_responses += 1
        self._has_flags = self._has_flags or response.is_final is not None
        self._is_final = self._is_final or bool(response.is_final)
        return response

    def _check_whole(self) -> None:
        """A clean end of the RPC is the end of the answer only if nothing says otherwise."""
        if self._is_cancelled or self._is_final or (self._num_responses and not self._has_flags):
            return
        if self._num_responses:
            raise StreamBrokenError(
                f"{self._url} ended the stream after {self._num_responses} responses, none of them the last",
                request_id=self._request_id,
            )
        raise ProtocolError(f"{self._url} ended the stream without a response", request_id=self._request_id)

    def _drain(self) -> None:
        """Read on to the end of the RPC after an error, for a moment at most."""
        import grpc

        timer = threading.Timer(_DRAIN_S, self._call.cancel)
        timer.start()
        try:
            for _ in self._call:
                pass
        except grpc.RpcError as error:
            _log.debug("after the error of request %s: %s", self._request_id, _status(error))
        finally:
            timer.cancel()
            timer.join()

    def _error(self, code: str, details: str) -> MinitronClientError:
        if code == "DEADLINE_EXCEEDED":
            return DeadlineError(
                f"not finished within timeout_s={self._timeout_s:g}, after {self._num_responses} responses; "
                "allow more time or fewer tokens",
                request_id=self._request_id,
            )
        return _error(code, details, self._url, self._request_id, self._num_responses > 0)


def _pb() -> Any:
    from tritonclient.grpc import service_pb2

    return service_pb2


def _status(error: Any) -> tuple[str, str]:
    """Status name and sentence of a grpc error."""
    code = error.code()
    return (code.name if code is not None else "UNKNOWN"), error.details() or ""


def _error(
    code: str, details: str, url: str, request_id: str = "", is_mid_stream: bool = False
) -> MinitronClientError:
    """The error of a status; a connection that is not there names the address."""
    error = error_from_status(code, details, request_id=request_id, is_mid_stream=is_mid_stream)
    if not isinstance(error, ServerConnectionError):
        return error
    cause = error.message.rsplit("Failed to connect to remote host: ", 1)[-1]
    said = f"lost the connection to {url} in mid-stream" if is_mid_stream else f"no connection to {url}"
    return type(error)(f"{said}: {cause}", code=error.code, request_id=request_id)


def _specs(tensors: Any) -> Mapping[str, TensorSpec]:
    return {item.name: TensorSpec(item.name, item.datatype, tuple(item.shape)) for item in tensors}


_PARAMETER_FIELDS: dict[type, str] = {bool: "bool_param", int: "int64_param", str: "string_param"}


def _request_message(request: InferRequest) -> Any:
    message = _pb().ModelInferRequest(model_name=request.model, id=request.request_id)
    for name, value in request.parameters.items():
        setattr(message.parameters[name], _PARAMETER_FIELDS[type(value)], value)
    for tensor in request.inputs:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_input_contents.append(tensor.data)
    for name in request.outputs:
        message.outputs.add(name=name)
    return message


def _response(message: Any, request_id: str) -> InferResponse:
    """A response message as plain values; the raw contents stand in the order of the outputs."""
    listed, sent = len(message.outputs), len(message.raw_output_contents)
    if listed != sent:
        raise ProtocolError(
            f"a response lists {listed} outputs and brings the contents of {sent}", request_id=request_id
        )
    tensors = {
        item.name: Tensor(item.name, item.datatype, tuple(item.shape), data)
        for item, data in zip(message.outputs, message.raw_output_contents, strict=True)
    }
    flag = message.parameters.get("triton_final_response")
    return InferResponse(tensors, None if flag is None else flag.bool_param)
