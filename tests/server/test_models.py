"""The five models in a real Triton: one text on every path, many streams at once, stopping, refusing."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import queue
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from triton_calls import PROMPT, Channel, arrays, http_chunks, joined, message, post, sync_answers

from minitron_build.bundle.bundle import Bundle
from minitron_build.runtime.reference_engine import (
    EngineLimits,
    EngineOutput,
    GenerationRequest,
    ReferenceEngine,
    SamplingConfig,
)
from minitron_build.runtime.tokenizer import TextTokenizer
from minitron_build.serving.triton_server import TritonServer

TEXT_MODELS = ("tensorrt_llm_bls", "ensemble")
BOS_ID, EOS_ID = 508, 509
LIVELY = {"temperature": 1.0, "top_k": 200}  # a random model that samples freely makes the nastiest bytes


@pytest.fixture
async def channel(running_server: TritonServer) -> AsyncIterator[Channel]:
    opened = Channel(running_server.grpc_url)
    yield opened
    await opened.close()


@pytest.fixture(scope="module")
def tokenizer(tiny_minitron: Path) -> TextTokenizer:
    return TextTokenizer(tiny_minitron)


@pytest.fixture(scope="module")
def truth(tiny_bundle: Bundle) -> Iterator[Callable[..., tuple[int, ...]]]:
    """The ids the engine gives one request that has it to itself, in this process, without Triton."""
    limits = EngineLimits(max_batch_size=32, max_input_len=1024, max_seq_len=2048, max_num_tokens=256)
    engine = ReferenceEngine(tiny_bundle.path / "checkpoint", limits)

    @functools.cache
    def generate(prompt_ids: tuple[int, ...], max_tokens: int = 40, **sampling: Any) -> tuple[int, ...]:
        outputs: queue.SimpleQueue[EngineOutput] = queue.SimpleQueue()
        config = SamplingConfig(**sampling)
        request = GenerationRequest("1", prompt_ids, max_tokens, EOS_ID, config)
        engine.submit(request, outputs.put)
        ids: list[int] = []
        while True:
            output = outputs.get(timeout=60)
            ids += output.token_ids
            if output.finish_reason is not None:
                return tuple(ids)

    yield generate
    engine.close()


@pytest.fixture(scope="module")
def expected(tokenizer: TextTokenizer, truth: Callable[..., tuple[int, ...]]) -> Callable[..., str]:
    def text(prompt: str = PROMPT, **settings: Any) -> str:
        ids = truth(tuple(tokenizer.encode(prompt, add_special_tokens=True)), **settings)
        return tokenizer.decode(ids, skip_special_tokens=True)

    return text


# --- text


@pytest.mark.parametrize("model", TEXT_MODELS)
async def test_text_is_the_same_on_every_path(
    channel: Channel, running_server: TritonServer, expected: Callable[..., str], model: str
) -> None:
    for seed in range(6):
        want = expected(seed=seed, **LIVELY)
        assert await channel.text(model, stream=True, seed=seed, **LIVELY) == want
        assert await channel.text(model, stream=False, seed=seed, **LIVELY) == want
        # A word that never comes makes the models watch the text.
        assert await channel.text(model, stream=False, seed=seed, stop_words="\x00never", **LIVELY) == want
        body = {
            "text_input": PROMPT,
            "max_tokens": 40,
            "seed": seed,
            "exclude_input_in_output": True,
        } | LIVELY
        assert json.loads(post(running_server, model, "generate", body))["text_output"] == want
        pieces = http_chunks(running_server, model, body | {"stream": True})
        assert "".join(pieces) == want


def test_the_sync_client_of_tritonclient_streams(
    running_server: TritonServer, expected: Callable[..., str]
) -> None:
    inputs = {"text_input": PROMPT, "max_tokens": 40, "stream": True}
    assert joined(sync_answers(running_server, "tensorrt_llm_bls", inputs)) == expected()


@pytest.mark.parametrize("model", TEXT_MODELS)
async def test_without_exclude_input_one_response_begins_with_the_prompt(
    channel: Channel, expected: Callable[..., str], model: str
) -> None:
    whole = await channel.text(model, stream=False, exclude_input_in_output=False)
    assert whole == PROMPT + expected()
    assert await channel.text(model, stream=True, exclude_input_in_output=False) == expected()


@pytest.mark.parametrize("model", TEXT_MODELS)
async def test_32_streams_at_once_give_what_each_gives_alone(
    channel: Channel, expected: Callable[..., str], model: str
) -> None:
    seeds = range(100, 132)
    texts = await asyncio.gather(*(channel.text(model, stream=True, seed=seed, **LIVELY) for seed in seeds))
    assert texts == [expected(seed=seed, **LIVELY) for seed in seeds]


async def test_many_short_streams_leave_the_models_alive(
    channel: Channel, expected: Callable[..., str]
) -> None:
    # Beginning and ending requests while others stream is what deadlocked and crashed the Python backend.
    for _ in range(15):
        texts = await asyncio.gather(
            *(channel.text(model, stream=True, max_tokens=6) for model in TEXT_MODELS for _ in range(24))
        )
        assert set(texts) == {expected(max_tokens=6)}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stop_word_ends_the_text_and_stays_in_it(
    channel: Channel, expected: Callable[..., str], stream: bool
) -> None:
    for seed in range(6):
        want = expected(seed=seed, max_tokens=200, **LIVELY)
        word = want[len(want) // 2 : len(want) // 2 + 3]
        answers = await channel.ask(
            "tensorrt_llm_bls",
            text_input=PROMPT,
            max_tokens=200,
            seed=seed,
            stream=stream,
            exclude_input_in_output=True,
            stop_words=["\x00never", word],
            **LIVELY,
        )
        assert joined(answers) == want[: want.index(word) + len(word)]
        assert answers[-1]["finish_reason"].item() == b"stop"


async def test_ids_and_log_probs_belong_to_the_text_beside_them(
    channel: Channel, tokenizer: TextTokenizer, truth: Callable[..., tuple[int, ...]]
) -> None:
    prompt_ids = tuple(tokenizer.encode(PROMPT, add_special_tokens=True))
    flags = dict.fromkeys(
        (f"return_{name}" for name in ("log_probs", "output_ids", "num_input_tokens", "num_output_tokens")),
        True,
    )
    given = (
        {"text_input": PROMPT, "max_tokens": 40, "seed": 3, "exclude_input_in_output": True} | LIVELY | flags
    )
    for stream in (True, False):
        answers = await channel.ask("tensorrt_llm_bls", stream=stream, **given)
        ids = [token_id for answer in answers for token_id in answer["output_ids"].reshape(-1).tolist()]
        log_probs = [value for answer in answers for value in answer["output_log_probs"].reshape(-1).tolist()]
        assert tuple(ids) == truth(prompt_ids, seed=3, **LIVELY)
        assert len(log_probs) == len(ids)
        assert answers[-1]["cum_log_probs"].item() == pytest.approx(sum(log_probs), rel=1e-5)
        assert answers[-1]["num_input_tokens"].item() == len(prompt_ids)
        assert answers[-1]["num_output_tokens"].item() == len(ids)


async def test_outputs_nobody_asked_for_are_not_sent(channel: Channel) -> None:
    (answer,) = await channel.ask("tensorrt_llm_bls", text_input=PROMPT, max_tokens=3)
    assert set(answer) == {"text_output", "finish_reason"}
    flags = {"return_perf_metrics": True, "return_context_logits": True, "return_generation_logits": True}
    (answer,) = await channel.ask("tensorrt_llm_bls", text_input="abc", max_tokens=3, **flags)
    assert answer["generation_logits"].shape == (1, 1, 3, 512)
    assert answer["context_logits"].shape[::2] == (1, 512)
    times = [
        answer[f"{name}_time_ns"].item()
        for name in ("arrival", "first_scheduled", "first_token", "last_token")
    ]
    assert times == sorted(times)
    assert times[0] > 0
    blocks = [answer[f"kv_cache_{name}_blocks"].item() for name in ("alloc_total", "alloc_new", "reused")]
    assert blocks == [1, 1, 0]  # six tokens fit one block, and this engine reuses none


async def test_several_prompts_and_several_sequences_in_one_request(
    channel: Channel, expected: Callable[..., str]
) -> None:
    prompts = [["First prompt"], ["The second 👍 one"]]
    rows = {"max_tokens": [[20], [20]], "seed": [[7], [9]], "stream": [[True], [True]]}
    rows |= {"temperature": [[1.0], [1.0]], "top_k": [[200], [200]], "num_return_sequences": [[2], [2]]}
    answers = await channel.ask("tensorrt_llm_bls", text_input=prompts, **rows)
    texts: dict[tuple[int, int], str] = {}
    for answer in answers:
        place = (answer["batch_index"].item(), answer["sequence_index"].item())
        texts[place] = texts.get(place, "") + joined([answer])
    assert texts == {
        (row, number): expected(prompts[row][0], max_tokens=20, seed=seed + number, **LIVELY)
        for row, seed in enumerate((7, 9))
        for number in range(2)
    }


# --- token ids


async def test_raw_ids_batched_and_sequenced(channel: Channel, truth: Callable[..., tuple[int, ...]]) -> None:
    prompts = [(BOS_ID, 40, 41, 42), (BOS_ID, 77)]
    answers = await channel.ask(
        "tensorrt_llm",
        input_ids=[list(prompts[0]), [*prompts[1], EOS_ID, EOS_ID]],
        input_lengths=[[4], [2]],
        request_output_len=[[12], [12]],
        end_id=[[EOS_ID], [EOS_ID]],
        seed=[[5], [5]],
        temperature=[[1.0], [1.0]],
        runtime_top_k=[[200], [200]],
        num_return_sequences=[[2], [2]],
    )
    assert len(answers) == 4
    for answer in answers:
        row, number = answer["batch_index"].item(), answer["sequence_index"].item()
        want = prompts[row] + truth(prompts[row], max_tokens=12, seed=5 + number, **LIVELY)
        assert answer["output_ids"].shape == (1, 1, len(want))
        assert tuple(answer["output_ids"].reshape(-1).tolist()) == want
        assert answer["sequence_length"].tolist() == [[len(want)]]


async def test_preprocessing_and_postprocessing_alone(channel: Channel, tokenizer: TextTokenizer) -> None:
    texts = ["Grüße 👍", "a"]
    ids = [tokenizer.encode(text, add_special_tokens=True) for text in texts]
    request = message(
        "preprocessing",
        {
            "QUERY": [[text] for text in texts],
            "REQUEST_OUTPUT_LEN": [[5], [6]],
            "STOP_WORDS_DICT": [["ab", "c"], ["d", ""]],
            "EMBEDDING_BIAS_WORDS": [["a"], ["b"]],
            "EMBEDDING_BIAS_WEIGHTS": [[2.0], [-1.0]],
        },
    )
    answer = arrays(await channel.stub.ModelInfer(request))
    assert answer["REQUEST_INPUT_LEN"].tolist() == [[len(ids[0])], [len(ids[1])]]
    assert answer["INPUT_ID"].tolist() == [ids[0], ids[1] + [EOS_ID] * (len(ids[0]) - len(ids[1]))]
    word = [tokenizer.encode(text, add_special_tokens=False) for text in ("ab", "c", "d")]
    assert answer["STOP_WORDS_IDS"][0, 0, : len(word[0]) + 1].tolist() == word[0] + word[1]
    assert answer["STOP_WORDS_IDS"][1, 1].tolist() == [1] + [-1] * len(word[0])
    assert answer["BAD_WORDS_IDS"].shape == (2, 2, 0)
    assert answer["EMBEDDING_BIAS"].sum(axis=1).tolist() == [2.0, -1.0]
    assert answer["OUT_END_ID"].tolist() == answer["OUT_PAD_ID"].tolist() == [[EOS_ID], [EOS_ID]]
    request = message("postprocessing", {"TOKENS_BATCH": [[ids[0]]], "SEQUENCE_LENGTH": [[len(ids[0])]]})
    assert arrays(await channel.stub.ModelInfer(request))["OUTPUT"].item().decode() == texts[0]


# --- stopping

LONG = {"text_input": PROMPT, "max_tokens": 1900, "stream": True, "end_id": -1} | LIVELY
RAW_LONG = {
    "input_ids": [[BOS_ID, 40]],
    "input_lengths": 2,
    "request_output_len": 1900,
    "streaming": True,
    "temperature": 1.0,
    "runtime_top_k": 200,
}
STREAMS = [("tensorrt_llm_bls", LONG), ("ensemble", LONG), ("tensorrt_llm", RAW_LONG)]
MODELS = [model for model, _ in STREAMS]
RAW_STOP = {"input_ids": [[1]], "input_lengths": 1, "request_output_len": 1, "stop": True}
TEXT_STOP = {"text_input": "x", "max_tokens": 1, "stop": True}


async def first_token_s(channel: Channel) -> float:
    begun_s = time.monotonic()
    await channel.ask("tensorrt_llm_bls", text_input="abc", max_tokens=1)
    return time.monotonic() - begun_s


@pytest.mark.parametrize(("model", "inputs"), STREAMS, ids=MODELS)
async def test_cancelling_32_streams_frees_every_slot(
    channel: Channel, model: str, inputs: dict[str, Any]
) -> None:
    calls = [channel.open(message(model, inputs | {"seed": seed})) for seed in range(40)]  # 8 of them wait
    firsts = [asyncio.ensure_future(call.read()) for call in calls]
    begun = [await first for first in itertools.islice(asyncio.as_completed(firsts), 32)]
    assert not any(answer.error_message for answer in begun)
    for call in calls:
        call.cancel()
    await asyncio.gather(*firsts, return_exceptions=True)
    # With a full house that was not told, the next request would wait for 1900 steps.
    assert await first_token_s(channel) < 3


@pytest.mark.parametrize(
    ("model", "inputs", "stop"),
    [
        ("tensorrt_llm_bls", LONG, TEXT_STOP),
        ("ensemble", LONG, TEXT_STOP),
        ("tensorrt_llm", RAW_LONG, RAW_STOP),
    ],
    ids=["bls", "ensemble", "raw"],
)
async def test_stop_by_request_id_ends_the_stream_without_an_error(
    channel: Channel, model: str, inputs: dict[str, Any], stop: dict[str, Any]
) -> None:
    stopped = channel.open(message(model, inputs, request_id="to stop"))
    other = asyncio.create_task(channel.text("tensorrt_llm_bls", stream=True, request_id="other"))
    responses = aiter(stopped)
    assert not (await anext(responses)).error_message
    (answer,) = await channel.ask(model, request_id="to stop", **stop)
    assert all(array.size == 0 or not array.any() for array in answer.values())
    rest = [response async for response in responses]
    assert not any(response.error_message for response in rest)
    assert len(rest) < 1000
    last = arrays(rest[-1].infer_response)
    if model == "tensorrt_llm":
        assert last["output_ids"].shape == (1, 1, 0)
    else:
        assert last["finish_reason"].item() == b"cancelled"
    assert await other


async def test_requests_with_the_same_id_do_not_meet(channel: Channel, expected: Callable[..., str]) -> None:
    texts = await asyncio.gather(
        *(
            channel.text("tensorrt_llm_bls", stream=True, request_id="same", seed=seed, **LIVELY)
            for seed in range(8)
        )
    )
    assert texts == [expected(seed=seed, **LIVELY) for seed in range(8)]


@pytest.mark.parametrize(("model", "inputs"), STREAMS, ids=MODELS)
async def test_the_requests_own_timeout_ends_it(channel: Channel, model: str, inputs: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"^DEADLINE_EXCEEDED: the request's own timeout has passed$"):
        await channel.ask(model, timeout_us=150_000, **inputs)
    assert await first_token_s(channel) < 3


# --- refusing

GOOD = {"text_input": "abc", "max_tokens": 4}
REFUSED_TEXT = [
    ({"text_input": ""}, "the prompt is empty; expected at least one character"),
    ({"text_input": b"\xff\xfe"}, "text_input is not valid UTF-8 (byte 0: invalid start byte)"),
    ({"stop_words": b"ok\xff"}, "stop_words is not valid UTF-8 (byte 2: invalid start byte)"),
    ({"max_tokens": 0}, "max_tokens is 0; expected at least 1"),
    ({"temperature": -1.0}, "temperature is -1.0; expected 0 (greedy) or more"),
    ({"top_p": 1.5}, "top_p is 1.5; expected a number between 0 and 1"),
    ({"max_tokens": 5000}, "max_seq_len is 2048"),
    ({"text_input": "x y " * 3000}, "max_input_len is 1024"),
    ({"end_id": 9999}, "end_id is 9999; the vocabulary has 512 ids"),
    ({"beam_width": 2}, "beam_width is 2; text is generated without beam search, expected 1"),
    ({"num_return_sequences": 0}, "num_return_sequences is 0 for 1 prompts"),
    ({"embedding_bias_words": "a"}, "has 1 words and embedding_bias_weights 0 weights"),
    ({"stop": True}, "a stop request has no request id"),
]
GOOD_RAW = {"input_ids": [[BOS_ID, 40]], "input_lengths": 2, "request_output_len": 4}
REFUSED_RAW = [
    ({"input_ids": [[BOS_ID, 512]]}, "the prompt holds token id 512; the vocabulary has ids 0 to 511"),
    ({"input_lengths": 3}, "input_lengths is 3 in row 0; input_ids holds 2, expected 1 to 2"),
    ({"beam_width": 2}, "beam_width is 2; this engine does not do beam search, expected 1"),
    ({"runtime_top_p_decay": 0.5}, "runtime_top_p_decay is 0.5; this engine does not change top_p"),
    ({"request_output_len": 0}, "max_tokens is 0; expected at least 1"),
    ({"stop_words_list": [[[1, 2], [3, -1]]]}, "stop_words_list has sequence ends [3] over 2 ids"),
    ({"num_return_sequences": 1000}, "at most 256 sequences in all"),
    ({"stop": True}, "a stop request has no request id"),
]


@pytest.mark.parametrize(
    ("wrong", "sentence"), REFUSED_TEXT, ids=[sentence[:24] for _, sentence in REFUSED_TEXT]
)
async def test_a_bad_text_request_is_refused_in_one_line(
    channel: Channel, wrong: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        await channel.ask("tensorrt_llm_bls", **(GOOD | wrong))
    found = str(caught.value)
    assert found.startswith("INVALID_ARGUMENT: ")
    assert sentence in found
    assert "\n" not in found
    with pytest.raises(RuntimeError, match="INVALID_ARGUMENT: "):
        await channel.ask("ensemble", **(GOOD | wrong))


@pytest.mark.parametrize(
    ("wrong", "sentence"), REFUSED_RAW, ids=[sentence[:24] for _, sentence in REFUSED_RAW]
)
async def test_a_bad_raw_request_is_refused_in_one_line(
    channel: Channel, wrong: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        await channel.ask("tensorrt_llm", **(GOOD_RAW | wrong))
    assert str(caught.value).startswith("INVALID_ARGUMENT: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "asked", "missing"),
    [
        ("tensorrt_llm_bls", GOOD, "max_tokens"),
        ("ensemble", GOOD, "max_tokens"),
        ("tensorrt_llm", GOOD_RAW, "request_output_len"),
        ("tensorrt_llm", GOOD_RAW, "input_lengths"),
    ],
)
async def test_a_forgotten_tensor_is_named(
    channel: Channel, model: str, asked: dict[str, Any], missing: str
) -> None:
    """Triton itself only counts the inputs: another one in its place lets the request through."""
    inputs = {name: value for name, value in asked.items() if name != missing}
    with pytest.raises(RuntimeError, match=f"^INVALID_ARGUMENT: {missing} is missing; every request must"):
        await channel.ask(model, **inputs, temperature=1.0)


async def test_refusals_leave_the_streams_beside_them_alone(
    channel: Channel, expected: Callable[..., str]
) -> None:
    good = [channel.text("tensorrt_llm_bls", stream=True, seed=seed, **LIVELY) for seed in range(8)]
    bad = [channel.ask("tensorrt_llm_bls", **(GOOD | wrong)) for wrong, _ in REFUSED_TEXT]
    results = await asyncio.gather(*good, *bad, return_exceptions=True)
    assert results[:8] == [expected(seed=seed, **LIVELY) for seed in range(8)]
    assert all(isinstance(result, RuntimeError) for result in results[8:])


def test_http_refuses_with_a_sentence(running_server: TritonServer) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(running_server, "tensorrt_llm_bls", "generate", {"text_input": "", "max_tokens": 3})
    with caught.value as answer:
        assert answer.code == 400
        assert json.loads(answer.read())["error"].startswith("INVALID_ARGUMENT: the prompt is empty")
