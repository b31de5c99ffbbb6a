"""Prometheus reads from a real server what was asked of it.

Run with: pytest tests/server/test_metrics.py
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from triton_calls import Channel, message, post
from triton_repos import serving

from minitron_build.bundle.bundle import Bundle
from minitron_build.runtime.metrics import (
    ENGINE_METRICS,
    FLUSH_INTERVAL_S,
    HISTOGRAM,
    OUTCOMES,
    REQUEST_METRICS,
)
from minitron_build.serving.triton_server import TritonServer
from minitron_build.serving.triton_stubs import live_stubs, read_state
from minitron_client import health_command

TEXT, TOKENS = "tensorrt_llm_bls", "tensorrt_llm"
REFUSED: dict[str, dict[str, Any]] = {
    TEXT: {"text_input": "def f(", "max_tokens": 0},
    "ensemble": {"text_input": "def f(", "max_tokens": 0},
    TOKENS: {"input_ids": [508], "input_lengths": 1, "request_output_len": 0},
}
LINE = re.compile(r"^(?P<name>\w+)\{(?P<labels>[^}]*)\} (?P<value>\S+)$")


@pytest_asyncio.fixture
async def channel(running_server: TritonServer) -> AsyncIterator[Channel]:
    opened = Channel(running_server.grpc_url)
    yield opened
    await opened.close()


async def _scrape(server: TritonServer) -> dict[str, float]:
    """Series -> value, after everything so far has been handed over."""
    await asyncio.sleep(2 * FLUSH_INTERVAL_S)
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        text = answer.read().decode()
    found = (LINE.match(line) for line in text.splitlines() if line.startswith("minitron_"))
    return {f"{match['name']}{{{match['labels']}}}": float(match["value"]) for match in found if match}


def _change(before: dict[str, float], after: dict[str, float], name: str, model: str, **labels: str) -> float:
    pairs = sorted({"model": model, **labels}.items())
    key = name + "{" + ",".join(f'{label}="{value}"' for label, value in pairs) + "}"
    return after[key] - before[key]


async def test_every_metric_is_there(running_server: TritonServer) -> None:
    names = {series.partition("{")[0] for series in await _scrape(running_server)}
    for info in (*REQUEST_METRICS, *ENGINE_METRICS):
        parts = ("_bucket", "_sum", "_count") if info.kind == HISTOGRAM else ("",)
        assert {f"{info.name}{part}" for part in parts} <= names


def test_models_end_well_when_the_server_stops(tiny_bundle: Bundle) -> None:
    """What the backend's library frees only as the interpreter ends takes the process down with SIGSEGV.

    That may be a metric, or the sender of a request that was refused.
    """
    ends: dict[str, int] = {}
    with serving(tiny_bundle.model_repo) as server:
        stubs = live_stubs(server.pid)
        for model in (TEXT, "ensemble", TOKENS):
            for _ in range(5):
                with pytest.raises(urllib.error.HTTPError, match="400"):
                    post(server, model, "generate", REFUSED[model])
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        while stopping.is_alive():  # Triton reaps a process some time after its end
            states = {instance: read_state(pid) for pid, instance in stubs.items()}
            ends |= {one: state.wait_status for one, state in states.items() if state.letter == "Z"}
            time.sleep(0.001)
    assert server.exit_code == 0
    assert ends.keys() & {f"{TEXT}_0_0", f"{TOKENS}_0_0", "ensemble_0_0"}, "none with metrics was seen to end"
    assert set(ends.values()) == {0}, ends


async def test_completed_requests(running_server: TritonServer, channel: Channel) -> None:
    before = await _scrape(running_server)
    answers = await asyncio.gather(
        *(channel.ask(TEXT, text_input="def f(", max_tokens=20, stream=True) for _ in range(5))
    )
    after = await _scrape(running_server)
    assert all(answers)
    for model in (TEXT, TOKENS):
        assert _change(before, after, "minitron_requests_total", model, outcome="completed") == 5
        assert _change(before, after, "minitron_output_tokens_total", model) == 100
        assert _change(before, after, "minitron_prompt_tokens_total", model) > 5
        for name, times in (("queue_time", 5), ("time_to_first_token", 5), ("request_duration", 5)):
            assert _change(before, after, f"minitron_{name}_seconds_count", model) == times
            assert _change(before, after, f"minitron_{name}_seconds_bucket", model, le="+Inf") == times
            assert 0 < _change(before, after, f"minitron_{name}_seconds_sum", model) < 60
        assert 80 <= _change(before, after, "minitron_inter_token_seconds_count", model) <= 95
    assert _change(before, after, "minitron_engine_steps_total", TOKENS) >= 20


async def test_ends_by_their_outcome(running_server: TritonServer, channel: Channel) -> None:
    before = await _scrape(running_server)
    with pytest.raises(RuntimeError, match="INVALID_ARGUMENT"):
        await channel.ask(TEXT, text_input="x", max_tokens=0)
    with pytest.raises(RuntimeError, match="DEADLINE_EXCEEDED"):
        await channel.ask(TEXT, text_input="x", max_tokens=1000, timeout_us=50_000, end_id=-1)
    call = channel.open(message(TEXT, {"text_input": "x", "max_tokens": 1000, "stream": True, "end_id": -1}))
    await call.read()
    call.cancel()
    after = await _scrape(running_server)
    for outcome in ("invalid_argument", "deadline_exceeded", "cancelled"):
        assert _change(before, after, "minitron_requests_total", TEXT, outcome=outcome) == 1, outcome
    # What ended above it, the engine sees as stopped.
    assert _change(before, after, "minitron_requests_total", TOKENS, outcome="cancelled") == 2


async def test_a_stop_word_completes_a_request_in_the_engine_too(
    running_server: TritonServer, channel: Channel
) -> None:
    asked = {"text_input": "def f(", "max_tokens": 400, "end_id": -1, "stream": True}
    text = await channel.text(TEXT, **asked)
    word = text[20:24]
    before = await _scrape(running_server)
    assert await channel.text(TEXT, **asked, stop_words=word) == text[: text.index(word) + len(word)]
    after = await _scrape(running_server)
    for model in (TEXT, TOKENS):
        ended = {
            outcome: _change(before, after, "minitron_requests_total", model, outcome=outcome)
            for outcome in OUTCOMES.values()
        }
        assert ended == dict.fromkeys(OUTCOMES.values(), 0) | {"completed": 1}, model
    # It was the stop that ended it there, not its length.
    assert _change(before, after, "minitron_output_tokens_total", TOKENS) < 400


async def test_gauges_rise_and_return_to_zero(running_server: TritonServer, channel: Channel) -> None:
    asked = {"text_input": "x", "max_tokens": 1500, "stream": True, "end_id": -1}
    calls = [channel.open(message(TEXT, asked)) for _ in range(3)]
    for call in calls:
        await call.read()
    busy = await _scrape(running_server)
    for call in calls:
        call.cancel()
    deadline_s = time.monotonic() + 20
    while (idle := await _scrape(running_server))[f'minitron_running_requests{{model="{TEXT}"}}']:
        assert time.monotonic() < deadline_s
    for name in (
        f'minitron_running_requests{{model="{TEXT}"}}',
        f'minitron_engine_running_requests{{model="{TOKENS}"}}',
    ):
        assert busy[name] == 3, name
        assert idle[name] == 0, name
    used = f'minitron_kv_cache_used_tokens{{model="{TOKENS}"}}'
    assert 0 < busy[used] <= busy[f'minitron_kv_cache_capacity_tokens{{model="{TOKENS}"}}']
    assert idle[used] == 0
    assert idle[f'minitron_engine_up{{model="{TOKENS}"}}'] == 1


async def test_health_shows_models_versions_queue_kv_cache_and_speed(
    running_server: TritonServer, channel: Channel, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"text_input": "x", "max_tokens": 1900, "stream": True, "end_id": -1}
    calls = [channel.open(message(TEXT, asked)) for _ in range(16)]  # one alone would be over too soon
    await asyncio.gather(*(call.read() for call in calls))
    words = ["--url", running_server.grpc_url, "--metrics-url", running_server.metrics_url]
    parser = argparse.ArgumentParser()
    health_command.configure_parser(parser)
    await asyncio.sleep(2 * FLUSH_INTERVAL_S)  # the gauge has been handed over
    code = await asyncio.to_thread(health_command.run, parser.parse_args(words))
    for call in calls:
        call.cancel()
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert code == 0
    assert document["models"][TEXT]
    assert document["versions"][TEXT] == ["1"]
    load = document["load"]
    assert load["running_requests"] == 16
    assert 0 < load["kv_cache_used"] < 1
    assert load["output_tokens_per_s"] > 0
    for words_of_line in ("16 running, 0 waiting", "% of", "tokens/s"):
        assert any(words_of_line in line for line in lines[:-1])
