"""An executor bundle in a real Triton, TensorRT-LLM the stand-in's: the reference engine's texts and ways."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from executor_bundle import build_executor_bundle, stand_in_server
from triton_calls import Channel, arrays, message

from minitron_build.bundle.bundle import Bundle
from minitron_build.lint.lint_command import lint
from minitron_build.lint.triton_repository import TritonRepository
from minitron_build.repository import pbtxt
from minitron_build.serving.triton_server import TritonServer

TEXT_MODELS = ("tensorrt_llm_bls", "ensemble")
LIVELY = {"temperature": 1.0, "top_k": 200}
LONG = {"text_input": "abc", "max_tokens": 1900, "end_id": -1, "stream": True}
RAW = {"input_ids": [[508, 300, 301]], "input_lengths": 3, "request_output_len": 20}
RAW_LONG = RAW | {"request_output_len": 1900, "end_id": -1, "streaming": True}
STREAMS = [("tensorrt_llm_bls", LONG), ("ensemble", LONG), ("tensorrt_llm", RAW_LONG)]
MODELS = [model for model, _ in STREAMS]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    LIVELY,
    {"temperature": 0.7, "top_p": 0.9},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    LIVELY | {"min_tokens": 30},
    LIVELY | {"stop_words": "e", "bad_words": "a"},
]
FAILING_SEED, DYING_SEED = 666, 667


@pytest.fixture(scope="module")
def executor_bundle(tiny_minitron: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_executor_bundle(str(tiny_minitron), tmp_path_factory.mktemp("executor"))


@pytest.fixture(scope="module")
def executor_server(
    executor_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    with stand_in_server(executor_bundle, tmp_path_factory.mktemp("served") / "model_repo") as server:
        yield server


@pytest.fixture
async def channel(executor_server: TritonServer) -> AsyncIterator[Channel]:
    opened = Channel(executor_server.grpc_url)
    yield opened
    await opened.close()


@pytest.fixture
async def reference(running_server: TritonServer) -> AsyncIterator[Channel]:
    opened = Channel(running_server.grpc_url)
    yield opened
    await opened.close()


def test_the_bundle_says_what_serves_it(executor_bundle: Bundle) -> None:
    plan, repo = executor_bundle.manifest.plan, executor_bundle.model_repo
    assert plan["engine_backend"] == "executor"
    (decision,) = (one for one in plan["decisions"] if one["what"] == "engine_backend")
    assert "owns TensorRT-LLM's executor" in decision["reason"]
    config = pbtxt.read_config(repo / "tensorrt_llm")
    (group,) = config.instance_group
    assert (config.backend, group.kind) == ("python", type(group).KIND_CPU)
    assert pbtxt.get_parameters(config)["engine"] == "executor"
    for model in TEXT_MODELS:
        assert pbtxt.get_parameters(pbtxt.read_config(repo / model))["engine_link"] == "true"
    names = {path.name for path in (repo / "tensorrt_llm" / "1").iterdir()}
    assert {"model.py", "minitron_runtime", "rank0.engine"} <= names
    assert lint(TritonRepository.read(repo)) == ()


@pytest.mark.parametrize("model", TEXT_MODELS)
async def test_text_is_the_reference_engines(channel: Channel, reference: Channel, model: str) -> None:
    for seed, settings in enumerate(SETTINGS):
        want = await reference.text(model, stream=False, seed=seed, **settings)
        assert await channel.text(model, stream=True, seed=seed, **settings) == want
        assert await channel.text(model, stream=False, seed=seed, **settings) == want


@pytest.mark.parametrize("streaming", [True, False])
async def test_ids_and_log_probs_are_the_reference_engines(
    channel: Channel, reference: Channel, streaming: bool
) -> None:
    asked = RAW | {"seed": 3, "temperature": 1.0, "runtime_top_k": 50, "return_log_probs": True}
    got, want = [
        await one.ask("tensorrt_llm", streaming=streaming, num_return_sequences=2, **asked)
        for one in (channel, reference)
    ]
    for place in (0, 1):
        for name in ("output_ids", "output_log_probs"):
            found, wanted = (of_sequence(answers, place, name) for answers in (got, want))
            assert len(found) == (20 if streaming or name == "output_log_probs" else 23)
            assert found == pytest.approx(wanted, abs=1e-5)
    assert got[-1]["cum_log_probs"].size == 1


def of_sequence(answers: list[dict[str, Any]], place: int, name: str) -> list[float]:
    """The values of one output of one of the sequences, response after response."""
    mine = (answer for answer in answers if answer["sequence_index"].item() == place)
    return [value for answer in mine for value in answer[name].flat]


async def test_32_streams_at_once_are_those_of_one_alone(channel: Channel, reference: Channel) -> None:
    texts = await asyncio.gather(
        *(channel.text(TEXT_MODELS[seed % 2], stream=True, seed=seed, **LIVELY) for seed in range(32))
    )
    for seed in range(0, 32, 5):
        assert texts[seed] == await reference.text("ensemble", stream=False, seed=seed, **LIVELY)


async def test_measurements_are_sent_when_asked_for(channel: Channel) -> None:
    (answer,) = await channel.ask("tensorrt_llm", return_perf_metrics=True, **RAW)
    names = ("arrival", "first_scheduled", "first_token", "last_token")
    times = [answer[f"{name}_time_ns"].item() for name in names]
    assert times == sorted(times)
    assert abs(times[0] / 1e9 - time.time()) < 60
    assert answer["kv_cache_reused_blocks"].item() == 0
    assert answer["kv_cache_alloc_new_blocks"].item() == answer["kv_cache_alloc_total_blocks"].item() > 0


@pytest.mark.parametrize("name", ["context_logits", "generation_logits"])
async def test_logits_of_an_engine_without_them_are_refused(channel: Channel, name: str) -> None:
    sentence = f"return_{name} is true; this engine was built without gather_{name}"
    with pytest.raises(RuntimeError, match=f"^INVALID_ARGUMENT: {sentence}$"):
        await channel.ask("tensorrt_llm", **RAW, **{f"return_{name}": True})


async def first_token_s(channel: Channel) -> float:
    begun_s = time.monotonic()
    await channel.ask("tensorrt_llm_bls", text_input="abc", max_tokens=1)
    return time.monotonic() - begun_s


@pytest.mark.parametrize(("model", "inputs"), STREAMS, ids=MODELS)
async def test_cancelling_a_full_house_frees_every_slot(
    channel: Channel, model: str, inputs: dict[str, Any]
) -> None:
    calls = [channel.open(message(model, inputs | {"seed": seed})) for seed in range(40)]
    firsts = [asyncio.ensure_future(call.read()) for call in calls]
    await asyncio.wait(firsts, return_when=asyncio.FIRST_COMPLETED)
    for call in calls:
        call.cancel()
    await asyncio.gather(*firsts, return_exceptions=True)
    assert await first_token_s(channel) < 5


@pytest.mark.parametrize(("model", "inputs"), STREAMS, ids=MODELS)
async def test_stop_ends_the_stream_without_an_error(
    channel: Channel, model: str, inputs: dict[str, Any]
) -> None:
    text_stop = {"text_input": "x", "max_tokens": 1, "stop": True}
    stop = RAW | {"stop": True} if model == "tensorrt_llm" else text_stop
    stopped = channel.open(message(model, inputs, request_id="to stop"))
    responses = aiter(stopped)
    assert not (await anext(responses)).error_message
    await channel.ask(model, request_id="to stop", **stop)
    rest = [response async for response in responses]
    assert not any(response.error_message for response in rest)
    last = arrays(rest[-1].infer_response)
    if model == "tensorrt_llm":
        assert last["output_ids"].shape == (1, 1, 0)
    else:
        assert last["finish_reason"].item() == b"cancelled"


@pytest.mark.parametrize(("model", "inputs"), STREAMS, ids=MODELS)
async def test_the_requests_own_timeout_ends_it(channel: Channel, model: str, inputs: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"^DEADLINE_EXCEEDED: the request's own timeout has passed$"):
        await channel.ask(model, timeout_us=150_000, **inputs)
    assert await first_token_s(channel) < 5


@pytest.mark.parametrize(("model", "inputs"), STREAMS, ids=MODELS)
async def test_an_error_of_the_executor_fails_one_request(
    channel: Channel, model: str, inputs: dict[str, Any]
) -> None:
    with pytest.raises(RuntimeError, match=r"^INTERNAL: the stand-in says so$"):
        await channel.ask(model, seed=FAILING_SEED, **inputs)
    assert await channel.text("ensemble", stream=True, seed=1)


async def test_what_the_engine_cannot_serve_is_refused_in_one_line(channel: Channel) -> None:
    for inputs, sentence in (
        (
            {"request_output_len": 5000},
            r"prompt \(3 tokens\) plus max_tokens \(5000\) is 5003; max_seq",
        ),
        ({"beam_width": 2}, "beam_width is 2; this engine does not do beam search, expected 1"),
        ({"input_ids": [[508, 300, 9999]]}, "the prompt holds token id 9999; the vocabulary has ids 0 to"),
    ):
        with pytest.raises(RuntimeError, match=f"^INVALID_ARGUMENT: {sentence}"):
            await channel.ask("tensorrt_llm", **RAW | inputs)


async def test_when_the_executor_dies_all_that_is_open_fails_and_the_model_says_so(
    executor_bundle: Bundle, tmp_path: Path
) -> None:
    with stand_in_server(executor_bundle, tmp_path / "model_repo") as server:
        channel = Channel(server.grpc_url)
        calls = [channel.open(message(model, inputs)) for model, inputs in STREAMS]
        await asyncio.gather(*(call.read() for call in calls))
        with pytest.raises(RuntimeError, match=r"^UNAVAILABLE: the executor failed: .*illegal memory"):
            await channel.ask("tensorrt_llm", **RAW, seed=DYING_SEED)
        errors = await asyncio.gather(*(last_error(call) for call in calls))
        assert all(error.startswith("UNAVAILABLE: the executor failed") for error in errors)
        with pytest.raises(RuntimeError, match="^UNAVAILABLE: the executor failed"):
            await channel.ask("tensorrt_llm_bls", text_input="abc", max_tokens=1)
        await channel.close()


async def test_when_the_engine_process_is_killed_every_text_fails_at_once(
    channel: Channel, executor_server: TritonServer
) -> None:
    """The last test: nothing starts the model again."""
    calls = [channel.open(message(model, LONG)) for model in TEXT_MODELS for _ in range(4)]
    await asyncio.gather(*(call.read() for call in calls))
    stubs = psutil.Process(executor_server.pid).children(recursive=True)
    (engine,) = (one for one in stubs if any("/tensorrt_llm/" in part for part in one.cmdline()))
    engine.kill()
    errors = await asyncio.wait_for(asyncio.gather(*(last_error(call) for call in calls)), 5)
    assert {error.split(" (")[0] for error in errors} == {"UNAVAILABLE: model tensorrt_llm is gone"}


async def last_error(call: Any) -> str:
    while answer := await call.read():
        if answer.error_message:
            return str(answer.error_message)
    raise AssertionError("it ended without an error")
