"""The one module that imports tritonclient; grpc and protobuf come with it, each at first use.

It turns the client's plain values into Triton's protobuf messages and back, knows how a channel is set
up, and turns every gRPC failure into an error of `minitron_client.errors`. It knows no tensor's name and
makes no call: that is `_blocking.py` and `_aio.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from minitron_client.errors import (
    DeadlineError,
    HandshakeError,
    MinitronClientError,
    ProtocolError,
    ServerConnectionError,
    StreamBrokenError,
    error_from_sentence,
    error_from_status,
)
from minitron_client.listeners import find_listener, is_name
from minitron_client.settings import TlsConfig
from minitron_client.tensors import InferRequest, InferResponse, ModelMetadata, TensorSpec

Headers: TypeAlias = tuple[tuple[str, str], ...]

MAX_RESPONSE_BYTES = 64 * 2**20
"""No text comes near it; what is larger is refused before it fills the memory."""
DRAIN_S = 1.0
"""How long a failed stream is read on for its end: a server that is left before it keeps a reference."""

_STREAM_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
_CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
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


def messages() -> Any:
    """Triton's generated `service_pb2` module: the messages of its gRPC service."""
    from tritonclient.grpc import service_pb2

    return service_pb2


def make_stub(grpc_module: Any, url: str, tls: TlsConfig | None) -> tuple[Any, Any]:
    """A channel to one server and the stub on it.

    Args:
        grpc_module: `grpc` for blocking calls, `grpc.aio` for awaited ones.
        url: HOST:PORT.
        tls: None for plain text.
    """
    from tritonclient.grpc import service_pb2_grpc

    if tls is None:
        channel = grpc_module.insecure_channel(url, options=_CHANNEL_OPTIONS)
    else:
        name = tls.server_name
        own = (("grpc.ssl_target_name_override", name),) if name else ()
        channel = grpc_module.secure_channel(url, _credentials(tls), options=(*_CHANNEL_OPTIONS, *own))
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    # One request on each stream: on the wire the same as a stream of requests that ends after its first,
    # but without the task, or the thread, that would feed it.
    stub.ModelStreamInfer = channel.unary_stream(
        _STREAM_METHOD,
        request_serializer=messages().ModelInferRequest.SerializeToString,
        response_deserializer=messages().ModelStreamInferResponse.FromString,
    )
    return channel, stub


def _credentials(tls: TlsConfig) -> Any:
    import grpc

    return grpc.ssl_channel_credentials(tls.read("ca_file"), tls.read("key_file"), tls.read("cert_file"))


class ResponseReader:
    """What the responses of one call say so far: whether the answer is whole, and what an end means.

    Args:
        url: the server asked.
        request_id: id of the request.
        timeout_s: deadline of the call, for the error that names it.
    """

    def __init__(self, url: str, request_id: str, timeout_s: float) -> None:
        self.num_responses = 0
        self._url, self._request_id, self._timeout_s = url, request_id, timeout_s
        self._has_flags = False
        self._is_final = False
        self._names: list[str] = []
        self._places: dict[str, int] = {}

    def take(self, message: Any) -> InferResponse:
        """A response message as a response; the raw contents stand in the order of the outputs.

        Raises:
            ProtocolError: outputs and contents do not add up, or it answers another request.
        """
        answered = message.id
        if answered and answered != self._request_id and self._request_id:
            raise ProtocolError(
                f"{self._url} sent a response to request {answered} instead", request_id=self._request_id
            )
        # A slice, because to iterate over protobuf's own list takes three times as long, for each token.
        heads, contents = message.outputs[:], message.raw_output_contents
        if len(heads) != len(contents):
            raise ProtocolError(
                f"a response lists {len(heads)} outputs and brings the contents of {len(contents)}",
                request_id=self._request_id,
            )
        is_final: bool | None = None
        parameters = message.parameters
        if "triton_final_response" in parameters:
            is_final = parameters["triton_final_response"].bool_param
            self._has_flags = True
            self._is_final = self._is_final or is_final
        self.num_responses += 1
        return InferResponse(self._places_of(heads), heads, contents, is_final)

    def _places_of(self, heads: list[Any]) -> dict[str, int]:
        """Name -> place; one table for all responses that list the same, as those of a stream do."""
        names = [head.name for head in heads]
        if names != self._names:
            self._names, self._places = names, {name: place for place, name in enumerate(names)}
        return self._places

    def refusal(self, sentence: str) -> MinitronClientError:
        """The error that a stream's `error_message` means."""
        return error_from_sentence(
            sentence, request_id=self._request_id, is_mid_stream=self.num_responses > 0
        )

    def check_whole(self) -> None:
        """A clean end of the RPC is the end of the answer only if nothing says otherwise.

        Raises:
            StreamBrokenError: the last response has not come.
            ProtocolError: no response has come.
        """
        if self._is_final or (self.num_responses and not self._has_flags):
            return
        if self.num_responses:
            raise StreamBrokenError(
                f"{self._url} ended the stream after {self.num_responses} responses, none of them the last",
                request_id=self._request_id,
            )
        raise ProtocolError(f"{self._url} ended the stream without a response", request_id=self._request_id)

    def error(self, code: str, details: str) -> MinitronClientError:
        """The error that the status of the call means."""
        if code == "DEADLINE_EXCEEDED":
            return DeadlineError(
                f"not finished within timeout_s={self._timeout_s:g}, after {self.num_responses} responses; "
                "allow more time or fewer tokens",
                request_id=self._request_id,
            )
        return call_error(code, details, self._url, self._request_id, self.num_responses > 0)


# What grpc says around the cause itself.
_CAUSE = re.compile(r"^.*(?:Failed to connect to remote host: |(?=Failed parsing HTTP/2))")
_LOOK_UP = re.compile(r"^errors resolving .* lookup failed for \S+ (.*?)\]?$")


def status_of(error: Any) -> tuple[str, str]:
    """Status name and sentence of a grpc error."""
    code = error.code()
    return (code.name if code is not None else "UNKNOWN"), error.details() or ""


def call_error(
    code: str, details: str, url: str, request_id: str = "", is_mid_stream: bool = False
) -> MinitronClientError:
    """The error of a status; a connection that is not there names the address."""
    error = error_from_status(code, details, request_id=request_id, is_mid_stream=is_mid_stream)
    if not isinstance(error, ServerConnectionError):
        return error
    cause = _LOOK_UP.sub(r"the name cannot be looked up: \1", _CAUSE.sub("", error.message))
    said = f"lost the connection to {url} in mid-stream" if is_mid_stream else f"no connection to {url}"
    return type(error)(
        f"{said}: {cause}", code=error.code, request_id=request_id, advice=error.default_advice
    )


def leaves_addresses_open(details: str, url: str) -> bool:
    """Whether a refusal is that of one address of a name: `small_call_error` then tries to connect."""
    return "Connection refused" in details and is_name(url)


def small_call_error(code: str, details: str, url: str, timeout_s: float) -> MinitronClientError:
    """The error of a call that takes milliseconds where a server is there at all.

    May take half a second itself, and a look-up of the name, where `leaves_addresses_open`.
    """
    if code == "DEADLINE_EXCEEDED":
        return ServerConnectionError(
            f"no answer from {url} within {round(timeout_s, 2):g} s; is a server running there?", code=code
        )
    listener = find_listener(url) if leaves_addresses_open(details, url) else None
    if listener is not None:
        return HandshakeError(
            f"no connection to {url}: one of its addresses refuses connections, and {listener} takes them: "
            "it failed the handshake, or has only just come",
            code=code,
            advice=HandshakeError.default_advice,
        )
    return call_error(code, details, url)


def read_metadata(answer: Any, is_decoupled: bool | None) -> ModelMetadata:
    """A `ModelMetadataResponse` as plain values."""
    return ModelMetadata(
        name=answer.name,
        versions=tuple(answer.versions),
        platform=answer.platform,
        inputs=_specs(answer.inputs),
        outputs=_specs(answer.outputs),
        is_decoupled=is_decoupled,
    )


def read_index(index: Any) -> dict[str, bool]:
    """A `RepositoryIndexResponse`: model -> whether a version of it is loaded."""
    ready: dict[str, bool] = {}
    for model in index.models:
        ready[model.name] = ready.get(model.name, False) or model.state == "READY"
    return ready


def read_parameters(config: Any) -> dict[str, str]:
    """The parameters in a model's configuration, by name."""
    return {name: parameter.string_value for name, parameter in config.parameters.items()}


def _specs(tensors: Any) -> Mapping[str, TensorSpec]:
    return {item.name: TensorSpec(item.name, item.datatype, tuple(item.shape)) for item in tensors}


_PARAMETER_FIELDS: dict[type, str] = {bool: "bool_param", int: "int64_param", str: "string_param"}


def request_message(request: InferRequest) -> Any:
    """The request as a `ModelInferRequest`."""
    message = messages().ModelInferRequest(model_name=request.model, id=request.request_id)
    for name, value in request.parameters.items():
        setattr(message.parameters[name], _PARAMETER_FIELDS[type(value)], value)
    for tensor in request.inputs:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_input_contents.append(tensor.data)
    for name in request.outputs:
        message.outputs.add(name=name)
    return message


# Name of a small call -> its request message's type and what to read from the answer
SMALL_CALLS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "ServerLive": ("ServerLiveRequest", lambda answer: bool(answer.live)),
    "ServerReady": ("ServerReadyRequest", lambda answer: bool(answer.ready)),
    "ModelReady": ("ModelReadyRequest", lambda answer: bool(answer.ready)),
    "RepositoryIndex": ("RepositoryIndexRequest", read_index),
    "ModelMetadata": ("ModelMetadataRequest", lambda answer: answer),
    "ModelConfig": ("ModelConfigRequest", lambda answer: answer.config),
}
