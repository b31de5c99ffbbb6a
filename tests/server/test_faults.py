"""A real server under fire: killed model processes, signals under load, little shared memory, rude clients.

Longer runs of the same: tests/bench/serving/bench_soak.py.

Run with: pytest tests/server/test_faults.py
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_process import ServeProcess, minitron_serve
from triton_calls import Channel, message, post
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from minitron_build.bundle.bundle import Bundle
from minitron_build.runtime.metrics import FLUSH_INTERVAL_S
from minitron_build.serving.triton_server import TritonServer
from minitron_client.load import scrape

TEXT, TOKENS = "tensorrt_llm_bls", "tensorrt_llm"
LONG = {"text_input": "def f(", "max_tokens": 1900, "stream": True, "end_id": -1}
SHORT = {"text_input": "def f(", "max_tokens": 3}
NUM_STREAMS = 8


class Load:
    """Streams in flight, and how each of them ended."""

    def __init__(self, url: str, asked: dict[str, Any], count: int = NUM_STREAMS) -> None:
        self._url, self._asked, self._count = url, asked, count
        self.responses = [0] * count

    async def run(self, after_first: Callable[[], Awaitable[None]]) -> list[str | None]:
        """Start all, do something once each has had a response; the error of each, None for a whole one."""
        channel = Channel(self._url)
        tasks = [asyncio.create_task(self._one(channel, at)) for at in range(self._count)]
        async with asyncio.timeout(120):
            while not all(count or task.done() for count, task in zip(self.responses, tasks, strict=True)):
                await asyncio.sleep(0.02)
            await after_first()
            ends = await asyncio.gather(*tasks)
        await channel.close()
        return ends

    async def _one(self, channel: Channel, at: int) -> str | None:
        try:
            async for answer in channel.open(message(TEXT, self._asked, request_id=f"load-{at}")):
                if answer.error_message:
                    return str(answer.error_message)
                self.responses[at] += 1
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        return None


async def ask_short(url: str) -> int:
    """One request of its own; how many responses came."""
    channel = Channel(url)
    try:
        return len(await channel.ask(TEXT, **SHORT))
    finally:
        await channel.close()


def running_requests(server: TritonServer) -> float:
    time.sleep(2 * FLUSH_INTERVAL_S)
    names = ("minitron_running_requests", "minitron_waiting_requests", "minitron_engine_running_requests")
    return sum(value for name, _, value in scrape(server.metrics_url, 10) if name in names)


def wait_until_idle(server: TritonServer, timeout_s: float = 60) -> None:
    """No request is open in any model: what clients left behind has been let go."""
    deadline_s = time.monotonic() + timeout_s
    while running_requests(server):
        assert time.monotonic() < deadline_s, "requests are left"


# --- a model process is killed, or hangs, under load; the last of these ends the server


@pytest.fixture(scope="module")
def served(tiny_bundle: Bundle) -> Iterator[ServeProcess]:
    """One `minitron serve`, with restarts enough for what is done to it."""
    flags = {"restarts": 9, "stall-timeout-s": 6, "probe-interval-s": 2, "drain-timeout-s": 60}
    with minitron_serve(tiny_bundle.path, flags) as process:
        yield process


async def _fails_and_recovers(served: ServeProcess, fault: Callable[[], None], words: str) -> None:
    async def strike() -> None:
        fault()

    began_s, num_lines = time.monotonic(), len(served.errors)
    ends = await Load(served.document["grpc"], LONG).run(strike)
    assert time.monotonic() - began_s < 60, "no stream hangs"
    assert {str(end).partition(":")[0] for end in ends} == {"UNAVAILABLE"}, ends
    await asyncio.to_thread(served.wait_for_ready, 503, 10)
    assert words in served.state()["reason"]
    await asyncio.to_thread(served.wait_for_ready, 200)
    state = served.state()
    assert (state["state"], state["reason"]) == ("ready", ""), "nothing is wrong any more"
    assert words in state["last_loss"]
    assert any(words in line for line in served.errors[num_lines:]), served.errors
    assert await ask_short(served.document["grpc"])


@pytest.mark.parametrize("model", [TEXT, TOKENS])
async def test_killed_model_process_fails_its_requests_and_is_replaced(
    served: ServeProcess, model: str
) -> None:
    stub_pid = served.stub(model)
    await _fails_and_recovers(
        served, lambda: os.kill(stub_pid, signal.SIGKILL), f"{model}_0_0 died (signal SIGKILL"
    )


async def test_engine_that_hangs_turns_red_and_is_replaced(served: ServeProcess) -> None:
    """No process ends, and Triton's health stays green; but counters stand still, and no token comes."""
    stub_pid = served.stub(TOKENS)
    await _fails_and_recovers(served, lambda: os.kill(stub_pid, signal.SIGSTOP), "no token came for")


async def test_sigterm_lets_streams_finish(served: ServeProcess) -> None:
    async def terminate() -> None:
        served.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(served.wait_for_ready, 503, 10)

    load = Load(served.document["grpc"], LONG | {"max_tokens": 500})
    assert await load.run(terminate) == [None] * NUM_STREAMS
    assert await asyncio.to_thread(served.end) == 0


async def test_sigterm_cuts_off_what_takes_longer_than_the_drain(tiny_bundle: Bundle) -> None:
    with minitron_serve(tiny_bundle.path, {"drain-timeout-s": 1}) as served:
        began_s = 0.0

        async def terminate() -> None:
            nonlocal began_s
            began_s = time.monotonic()
            served.process.send_signal(signal.SIGTERM)

        ends = await Load(served.document["grpc"], LONG, count=24).run(terminate)
        assert time.monotonic() - began_s < 30
        assert {str(end).partition(":")[0] for end in ends} <= {"None", "UNAVAILABLE", "CANCELLED"}, ends
        assert "UNAVAILABLE" in str(ends)
        assert await asyncio.to_thread(served.end) == 1
        assert "did not finish within --drain-timeout-s 1" in served.errors[-1]


# --- little shared memory

LITTLE_SHARED_MEMORY = textwrap.dedent("""
    import asyncio, json, subprocess, sys
    from pathlib import Path
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=72m", "tmpfs", "/dev/shm"], check=True)
    sys.path.insert(0, sys.argv[2])
    from triton_calls import Channel, message
    from triton_repos import serving

    async def ask(url, text):
        channel = Channel(url)
        request = message("tensorrt_llm_bls", {"text_input": text, "max_tokens": 3})
        answers = [answer.error_message or "served" async for answer in channel.open(request)]
        await channel.close()
        print(json.dumps(answers[0]))

    async def ask_all(url):
        for text in ("def f(", "x " * 40_000_000, "def f("):
            await ask(url, text)

    with serving(Path(sys.argv[1])) as server:
        asyncio.run(ask_all(server.grpc_url))
""")


def _may_mount() -> bool:
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    command = [unshare, "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _may_mount(), reason="no mount namespaces for this user")
def test_request_that_does_not_fit_the_shared_memory_fails_alone(tiny_bundle: Bundle) -> None:
    command = [shutil.which("unshare") or "", "--mount", sys.executable, "-c", LITTLE_SHARED_MEMORY]
    done = subprocess.run(
        [*command, str(tiny_bundle.model_repo), str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    before, too_large, after = (json.loads(line) for line in done.stdout.splitlines()[-3:])
    assert before == after == "served", done.stderr
    assert "Failed to increase the shared memory pool size" in too_large


async def test_request_that_is_too_large_is_refused_before_it_is_read(running_server: TritonServer) -> None:
    channel = Channel(running_server.grpc_url)
    began_s = time.monotonic()
    with pytest.raises(RuntimeError, match=r"INVALID_ARGUMENT: .*have 20000004 bytes; max_request_bytes is"):
        await channel.ask(TEXT, text_input="x " * 10_000_000, max_tokens=1)
    assert time.monotonic() - began_s < 10, "tokenising it would take longer"
    await channel.close()


# --- rude clients


async def test_a_thousand_clients_that_connect_and_vanish(running_server: TritonServer) -> None:
    host, port = running_server.grpc_url.split(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", preface, preface + bytes(9), os.urandom(64)):
        for _ in range(190):
            with socket.create_connection((host, int(port)), timeout=10) as client:
                client.sendall(words)
    for _ in range(5):  # and fifty that had begun to be served
        channel = Channel(running_server.grpc_url)
        calls = [channel.open(message(TEXT, LONG, request_id=f"vanish-{at}")) for at in range(10)]
        await calls[0].read()
        await channel.close()
    assert await ask_short(running_server.grpc_url)
    await asyncio.to_thread(wait_until_idle, running_server)


async def test_half_closed_streams(running_server: TritonServer) -> None:
    channel = grpc.aio.insecure_channel(running_server.grpc_url)
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def nothing() -> AsyncIterator[service_pb2.ModelInferRequest]:
        return
        yield

    async def several() -> AsyncIterator[service_pb2.ModelInferRequest]:
        for at in range(3):
            yield message(TEXT, SHORT, request_id=f"half-{at}")

    async def stays_open() -> AsyncIterator[service_pb2.ModelInferRequest]:
        yield message(TEXT, SHORT)
        await asyncio.sleep(3600)

    assert [answer async for answer in stub.ModelStreamInfer(nothing(), timeout=30)] == []
    answers = [answer async for answer in stub.ModelStreamInfer(several(), timeout=30)]
    finals = [answer.infer_response.parameters["triton_final_response"].bool_param for answer in answers]
    assert sum(finals) == 3, "each request is answered after the client has said its last"
    call = stub.ModelStreamInfer(stays_open(), timeout=30)
    assert not (await call.read()).error_message
    call.cancel()
    unread = stub.ModelStreamInfer(several(), timeout=0.05)  # nobody reads
    await asyncio.sleep(0.2)
    del unread
    await channel.close()
    assert await ask_short(running_server.grpc_url)
    await asyncio.to_thread(wait_until_idle, running_server)


# --- malformed tensors

FUZZED = {
    TEXT: (
        "text_input", "max_tokens", "stop_words", "bad_words", "end_id", "top_k", "top_p", "temperature",
        "seed", "num_return_sequences", "beam_width", "embedding_bias_words", "embedding_bias_weights",
        "min_tokens", "stream", "stop", "repetition_penalty", "return_log_probs",
    ),
    TOKENS: (
        "input_ids", "input_lengths", "request_output_len", "stop_words_list", "bad_words_list",
        "embedding_bias", "end_id", "runtime_top_k", "runtime_top_p", "temperature", "seed",
        "num_return_sequences", "streaming", "stop", "min_tokens",
    ),
}  # fmt: skip
DTYPES = {
    "INT32": np.int32, "INT64": np.int64, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_,
    "BYTES": np.object_,
}  # fmt: skip
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "INT32": st.sampled_from([0, 1, 2, 3, 7, -1, 10**6, 2**31 - 1, -(2**31)]),
    "INT64": st.sampled_from([0, 1, -1, 2**63 - 1]),
    "UINT64": st.sampled_from([0, 1, 2**63, 2**64 - 1]),
    "FP32": st.sampled_from([0.0, -1.0, 0.5, 1.0, 1e38, float("nan"), float("inf"), -float("inf")]),
    "BOOL": st.booleans(),
    "BYTES": st.sampled_from([b"", b"x", b"def", b"\xff\xfe", "é".encode(), b"\x00", b"a" * 5000]),
}
SHAPES = st.one_of(
    st.sampled_from([[1, 1], [1, 3], [1, 2, 3], [1]]), st.lists(st.integers(0, 3), min_size=1, max_size=4)
)
VALID: dict[str, dict[str, np.ndarray]] = {
    TEXT: {
        "text_input": np.array([[b"def f("]], dtype=np.object_),
        "max_tokens": np.array([[2]], dtype=np.int32),
    },
    TOKENS: {
        "input_ids": np.array([[1, 2, 3]], dtype=np.int32),
        "input_lengths": np.array([[3]], dtype=np.int32),
        "request_output_len": np.array([[2]], dtype=np.int32),
    },
}
TRITONS_OWN = ("inference", "unexpected", "expected", "input", "invalid", "batch", "shape", "byte size")


@st.composite
def tensors(draw: st.DrawFn, dtype: str) -> np.ndarray:
    """Mostly of the tensor's own dtype and of a shape that may be right, with values at the edges."""
    dtype = draw(st.sampled_from([dtype] * 4 + list(DTYPES)))
    shape = draw(SHAPES)
    values = draw(st.lists(VALUES[dtype], min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    return np.array(values, dtype=DTYPES[dtype]).reshape(shape)


def _raw(array: np.ndarray) -> bytes:
    return (
        serialize_byte_tensor(array).item() if array.dtype == np.object_ and array.size else array.tobytes()
    )


@pytest.fixture(scope="module")
def stub(running_server: TritonServer) -> Any:
    with grpc.insecure_channel(running_server.grpc_url) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.mark.parametrize("model", [TEXT, TOKENS])
def test_malformed_tensors_are_refused_and_hurt_nobody(
    running_server: TritonServer, stub: Any, model: str
) -> None:
    described = stub.ModelMetadata(service_pb2.ModelMetadataRequest(name=model), timeout=30)
    dtypes = {tensor.name: tensor.datatype for tensor in described.inputs}
    dead = {"INTERNAL", "is not healthy", "is gone", "see the server's log"}
    seen: dict[str, int] = {"served": 0, "refused": 0}

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(data=st.data(), name=st.sampled_from(FUZZED[model]), cut=st.sampled_from([0] * 9 + [1]))
    def ask(data: st.DataObject, name: str, cut: int) -> None:
        array = data.draw(tensors(dtypes[name]))
        request = service_pb2.ModelInferRequest(model_name=model, id="fuzz")
        for own, value in {**VALID[model], name: array}.items():
            dtype = np_to_triton_dtype(value.dtype)
            tensor = service_pb2.ModelInferRequest.InferInputTensor(
                name=own, datatype=dtype, shape=list(value.shape)
            )
            request.inputs.append(tensor)
            raw = _raw(value)
            request.raw_input_contents.append(raw[: len(raw) - cut] if own == name else raw)
        for answer in stub.ModelStreamInfer(iter([request]), timeout=30):
            words = answer.error_message
            if not words:
                seen["served"] += 1
                continue
            seen["refused"] += 1
            assert not any(word in words for word in dead), f"{name} {array!r}: {words}"
            is_ours = words.startswith("INVALID_ARGUMENT: ")
            assert is_ours or any(word in words for word in TRITONS_OWN), words

    ask()
    assert seen["served"]
    assert seen["refused"]
    body = {"text_input": "def f(", "max_tokens": 2}
    assert "text_output" in post(running_server, TEXT, "generate", body)
    wait_until_idle(running_server)


async def test_three_hundred_requests_leave_nothing_behind(running_server: TritonServer) -> None:
    """The memory of ten thousand is measured by tests/bench/serving/bench_soak.py."""
    channel = Channel(running_server.grpc_url)
    for at in range(300):
        assert await channel.ask(TEXT, **(SHORT | {"max_tokens": 1}), request_id=f"s{at}")
    await channel.close()
    await asyncio.to_thread(wait_until_idle, running_server)
