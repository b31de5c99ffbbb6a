"""The client against a real tritonserver whose models play scripts.

What is seen here: every sentence Triton says, and what reaches the server when a caller leaves.

Run with: pytest tests/server/test_client_fake_server.py
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import InferenceServerClient

from fake_triton import AwaitedClient, own_threads
from minitron_build.serving.triton_security import ServerSecurity
from minitron_build.serving.triton_server import ServerOptions, TritonServer, free_ports
from minitron_client import (
    Chunk,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    MinitronClient,
    MinitronClientError,
    NotFoundError,
    OverloadedError,
    ServerConnectionError,
    StreamBrokenError,
    UnavailableError,
    UnsupportedError,
)
from minitron_client._blocking import Connection
from minitron_client.tensors import InferRequest, Scalar, Tensor, TensorSpec

pytestmark = pytest.mark.server

ADMIN_KEY = "the-administrator-of-the-tests"
ADMIN = {"triton-grpc-protocol-minitron-admin-key": ADMIN_KEY}
BLS, ENSEMBLE = "tensorrt_llm_bls", "ensemble"
INTERFACE = """
input [
  { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "max_tokens" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true },
  { name: "stop" data_type: TYPE_BOOL dims: [ 1 ] optional: true },
  { name: "exclude_input_in_output" data_type: TYPE_BOOL dims: [ 1 ] optional: true },
  { name: "return_log_probs" data_type: TYPE_BOOL dims: [ 1 ] optional: true }
]
output [
  { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] },
  { name: "finish_reason" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "output_log_probs" data_type: TYPE_FP32 dims: [ -1, -1 ] }
]
"""
PYTHON = 'backend: "python" instance_group [ { count: 1 kind: KIND_CPU } ]' + INTERFACE
INPUT_NAMES = ("text_input", "max_tokens", "stream", "stop", "exclude_input_in_output", "return_log_probs")
OUTPUT_NAMES = ("text_output", "finish_reason", "output_log_probs")
MAPS = "".join(
    [f'input_map {{ key: "{name}" value: "{name}" }}\n' for name in INPUT_NAMES]
    + [f'output_map {{ key: "{name}" value: "{name}" }}\n' for name in OUTPUT_NAMES]
)
CONFIGS = {
    BLS: PYTHON + "max_batch_size: 8 model_transaction_policy { decoupled: true }",
    ENSEMBLE: 'platform: "ensemble" max_batch_size: 8 ensemble_scheduling { step [ { model_name: "'
    f'{BLS}" model_version: -1 {MAPS} }} ] }}' + INTERFACE,
    "short_queue": PYTHON
    + "max_batch_size: 1 dynamic_batching { default_queue_policy { max_queue_size: 1 } }",
    "short_patience": PYTHON + "max_batch_size: 1 dynamic_batching { default_queue_policy "
    "{ timeout_action: REJECT default_timeout_microseconds: 100000 } }",
    "fragile": PYTHON + "max_batch_size: 1",
    "unloaded": PYTHON + "max_batch_size: 1",
}

LLM_API_CONFIG = """
backend: "python" max_batch_size: 0 model_transaction_policy { decoupled: true }
instance_group [ { count: 1 kind: KIND_CPU } ]
input [
  { name: "text_input" data_type: TYPE_STRING dims: [ -1 ] },
  { name: "streaming" data_type: TYPE_BOOL dims: [ 1 ] optional: true },
  { name: "sampling_param_max_tokens" data_type: TYPE_INT32 dims: [ 1 ] optional: true },
  { name: "sampling_param_top_p" data_type: TYPE_FP32 dims: [ 1 ] optional: true },
  { name: "sampling_param_exclude_input_from_output" data_type: TYPE_BOOL dims: [ 1 ] optional: true },
  { name: "return_finish_reason" data_type: TYPE_BOOL dims: [ 1 ] optional: true },
  { name: "stop" data_type: TYPE_BOOL dims: [ 1 ] optional: true }
]
output [
  { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] },
  { name: "finish_reason" data_type: TYPE_STRING dims: [ -1 ] }
]
"""
CONFIGS["llm_api"] = LLM_API_CONFIG
# Answers as NVIDIA's model on the LLM API does: the whole text so far in each response, "None" for no reason
# yet, one dimension, a stop answered with an error. It says its prompt, a character a token.
LLM_API_MODEL = """
import queue, threading, time
import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

class TritonPythonModel:
    def initialize(self, args):
        self.stopped, self.arrived = set(), queue.SimpleQueue()
        # The only thread that sends, as above.
        self.player = threading.Thread(target=self.play_all)
        self.player.start()

    def finalize(self):
        self.arrived.put(None)
        self.player.join()

    def execute(self, requests):
        for request in requests:
            values = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            if "stop" in values:
                self.stopped.add(request.request_id())
            values = {name: value.copy() for name, value in values.items()}
            self.arrived.put((request, request.get_response_sender(), values))

    def play_all(self):
        while (arrived := self.arrived.get()) is not None:
            self.play(*arrived)

    def play(self, request, sender, values):
        assert all(value.ndim == 1 for value in values.values())
        if "stop" in values:
            error = pb_utils.TritonError("Request cancelled by client", pb_utils.TritonError.CANCELLED)
            return sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)
        text, limit = values["text_input"][0].decode(), values["sampling_param_max_tokens"][0]
        if text == "bad":
            error = pb_utils.TritonError("Error generating request: a bad prompt")
            return sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)
        said = text[:limit]
        for end in range(1, len(said) + 1) if values["streaming"][0] else [len(said)]:
            is_last = end == len(said)
            reason = ("length" if len(text) > limit else "stop") if is_last else "None"
            sender.send(self.response(said[:end], reason), flags=FINAL if is_last else 0)
            if not is_last and (request.request_id() in self.stopped or request.is_cancelled()):
                return sender.send(flags=FINAL)
            time.sleep(0.002)

    def response(self, text, reason):
        words = {"text_output": text, "finish_reason": reason}
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(k, np.array([v.encode()], dtype=np.object_)) for k, v in words.items()]
        )
"""

# Plays the script in text_input: a list of [verb, value].
SCRIPTED_MODEL = """
import json, queue, threading
import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

def value_of(request, name):
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().reshape(-1)[0]

def text(value, reason=""):
    words = {"text_output": value, "finish_reason": reason}
    tensors = [pb_utils.Tensor(k, np.array([[v.encode()]], dtype=np.object_)) for k, v in words.items()]
    tensors.append(pb_utils.Tensor("output_log_probs", np.array([[[-0.5, -0.25]]], dtype=np.float32)))
    return pb_utils.InferenceResponse(tensors)

class TritonPythonModel:
    def initialize(self, args):
        self.stopped, self.streams = set(), []
        self.arrived = queue.SimpleQueue()
        # The only thread that sends: a stub whose senders are used by several corrupts its heap.
        self.player = threading.Thread(target=self.play_all)
        self.player.start()

    def finalize(self):
        self.arrived.put(None)
        self.player.join()

    def execute(self, requests):
        for request in requests:
            self.arrived.put((request, request.get_response_sender()))

    def play_all(self):
        while True:
            try:
                arrived = self.arrived.get(timeout=0.02)
                if arrived is None:
                    return
                self.play(*arrived)
            except queue.Empty:
                pass
            self.streams = [stream for stream in self.streams if self.count_on(*stream)]

    def play(self, request, sender):
        if value_of(request, "stop"):
            self.stopped.add(request.request_id())
            return sender.send(flags=FINAL)
        for verb, value in json.loads(value_of(request, "text_input")):
            if verb == "text":
                sender.send(text(value))
            elif verb == "last":
                return sender.send(text(value, "length"), flags=FINAL)
            elif verb == "running":
                return sender.send(text(str(len(self.streams))), flags=FINAL)
            elif verb == "error":
                error = pb_utils.TritonError(value, pb_utils.TritonError.INVALID_ARG)
                return sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)
            elif verb == "count":
                return self.streams.append((request, sender, iter(range(value))))
        sender.send(flags=FINAL)

    def count_on(self, request, sender, numbers):
        number = next(numbers, None)
        if number is None or request.request_id() in self.stopped or request.is_cancelled():
            sender.send(flags=FINAL)
            return False
        sender.send(text(f"{number} "))
        return True
"""
# Does what text_input says: sleep so many seconds, raise, or die.
PLAIN_MODEL = """
import os, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            word = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy().reshape(-1)[0].decode()
            if word == "die":
                os._exit(3)
            if word == "raise":
                raise ValueError("boom")
            time.sleep(float(word))
            tensor = pb_utils.Tensor("text_output", np.array([[b"done"]], dtype=np.object_))
            reason = pb_utils.Tensor("finish_reason", np.array([[b"stop"]], dtype=np.object_))
            responses.append(pb_utils.InferenceResponse([tensor, reason]))
        return responses
"""


@pytest.fixture(scope="module")
def model_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repo = tmp_path_factory.mktemp("model_repo")
    for name, config in CONFIGS.items():
        (repo / name / "1").mkdir(parents=True)
        (repo / name / "config.pbtxt").write_text(f'name: "{name}"\n{config}')
        if name != ENSEMBLE:
            sources = {BLS: SCRIPTED_MODEL, "llm_api": LLM_API_MODEL}
            (repo / name / "1" / "model.py").write_text(sources.get(name, PLAIN_MODEL))
    return repo


@pytest.fixture(scope="module")
def start_server(model_repo: Path) -> Callable[[], TritonServer]:
    """Gives a ready tritonserver on its own ports, which has unloaded one of its models."""

    def start() -> TritonServer:
        grpc_port, http_port, metrics_port = free_ports(3)
        options = ServerOptions(
            model_repo,
            grpc_port=grpc_port,
            http_port=http_port,
            metrics_port=metrics_port,
            drain_timeout_s=10,
            start_timeout_s=40,
            security=ServerSecurity(admin_key=ADMIN_KEY),
        )
        server = TritonServer.start(options)
        server.wait_until_ready()
        with InferenceServerClient(server.grpc_url) as admin:
            admin.unload_model("unloaded", headers=ADMIN)
        return server

    return start


@pytest.fixture(scope="module")
def server(start_server: Callable[[], TritonServer]) -> Iterator[TritonServer]:
    with start_server() as started:
        yield started


@pytest.fixture(
    params=[(BLS, MinitronClient), (ENSEMBLE, MinitronClient), (ENSEMBLE, AwaitedClient)],
    ids=["bls", "ensemble", "ensemble-awaited"],
)
def client(server: TritonServer, request: pytest.FixtureRequest) -> Iterator[MinitronClient]:
    before = own_threads()
    model, make_client = request.param
    with make_client(server.grpc_url, model=model, timeout_s=20) as made:
        yield made
    until = time.monotonic() + 5
    while (left := own_threads() - before) and time.monotonic() < until:
        time.sleep(0.01)
    assert not left


@pytest.fixture
def connection(server: TritonServer) -> Iterator[Connection]:
    made = Connection(server.grpc_url)
    yield made
    made.close()


def script(*steps: tuple[str, Any]) -> str:
    return json.dumps(steps)


def wait_until_none_runs(client: MinitronClient, timeout_s: float = 5) -> None:
    until = time.monotonic() + timeout_s
    while client.generate(script(("running", 0))).text != "0":
        assert time.monotonic() < until, "a request that nobody waits for still runs"
        time.sleep(0.05)


# --- text ---


def test_text_arrives_whole_on_both_names(client: MinitronClient) -> None:
    assert client.generate(script(("last", "größer 🎈\0"))).text == "größer 🎈\0"
    with client.stream(script(("text", "gr"), ("text", "ößer"), ("last", " 🎈"))) as stream:
        assert [chunk.text for chunk in stream] == ["gr", "ößer", " 🎈"]
        completion = stream.final()
    assert completion.finish_reason == "length"
    assert completion.timings.ttft_s is not None
    with client.stream(script(("text", "a"), ("text", "b"))) as stream:  # bare final response
        assert list(stream) == [Chunk("a"), Chunk("b")]


def test_log_probs_come_only_when_asked_for(client: MinitronClient) -> None:
    assert client.generate(script(("last", "a"))).log_probs is None
    assert client.generate(script(("last", "a")), return_log_probs=True).log_probs == (-0.5, -0.25)


def test_many_threads_one_client(client: MinitronClient) -> None:
    def ask(number: int) -> bool:
        pieces = [f"{number}.{index} " for index in range(30)]
        with client.stream(script(*(("text", piece) for piece in pieces))) as stream:
            return [chunk.text for chunk in stream] == pieces

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(64)))


def test_health_tells_what_is_loaded(client: MinitronClient) -> None:
    health = client.health()
    assert health.live
    assert dict(health.models) == {name: True for name in (BLS, ENSEMBLE)}  # what a caller can find out
    assert set(client.metadata().inputs) == set(INPUT_NAMES)


@pytest.mark.parametrize("make", [MinitronClient, AwaitedClient], ids=["blocking", "awaited"])
def test_health_tells_the_administrator_every_model(server: TritonServer, make: Any) -> None:
    with make(server.grpc_url, headers=ADMIN) as client:
        assert dict(client.health().models) == {name: name != "unloaded" for name in CONFIGS}


# --- other vocabularies and policies ---


@pytest.mark.parametrize("make", [MinitronClient, AwaitedClient], ids=["blocking", "awaited"])
def test_a_model_on_the_llm_api_is_spoken_to_in_its_own_words(server: TritonServer, make: Any) -> None:
    with make(server.grpc_url, model="llm_api", timeout_s=20) as client:
        completion = client.generate("größer 🎈 und mehr", max_tokens=8)
        assert (completion.text, completion.finish_reason) == ("größer 🎈", "length")
        with client.stream("größer 🎈", max_tokens=99, top_p=0.9) as stream:
            assert [chunk.text for chunk in stream] == list("größer 🎈")
            assert stream.final().finish_reason == "stop"
        with pytest.raises(InternalError, match="Error generating request: a bad prompt"):
            client.generate("bad")
        with pytest.raises(UnsupportedError, match="has no input sampling_param_stop"):
            client.generate("hi", stop_words=["x"])
        with client.stream("x" * 5000, max_tokens=5000) as stream:
            next(stream)
        assert stream.final().finish_reason == "cancelled"


@pytest.mark.parametrize("make", [MinitronClient, AwaitedClient], ids=["blocking", "awaited"])
def test_a_model_that_is_not_decoupled_answers_a_unary_call(server: TritonServer, make: Any) -> None:
    with make(server.grpc_url, model="fragile", timeout_s=20) as client:
        assert client.metadata().is_decoupled is False
        completion = client.generate("0")
        assert (completion.text, completion.finish_reason) == ("done", "stop")
        with pytest.raises(InternalError, match="ValueError: boom") as caught:
            client.generate("raise")
        assert caught.value.code == "INTERNAL"
        with pytest.raises(UnsupportedError, match="is not decoupled"):
            client.stream("0")
        with pytest.raises(DeadlineError):
            client.generate("1", timeout_s=0.3)


# --- leaving ---


def test_leaving_early_stops_the_model_behind_either_name(client: MinitronClient) -> None:
    started_s = time.monotonic()
    with client.stream(script(("count", 1000))) as stream:
        for chunk in stream:
            if chunk.text == "3 ":
                break
    assert stream.final().finish_reason == "cancelled"
    assert time.monotonic() - started_s < 3
    wait_until_none_runs(client)


def test_a_deadline_stops_the_model_behind_either_name(client: MinitronClient) -> None:
    with pytest.raises(DeadlineError, match=r"timeout_s=0\.4"):
        client.generate(script(("count", 1000)), timeout_s=0.4)
    wait_until_none_runs(client)


def test_closing_the_client_ends_its_streams(server: TritonServer) -> None:
    with MinitronClient(server.grpc_url) as other:
        stream = other.stream(script(("count", 1000)))
        next(stream)
    with pytest.raises(MinitronClientError):
        stream.final()
    with MinitronClient(server.grpc_url) as other:
        wait_until_none_runs(other)


# --- errors ---


def test_the_model_s_own_refusal(client: MinitronClient) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate(script(("error", "INVALID_ARGUMENT: top_p is 2; expected 0 to 1")), request_id="r1")
    said = str(caught.value)
    assert said.startswith("top_p is 2; expected 0 to 1; change the request")
    assert said.endswith("[INVALID_ARGUMENT, request r1]")


def infer_request(
    model: str, text: str = "0", *, datatype: str = "INT32", rank: int = 2, skip: str = "", extra: str = ""
) -> InferRequest:
    """A request with one thing wrong."""
    named: list[tuple[str, str, int, Scalar]] = [
        ("text_input", "BYTES", 2, text),
        ("max_tokens", datatype, rank, 1),
        (extra, "INT32", 2, 1),
    ]
    tensors = tuple(
        Tensor.of(TensorSpec(name, kind, (-1,) * size), [value])
        for name, kind, size, value in named
        if name and name != skip
    )
    return InferRequest(model, "r1", tensors)


@pytest.mark.parametrize(
    ("request_made", "error_class", "code", "words"),
    [
        (infer_request("nope"), NotFoundError, "NOT_FOUND", "unknown model: 'nope'"),
        (infer_request("unloaded"), UnavailableError, "UNAVAILABLE", "has no available versions"),
        (
            infer_request(BLS, datatype="INT64"),
            InvalidRequestError,
            "INVALID_ARGUMENT",
            "data-type is 'INT64'",
        ),
        (infer_request(BLS, rank=1), InvalidRequestError, "INVALID_ARGUMENT", "unexpected shape for input"),
        (
            infer_request(BLS, skip="max_tokens"),
            InvalidRequestError,
            "INVALID_ARGUMENT",
            "missing required input",
        ),
        (
            infer_request(BLS, extra="foo"),
            InvalidRequestError,
            "INVALID_ARGUMENT",
            "unexpected inference input",
        ),
        (
            infer_request(ENSEMBLE, rank=1),
            InvalidRequestError,
            "INVALID_ARGUMENT",
            "unexpected shape for input",
        ),
        (infer_request("short_queue", "raise"), InternalError, "INTERNAL", "ValueError: boom"),
        (infer_request("short_queue", "x"), InternalError, "INTERNAL", "could not convert string to float"),
    ],
)
def test_what_triton_says_is_understood(
    connection: Connection,
    request_made: InferRequest,
    error_class: type[MinitronClientError],
    code: str,
    words: str,
) -> None:
    with pytest.raises(error_class, match=words) as caught:
        list(connection.open(request_made, 10))
    assert type(caught.value) is error_class
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "error_class"), [("short_queue", OverloadedError), ("short_patience", DeadlineError)]
)
def test_a_full_queue_and_a_request_that_waited_too_long(
    connection: Connection, model: str, error_class: type[MinitronClientError]
) -> None:
    def ask(_: int) -> type[MinitronClientError] | None:
        try:
            list(connection.open(infer_request(model, "0.4"), 10))
        except MinitronClientError as error:
            return type(error)
        return None

    with ThreadPoolExecutor(5) as pool:
        outcomes = list(pool.map(ask, range(5)))
    assert set(outcomes) == {None, error_class}


# --- the server goes ---


def test_a_draining_server_ends_what_runs_and_refuses_what_comes(
    start_server: Callable[[], TritonServer],
) -> None:
    with start_server() as server, MinitronClient(server.grpc_url) as client:
        assert client.wait_until_ready(10).ready
        with client.stream(script(("count", 75))) as stream:
            next(stream)
            os.kill(server.pid, signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(UnavailableError, match="has no available versions") as caught:
                client.generate(script(("last", "a")))
            assert caught.value.retryable
            assert stream.final().text == "".join(f"{number} " for number in range(75))
        started_s = time.monotonic()
        assert server.wait(10) is not None
        assert time.monotonic() - started_s < 5  # nothing of ours kept it


def test_a_dead_model_does_not_hang_and_a_killed_server_breaks_its_streams(
    start_server: Callable[[], TritonServer],
) -> None:
    with start_server() as server, MinitronClient(server.grpc_url) as client:
        assert client.wait_until_ready(10).ready
        connection = Connection(server.grpc_url)
        for word in ("die", "0"):  # here, because a server with a dead model cannot drain
            with pytest.raises(InternalError, match=r"Stub process .* is not healthy"):
                list(connection.open(infer_request("fragile", word), 10))
        connection.close()
        with client.stream(script(("count", 1000))) as stream:
            next(stream)
            os.kill(server.pid, signal.SIGKILL)
            with pytest.raises(StreamBrokenError, match=r"lost the connection to .* in mid-stream") as caught:
                stream.final()
        assert not caught.value.retryable
        with pytest.raises(ServerConnectionError, match="no connection to"):
            client.generate("x")
        assert not client.health().live
