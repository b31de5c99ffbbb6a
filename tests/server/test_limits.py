"""Nothing is computed for nobody, nobody waits for a slow reader, and the more important request goes first.

Run with: pytest tests/server/test_limits.py
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from triton_calls import PROMPT, Channel, arrays, message, post
from triton_repos import copy_bundle, serving, set_parameters
from tritonclient.grpc import service_pb2

from minitron_build.bundle.bundle import Bundle
from minitron_build.serving.triton_server import TritonServer

TEXT_MODELS = ("tensorrt_llm_bls", "ensemble")
RAW = "tensorrt_llm"
MODELS = ("ensemble", RAW)
"""One of the two names of the text model, and the engine itself."""
LONG_TOKENS = 1900
ENGINE_FILE = Path(__file__).with_name("scripted_engine.py")
TEXT = {"text_input": PROMPT, "end_id": -1, "exclude_input_in_output": True, "stream": True}
IDS = {"input_ids": [[508, 40]], "input_lengths": 2, "streaming": True}


def request(
    model: str, num_tokens: int, *, priority_level: int | None = None, **more: Any
) -> service_pb2.ModelInferRequest:
    """A streamed request of so many tokens to any of the models."""
    given = IDS | {"request_output_len": num_tokens} if model == RAW else TEXT | {"max_tokens": num_tokens}
    made = message(model, given | more)
    if priority_level is not None:
        made.parameters["priority_level"].int64_param = priority_level
    return made


# --- the reference engine: two run, and some wait


@pytest.fixture(scope="module")
def narrow_server(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repo = copy_bundle(tiny_bundle, tmp_path_factory.mktemp("narrow") / "bundle")
    set_parameters(repo, RAW, max_batch_size="1", max_queue_size="8")
    with serving(repo, drain_timeout_s=8) as server:
        yield server


@pytest.fixture
async def channel(narrow_server: TritonServer) -> AsyncIterator[Channel]:
    opened = Channel(narrow_server.grpc_url)
    yield opened
    await opened.close()


def generated_tokens(server: TritonServer) -> int:
    """Tokens that the engine model has given so far, to whomever."""
    url = f"http://{server.metrics_url.removeprefix('http://').removesuffix('/metrics')}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    name = f'minitron_output_tokens_total{{model="{RAW}"}}'
    return int(float(next(line.split()[-1] for line in lines if line.startswith(name))))


async def settled_tokens(server: TritonServer) -> int:
    """The same once it has stopped growing; the metrics come twice a second."""
    found = [-1]
    while len(found) < 3 or found[-1] != found[-2]:
        await asyncio.sleep(0.6)
        found.append(generated_tokens(server))
    return found[-1]


@pytest.mark.parametrize("model", MODELS)
async def test_what_waits_for_a_client_that_has_gone_is_never_computed(
    channel: Channel, narrow_server: TritonServer, model: str
) -> None:
    before = await settled_tokens(narrow_server)
    runs = channel.open(request(model, 1000))
    assert not (await runs.read()).error_message
    waiting = [channel.open(request(model, LONG_TOKENS)) for _ in range(6)]
    await asyncio.sleep(0.3)
    for call in waiting:
        call.cancel()
    while await runs.read():
        pass
    assert await settled_tokens(narrow_server) - before == 1000


@pytest.mark.parametrize("model", MODELS)
async def test_a_cancel_stops_the_engine(channel: Channel, narrow_server: TritonServer, model: str) -> None:
    before = await settled_tokens(narrow_server)
    call = channel.open(request(model, LONG_TOKENS))
    for _ in range(5):
        await call.read()
    call.cancel()
    assert await settled_tokens(narrow_server) - before < 600  # polled every 20 ms; a step takes under 1 ms


async def test_an_http_client_that_hangs_up_stops_the_engine(narrow_server: TritonServer) -> None:
    before = await settled_tokens(narrow_server)
    host = narrow_server.http_url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    body = json.dumps(TEXT | {"max_tokens": LONG_TOKENS})
    connection.request("POST", "/v2/models/ensemble/generate_stream", body)
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    answer.close()
    connection.close()
    assert await settled_tokens(narrow_server) - before < 1200


@pytest.mark.parametrize("model", MODELS)
async def test_of_the_waiting_the_lowest_level_runs_first(channel: Channel, model: str) -> None:
    runs = channel.open(request(model, 600))
    assert not (await runs.read()).error_message
    order: list[int] = []

    async def ask(level: int) -> None:
        call = channel.open(request(model, 5, priority_level=level))
        assert not (await call.read()).error_message
        order.append(level)
        while await call.read():
            pass

    asked = []
    for level in (3, 2, 1):
        asked.append(asyncio.create_task(ask(level)))
        await asyncio.sleep(0.05)
    while await runs.read():
        pass
    await asyncio.gather(*asked)
    assert order == [1, 2, 3]


def test_a_priority_level_that_there_is_not_is_refused(narrow_server: TritonServer) -> None:
    body = {"text_input": "x", "max_tokens": 1, "priority_level": 7}
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(narrow_server, "ensemble", "generate", body)
    with caught.value as answer:
        error = json.loads(answer.read())["error"]
    assert error == "INVALID_ARGUMENT: priority_level is 7; this model has levels 1 (first) to 3"


async def test_a_shutdown_lets_the_streams_finish(tiny_bundle: Bundle) -> None:
    with serving(tiny_bundle.model_repo, drain_timeout_s=30) as server:
        channel = Channel(server.grpc_url)
        calls = [channel.open(request(model, 800)) for model in TEXT_MODELS for _ in range(2)]
        await asyncio.gather(*(call.read() for call in calls))
        stopping = asyncio.create_task(asyncio.to_thread(server.stop))
        endings = await asyncio.gather(*(last_answer(call) for call in calls))
        assert await stopping == 0
        await channel.close()
    assert [arrays(ending.infer_response)["finish_reason"].item() for ending in endings] == [b"length"] * 4


async def last_answer(call: Any) -> service_pb2.ModelStreamInferResponse:
    last = None
    while answer := await call.read():
        assert not answer.error_message
        last = answer
    assert last is not None
    return last


# --- the scripted engine: a token every millisecond for each


@pytest.fixture(scope="module")
def fast_server(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repo = copy_bundle(tiny_bundle, tmp_path_factory.mktemp("fast") / "bundle")
    engine_dir = repo / RAW / "1"
    shutil.copyfile(ENGINE_FILE, engine_dir / "model.py")
    (engine_dir / "scripts.json").write_text(json.dumps([{"ids": [40], "then": 41}]))
    with serving(repo, drain_timeout_s=8) as server:
        yield server


async def read_all(channel: Channel, model: str) -> float:
    """Seconds until a stream of 300 tokens has been read."""
    begun_s = time.monotonic()
    call = channel.open(request(model, 300, seed=0))
    while await call.read():
        pass
    return time.monotonic() - begun_s


async def test_readers_that_do_not_read_hold_nobody_up_and_cost_what_they_asked_for(
    fast_server: TritonServer,
) -> None:
    model = "ensemble"
    channel, idle = Channel(fast_server.grpc_url), Channel(fast_server.grpc_url)
    alone_s = min([await read_all(channel, model) for _ in range(3)])
    server = psutil.Process(fast_server.pid)
    processes = [server, *server.children(recursive=True)]
    before_bytes = sum(process.memory_info().rss for process in processes)
    unread = [idle.open(request(model, 1900, seed=0)) for _ in range(8)]
    await asyncio.gather(*(call.read() for call in unread))
    beside_s = min([await read_all(channel, model) for _ in range(3)])
    await asyncio.sleep(3)  # all of their tokens have come
    grown_bytes = sum(process.memory_info().rss for process in processes) - before_bytes
    for call in unread:
        call.cancel()
    await channel.close()
    await idle.close()
    assert beside_s < 5 * alone_s + 1  # eight more streams at work, on the same cores
    # At most what has been asked for: 8 x 1900 responses of about 2 KiB.
    assert grown_bytes < 8 * 1900 * 3000


async def test_when_the_engine_is_killed_every_text_fails_at_once(fast_server: TritonServer) -> None:
    channel = Channel(fast_server.grpc_url)
    calls = [channel.open(request(model, 1900, seed=0)) for model in TEXT_MODELS for _ in range(4)]
    await asyncio.gather(*(call.read() for call in calls))
    stubs = psutil.Process(fast_server.pid).children(recursive=True)
    (engine,) = (one for one in stubs if any(f"/{RAW}/" in part for part in one.cmdline()))
    engine.kill()
    killed_s = time.monotonic()
    errors = await asyncio.gather(*(last_error(call) for call in calls))
    assert time.monotonic() - killed_s < 5
    assert {error.split(" (")[0] for error in errors} == {"UNAVAILABLE: model tensorrt_llm is gone"}
    with pytest.raises(RuntimeError, match=r"^UNAVAILABLE: model tensorrt_llm is gone"):
        await channel.ask("tensorrt_llm_bls", **(TEXT | {"max_tokens": 1, "seed": 0}))
    await channel.close()


async def last_error(call: Any) -> str:
    for _ in itertools.count():
        answer = await call.read()
        if answer.error_message:
            return str(answer.error_message)
    raise AssertionError("unreachable")
