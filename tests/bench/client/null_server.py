"""A gRPC server that speaks Triton's protocol and answers as fast as Python can: what a client costs.

Serves until its stdin is closed; prints its port first. `max_tokens` of a request is the number of responses,
each made once and sent again and again. It knows nothing of text.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

SERVICE = "inference.GRPCInferenceService"
INPUTS = {
    "text_input": "BYTES", "max_tokens": "INT32", "stream": "BOOL", "exclude_input_in_output": "BOOL",
    "stop": "BOOL", "return_num_input_tokens": "BOOL", "return_num_output_tokens": "BOOL",
}  # fmt: skip
OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "num_input_tokens": "INT32",
    "num_output_tokens": "INT32",
}


def response(*, is_last: bool) -> bytes:
    """A token with its counts, as `tensorrt_llm_bls` sends it."""
    message = service_pb2.ModelStreamInferResponse()
    answer = message.infer_response
    answer.model_name, answer.model_version = "tensorrt_llm_bls", "1"
    answer.parameters["triton_final_response"].bool_param = is_last
    values = {
        "text_output": b"\5\0\0\0 word",
        "num_input_tokens": b"\7\0\0\0",
        "num_output_tokens": b"\t\0\0\0",
    }
    if is_last:
        values["finish_reason"] = b"\6\0\0\0length"
    for name, data in values.items():
        answer.outputs.add(name=name, datatype=OUTPUTS[name], shape=[1, 1])
        answer.raw_output_contents.append(data)
    return message.SerializeToString()


def metadata() -> bytes:
    answer = service_pb2.ModelMetadataResponse(name="tensorrt_llm_bls", versions=["1"], platform="python")
    for table, listed in ((INPUTS, answer.inputs), (OUTPUTS, answer.outputs)):
        for name, datatype in table.items():
            listed.add(name=name, datatype=datatype, shape=[-1, 1])
    return answer.SerializeToString()


def config() -> bytes:
    answer = service_pb2.ModelConfigResponse()
    answer.config.name = "tensorrt_llm_bls"
    answer.config.model_transaction_policy.decoupled = True
    return answer.SerializeToString()


TOKEN, LAST = response(is_last=False), response(is_last=True)


def num_tokens(request: Any) -> int:
    names = [item.name for item in request.inputs]
    if "stop" in names:
        return 1
    return int.from_bytes(request.raw_input_contents[names.index("max_tokens")], "little")


async def stream(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        for _ in range(num_tokens(request) - 1):
            yield TOKEN
        yield LAST


def answering(answer: bytes) -> Any:
    async def handle(request: bytes, context: Any) -> bytes:
        return answer

    return grpc.unary_unary_rpc_method_handler(handle)


async def main() -> None:
    server = grpc.aio.server()
    handlers = {
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
            stream, request_deserializer=service_pb2.ModelInferRequest.FromString
        ),
        "ModelMetadata": answering(metadata()),
        "ModelConfig": answering(config()),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
