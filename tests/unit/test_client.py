"""The client against an in-process gRPC server that speaks Triton's protocol and plays a script."""

from __future__ import annotations

import argparse
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

import minitron_client
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
    CancelledError,
    Chunk,
    ClientClosedError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    InvalidValueError,
    MinitronClient,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    SamplingParams,
    ServerConnectionError,
    StreamBrokenError,
    UnsupportedError,
    generate_command,
    health_command,
)

pytestmark = pytest.mark.unit

MAKERS = {"blocking": MinitronClient, "awaited": AwaitedClient}


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = own_threads()
    yield
    until = time.monotonic() + 5
    while (left := own_threads() - before) and time.monotonic() < until:
        time.sleep(0.01)
    assert not left


@pytest.fixture
def fake(_no_thread_is_left: None) -> Iterator[FakeTriton]:
    with serving_fake() as triton:
        yield triton


@pytest.fixture(params=MAKERS)
def make_client(request: pytest.FixtureRequest) -> Callable[..., MinitronClient]:
    """Makes either client; both are called alike."""
    return MAKERS[request.param]  # type: ignore[return-value]


@pytest.fixture
def client(fake: FakeTriton, make_client: Callable[..., MinitronClient]) -> Iterator[MinitronClient]:
    with make_client(fake.url, timeout_s=10, max_retries=0) as made:
        yield made


def soon(holds: Callable[[], bool], timeout_s: float = 5) -> bool:
    """Whether it holds before the time is over."""
    until_s = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < until_s:
        time.sleep(0.01)
    return holds()


# --- the package ---


def test_the_exported_names_are_exactly_the_public_ones() -> None:
    public = {
        name
        for name, value in vars(minitron_client).items()
        if not name.startswith("_") and not isinstance(value, type(sys))
    }
    assert public == set(minitron_client.__all__)
    assert list(minitron_client.__all__) == sorted(minitron_client.__all__)


def test_importing_pulls_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys, time; t = time.process_time(); import minitron_client.generate_command, "
        "minitron_client.health_command; print(time.process_time() - t); "
        "print([m for m in ('grpc', 'numpy', 'torch', 'tritonclient', 'minitron_build') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    assert float(seconds) < 0.3  # of processor time: the machine may be busy


# --- answers ---


def test_generate_gives_text_finish_reason_id_and_time(fake: FakeTriton, client: MinitronClient) -> None:
    fake.script = lambda request, context: iter([reply("hello wörld", is_final=True, finish_reason="length")])
    completion = client.generate("hi", max_tokens=3)
    assert (completion.text, completion.finish_reason) == ("hello wörld", "length")
    assert completion.request_id == fake.requests[0].id
    assert len(completion.request_id) == 32
    assert completion.timings.ttft_s is None
    assert 0 < completion.timings.total_s < 10


@pytest.mark.parametrize("ending", ["flag on the last data", "empty final response", "no flags at all"])
def test_a_stream_ends_whichever_way_the_server_marks_it(
    fake: FakeTriton, client: MinitronClient, ending: str
) -> None:
    flag = None if ending == "no flags at all" else False
    tail = {
        "flag on the last data": [reply("b", is_final=True)],
        "empty final response": [reply("b"), reply(is_final=True)],
        "no flags at all": [reply("b", is_final=None)],
    }[ending]
    fake.script = lambda request, context: iter([reply("a", is_final=flag), *tail])
    with client.stream("hi") as stream:
        assert [chunk.text for chunk in stream] == ["a", "b"]
        assert list(stream) == []
        assert stream.final().text == stream.text == "ab"
        assert stream.final().usage == stream.usage
    assert fake.stopped_ids == []
    assert fake.saw_end_of_requests.wait(5)  # half-closed, and read to the end of the RPC


def test_the_time_to_first_token_is_that_of_the_first_text(fake: FakeTriton, client: MinitronClient) -> None:
    def script(request: Any, context: Any) -> Iterator[Any]:
        yield reply("")
        time.sleep(0.2)
        yield reply("a")
        time.sleep(0.2)
        yield reply("b", is_final=True, finish_reason="stop")

    fake.script = script
    with client.stream("hi") as stream:
        assert next(stream) == Chunk("a")
        completion = stream.final()
    assert completion.timings.ttft_s is not None
    assert 0.2 <= completion.timings.ttft_s <= completion.timings.total_s - 0.1  # the machine may be busy
    assert completion.finish_reason == "stop"


def test_metadata_is_read_once_and_again_after_an_error(fake: FakeTriton, client: MinitronClient) -> None:
    client.generate("a")
    client.generate("b")
    assert fake.num_metadata_calls == 1
    fake.script = lambda request, context: iter([failure("unexpected inference input 'seed' for model 'x'")])
    with pytest.raises(InvalidRequestError, match="unexpected inference input"):
        client.generate("c")
    fake.script = lambda request, context: iter([reply("ok", is_final=True)])
    client.generate("d")
    assert fake.num_metadata_calls == 2
    assert client.metadata("ensemble").platform == "python"


def test_streams_of_many_threads_share_one_channel(fake: FakeTriton, client: MinitronClient) -> None:
    def script(request: Any, context: Any) -> Iterator[Any]:
        for _ in range(20):
            yield reply(request.id[-4:])
        yield reply(is_final=True)

    fake.script = script

    def ask(number: int) -> tuple[str, str]:
        with client.stream("hi", request_id=f"id-{number:04d}") as stream:
            return f"{number:04d}" * 20, stream.final().text

    with ThreadPoolExecutor(12) as pool:
        for expected, got in pool.map(ask, range(60)):
            assert got == expected
    assert len({request.id for request in fake.requests}) == 60


def test_no_header_that_crashes_the_server_is_sent(fake: FakeTriton, client: MinitronClient) -> None:
    seen: list[str] = []

    def script(request: Any, context: Any) -> Iterator[Any]:
        seen.extend(key for key, _ in context.invocation_metadata())
        yield reply("x", is_final=True)

    fake.script = script
    client.generate("hi")
    assert "triton_grpc_error" not in seen


# --- cancelling ---


def test_leaving_early_cancels_the_rpc_and_sends_a_stop(fake: FakeTriton, client: MinitronClient) -> None:
    fake.script = until_cancelled
    with client.stream("hi") as stream:
        for chunk in stream:
            if chunk.text.startswith("3"):
                break
    assert fake.cancelled.wait(5)
    assert soon(lambda: fake.stopped_ids == [stream.request_id])
    completion = stream.final()
    assert (completion.text, completion.finish_reason) == ("0 1 2 3 ", "cancelled")
    stream.close()
    assert fake.stopped_ids == [stream.request_id]  # once


def test_an_error_in_the_with_block_cancels_too(fake: FakeTriton, client: MinitronClient) -> None:
    fake.script = until_cancelled
    stream = client.stream("hi")

    def interrupted() -> None:
        with stream:
            next(stream)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert fake.cancelled.wait(5)
    assert soon(lambda: fake.stopped_ids == [stream.request_id])


def test_a_server_without_a_stop_input_gets_no_stop(fake: FakeTriton, client: MinitronClient) -> None:
    del fake.inputs["stop"]
    fake.script = until_cancelled
    with client.stream("hi") as stream:
        next(stream)
    assert fake.cancelled.wait(5)
    assert fake.stopped_ids == []


def test_close_from_another_thread_ends_the_iteration(fake: FakeTriton, client: MinitronClient) -> None:
    fake.script = until_cancelled
    with client.stream("hi") as stream:
        timer = threading.Timer(0.1, stream.close)
        timer.start()
        assert len(list(stream)) > 1
        assert stream.final().finish_reason == "cancelled"
        timer.join()


def test_closing_the_client_fails_what_runs_and_refuses_what_comes(
    fake: FakeTriton, client: MinitronClient
) -> None:
    fake.script = until_cancelled
    stream = client.stream("hi")
    next(stream)
    client.close()
    client.close()
    with pytest.raises((CancelledError, ClientClosedError)) as caught:
        stream.final()
    assert caught.value.request_id == stream.request_id
    assert fake.cancelled.wait(5)
    with pytest.raises(ClientClosedError, match="was closed; make a new one"):
        client.health()


# --- failures ---


def test_the_deadline_is_kept_and_the_server_told(fake: FakeTriton, client: MinitronClient) -> None:
    fake.script = until_cancelled
    started_s = time.monotonic()
    with pytest.raises(
        DeadlineError, match=r"not finished within timeout_s=0\.3, after \d+ responses"
    ) as caught:
        client.generate("hi", timeout_s=0.3)
    assert time.monotonic() - started_s < 2
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert fake.cancelled.wait(5)
    assert soon(lambda: fake.stopped_ids == [caught.value.request_id])


def test_a_server_s_sentence_is_raised_with_the_request_s_id(
    fake: FakeTriton, client: MinitronClient
) -> None:
    fake.script = lambda request, context: iter(
        [failure("in ensemble 'ensemble', INVALID_ARGUMENT: max_tokens is 9, at most 8")]
    )
    with pytest.raises(InvalidRequestError, match="max_tokens is 9, at most 8") as caught:
        client.generate("hi", request_id="r7")
    assert (caught.value.code, caught.value.request_id) == ("INVALID_ARGUMENT", "r7")
    assert fake.saw_end_of_requests.wait(5)


def test_a_stream_goes_on_failing_after_its_failure(fake: FakeTriton, client: MinitronClient) -> None:
    fake.script = lambda request, context: iter([reply("a"), failure("Exceeds maximum queue size")])
    with client.stream("hi") as stream:
        assert next(stream).text == "a"
        for _ in range(2):
            with pytest.raises(StreamBrokenError):
                next(stream)
        assert stream.text == "a"


def test_an_error_that_is_not_followed_by_the_end_does_not_hang(
    fake: FakeTriton, client: MinitronClient
) -> None:
    def script(request: Any, context: Any) -> Iterator[Any]:
        yield failure("Exceeds maximum queue size")
        while context.is_active():
            time.sleep(0.01)

    fake.script = script
    started_s = time.monotonic()
    with pytest.raises(OverloadedError):
        client.generate("hi")
    assert time.monotonic() - started_s < 5
    assert fake.cancelled.wait(5)


@pytest.mark.parametrize(
    ("num_before", "status", "details", "error_class", "retryable"),
    [
        (0, grpc.StatusCode.UNAVAILABLE, "Socket closed", ServerConnectionError, True),
        (2, grpc.StatusCode.UNAVAILABLE, "Socket closed", StreamBrokenError, False),
        (2, grpc.StatusCode.UNAVAILABLE, "server is shutting down", StreamBrokenError, False),
        (2, grpc.StatusCode.CANCELLED, "endpoint closing", CancelledError, False),
        (0, grpc.StatusCode.INTERNAL, "lost it", InternalError, False),
    ],
)
def test_an_rpc_that_fails(
    fake: FakeTriton,
    client: MinitronClient,
    num_before: int,
    status: grpc.StatusCode,
    details: str,
    error_class: type[minitron_client.MinitronClientError],
    retryable: bool,
) -> None:
    def script(request: Any, context: Any) -> Iterator[Any]:
        for _ in range(num_before):
            yield reply("a")
        context.abort(status, details)

    fake.script = script
    with client.stream("hi") as stream, pytest.raises(error_class, match=details) as caught:
        stream.final()
    assert type(caught.value) is error_class
    assert caught.value.retryable is retryable
    assert caught.value.code == status.name
    assert stream.text == "a" * num_before


@pytest.mark.parametrize(
    ("replies", "error_class", "words"),
    [
        ([reply("a")], StreamBrokenError, "after 1 responses, none of them the last"),
        ([], ProtocolError, "ended the stream without a response"),
    ],
)
def test_a_clean_end_that_is_too_early_is_noticed(
    fake: FakeTriton,
    client: MinitronClient,
    replies: list[Any],
    error_class: type[minitron_client.MinitronClientError],
    words: str,
) -> None:
    fake.script = lambda request, context: iter(replies)
    with pytest.raises(error_class, match=words):
        client.generate("hi")


def test_a_response_without_the_text_is_a_protocol_error(fake: FakeTriton, client: MinitronClient) -> None:
    broken = reply("a", is_final=True)
    broken.infer_response.outputs[0].name = "text"
    fake.script = lambda request, context: iter([broken])
    with pytest.raises(
        ProtocolError, match="a response without text_output; it has finish_reason, text"
    ) as caught:
        client.generate("hi")
    assert caught.value.request_id == fake.requests[0].id
    short = reply("a", is_final=True)
    del short.infer_response.raw_output_contents[1]
    fake.script = lambda request, context: iter([short])
    with pytest.raises(ProtocolError, match="lists 2 outputs and brings the contents of 1"):
        client.generate("hi")


def test_nobody_there() -> None:
    with socket.socket() as held:  # bound, never listening: refuses
        held.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{held.getsockname()[1]}"
        with MinitronClient(url) as client:
            with pytest.raises(ServerConnectionError, match=f"no connection to {url}: .*refused") as caught:
                client.generate("hi")
            assert caught.value.retryable
            assert client.health().live is False


def test_somebody_there_who_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        started_s = time.monotonic()
        with (
            MinitronClient(url, connect_timeout_s=0.3) as client,
            pytest.raises(ServerConnectionError, match=r"no answer from .* within 0\.3 s"),
        ):
            client.generate("hi")
        assert time.monotonic() - started_s < 3


def test_an_unknown_model_and_a_missing_feature(fake: FakeTriton, client: MinitronClient) -> None:
    with (
        MinitronClient(client.url, model="nope") as other,
        pytest.raises(NotFoundError, match="unknown model: 'nope'"),
    ):
        other.generate("hi")
    with pytest.raises(UnsupportedError, match="has no input return_log_probs"):
        client.generate("hi", return_log_probs=True)
    assert fake.requests == []


@pytest.mark.parametrize(
    "url", ["localhost", "http://localhost:8001", "localhost:0", "localhost:99999", "a b:1", ":1"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidValueError, match="is not HOST:PORT; give the gRPC address without a scheme"):
        MinitronClient(url)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), True, "5"])
def test_an_endless_or_empty_deadline_is_refused(seconds: Any) -> None:
    with pytest.raises(InvalidValueError, match="timeout_s must be a positive, finite number of seconds"):
        MinitronClient(timeout_s=seconds)


def test_options_twice_are_refused(client: MinitronClient) -> None:
    with pytest.raises(InvalidValueError, match="give sampling= or max_tokens=, not both"):
        client.generate("hi", sampling=SamplingParams(), max_tokens=4)


# --- health ---


def test_health_lists_every_model(fake: FakeTriton, client: MinitronClient) -> None:
    fake.models = {"tensorrt_llm_bls": "READY", "ensemble": "UNAVAILABLE"}
    health = client.health()
    assert (health.live, health.ready, dict(health.models)) == (
        True,
        True,
        {"tensorrt_llm_bls": True, "ensemble": False},
    )


def test_waiting_until_ready(fake: FakeTriton, client: MinitronClient) -> None:
    fake.models = {"tensorrt_llm_bls": "LOADING"}
    fake.is_ready = False
    with pytest.raises(DeadlineError, match=r"not ready after 0\.3 s: models not ready: tensorrt_llm_bls"):
        client.wait_until_ready(0.3)

    def become_ready() -> None:
        fake.models["tensorrt_llm_bls"] = "READY"
        fake.is_ready = True

    timer = threading.Timer(0.2, become_ready)
    timer.start()
    assert client.wait_until_ready(10).ready
    timer.join()
    fake.models = {"other": "READY"}
    with pytest.raises(NotFoundError, match="has no model tensorrt_llm_bls; it has other"):
        client.wait_until_ready(10)


def test_a_connection_answers_for_one_model_and_its_config(fake: FakeTriton) -> None:
    from minitron_client._blocking import Connection
    from minitron_client._triton import model_config_pb2

    connection = Connection(fake.url)
    assert connection.ask("ModelReady", 5, name="ensemble")
    assert not connection.ask("ModelReady", 5, name="nope")
    config = connection.ask("ModelConfig", 5, name="ensemble")
    assert isinstance(config, model_config_pb2().ModelConfig)
    assert config.name == "ensemble"
    connection.close()


# --- commands ---


def run_command(module: Any, *words: str) -> int:
    parser = argparse.ArgumentParser()
    module.configure_parser(parser)
    return int(module.run(parser.parse_args(words)))


def test_generate_prints_the_text(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_URL", fake.url)
    monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin"))
    fake.script = lambda request, context: iter([reply("whole", is_final=True, finish_reason="stop")])
    assert run_command(generate_command, "-", "--max-tokens", "5", "--top-p", "0.9", "--seed", "0") == 0
    printed = capsys.readouterr()
    assert printed.out == "whole\n"
    assert printed.err.startswith("minitron: finish reason stop, ")
    sent = dict(
        zip((item.name for item in fake.requests[0].inputs), fake.requests[0].raw_input_contents, strict=True)
    )
    assert sent["text_input"][4:] == b"from stdin"
    assert sent["seed"] == bytes(8)


def test_generate_streams_and_ends_with_json(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    fake.script = lambda request, context: iter(
        [reply("a\n"), reply("b", is_final=True, finish_reason="length")]
    )
    words = ("hi", "--url", fake.url, "--stream", "--json", "--stop-word", "x", "--stop-word", "y")
    assert run_command(generate_command, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == ["a", "b"]
    document = json.loads(lines[-1])
    assert (document["text"], document["finish_reason"]) == ("a\nb", "length")
    assert document["timings"]["ttft_s"] > 0
    assert document["request_id"] == fake.requests[0].id
    assert run_command(generate_command, "hi", "--url", fake.url, "--json") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_generate_refuses_before_it_sends(fake: FakeTriton) -> None:
    with pytest.raises(InvalidValueError, match=r"temperature=0\.7 has no effect"):
        run_command(generate_command, "hi", "--url", fake.url, "--temperature", "0.7")
    assert fake.num_metadata_calls == 0


def test_health_prints_a_table_and_json(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    fake.models = {"tensorrt_llm_bls": "READY", "ensemble": "UNAVAILABLE"}
    assert run_command(health_command, "--url", fake.url, "--metrics-url", "none") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("  ready")
    assert [line.split() for line in lines[1:3]] == [
        ["ensemble", "not", "ready"],
        ["tensorrt_llm_bls", "ready,", "version", "1"],
    ]
    document = json.loads(lines[-1])
    assert document["models"] == {"ensemble": False, "tensorrt_llm_bls": True}
    assert document["versions"] == {"ensemble": [], "tensorrt_llm_bls": ["1"]}
    fake.is_ready = False
    assert run_command(health_command, "--url", fake.url, "--metrics-url", "none") == 1
    assert "live, not ready" in capsys.readouterr().out


def test_health_of_nobody_is_exit_1_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(health_command, "--url", "127.0.0.1:1") == 1
    lines = capsys.readouterr().out.splitlines()
    assert "not live: no connection to 127.0.0.1:1" in lines[0]
    assert json.loads(lines[-1])["live"] is False


def test_ctrl_c_cancels_on_the_server_and_exits_130(fake: FakeTriton) -> None:
    fake.script = until_cancelled
    code = "import sys; from minitron_build.cli import main; sys.exit(main())"
    words = ["generate", "hi", "--url", fake.url, "--stream"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(2) == "0 "
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "minitron: interrupted\n"
    assert fake.cancelled.wait(5)
    assert fake.stopped_ids == [fake.requests[0].id]
