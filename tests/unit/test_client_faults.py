"""Both clients before servers that misbehave on purpose: what is tried again, and what is never lost or hung.

Each test runs with the blocking and with the awaited client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from fake_triton import (
    AwaitedClient,
    FakeTriton,
    failure,
    own_threads,
    reply,
    serving_fake,
    until_cancelled,
)
from minitron_client import (
    AsyncMinitronClient,
    BatchProgress,
    ClientClosedError,
    Completion,
    DeadlineError,
    InvalidRequestError,
    InvalidValueError,
    MinitronClient,
    MinitronClientError,
    OverloadedError,
    ProtocolError,
    SamplingParams,
    ServerConnectionError,
    StreamBrokenError,
    UnavailableError,
    UnsupportedError,
)
from minitron_client._aio import AioResponses
from minitron_client._fork import CallMark
from minitron_client._triton import MAX_RESPONSE_BYTES, ResponseReader
from minitron_client.settings import API_KEY_HEADER

pytestmark = pytest.mark.unit

MAKERS: dict[str, Any] = {"blocking": MinitronClient, "awaited": AwaitedClient}


@pytest.fixture(autouse=True)
def _quick_pauses_and_no_thread_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("minitron_client.retries.INITIAL_PAUSE_S", 0.05)
    before = own_threads()
    yield
    assert soon(lambda: not own_threads() - before)


@pytest.fixture
def fake() -> Iterator[FakeTriton]:
    with serving_fake() as triton:
        yield triton


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Any:
    return MAKERS[request.param]


@pytest.fixture
def client(fake: FakeTriton, make: Any) -> Iterator[Any]:
    with make(fake.url, timeout_s=10) as made:
        yield made


def soon(holds: Callable[[], bool], timeout_s: float = 5) -> bool:
    """Whether it holds before the time is over."""
    until_s = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < until_s:
        time.sleep(0.01)
    return holds()


def failing(num_times: int, fail: Callable[[Any], Any]) -> Any:
    """A script that fails so often and then answers."""
    left = [num_times]

    def script(request: Any, context: Any) -> Iterator[Any]:
        if left[0] > 0:
            left[0] -= 1
            yield fail(context)
        yield reply("fine", is_final=True, finish_reason="stop")

    return script


def aborting(status: grpc.StatusCode, details: str) -> Callable[[Any], Any]:
    return lambda context: context.abort(status, details)


FAILURES = {
    "status": aborting(grpc.StatusCode.UNAVAILABLE, "Socket closed"),
    "exhausted": aborting(grpc.StatusCode.RESOURCE_EXHAUSTED, "no more"),
    "sentence": lambda context: failure("Exceeds maximum queue size"),
    "our sentence": lambda context: failure("UNAVAILABLE: 9 requests are waiting; max_queue_size is 9"),
    "unloaded": lambda context: failure("Request for unknown model: 'x' has no available versions"),
}


# --- trying again ---


@pytest.mark.parametrize("how", FAILURES)
def test_what_may_pass_is_tried_again_under_the_same_id(fake: FakeTriton, client: Any, how: str) -> None:
    fake.script = failing(2, FAILURES[how])
    completion = client.generate("hi")
    assert (completion.text, completion.finish_reason) == ("fine", "stop")
    assert [request.id for request in fake.requests] == [completion.request_id] * 3


def test_it_gives_up_after_two_and_tells_the_server_s_reason(fake: FakeTriton, client: Any) -> None:
    fake.script = failing(9, FAILURES["sentence"])
    with pytest.raises(OverloadedError, match="Exceeds maximum queue size; ask again a little later"):
        client.generate("hi")
    assert len(fake.requests) == 3


def test_a_request_that_is_wrong_is_asked_once(fake: FakeTriton, client: Any) -> None:
    fake.script = failing(1, lambda context: failure("INVALID_ARGUMENT: top_p is 2"))
    with pytest.raises(InvalidRequestError):
        client.generate("hi")
    assert len(fake.requests) == 1


def test_nothing_is_tried_again_once_text_has_come(fake: FakeTriton, client: Any) -> None:
    def script(request: Any, context: Any) -> Iterator[Any]:
        yield reply("half a ")
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    fake.script = script
    with client.stream("hi") as stream, pytest.raises(StreamBrokenError, match="in mid-stream") as caught:
        list(stream)
    assert len(fake.requests) == 1
    assert not caught.value.retryable
    assert stream.text == "half a "


def test_retries_do_not_outlive_the_deadline(
    fake: FakeTriton, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron_client.retries.INITIAL_PAUSE_S", 5.0)
    fake.script = failing(9, FAILURES["status"])
    began_s = time.monotonic()
    with make(fake.url, timeout_s=2, max_retries=50) as client, pytest.raises(ServerConnectionError):
        client.generate("hi")
    assert time.monotonic() - began_s < 2
    assert len(fake.requests) == 1


def test_closing_a_stream_ends_its_wait_for_the_next_attempt(
    fake: FakeTriton, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron_client.retries.INITIAL_PAUSE_S", 20.0)
    fake.script = failing(9, FAILURES["status"])
    with make(fake.url, timeout_s=60) as client:
        timer = threading.Timer(0.5, client.close)
        timer.start()
        began_s = time.monotonic()
        with client.stream("hi") as stream, pytest.raises(ClientClosedError):
            stream.final()
        assert time.monotonic() - began_s < 5
        timer.join()


def test_a_server_that_comes_back_is_found_by_the_same_client(make: Any) -> None:
    with serving_fake() as first:
        port = int(first.url.rpartition(":")[2])
        client = make(first.url, timeout_s=20, max_retries=8)
        assert client.generate("hi").text == "ok"
    with client:
        timer_done = threading.Event()

        def come_back() -> None:
            time.sleep(0.3)
            with serving_fake(port):
                timer_done.wait(20)

        thread = threading.Thread(target=come_back)
        thread.start()
        try:
            assert client.generate("hi").text == "ok"
        finally:
            timer_done.set()
            thread.join()


# --- several servers ---


def test_servers_share_the_requests_and_one_that_is_gone_is_left_out(make: Any) -> None:
    with serving_fake() as one, serving_fake() as two, socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, never listening: refuses
        gone = f"127.0.0.1:{held.getsockname()[1]}"
        with make([one.url, gone, two.url], timeout_s=10) as client:
            assert [client.generate("hi").text for _ in range(8)] == ["ok"] * 8
            assert len(one.requests) + len(two.requests) == 8
            assert abs(len(one.requests) - len(two.requests)) <= 2
            health = client.health()
            assert health.live
            assert health.ready
            assert (health.reason, health.advice) == ("", "")
            assert [state.live for state in health.servers.values()] == [True, False, True]
            assert f"no connection to {gone}" in health.servers[gone].reason
            assert health.servers[gone].advice.startswith("check the address")
            assert client.url == f"{one.url},{gone},{two.url}"


def test_a_request_moves_on_to_another_server_before_its_first_token(make: Any) -> None:
    with serving_fake() as one, serving_fake() as two, make([one.url, two.url], timeout_s=10) as client:
        one.script = two.script = failing(1, FAILURES["status"])
        assert client.generate("hi").text == "fine"
        assert (len(one.requests), len(two.requests)) == (1, 1)


# --- stalls, resets, garbage, too much ---


@contextmanager
def raw_server(handle: Callable[[socket.socket], None]) -> Iterator[str]:
    """A TCP server that does to each connection what it is told."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    is_over = threading.Event()

    def serve() -> None:
        while not is_over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                continue
            with connection:
                connection.settimeout(5)
                handle(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        is_over.set()
        thread.join()
        listener.close()


def reset(connection: socket.socket) -> None:
    connection.recv(64)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def speak_http_1(connection: socket.socket) -> None:
    connection.recv(64)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")


def speak_nonsense(connection: socket.socket) -> None:
    connection.recv(64)
    connection.sendall(os.urandom(4096))


@pytest.mark.parametrize("handle", [reset, speak_http_1, speak_nonsense])
def test_what_is_no_grpc_server_is_no_connection(make: Any, handle: Callable[[socket.socket], None]) -> None:
    with raw_server(handle) as url, make(url, timeout_s=5, connect_timeout_s=1, max_retries=1) as client:
        began_s = time.monotonic()
        with pytest.raises((ServerConnectionError, UnavailableError)) as caught:
            client.generate("hi")
        assert time.monotonic() - began_s < 5
        assert caught.value.retryable
        health = client.health(timeout_s=1)
        assert not health.live
        if handle is not reset:
            assert "gRPC port (8001 by default; 8000 is" in health.advice


def test_a_stall_before_and_after_the_first_token_ends_at_the_deadline(fake: FakeTriton, client: Any) -> None:
    for first in ((), (reply("a"),)):

        def script(request: Any, context: Any, first: tuple[Any, ...] = first) -> Iterator[Any]:
            yield from first
            while context.is_active():
                time.sleep(0.01)

        fake.script = script
        began_s = time.monotonic()
        with client.stream("hi", timeout_s=0.4) as stream, pytest.raises(DeadlineError) as caught:
            list(stream)
        assert time.monotonic() - began_s < 3
        assert stream.text == "a" * len(first)
        assert soon(lambda caught=caught: fake.stopped_ids[-1:] == [caught.value.request_id])  # type: ignore[misc]


def test_an_answer_that_is_too_large_is_refused(fake: FakeTriton, client: Any) -> None:
    fake.script = lambda request, context: iter([reply("x" * (MAX_RESPONSE_BYTES + 1), is_final=True)])
    with pytest.raises(ProtocolError, match="larger than max"):
        client.generate("hi")
    assert len(fake.requests) == 1
    fake.script = lambda request, context: iter([reply("y" * 2**22, is_final=True)])  # gRPC's own default
    assert len(client.generate("hi").text) == 2**22


def test_responses_after_the_last_and_an_error_after_it(fake: FakeTriton, client: Any) -> None:
    fake.script = lambda request, context: iter(
        [reply("a", is_final=True), reply("b"), failure("INTERNAL: late")]
    )
    with client.stream("hi") as stream:
        assert [next(stream).text, next(stream).text] == ["a", "b"]
        with pytest.raises(MinitronClientError, match="late"):
            next(stream)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda answer: answer.outputs[0].ClearField("datatype"),
        lambda answer: answer.raw_output_contents.__setitem__(0, b"\xff\xff\xff\xffa"),
        lambda answer: answer.raw_output_contents.__setitem__(0, b"\2\0\0\0\xff\xfe"),
        lambda answer: answer.raw_output_contents.append(b"more"),
        lambda answer: answer.outputs[0].shape.append(7),
        lambda answer: setattr(answer, "id", "another"),
    ],
    ids=["no datatype", "length", "no UTF-8", "contents too many", "shape", "another's answer"],
)
def test_garbage_in_a_response_is_a_protocol_error_and_stops_the_server(
    fake: FakeTriton, client: Any, spoil: Callable[[Any], Any]
) -> None:
    message = reply("a")
    spoil(message.infer_response)
    fake.script = lambda request, context: iter([message, reply("b", is_final=True)])
    with pytest.raises(ProtocolError) as caught:
        client.generate("hi")
    assert soon(lambda: fake.stopped_ids == [caught.value.request_id])


# --- unary or stream ---


def test_a_model_that_is_not_decoupled_is_asked_with_a_unary_call(fake: FakeTriton, client: Any) -> None:
    fake.is_decoupled = False
    fake.script = lambda request, context: iter([reply("whole", is_final=None, finish_reason="stop")])
    assert client.metadata().is_decoupled is False
    assert client.generate("hi").text == "whole"
    assert fake.num_unary == 1
    with pytest.raises(UnsupportedError, match=r"is not decoupled, .* cannot stream; use generate\(\)"):
        client.stream("hi")
    fake.script = lambda request, context: iter([failure("top_p is 2")])
    with pytest.raises(InvalidRequestError, match="top_p is 2") as caught:
        client.generate("hi")
    assert caught.value.code == "INVALID_ARGUMENT"


# --- what goes along ---


def test_headers_keys_and_traces_go_with_every_call(fake: FakeTriton, make: Any) -> None:
    from opentelemetry.sdk.trace import TracerProvider

    tracer = TracerProvider().get_tracer("test")
    with make(fake.url, api_key="secret", headers={"x-route": "blue"}) as client:
        client.health()
        client.generate("a", headers={"x-tenant": "7"})
        with tracer.start_as_current_span("caller") as span:
            trace_id = span.get_span_context().trace_id
            if isinstance(client, MinitronClient):
                client.generate("b")
    calls = fake.headers
    assert all(call[API_KEY_HEADER] == "secret" and call["x-route"] == "blue" for call in calls)
    assert [call.get("x-tenant") for call in calls] == [None, "7", None][: len(calls)]
    assert all("triton_grpc_error" not in call for call in calls)
    traces = [call.get("traceparent") for call in calls]
    if make is MinitronClient:
        assert traces[:2] == [None, None]
        assert (traces[2] or "").startswith(f"00-{trace_id:032x}-")


async def test_the_active_span_goes_along_from_a_task(fake: FakeTriton) -> None:
    from opentelemetry.sdk.trace import TracerProvider

    tracer = TracerProvider().get_tracer("test")
    async with AsyncMinitronClient(fake.url) as client:
        with tracer.start_as_current_span("caller") as span:
            await client.generate("b")
            trace_id = span.get_span_context().trace_id
    assert fake.headers[-1]["traceparent"].startswith(f"00-{trace_id:032x}-")


@pytest.mark.parametrize("asks", [False, True])
def test_prompts_are_logged_only_where_asked_for(
    fake: FakeTriton, make: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, asks: bool
) -> None:
    monkeypatch.setenv("MINITRON_LOG_PROMPTS", "1" if asks else "0")
    fake.script = failing(1, FAILURES["status"])
    with caplog.at_level(logging.DEBUG), make(fake.url, api_key="s3cr3t") as client:
        completion = client.generate("my private words")
    logged = "\n".join(record.getMessage() for record in caplog.records if record.name == "minitron_client")
    assert completion.request_id in logged
    assert "again in" in logged
    assert ("my private words" in logged) is asks
    assert "s3cr3t" not in caplog.text


# --- batches ---


def echo(request: Any, context: Any) -> Iterator[Any]:
    """The prompt, or a refusal where it says so."""
    names = [item.name for item in request.inputs]
    text = request.raw_input_contents[names.index("text_input")][4:].decode()
    if text.startswith("bad"):
        yield failure("INVALID_ARGUMENT: bad prompt")
        return
    time.sleep(0.03 if text.endswith("0") else 0)
    yield reply(text.upper(), is_final=True, finish_reason="length")


def test_a_batch_is_in_order_with_an_error_for_each_that_failed(fake: FakeTriton, client: Any) -> None:
    fake.script = echo
    seen: list[BatchProgress] = []
    prompts = [("own", SamplingParams(max_tokens=3)), *(f"p{number}" for number in range(30)), "bad one"]
    results = client.generate_batch(prompts, concurrency=8, on_progress=seen.append, max_tokens=9)
    assert [result.text for result in results[:-1]] == ["OWN", *(f"P{number}" for number in range(30))]
    assert isinstance(results[-1], InvalidRequestError)
    assert [progress.done for progress in seen] == list(range(1, 33))
    assert sorted(progress.index for progress in seen) == list(range(32))
    assert (seen[-1].failed, seen[-1].total) == (1, 32)
    assert all(isinstance(progress.result, (Completion, MinitronClientError)) for progress in seen)
    limits = {max_tokens_of(request) for request in fake.requests}
    assert limits == {3, 9}
    assert client.generate_batch([]) == []


def test_a_prompt_of_a_batch_that_is_none_is_an_error_in_its_place(fake: FakeTriton, client: Any) -> None:
    fake.script = echo
    first, second, third, pair = client.generate_batch(["a", None, "b", (7, SamplingParams())])
    assert (first.text, third.text) == ("A", "B")
    assert isinstance(second, InvalidValueError)
    assert "prompt must be a string or a list of token ids, got NoneType" in str(second)
    assert isinstance(pair, InvalidValueError)
    assert len(fake.requests) == 2


def max_tokens_of(request: Any) -> int:
    names = [item.name for item in request.inputs]
    return int.from_bytes(request.raw_input_contents[names.index("max_tokens")], "little")


def test_a_batch_keeps_to_its_concurrency(fake: FakeTriton, client: Any) -> None:
    running, most = [0], [0]
    lock = threading.Lock()

    def script(request: Any, context: Any) -> Iterator[Any]:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        yield reply("x", is_final=True)

    fake.script = script
    client.generate_batch(["a"] * 20, concurrency=4)
    assert most[0] == 4


def test_an_error_of_the_caller_s_own_ends_a_batch_at_once(fake: FakeTriton, client: Any) -> None:
    def script(request: Any, context: Any) -> Iterator[Any]:
        names = [item.name for item in request.inputs]
        if request.raw_input_contents[names.index("text_input")][4:] == b"first":
            yield reply("x", is_final=True)
        else:
            yield from until_cancelled(request, context)

    fake.script = script

    def complain(progress: BatchProgress) -> None:
        raise RuntimeError("the disk is full")

    began_s = time.monotonic()
    with pytest.raises(RuntimeError, match="the disk is full"):
        client.generate_batch(["first", *["endless"] * 20], concurrency=4, on_progress=complain)
    assert time.monotonic() - began_s < 5
    assert len(fake.requests) <= 5


# --- tasks, threads, processes ---


async def test_a_thousand_at_once_ask_for_the_metadata_once(fake: FakeTriton) -> None:
    async with AsyncMinitronClient(fake.url, timeout_s=30) as client:
        results = await asyncio.gather(*(client.generate("hi") for _ in range(200)))
    assert {result.text for result in results} == {"ok"}
    assert fake.num_metadata_calls == 1


async def test_each_of_many_that_fail_together_has_its_own_error() -> None:
    async with AsyncMinitronClient("127.0.0.1:1", timeout_s=5, max_retries=0) as client:
        asked = (client.generate("hi", request_id=f"r{number}") for number in range(20))
        errors = await asyncio.gather(*asked, return_exceptions=True)
    assert [getattr(error, "request_id", error) for error in errors] == [f"r{number}" for number in range(20)]


def test_errors_survive_a_trip_between_processes() -> None:
    error = OverloadedError("full", code="UNAVAILABLE", request_id="r1", advice="wait")
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), str(copied), copied.advice) == (OverloadedError, str(error), "wait")


async def test_a_cancelled_task_cancels_on_the_server_and_leaves_no_task(fake: FakeTriton) -> None:
    fake.script = until_cancelled
    client = AsyncMinitronClient(fake.url)
    task = asyncio.create_task(client.generate("hi"))
    while not fake.requests:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await client.close()
    assert fake.cancelled.wait(5)
    assert soon(lambda: fake.stopped_ids == [fake.requests[0].id])
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_timings_begin_when_the_request_is_sent_and_count_what_failed(
    fake: FakeTriton, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = fake.ModelMetadata

    def slow_metadata(request: Any, context: Any) -> Any:
        time.sleep(1.0)
        return told(request, context)

    def slow_failure(request: Any, context: Any) -> Iterator[Any]:
        fake.script = lambda request, context: iter([reply("ok", is_final=True)])
        time.sleep(1.0)
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        yield

    monkeypatch.setattr(fake, "ModelMetadata", slow_metadata)
    with make(fake.url) as client:
        assert client.generate("hi").timings.total_s < 0.9
        fake.script = slow_failure
        assert client.generate("hi").timings.total_s > 1.0


def test_the_event_loop_goes_on_while_grpc_is_imported(fake: FakeTriton) -> None:
    program = """
import asyncio, sys, threading
seen = {}
class Watch:
    def find_spec(self, name, path=None, target=None):
        seen.setdefault(name, threading.current_thread() is threading.main_thread())
sys.meta_path.insert(0, Watch())
from minitron_client import AsyncMinitronClient
async def main():
    print(await AsyncMinitronClient(sys.argv[1]).generate("hi"))
asyncio.run(main())
print([seen[name] for name in ("grpc", "grpc.aio", "tritonclient.grpc")])
"""
    command = [sys.executable, "-W", "ignore", "-c", program, fake.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[False, False, False]"


class EndedCall:
    """A call that has ended well while its reader waits for the last word of it."""

    def __aiter__(self) -> EndedCall:
        return self

    async def __anext__(self) -> Any:
        await asyncio.Event().wait()

    def done(self) -> bool:
        return True

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.OK

    async def details(self) -> str:
        return ""

    def cancel(self) -> None:
        """Nothing runs any more."""


@pytest.mark.parametrize("is_left", [False, True])
@pytest.mark.skipif(sys.version_info < (3, 11), reason="a task does not tell that it is being cancelled")
async def test_a_cancelled_task_ends_though_the_call_ends_in_the_same_moment(is_left: bool) -> None:
    responses = AioResponses(EndedCall(), ResponseReader("u:1", "id", 1.0), CallMark())
    task = asyncio.create_task(responses.read())
    await asyncio.sleep(0)
    if is_left:
        responses.cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_tasks_that_stream_in_a_loop_end_when_they_are_cancelled(fake: FakeTriton) -> None:
    async def stream_for_ever(client: AsyncMinitronClient) -> None:
        while True:
            with contextlib.suppress(MinitronClientError):
                async with client.stream("hi") as stream:
                    await stream.final()

    async with AsyncMinitronClient(fake.url) as client:
        for turn in range(60):
            tasks = [asyncio.create_task(stream_for_ever(client)) for _ in range(8)]
            await asyncio.sleep(0.0005 * turn)
            for task in tasks:
                task.cancel()
            _, left = await asyncio.wait(tasks, timeout=5)
            assert not left


async def test_closing_while_many_run_takes_a_second_at_most_and_fails_them_all(fake: FakeTriton) -> None:
    fake.script = until_cancelled
    client = AsyncMinitronClient(fake.url)
    tasks = [asyncio.create_task(client.generate("hi")) for _ in range(12)]
    while len(fake.requests) < 12:
        await asyncio.sleep(0.01)
    began_s = time.monotonic()
    await client.close()
    assert time.monotonic() - began_s < 3
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {ClientClosedError}
    await client.close()
    with pytest.raises(ClientClosedError, match="was closed; make a new one"):
        await client.generate("hi")


def test_whatever_a_close_cuts_off_says_that_the_client_was_closed(fake: FakeTriton) -> None:
    seen = set()

    def ask(client: MinitronClient, turn: int) -> None:
        try:
            while True:
                client.health() if turn % 2 else client.generate("hi")
        except BaseException as error:
            seen.add((type(error).__name__, "closed" in str(error)))

    for _ in range(12):
        client = MinitronClient(fake.url, timeout_s=10)
        threads = [threading.Thread(target=ask, args=(client, turn)) for turn in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        client.close()
        for thread in threads:
            thread.join()
    assert seen == {("ClientClosedError", True)}


def test_close_takes_a_second_at_most_though_no_stop_is_answered(fake: FakeTriton, make: Any) -> None:
    fake.script = until_cancelled
    fake.answers_stops = False
    client = make(fake.url, timeout_s=30)
    streams = [client.stream("hi") for _ in range(6)]
    for stream in streams:
        next(stream)
    began_s = time.monotonic()
    client.close()
    assert time.monotonic() - began_s < 2.5
    assert soon(lambda: sorted(fake.stopped_ids) == sorted(stream.request_id for stream in streams))
    for stream in streams:
        with pytest.raises(ClientClosedError):
            stream.final()
    if make is AwaitedClient:
        client.leave()


def test_close_does_not_wait_for_a_server_that_says_nothing(make: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        client = make(url, connect_timeout_s=20, timeout_s=20, max_retries=0)
        outcome: list[BaseException] = []

        def ask() -> None:
            try:
                client.generate("hi")
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.3)
        began_s = time.monotonic()
        client.close()
        assert time.monotonic() - began_s < 2
        thread.join(5)
        assert not thread.is_alive()
        assert isinstance(outcome[0], MinitronClientError)
        if make is AwaitedClient:
            client.leave()


def test_a_client_of_another_event_loop_is_refused(fake: FakeTriton) -> None:
    client = AsyncMinitronClient(fake.url)

    async def ask() -> None:
        await client.generate("hi")

    loop = asyncio.new_event_loop()
    loop.run_until_complete(ask())
    other = asyncio.new_event_loop()
    with pytest.raises(ClientClosedError, match="was first used in another event loop"):
        other.run_until_complete(ask())
    loop.run_until_complete(client.close())
    loop.close()
    other.close()


def test_threads_share_a_client_and_close_it_while_they_ask(fake: FakeTriton) -> None:
    with MinitronClient(fake.url, timeout_s=10) as client, ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(client.generate, "hi") for _ in range(100)]
        time.sleep(0.05)
        client.close()
        for future in asked:
            try:
                assert future.result(20).text == "ok"
            except MinitronClientError as error:
                assert isinstance(error, ClientClosedError) or error.code == "CANCELLED"  # noqa: PT017
