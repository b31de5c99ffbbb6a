"""More requests than a server takes: refused at once as UNAVAILABLE, with a number, and the others finish.

Run with: pytest tests/server/test_overload.py
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
import urllib.error
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from triton_calls import PROMPT, Channel, joined, message, post
from triton_repos import add_variant, copy_bundle, serving, set_parameters

from minitron_build.bundle.bundle import Bundle
from minitron_build.serving.triton_server import TritonServer

MAX_BATCH_SIZE, MAX_QUEUE_SIZE = 2, 3
"""The engine runs so many, and so many wait."""
MAX_CONCURRENT = 4
WIDE = "tensorrt_llm_bls_wide"
"""A text model that lets through more than the engine takes."""
NUM_ASKED = 12
NUM_TOKENS = 200
"""So many that none is done before the last has arrived."""
TEXT = {"text_input": PROMPT, "max_tokens": NUM_TOKENS, "end_id": -1, "exclude_input_in_output": True}
RAW = {"input_ids": [[508, 40]], "input_lengths": 2, "request_output_len": NUM_TOKENS}
# What a free slot is about to take still counts as waiting.
ENGINE_IS_FULL = rf"UNAVAILABLE: [345] requests are waiting; max_queue_size is {MAX_QUEUE_SIZE}"
TEXT_IS_FULL = (
    f"UNAVAILABLE: {MAX_CONCURRENT} sequences are in flight and 1 more were asked for; "
    f"max_concurrent_requests is {MAX_CONCURRENT}, try again later"
)


@pytest.fixture(scope="module")
def small_server(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repo = copy_bundle(tiny_bundle, tmp_path_factory.mktemp("small") / "bundle")
    limits = {"max_batch_size": str(MAX_BATCH_SIZE), "max_queue_size": str(MAX_QUEUE_SIZE)}
    set_parameters(repo, "tensorrt_llm", **limits)
    add_variant(repo, "tensorrt_llm_bls", WIDE)
    for model in ("tensorrt_llm_bls", "ensemble"):
        set_parameters(repo, model, max_concurrent_requests=str(MAX_CONCURRENT))
    with serving(repo, drain_timeout_s=8) as server:
        yield server


@pytest.fixture
async def channel(small_server: TritonServer) -> AsyncIterator[Channel]:
    opened = Channel(small_server.grpc_url)
    yield opened
    await opened.close()


async def ask_too_often(channel: Channel, model: str, inputs: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """The answers to those that were taken, and the sentences that refuse the others."""
    asked = (channel.ask(model, **inputs) for _ in range(NUM_ASKED))
    results = await asyncio.gather(*asked, return_exceptions=True)
    refused = [str(result) for result in results if isinstance(result, RuntimeError)]
    return [result for result in results if not isinstance(result, RuntimeError)], refused


@pytest.mark.parametrize(
    ("model", "stream", "num_taken", "sentence"),
    [
        (WIDE, True, MAX_BATCH_SIZE + MAX_QUEUE_SIZE, ENGINE_IS_FULL),
        (WIDE, False, MAX_BATCH_SIZE + MAX_QUEUE_SIZE, ENGINE_IS_FULL),
        ("tensorrt_llm_bls", True, MAX_CONCURRENT, TEXT_IS_FULL),
        ("tensorrt_llm_bls", False, MAX_CONCURRENT, TEXT_IS_FULL),
        ("ensemble", True, MAX_CONCURRENT, TEXT_IS_FULL),
    ],
    ids=["engine-stream", "engine-unary", "text-stream", "text-unary", "ensemble"],
)
async def test_too_many_texts_are_refused_and_the_rest_finishes(
    channel: Channel, model: str, stream: bool, num_taken: int, sentence: str
) -> None:
    finished, refused = await ask_too_often(channel, model, TEXT | {"stream": stream})
    assert (len(finished), len(refused)) == (num_taken, NUM_ASKED - num_taken)
    assert all(re.fullmatch(sentence, refusal) for refusal in refused)
    assert {answers[-1]["finish_reason"].item() for answers in finished} == {b"length"}
    assert len({joined(answers) for answers in finished}) == 1


async def test_too_many_raw_requests_are_refused_and_the_rest_finishes(channel: Channel) -> None:
    finished, refused = await ask_too_often(channel, "tensorrt_llm", RAW | {"streaming": True})
    assert (len(finished), len(refused)) == (5, NUM_ASKED - 5)
    assert all(re.fullmatch(ENGINE_IS_FULL, refusal) for refusal in refused)
    for answers in finished:
        assert sum(answer["output_ids"].size for answer in answers) == NUM_TOKENS


async def test_http_is_refused_with_the_same_sentence_and_a_free_place_is_taken_again(
    channel: Channel, small_server: TritonServer
) -> None:
    request = message("tensorrt_llm_bls", TEXT | {"max_tokens": 1900, "stream": True})
    calls = [channel.open(request) for _ in range(MAX_CONCURRENT)]
    firsts = [asyncio.ensure_future(call.read()) for call in calls]
    await asyncio.wait(firsts, return_when=asyncio.FIRST_COMPLETED)  # whichever of them runs
    await asyncio.sleep(0.3)  # the others are on their way
    with pytest.raises(urllib.error.HTTPError) as caught:
        await asyncio.to_thread(post, small_server, "tensorrt_llm_bls", "generate", TEXT)
    with caught.value as answer:
        # /generate answers 400 for an error of any code; the sentence tells which.
        assert (answer.code, json.loads(answer.read())) == (400, {"error": TEXT_IS_FULL})
    for call in calls:
        call.cancel()
    await asyncio.gather(*firsts, return_exceptions=True)
    await until_taken(channel)


async def until_taken(channel: Channel) -> None:
    """Ask until a place is free: the server notices what a client gave up a little later."""
    deadline_s = time.monotonic() + 10
    while True:
        with contextlib.suppress(RuntimeError):
            await channel.ask("tensorrt_llm_bls", text_input="abc", max_tokens=1)
            return
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.02)
