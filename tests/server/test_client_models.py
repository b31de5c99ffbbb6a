"""Both clients on the real models of a bundle: text, token ids, the server's own tokenizer, many at once.

Run with: pytest tests/server/test_client_models.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from triton_calls import PROMPT

from fake_triton import AwaitedClient
from minitron_build.bundle.bundle import Bundle
from minitron_build.runtime.tokenizer import TextTokenizer
from minitron_build.serving.triton_server import TritonServer
from minitron_client import (
    AsyncMinitronClient,
    InvalidRequestError,
    MinitronClient,
    NotFoundError,
    UnsupportedError,
)

pytestmark = pytest.mark.server

TOKENS = "tensorrt_llm"
SAMPLED = {"max_tokens": 24, "top_p": 0.95, "temperature": 1.5, "seed": 11}
"""So hot that the tiny model says characters of several bytes, cut anywhere."""


@pytest.fixture(params=[MinitronClient, AwaitedClient], ids=["blocking", "awaited"])
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def text(running_server: TritonServer, make: Any) -> Iterator[Any]:
    with make(running_server.grpc_url) as client:
        yield client


@pytest.fixture
def tokens(running_server: TritonServer, make: Any) -> Iterator[Any]:
    with make(running_server.grpc_url, model=TOKENS) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(tiny_bundle: Bundle) -> TextTokenizer:
    return TextTokenizer(tiny_bundle.model_repo / "preprocessing" / "1")


def test_the_client_tokenises_as_the_server_does(text: Any, tokenizer: TextTokenizer) -> None:
    ids = text.tokenize(PROMPT)
    assert ids == tokenizer.encode(PROMPT, add_special_tokens=True)
    assert text.detokenize(ids) == PROMPT
    assert text.generate(PROMPT, max_tokens=1).usage.input_tokens == len(ids)


def test_parameters_of_a_model_are_read(tokens: Any) -> None:
    told = tokens.parameters()
    assert (told["precision"], told["kv_cache_dtype"], told["engine"]) == ("bf16", "bf16", "reference")
    assert "eos_token_ids" in tokens.parameters("tensorrt_llm_bls")
    with pytest.raises(NotFoundError):
        tokens.parameters("nobody")


@pytest.mark.parametrize("seed", range(3))
def test_text_is_the_same_through_the_text_model_and_through_token_ids(
    text: Any, tokens: Any, seed: int
) -> None:
    sampling = {**SAMPLED, "seed": seed}
    expected = text.generate(PROMPT, return_output_ids=True, return_log_probs=True, **sampling)
    by_text = tokens.generate(PROMPT, return_output_ids=True, return_log_probs=True, **sampling)
    assert (by_text.text, by_text.token_ids) == (expected.text, expected.token_ids)
    assert by_text.log_probs == expected.log_probs
    assert (by_text.finish_reason, by_text.usage) == (expected.finish_reason, expected.usage)
    by_ids = tokens.generate(text.tokenize(PROMPT), **sampling)
    assert (by_ids.text, by_ids.token_ids) == ("", expected.token_ids)
    assert by_ids.finish_reason == expected.finish_reason


def test_token_ids_stream_as_text_or_as_ids(text: Any, tokens: Any) -> None:
    expected = text.generate(PROMPT, return_output_ids=True, **SAMPLED)
    with tokens.stream(PROMPT, **SAMPLED) as stream:
        chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert chunks[-1].finish_reason == expected.finish_reason
    assert stream.final().timings.ttft_s is not None
    with tokens.stream(text.tokenize(PROMPT), **SAMPLED) as stream:
        ids = [token_id for chunk in stream for token_id in chunk.token_ids]
        assert tuple(ids) == expected.token_ids == stream.final().token_ids


def test_the_time_in_the_queue_is_told(text: Any) -> None:
    assert 0 <= text.generate(PROMPT, max_tokens=2).timings.queue_s < 10
    with text.stream(PROMPT, max_tokens=2, return_perf_metrics=True) as stream:
        assert stream.final().timings.queue_s is not None


def test_the_engine_s_own_refusals_are_understood_on_the_token_path(tokens: Any) -> None:
    with pytest.raises(InvalidRequestError):
        tokens.generate([5] * 5000, max_tokens=1)
    with pytest.raises(UnsupportedError, match="use model tensorrt_llm_bls, which"):
        tokens.generate("x", stop_words=["y"])


def test_a_bias_and_a_priority_reach_the_models(text: Any, tokens: Any) -> None:
    bias = {"embedding_bias_words": (" fox",), "embedding_bias_weights": (1000.0,)}
    assert text.generate(PROMPT, max_tokens=3, priority_level=1).text != " fox fox fox"
    one_word = text.tokenize(" fox")[1:]  # without the id that begins every text
    completion = text.generate(PROMPT, max_tokens=3, return_output_ids=True, **bias)
    assert set(completion.token_ids) <= set(one_word)
    for client, prompt in ((text, PROMPT), (tokens, [1, 2, 3])):
        with pytest.raises(InvalidRequestError, match="this model has levels 1 .first. to 3"):
            client.generate(prompt, max_tokens=1, priority_level=4)


async def test_many_streams_at_once_on_one_channel(running_server: TritonServer) -> None:
    async def one(client: AsyncMinitronClient, seed: int) -> str:
        async with client.stream(PROMPT, max_tokens=8, top_k=50, seed=seed) as stream:
            return "".join([chunk.text async for chunk in stream])

    async with AsyncMinitronClient(running_server.grpc_url, timeout_s=60) as client:
        expected = [await one(client, seed) for seed in range(4)]
        texts = await asyncio.gather(*(one(client, index % 4) for index in range(64)))
    assert texts == expected * 16
