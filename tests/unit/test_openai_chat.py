"""Chat, chat templates and log probabilities, against a door whose client plays a script."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from openai_door import MODEL, OpenDoor, PlayingClient, open_door, words
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from minitron_build.runtime.tokenizer_files import TokenizerFiles
from minitron_build.source.hf_checkpoint import HfCheckpoint
from minitron_client import Chunk
from minitron_client.errors import InvalidValueError, UnsupportedError
from minitron_client.openai.api_errors import ApiError
from minitron_client.openai.chat_template import ChatTemplateError, read_chat_template
from minitron_client.openai.served_tokenizer import read_tokenizer_dir, served_tokenizer
from minitron_client.openai.token_texts import TokenBytes, TokenPlaces
from minitron_client.tokenizer import Tokenizer, TokenRules

NAMES, FILES = "TOKENIZER_FILE_NAMES", "TOKENIZER_FILES"

# The shape of Llama 3's own template.
LLAMA = """{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
TALK: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Say é {{ 7 * 7 }}"},
]


@pytest.fixture
def chat_dir(tiny_minitron: Path, tmp_path: Path) -> Path:
    """The tiny tokenizer with a chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tiny_minitron / name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": LLAMA}))
    return tmp_path


@pytest.fixture
async def door(chat_dir: Path) -> AsyncIterator[OpenDoor]:
    async with open_door(PlayingClient(), tokenizer_dir=chat_dir) as opened:
        yield opened


@pytest.fixture
async def sdk(door: OpenDoor) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_whole_answer(door: OpenDoor, sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(model=MODEL, messages=TALK, max_completion_tokens=3, n=2)
    assert [choice.message.content for choice in answer.choices] == ["abc", "abc"]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 5 + 6
    assert door.client.calls[0].sampling.max_tokens == 3


async def test_a_stream(door: OpenDoor, sdk: openai.AsyncOpenAI) -> None:
    door.client.script = lambda call: words("a", "b", "\nUser:", finish="stop")
    stream = await sdk.chat.completions.create(
        model=MODEL, messages=TALK, stream=True, stop=["\nUser:"], stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert [choice.delta.role for choice in choices] == ["assistant", None, None]
    assert [choice.delta.content for choice in choices] == ["a", "b", None]
    assert [choice.finish_reason for choice in choices] == [None, None, "stop"]
    assert chunks[-1].usage is not None
    assert door.client.calls[0].sampling.max_tokens == 512


async def test_a_stream_of_nothing_still_has_a_role(door: OpenDoor, sdk: openai.AsyncOpenAI) -> None:
    door.client.script = lambda call: [Chunk("", finish_reason="stop")]
    stream = await sdk.chat.completions.create(model=MODEL, messages=TALK, stream=True)
    choices = [chunk.choices[0] async for chunk in stream]
    assert [(choice.delta.role, choice.delta.content) for choice in choices] == [("assistant", "")]


async def test_the_prompt_is_what_transformers_renders(
    door: OpenDoor, sdk: openai.AsyncOpenAI, chat_dir: Path
) -> None:
    await sdk.chat.completions.create(model=MODEL, messages=TALK)
    tokenizer = AutoTokenizer.from_pretrained(chat_dir)
    expected = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert f"<|begin_of_text|>{door.client.calls[0].prompt}" == expected


async def test_a_base_model_has_no_chat(tiny_minitron: Path) -> None:
    async with open_door(PlayingClient(), tokenizer_dir=tiny_minitron) as door:
        answer = await door.post("chat/completions", messages=TALK)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "no_chat_template"
    assert "use /v1/completions" in answer.json()["error"]["message"]
    assert door.client.calls == []


# --- templates


def test_a_template_may_refuse() -> None:
    template = read_chat_template({"chat_template": "{{ raise_exception('roles must alternate') }}"})
    assert template is not None
    with pytest.raises(ApiError, match="roles must alternate") as caught:
        template.render([{"role": "user", "content": "x"}])
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_stays_in_its_sandbox(source: str) -> None:
    template = read_chat_template({"chat_template": source})
    assert template is not None
    with pytest.raises(ApiError, match="forbidden") as caught:
        template.render([{"role": "user", "content": "x"}])
    assert caught.value.status == 500


def test_where_a_template_is_found() -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    for config, file, expected in (
        ({"chat_template": "a"}, None, "a"),
        ({"chat_template": named}, None, "d"),
        ({"chat_template": "a"}, "b", "b"),
        ({"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}{{ bos_token }}"}, None, "<s>"),
        ({"chat_template": "{{ strftime_now('%Y')[:2] }}{{ [1] | tojson }}"}, None, "20[1]"),
    ):
        template = read_chat_template(config, file)
        assert template is not None
        assert template.render([{"role": "user", "content": "x"}]) == expected
    assert read_chat_template({}) is None
    assert read_chat_template({"chat_template": named[:1]}) is None


def test_a_template_in_a_file_of_its_own_reaches_the_door(tiny_copy: Path) -> None:
    """As newer checkpoints have it: taken into a bundle, handed out by the server, read by the door."""
    (tiny_copy / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    taken = {path.name for path in HfCheckpoint.open(tiny_copy).tokenizer_files}
    arrays = TokenizerFiles(tiny_copy).arrays()
    names, contents = ([item.decode() for item in arrays[name][0]] for name in (NAMES, FILES))
    files = dict(zip(names, contents, strict=True))
    template = served_tokenizer(Tokenizer(files["tokenizer.json"], TokenRules(), files)).template
    assert "chat_template.jinja" in taken
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "hi!"


def test_a_template_that_is_none() -> None:
    with pytest.raises(ChatTemplateError, match="no Jinja template"):
        read_chat_template({"chat_template": "{% if"})
    with pytest.raises(ChatTemplateError, match="expected a text"):
        read_chat_template({"chat_template": 3})


def test_a_tokenizer_that_cannot_be_used(chat_dir: Path, tmp_path: Path) -> None:
    (chat_dir / "tokenizer_config.json").write_text("{")
    with pytest.raises(InvalidValueError, match="cannot be read"):
        read_tokenizer_dir(chat_dir)
    (chat_dir / "tokenizer.json").unlink()
    with pytest.raises(InvalidValueError, match=r"has no tokenizer\.json"):
        read_tokenizer_dir(chat_dir)


# --- log probabilities


def spoken(tokenizer: Backend, text: str) -> list[Chunk]:
    """The text as the server streams it: ids and log probabilities beside the characters they complete."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    vocabulary, chunks, pending, data = TokenBytes(tokenizer), [], [], b""
    for token_id in ids:
        pending.append(token_id)
        data += vocabulary.visible(token_id)
        try:
            piece, data = data.decode(), b""
        except UnicodeDecodeError:
            continue
        chunks.append(Chunk(piece, tuple(pending), None, tuple(-float(i) for i in pending)))
        pending = []
    end = tokenizer.token_to_id("<|end_of_text|>")
    return [*chunks, Chunk("", (end,), "stop", (-0.1,))]


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probs_of_a_completion(
    door: OpenDoor, sdk: openai.AsyncOpenAI, chat_dir: Path, stream: bool
) -> None:
    tokenizer = Backend.from_file(str(chat_dir / "tokenizer.json"))
    door.client.script = lambda call: spoken(tokenizer, "né 🙂 end STOP")
    ask: dict[str, Any] = {"model": MODEL, "prompt": "x", "logprobs": 1, "temperature": 0, "stop": [" STOP"]}
    if stream:
        events = await sdk.completions.create(**ask, stream=True)
        parts = [event.choices[0] async for event in events]
    else:
        parts = [(await sdk.completions.create(**ask)).choices[0]]
    assert "".join(part.text for part in parts) == "né 🙂 end"
    logs = [part.logprobs for part in parts if part.logprobs is not None]
    tokens = [token for log in logs for token in log.tokens or ()]
    offsets = [offset for log in logs for offset in log.text_offset or ()]
    values = [value for log in logs for value in log.token_logprobs or ()]
    top = [best for log in logs for best in log.top_logprobs or ()]
    ids = tokenizer.encode("né 🙂 end", add_special_tokens=False).ids
    assert values == [-float(token_id) for token_id in ids]
    assert len(tokens) == len(offsets) == len(ids)
    assert any(token.startswith("bytes:\\x") for token in tokens)
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert [list(best.items()) for best in top] == [[item] for item in zip(tokens, values, strict=True)]
    assert door.client.calls[0].sampling.return_output_ids


async def test_log_probs_of_a_chat(door: OpenDoor, sdk: openai.AsyncOpenAI, chat_dir: Path) -> None:
    tokenizer = Backend.from_file(str(chat_dir / "tokenizer.json"))
    door.client.script = lambda call: spoken(tokenizer, "né 🙂")
    answer = await sdk.chat.completions.create(model=MODEL, messages=TALK, logprobs=True)
    log = answer.choices[0].logprobs
    assert log is not None
    assert log.content is not None
    assert bytes(byte for token in log.content for byte in token.bytes or ()).decode() == "né 🙂"
    assert log.content[0].top_logprobs == []
    greedy = await sdk.chat.completions.create(
        model=MODEL, messages=TALK, logprobs=True, top_logprobs=1, temperature=0
    )
    assert greedy.choices[0].logprobs is not None
    for token in greedy.choices[0].logprobs.content or ():
        assert [(top.token, top.logprob) for top in token.top_logprobs] == [(token.token, token.logprob)]


def test_an_id_of_another_vocabulary(chat_dir: Path) -> None:
    places = TokenPlaces(TokenBytes(Backend.from_file(str(chat_dir / "tokenizer.json"))))
    with pytest.raises(UnsupportedError, match="99999 is not in the door's tokenizer"):
        places.add([99999], [-1.0])
