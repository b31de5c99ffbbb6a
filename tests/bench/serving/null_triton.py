"""A text model that costs nothing, behind Triton's gRPC: every request is answered with ready-made messages.

    python tests/bench/serving/null_triton.py PORT [INTERVAL_S]

It answers as `tensorrt_llm_bls` does, one token a response, with `max_tokens` of them, back to back or
INTERVAL_S apart. It measures callers: nothing of a server is in its numbers, and of a request it reads
`max_tokens` and the id only.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

MODEL = "tensorrt_llm_bls"
INPUTS = {
    "text_input": "BYTES", "max_tokens": "INT32", "stream": "BOOL", "min_tokens": "INT32", "stop": "BOOL",
    "exclude_input_in_output": "BOOL", "return_num_input_tokens": "BOOL", "return_num_output_tokens": "BOOL",
}  # fmt: skip
OUTPUTS = {
    "text_output": "BYTES", "finish_reason": "BYTES",
    "num_input_tokens": "INT32", "num_output_tokens": "INT32",
}  # fmt: skip
MAX_TOKENS = 4096
ID = b"0" * 32
"""Stands in the ready-made messages where the request's own goes, which must be as long."""
SERVICE = "inference.GRPCInferenceService"
SMALL_CALLS = ("ServerLive", "ServerReady", "RepositoryIndex", "ModelMetadata", "ModelConfig")


def bytes_of(text: bytes) -> bytes:
    return len(text).to_bytes(4, "little") + text


def response(number: int, *, is_last: bool) -> bytes:
    """The message of token `number`, from 1."""
    message = service_pb2.ModelStreamInferResponse()
    answer = message.infer_response
    answer.model_name, answer.id = MODEL, ID.decode()
    answer.parameters["triton_final_response"].bool_param = is_last
    contents = (
        bytes_of(b" the"), bytes_of(b"length" if is_last else b""),
        (8).to_bytes(4, "little"), number.to_bytes(4, "little"),
    )  # fmt: skip
    for (name, datatype), content in zip(OUTPUTS.items(), contents, strict=True):
        answer.outputs.add(name=name, datatype=datatype, shape=[1, 1])
        answer.raw_output_contents.append(content)
    return bytes(message.SerializeToString())


class NullTriton:
    """The small calls; the stream is apart, because its messages are bytes already."""

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        index = service_pb2.RepositoryIndexResponse()
        index.models.add(name=MODEL, version="1", state="READY")
        return index

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        if request.name != MODEL:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}'")
        answer = service_pb2.ModelMetadataResponse(name=MODEL, versions=["1"], platform="python")
        for table, listed in ((INPUTS, answer.inputs), (OUTPUTS, answer.outputs)):
            for name, datatype in table.items():
                listed.add(name=name, datatype=datatype, shape=[-1, 1])
        return answer

    async def ModelConfig(self, request: Any, context: Any) -> Any:
        answer = service_pb2.ModelConfigResponse()
        answer.config.name = request.name
        answer.config.model_transaction_policy.decoupled = True
        return answer


class NullStream:
    """Plays ready-made messages."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._middle = [response(number, is_last=False) for number in range(1, MAX_TOKENS + 1)]
        self._last = [response(number, is_last=True) for number in range(1, MAX_TOKENS + 1)]

    async def infer(self, requests: Any, context: Any) -> None:
        count, request_id = 1, ID
        async for request in requests:
            request_id = request.id.encode().ljust(len(ID), b"-")[: len(ID)]
            at = [item.name for item in request.inputs].index("max_tokens")
            count = min(int.from_bytes(request.raw_input_contents[at], "little"), MAX_TOKENS)
        for number in range(count - 1):
            await context.write(self._middle[number].replace(ID, request_id))
            if self._interval_s:
                await asyncio.sleep(self._interval_s)
        await context.write(self._last[count - 1].replace(ID, request_id))


async def serve(port: int, interval_s: float = 0.0) -> grpc.aio.Server:
    """A server that has started on the loopback."""
    server = grpc.aio.server()
    small_calls = NullTriton()
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(small_calls, name),
            request_deserializer=getattr(service_pb2, f"{name}Request").FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        for name in SMALL_CALLS
    }
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
        NullStream(interval_s).infer, request_deserializer=service_pb2.ModelInferRequest.FromString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server


async def main() -> None:
    server = await serve(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    print("ready", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
