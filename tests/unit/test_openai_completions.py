"""`/v1/completions` through the official SDK, against a door whose client plays a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai_door import MODEL, Call, OpenDoor, PlayingClient, Step, open_door, words

from minitron_client import Chunk, OverloadedError
from minitron_client.openai.served_tokenizer import read_tokenizer_dir

FOX = ("The", " quick", " brown", " fox", ".\n", "Next")


@pytest.fixture
async def door() -> AsyncIterator[OpenDoor]:
    async with open_door(PlayingClient()) as opened:
        yield opened


@pytest.fixture
async def sdk(door: OpenDoor) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_whole_completion(door: OpenDoor, sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.completions.create(model=MODEL, prompt="Say", max_tokens=3)
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    assert answer.usage is not None
    assert answer.usage.to_dict() == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    assert door.client.calls[0].request_id.startswith(answer.id)
    assert door.client.calls[0].timeout_s == door.door.settings.timeout_s


async def test_a_stream(door: OpenDoor, sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.completions.create(
        model=MODEL, prompt="Say", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert [choice.text for choice in choices] == ["a", "b", "c", ""]
    assert [choice.finish_reason for choice in choices] == [None, None, None, "length"]
    assert [chunk.usage is not None for chunk in chunks] == [False, False, False, False, True]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 8
    assert len({chunk.id for chunk in chunks}) == 1
    assert door.client.cancelled == []


async def test_a_stream_on_the_wire(door: OpenDoor) -> None:
    answer = await door.post(prompt="Say", stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") and "\n" not in event for event in events[:-1])
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


async def test_text_comes_before_the_end(door: OpenDoor, sdk: openai.AsyncOpenAI) -> None:
    more = asyncio.Event()
    door.client.script = lambda call: [Chunk("early"), more, Chunk("late", finish_reason="stop")]
    stream = await sdk.completions.create(model=MODEL, prompt="Say", stream=True)
    first = await anext(aiter(stream))
    assert first.choices[0].text == "early"
    more.set()
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "late"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "texts", "expected"),
    [
        (["\n"], ("The", " quick", " brown", " fox", ".\n"), "The quick brown fox."),
        (["fox", "zzz"], ("The", " quick f", "o", "x"), "The quick "),
        (["ab", "xab"], ("--x", "a", "b"), "--"),  # both end together: the longest goes
        (["abc"], ("ab", "ab", "end"), "ababend"),  # held back, then let go
        (["never"], ("nev", "er mind"), " mind"),
        ("END", ("EN", "DEN", "D"), ""),
    ],
)
async def test_the_stop_word_stays_out(
    door: OpenDoor, stream: bool, stop: Any, texts: tuple[str, ...], expected: str
) -> None:
    door.client.script = lambda call: words(*texts, finish="stop")
    sdk = openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)
    async with sdk:
        if stream:
            events = await sdk.completions.create(model=MODEL, prompt="a", stop=stop, stream=True)
            chunks = [event.choices[0] async for event in events]
            text, reason = "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason
        else:
            choice = (await sdk.completions.create(model=MODEL, prompt="a", stop=stop)).choices[0]
            text, reason = choice.text, choice.finish_reason
    expected = "" if stop == ["never"] else expected
    assert (text, reason) == (expected, "stop")
    assert door.client.calls[0].sampling.stop_words == ((stop,) if isinstance(stop, str) else tuple(stop))


async def test_many_prompts_and_choices(door: OpenDoor, sdk: openai.AsyncOpenAI) -> None:
    door.client.script = lambda call: words(f"{call.prompt}!{call.sampling.seed}")
    answer = await sdk.completions.create(model=MODEL, prompt=["x", "y"], n=2, seed=7, echo=True)
    assert [choice.text for choice in answer.choices] == ["xx!7", "xx!8", "yy!7", "yy!8"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 4)
    assert len({call.request_id for call in door.client.calls}) == 4


async def test_choices_are_streamed_side_by_side(door: OpenDoor, sdk: openai.AsyncOpenAI) -> None:
    door.client.script = lambda call: words(f"<{call.sampling.seed}", ">")
    stream = await sdk.completions.create(model=MODEL, prompt="x", n=3, seed=0, stream=True, echo=True)
    texts = {0: "", 1: "", 2: ""}
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "x<0>", 1: "x<1>", 2: "x<2>"}


async def test_the_usage_of_several_choices_comes_once_and_last(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.completions.create(
        model=MODEL, prompt=["x", "y"], n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert sorted({choice.index for chunk in chunks for choice in chunk.choices}) == [0, 1, 2, 3]
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert ends == ["length"] * 4
    assert [chunk.usage is not None for chunk in chunks[-2:]] == [False, True]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.to_dict() == {"prompt_tokens": 10, "completion_tokens": 12, "total_tokens": 22}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_empty_prompt_is_the_id_that_begins_a_text(tiny_minitron: Path, stream: bool) -> None:
    begin = tuple(read_tokenizer_dir(tiny_minitron).tokenizer.encode(""))
    async with (
        open_door(PlayingClient(), tokenizer_dir=tiny_minitron) as door,
        openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0) as sdk,
    ):
        if stream:
            events = await sdk.completions.create(model=MODEL, prompt="", echo=True, stream=True)
            text = "".join([event.choices[0].text async for event in events])
        else:
            answer = await sdk.completions.create(model=MODEL, prompt=["", "x"], echo=True)
            text = answer.choices[0].text
            assert answer.choices[1].text == "xabc"
    assert text == "abc"
    assert len(begin) == 1
    assert door.client.calls[0].prompt == begin


async def test_an_empty_prompt_is_refused_where_nothing_begins_a_text(tiny_copy: Path) -> None:
    file = tiny_copy / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    async with open_door(PlayingClient(), tokenizer_dir=tiny_copy) as door:
        answer = await door.post(prompt="")
    assert answer.status_code == 400
    assert "prompt is empty, and this model has no token that begins a text" in answer.text
    assert door.client.calls == []


async def test_token_ids_are_passed_on(door: OpenDoor, sdk: openai.AsyncOpenAI) -> None:
    await sdk.completions.create(model=MODEL, prompt=[1, 2, 3])
    await sdk.completions.create(model=MODEL, prompt=[[1, 2], [3]])
    assert [call.prompt for call in door.client.calls] == [(1, 2, 3), (1, 2), (3,)]


async def test_the_best_of_several(door: OpenDoor, sdk: openai.AsyncOpenAI) -> None:
    def script(call: Call) -> list[Step]:
        quality = {10: -3.0, 11: -0.5, 12: -1.0}[call.sampling.seed or 0]
        return [Chunk(f"{quality}", (1,), "length", (quality,))]

    door.client.script = script
    answer = await sdk.completions.create(model=MODEL, prompt="x", n=2, best_of=3, seed=10)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "-0.5"), (1, "-1.0")]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert all(call.sampling.return_log_probs for call in door.client.calls)


async def test_a_failing_choice_ends_the_others(door: OpenDoor, sdk: openai.AsyncOpenAI) -> None:
    never = asyncio.Event()

    def script(call: Call) -> list[Step]:
        return [OverloadedError("the queue is full")] if call.sampling.seed == 1 else [never]

    door.client.script = script
    with pytest.raises(openai.RateLimitError, match="queue is full"):
        await sdk.completions.create(model=MODEL, prompt="x", n=2, seed=0)
    await door.door.running.wait(1)
    assert door.client.cancelled == [door.client.calls[0].request_id]


async def test_trace_context_is_passed_on(door: OpenDoor) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"traceparent": trace, "tracestate": "a=b", "x-other": "no"}
    await door.http.post(f"{door.url}/v1/completions", json={"prompt": "x"}, headers=headers)
    await door.http.post(f"{door.url}/v1/completions", json={"prompt": "x"}, headers={"traceparent": "junk"})
    assert [call.headers for call in door.client.calls] == [{"traceparent": trace, "tracestate": "a=b"}, {}]
