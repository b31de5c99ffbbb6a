"""What tests ask a running Triton: requests from plain values, over gRPC and HTTP, answers as arrays.

It knows the protocol: one final response, and it is the last. It knows nothing of what the models do.
"""

from __future__ import annotations

import json
import queue
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import triton_to_np_dtype

from minitron_build.serving.triton_server import TritonServer

PROMPT = "Schöne Grüße 👩‍👩‍👧‍👦 an alle"
DTYPES = {bool: "BOOL", int: "INT32", float: "FP32", str: "BYTES", bytes: "BYTES"}


def tensor(name: str, value: Any, dtype: str) -> grpcclient.InferInput:
    if dtype == "BYTES":
        value = np.array(value, dtype=np.object_)
    array = np.array(value, dtype=triton_to_np_dtype(dtype))
    array = array.reshape(1, -1) if array.ndim < 2 else array
    made = grpcclient.InferInput(name, list(array.shape), dtype)
    made.set_data_from_numpy(array)
    return made


def tensors(inputs: dict[str, Any]) -> list[grpcclient.InferInput]:
    """Plain values as tensors; a seed is the one unsigned 64-bit tensor there is."""
    first = {name: np.array(value, dtype=np.object_).reshape(-1)[0] for name, value in inputs.items()}
    return [
        tensor(name, value, "UINT64" if name in ("seed", "random_seed") else DTYPES[type(first[name])])
        for name, value in inputs.items()
    ]


def message(
    model: str, inputs: dict[str, Any], *, request_id: str = "", timeout_us: int = 0
) -> service_pb2.ModelInferRequest:
    made = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for item in tensors(inputs):
        made.inputs.append(item._get_tensor())
        made.raw_input_contents.append(item._get_content())
    if timeout_us:
        made.parameters["timeout"].int64_param = timeout_us
    return made


def arrays(answer: service_pb2.ModelInferResponse) -> dict[str, np.ndarray]:
    result = grpcclient.InferResult(answer)
    return {output.name: result.as_numpy(output.name) for output in answer.outputs}


class Channel:
    """Asks over gRPC as any client would: one request per stream, read to the end of the call."""

    def __init__(self, url: str) -> None:
        options = [("grpc.max_receive_message_length", -1)]
        self._channel = grpc.aio.insecure_channel(url, options=options)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    def open(self, request: service_pb2.ModelInferRequest) -> Any:
        async def one() -> AsyncIterator[service_pb2.ModelInferRequest]:
            yield request

        return self.stub.ModelStreamInfer(one(), timeout=60)

    async def ask(
        self, model: str, *, request_id: str = "", timeout_us: int = 0, **inputs: Any
    ) -> list[dict[str, Any]]:
        """All responses of one request; exactly one of them is final, and it is the last."""
        answers = []
        async for answer in self.open(message(model, inputs, request_id=request_id, timeout_us=timeout_us)):
            if answer.error_message:
                raise RuntimeError(answer.error_message)
            answers.append(answer.infer_response)
        finals = [answer.parameters["triton_final_response"].bool_param for answer in answers]
        assert finals == [False] * (len(answers) - 1) + [True]
        return [arrays(answer) for answer in answers]

    async def text(self, model: str, *, stream: bool, request_id: str = "", **inputs: Any) -> str:
        given = {"text_input": PROMPT, "max_tokens": 40, "exclude_input_in_output": True, "stream": stream}
        return joined(await self.ask(model, request_id=request_id, **(given | inputs)))


def chunks(answers: list[dict[str, Any]]) -> list[str]:
    return [answer["text_output"].item().decode() for answer in answers if "text_output" in answer]


def joined(answers: list[dict[str, Any]]) -> str:
    return "".join(chunks(answers))


def sync_answers(server: TritonServer, model: str, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """All responses of one streamed request to tritonclient's own client."""
    queued: queue.SimpleQueue[Any] = queue.SimpleQueue()
    answers, is_final = [], False
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: queued.put((result, error)))
        client.async_stream_infer(model, tensors(inputs), enable_empty_final_response=True)
        while not is_final:
            result, error = queued.get(timeout=60)
            assert error is None
            answers.append(arrays(result.get_response()))
            is_final = result.get_response().parameters["triton_final_response"].bool_param
        client.stop_stream()
    return answers


def post(server: TritonServer, model: str, verb: str, body: dict[str, Any]) -> str:
    url = f"http://{server.http_url.removeprefix('http://')}/v2/models/{model}/{verb}"
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def http_chunks(server: TritonServer, model: str, body: dict[str, Any]) -> list[str]:
    """The texts of the server-sent events that answer one streamed request."""
    events = post(server, model, "generate_stream", body).splitlines()
    return [json.loads(line.removeprefix("data: "))["text_output"] for line in events if line]
