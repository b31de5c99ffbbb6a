"""The official openai SDK against `minitron openai` in front of a real Triton.

Run with: pytest tests/server/test_openai_door.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from door_process import door_process
from minitron_build.serving.triton_server import TritonServer
from minitron_client import MinitronClient

MODEL = "tensorrt_llm_bls"
PROMPT = "def add(a, b):\n    return"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TALK: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count: é 🙂"}]
TRITON_LINE = re.compile(r"^minitron_requests_total\{(?P<labels>[^}]*)\} (?P<value>\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def url(running_server: TritonServer) -> Iterator[str]:
    """A door that fetches the tokenizer from the server when it needs it."""
    with door_process(running_server.grpc_url) as door:
        yield door.url


@pytest.fixture(scope="module")
def sdk(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def grpc(running_server: TritonServer) -> Iterator[MinitronClient]:
    with MinitronClient(running_server.grpc_url) as client:
        yield client


@pytest.fixture(scope="module")
def prompt_ids(grpc: MinitronClient) -> list[int]:
    return grpc.tokenize(PROMPT)


def test_the_tokenizer_comes_with_its_files(grpc: MinitronClient, tiny_minitron: Path) -> None:
    tokenizer = grpc.tokenizer()
    assert tokenizer.files["tokenizer_config.json"] == (tiny_minitron / "tokenizer_config.json").read_text()
    backend = Tokenizer.from_file(str(tiny_minitron / "tokenizer.json"))
    assert tokenizer.encode(PROMPT) == backend.encode(PROMPT).ids


def test_greedy_is_the_grpc_clients_text(
    sdk: openai.OpenAI, grpc: MinitronClient, prompt_ids: list[int]
) -> None:
    expected = grpc.generate(PROMPT, max_tokens=40)
    whole = sdk.completions.create(model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0)
    assert whole.choices[0].text == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == expected.usage.input_tokens == len(prompt_ids)
    assert whole.usage.completion_tokens == expected.usage.output_tokens
    chunks = list(
        sdk.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=40, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.text for choice in choices) == expected.text
    assert choices[-1].finish_reason == expected.finish_reason
    assert len(choices) > 10  # it was streamed
    assert chunks[-1].usage == whole.usage


def test_the_stop_word_stays_out_and_ends_the_work(
    sdk: openai.OpenAI, grpc: MinitronClient, prompt_ids: list[int]
) -> None:
    text = grpc.generate(PROMPT, max_tokens=40).text
    stop = text[len(text) // 2 :][:3]
    expected = text[: text.index(stop)]
    ask: Any = {"model": MODEL, "max_tokens": 40, "temperature": 0, "stop": [stop]}
    for prompt in (PROMPT, prompt_ids):
        whole = sdk.completions.create(prompt=prompt, **ask)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "stop")
        assert whole.usage is not None
        assert whole.usage.completion_tokens < 40
        streamed = [chunk.choices[0] for chunk in sdk.completions.create(prompt=prompt, stream=True, **ask)]
        assert "".join(choice.text for choice in streamed) == expected
        assert streamed[-1].finish_reason == "stop"


def test_token_ids_give_the_text_of_their_text(sdk: openai.OpenAI, prompt_ids: list[int]) -> None:
    ask: Any = {"model": MODEL, "max_tokens": 40, "temperature": 0}
    of_text = sdk.completions.create(prompt=PROMPT, **ask)
    of_ids = sdk.completions.create(prompt=prompt_ids, **ask)
    assert of_ids.choices == of_text.choices
    assert of_ids.usage == of_text.usage
    streamed = sdk.completions.create(prompt=prompt_ids, stream=True, **ask)
    assert "".join(chunk.choices[0].text for chunk in streamed) == of_text.choices[0].text


def test_an_empty_prompt_goes_on_from_the_id_that_begins_a_text(
    sdk: openai.OpenAI, grpc: MinitronClient
) -> None:
    ask: Any = {"model": MODEL, "max_tokens": 12, "temperature": 0}
    begin = grpc.tokenize("")
    of_ids = sdk.completions.create(prompt=begin, **ask)
    of_nothing = sdk.completions.create(prompt="", echo=True, logprobs=None, **ask)
    assert len(begin) == 1
    assert of_nothing.choices == of_ids.choices
    assert of_nothing.usage == of_ids.usage
    streamed = sdk.completions.create(prompt="", stream=True, **ask)
    assert "".join(chunk.choices[0].text for chunk in streamed) == of_ids.choices[0].text


def test_seeds(sdk: openai.OpenAI, grpc: MinitronClient) -> None:
    ask: Any = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24}
    pair = sdk.completions.create(seed=5, n=2, **ask).choices
    again = [sdk.completions.create(seed=seed, **ask).choices[0].text for seed in (5, 6)]
    assert [choice.text for choice in pair] == again
    assert again[0] != again[1]
    assert again[0] == grpc.generate(PROMPT, max_tokens=24, temperature=1.0, top_p=1.0, seed=5).text
    unseeded = {sdk.completions.create(**ask).choices[0].text for _ in range(3)}
    assert len(unseeded) > 1


def test_echo_many_prompts_and_the_best(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(model=MODEL, prompt=["ab", "cd"], max_tokens=4, echo=True, temperature=0)
    assert [choice.text[:2] for choice in answer.choices] == ["ab", "cd"]
    best = sdk.completions.create(model=MODEL, prompt="ab", max_tokens=8, best_of=3, n=1, seed=1, logprobs=0)
    single = sdk.completions.create(model=MODEL, prompt="ab", max_tokens=8, n=3, seed=1, logprobs=0)

    def mean(choice: Any) -> float:
        values = choice.logprobs.token_logprobs
        return float(sum(values) / len(values))

    assert best.choices[0].text == max(single.choices, key=mean).text


def test_log_probs_are_the_grpc_clients(sdk: openai.OpenAI, grpc: MinitronClient) -> None:
    expected = grpc.generate(PROMPT, max_tokens=20, return_log_probs=True)
    choice = sdk.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0, logprobs=1
    ).choices[0]
    log = choice.logprobs
    assert log is not None
    assert log.tokens is not None
    assert log.token_logprobs is not None
    assert log.token_logprobs == pytest.approx(list(expected.log_probs or ())[: len(log.tokens)])
    if not any(token.startswith("bytes:") for token in log.tokens):
        assert "".join(log.tokens) == choice.text
    streamed = sdk.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0, logprobs=1, stream=True
    )
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    assert [value for part in parts if part for value in part.token_logprobs or ()] == log.token_logprobs


def test_a_base_model_refuses_to_chat(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="has no chat template") as caught:
        sdk.chat.completions.create(model=MODEL, messages=TALK)
    assert caught.value.code == "no_chat_template"


def test_a_model_with_a_template_chats(
    running_server: TritonServer, tiny_minitron: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tiny_minitron / name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TALK, add_generation_prompt=True)
    with (
        door_process(running_server.grpc_url, "--tokenizer-dir", str(tmp_path)) as door,
        openai.OpenAI(base_url=door.url, api_key="none", max_retries=0) as sdk,
    ):
        ask: Any = {"model": MODEL, "messages": TALK, "max_tokens": 12, "temperature": 0, "logprobs": True}
        whole = sdk.chat.completions.create(**ask)
        by_ids = sdk.completions.create(model=MODEL, prompt=ids, max_tokens=12, temperature=0)
        streamed = list(sdk.chat.completions.create(stream=True, **ask))
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(ids)  # one BOS, not two
    assert whole.choices[0].message.content == by_ids.choices[0].text
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == whole.choices[0].message.content
    log = whole.choices[0].logprobs
    assert log is not None
    assert len(log.content or ()) == whole.usage.completion_tokens or whole.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "kind", "says"),
    [
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_seq_len is 2048"),
        ({"prompt": "x" * 9000}, openai.BadRequestError, "max_input_len is 1024"),
        ({"max_tokens": 0, "echo": True}, openai.BadRequestError, "max_tokens is 0, which asks for the log"),
        ({"prompt": [99_999]}, openai.BadRequestError, "token id 99999"),
        ({"model": "gpt-9"}, openai.NotFoundError, "does not exist"),
        ({"suffix": "x"}, openai.BadRequestError, "suffix is not supported"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(
    sdk: openai.OpenAI, fields: dict[str, Any], kind: type[Exception], says: str, stream: bool
) -> None:
    with pytest.raises(kind, match=says):
        sdk.completions.create(**({"model": MODEL, "prompt": PROMPT} | fields), stream=stream)


def outcomes(server: TritonServer, outcome: str) -> float:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        text = answer.read().decode()
    wanted = {f'model="{MODEL}"', f'outcome="{outcome}"'}
    found = [
        float(line["value"])
        for line in TRITON_LINE.finditer(text)
        if wanted <= set(line["labels"].split(","))
    ]
    return sum(found)


def eventually(holds: Callable[[], bool], limit_s: float = 15) -> None:
    until_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < until_s
        time.sleep(0.1)


def test_who_leaves_frees_the_engine(sdk: openai.OpenAI, running_server: TritonServer) -> None:
    before = outcomes(running_server, "cancelled")
    stream = sdk.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=2000, stream=True, n=2, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    eventually(lambda: outcomes(running_server, "cancelled") == before + 2)
    with pytest.raises(openai.APITimeoutError):
        sdk.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=2000, timeout=0.3, extra_body={"ignore_eos": True}
        )
    eventually(lambda: outcomes(running_server, "cancelled") == before + 3)


def test_many_at_once(sdk: openai.OpenAI, grpc: MinitronClient) -> None:
    expected = {place: grpc.generate(f"{place} ", max_tokens=16).text for place in range(4)}

    def ask(place: int) -> bool:
        stream = sdk.completions.create(
            model=MODEL, prompt=f"{place % 4} ", max_tokens=16, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in stream) == expected[place % 4]

    with ThreadPoolExecutor(32) as threads:
        assert all(threads.map(ask, range(64)))


def test_health_models_and_metrics(sdk: openai.OpenAI, url: str) -> None:
    assert [model.id for model in sdk.models.list()] == [MODEL]
    base = url.removesuffix("/v1")
    with urllib.request.urlopen(f"{base}/health", timeout=10) as answer:
        assert json.load(answer)["status"] == "ready"
    with urllib.request.urlopen(f"{base}/metrics", timeout=10) as answer:
        assert "minitron_openai_requests_in_flight 0.0" in answer.read().decode()


def test_sigterm_lets_a_stream_finish(running_server: TritonServer) -> None:
    with (
        door_process(running_server.grpc_url) as door,
        openai.OpenAI(base_url=door.url, api_key="none", max_retries=0) as sdk,
    ):
        stream = sdk.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        os.kill(door.pid, signal.SIGTERM)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"


def test_a_stream_that_outlives_the_drain_is_cancelled(running_server: TritonServer) -> None:
    before = outcomes(running_server, "cancelled")
    started_s = time.monotonic()
    with (
        door_process(running_server.grpc_url, "--drain-timeout-s", "1") as door,
        openai.OpenAI(base_url=door.url, api_key="none", max_retries=0) as sdk,
    ):
        stream = sdk.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=2000, stream=True, n=16, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        os.kill(door.pid, signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the door is shutting down"):
            list(stream)
    assert time.monotonic() - started_s < 20
    eventually(lambda: outcomes(running_server, "cancelled") == before + 16)
