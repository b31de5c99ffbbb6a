"""An in-process gRPC server that speaks Triton's protocol and plays a script, and both clients before it.

It knows the protocol's messages, and how an awaited client is called from a test that blocks.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from minitron_client import AsyncMinitronClient
from minitron_client.tensors import Tensor, TensorSpec

Script = Callable[[Any, Any], Iterator[Any]]
INPUTS = {
    "text_input": "BYTES", "max_tokens": "INT32", "stream": "BOOL", "exclude_input_in_output": "BOOL",
    "stop": "BOOL", "temperature": "FP32", "top_p": "FP32", "seed": "UINT64", "stop_words": "BYTES",
}  # fmt: skip
OUTPUTS = {"text_output": "BYTES", "finish_reason": "BYTES"}


def reply(text: str | None = None, *, is_final: bool | None = False, finish_reason: str = "") -> Any:
    """One response message; without a text it has no outputs."""
    message = service_pb2.ModelStreamInferResponse()
    answer = message.infer_response
    if is_final is not None:
        answer.parameters["triton_final_response"].bool_param = is_final
    for name, value in (("text_output", text), ("finish_reason", finish_reason)):
        if text is not None and value is not None:
            tensor = Tensor.of(TensorSpec(name, "BYTES", (-1, 1)), [value])
            answer.outputs.add(name=name, datatype="BYTES", shape=tensor.shape)
            answer.raw_output_contents.append(tensor.data)
    return message


def failure(sentence: str) -> Any:
    return service_pb2.ModelStreamInferResponse(error_message=sentence)


def own_threads() -> set[threading.Thread]:
    """Running threads but the one that grpc.aio keeps for the whole process."""
    return {thread for thread in threading.enumerate() if "_poll_wrapper" not in thread.name}


def text_of(request: Any) -> str:
    """The prompt of a request."""
    names = [item.name for item in request.inputs]
    return str(request.raw_input_contents[names.index("text_input")][4:].decode())


def upper(request: Any, context: Any) -> Iterator[Any]:
    """The prompt in capitals, or a refusal."""
    if text_of(request).startswith("bad"):
        yield failure("INVALID_ARGUMENT: bad prompt")
    else:
        yield reply(text_of(request).upper(), is_final=True, finish_reason="stop")


def until_cancelled(request: Any, context: Any) -> Iterator[Any]:
    """Text for as long as the caller listens."""
    for number in range(10_000):
        if not context.is_active():
            return
        yield reply(f"{number} ")
        time.sleep(0.002)


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # untyped package
    """Plays `script` for every request but a stop request, and remembers what it saw."""

    def __init__(self) -> None:
        self.script: Script = lambda request, context: iter([reply("ok", is_final=True)])
        self.requests: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.stopped_ids: list[str] = []
        self.answers_stops = True
        self.num_metadata_calls = 0
        self.num_unary = 0
        self.cancelled = threading.Event()
        self.saw_end_of_requests = threading.Event()
        self.inputs = dict(INPUTS)
        self.outputs = dict(OUTPUTS)
        self.models = {"tensorrt_llm_bls": "READY", "ensemble": "READY"}
        self.is_ready = True
        self.is_decoupled = True
        self.url = ""

    def ServerLive(self, request: Any, context: Any) -> Any:
        self.headers.append(dict(context.invocation_metadata()))
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=self.is_ready)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=self.models.get(request.name) == "READY")

    def RepositoryIndex(self, request: Any, context: Any) -> Any:
        index = service_pb2.RepositoryIndexResponse()
        for name, state in self.models.items():
            index.models.add(name=name, version="1", state=state)
        return index

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        self.num_metadata_calls += 1
        self._check_model(request.name, context)
        answer = service_pb2.ModelMetadataResponse(name=request.name, versions=["1"], platform="python")
        for table, listed in ((self.inputs, answer.inputs), (self.outputs, answer.outputs)):
            for name, datatype in table.items():
                listed.add(name=name, datatype=datatype, shape=[-1, 1])
        return answer

    def ModelConfig(self, request: Any, context: Any) -> Any:
        self._check_model(request.name, context)
        answer = service_pb2.ModelConfigResponse()
        answer.config.name = request.name
        answer.config.model_transaction_policy.decoupled = self.is_decoupled
        return answer

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self.num_unary += 1
        self.requests.append(request)
        self.headers.append(dict(context.invocation_metadata()))
        answer = next(self.script(request, context), reply())
        if answer.error_message:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, answer.error_message)
        return answer.infer_response

    def ModelStreamInfer(self, request_iterator: Any, context: Any) -> Iterator[Any]:
        context.add_callback(lambda: self.cancelled.set() if not context.is_active() else None)
        request = next(request_iterator)
        if "stop" in [item.name for item in request.inputs]:
            self.stopped_ids.append(request.id)
            while not self.answers_stops and context.is_active():
                time.sleep(0.01)
            yield reply(is_final=True)
            return
        self.requests.append(request)
        self.headers.append(dict(context.invocation_metadata()))
        yield from self.script(request, context)
        if next(request_iterator, None) is None:
            self.saw_end_of_requests.set()

    def _check_model(self, name: str, context: Any) -> None:
        if name not in self.models:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{name}' is not found")


@contextmanager
def serving_fake(port: int = 0, credentials: Any = None) -> Iterator[FakeTriton]:
    """A fake that listens on the loopback until the block is left."""
    triton = FakeTriton()
    with ThreadPoolExecutor(16) as pool:
        server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
        address = f"127.0.0.1:{port}"
        bound = (
            server.add_insecure_port(address)
            if credentials is None
            else server.add_secure_port(address, credentials)
        )
        triton.url = f"127.0.0.1:{bound}"
        server.start()
        yield triton
        server.stop(None).wait()


class AwaitedClient:
    """An `AsyncMinitronClient` on a loop of its own thread, called as the blocking client is."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self._is_stopped = False
        try:
            self.client = AsyncMinitronClient(*args, **options)
        except BaseException:
            self._stop()
            raise
        self.url, self.model = self.client.url, self.client.model

    def run(self, made: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(made, self.loop).result(30)

    def generate(self, *args: Any, **options: Any) -> Any:
        return self.run(self.client.generate(*args, **options))

    def generate_batch(self, *args: Any, **options: Any) -> Any:
        return self.run(self.client.generate_batch(*args, **options))

    def metadata(self, *args: Any) -> Any:
        return self.run(self.client.metadata(*args))

    def parameters(self, *args: Any) -> Any:
        return self.run(self.client.parameters(*args))

    def tokenize(self, text: str) -> Any:
        return self.run(self.client.tokenize(text))

    def detokenize(self, ids: Any) -> Any:
        return self.run(self.client.detokenize(ids))

    def health(self, **options: Any) -> Any:
        return self.run(self.client.health(**options))

    def wait_until_ready(self, timeout_s: float) -> Any:
        return self.run(self.client.wait_until_ready(timeout_s))

    def stream(self, *args: Any, **options: Any) -> AwaitedStream:
        return AwaitedStream(self, self.client.stream(*args, **options))

    def close(self) -> None:
        """Close the client; nothing of it may be left on the loop."""
        if self._is_stopped:
            return
        self.run(self.client.close())

    def leave(self) -> None:
        self.close()
        left = self.run(self._tasks_left())
        self._stop()
        assert not left, left

    async def _tasks_left(self) -> list[Any]:
        for _ in range(100):  # what was cancelled a moment ago needs a turn of the loop
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            if not left:
                return []
            await asyncio.sleep(0.01)
        return left

    def _stop(self) -> None:
        self._is_stopped = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def __enter__(self) -> AwaitedClient:
        return self

    def __exit__(self, *error: Any) -> None:
        self.leave()


class AwaitedStream:
    """An `AsyncTextStream`, entered at once, as the blocking one is."""

    def __init__(self, owner: AwaitedClient, stream: Any) -> None:
        self._owner, self._stream = owner, stream
        self.request_id = stream.request_id
        owner.run(stream.__aenter__())

    @property
    def text(self) -> str:
        return self._stream.text

    @property
    def usage(self) -> Any:
        return self._stream.usage

    def __iter__(self) -> AwaitedStream:
        return self

    def __next__(self) -> Any:
        async def step() -> Any:
            async for chunk in self._stream:
                return chunk
            return None

        chunk = self._owner.run(step())
        if chunk is None:
            raise StopIteration
        return chunk

    def final(self) -> Any:
        return self._owner.run(self._stream.final())

    def close(self) -> None:
        self._owner.run(self._stream.close())

    def __enter__(self) -> AwaitedStream:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
