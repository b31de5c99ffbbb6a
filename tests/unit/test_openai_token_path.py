"""Prompts given as token ids: text made of the engine's ids, and an end at a stop word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openai_door import PROMPT_TOKENS, Call, PlayingClient, open_door
from tokenizers import Tokenizer

from minitron_client import Chunk, SamplingParams
from minitron_client.openai.served_tokenizer import ServedTokenizer, read_tokenizer_dir
from minitron_client.openai.token_path import PromptRouter

TEXT = "né 🙂 end of it"


class Pair:
    """Both clients of a door, and the tokenizer between them."""

    def __init__(self, folder: Path) -> None:
        self.served = read_tokenizer_dir(folder)
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.ids = backend.encode(TEXT, add_special_tokens=False).ids
        self.texts, self.token_ids = PlayingClient(), PlayingClient(self._spoken)
        self.router = PromptRouter(self.texts, self.token_ids, self._load)

    async def _load(self) -> ServedTokenizer:
        return self.served

    def _spoken(self, call: Call) -> list[Any]:
        last = len(self.ids) - 1
        return [
            Chunk("", (one,), "length" if place == last else None, (-1.0,))
            for place, one in enumerate(self.ids)
        ]


@pytest.fixture
def pair(tiny_minitron: Path) -> Pair:
    return Pair(tiny_minitron)


async def test_ids_become_text(pair: Pair) -> None:
    sampling = SamplingParams(return_log_probs=True, return_output_ids=True)
    completion = await pair.router.generate((7, 8, 9), sampling=sampling, request_id="r")
    assert (completion.text, completion.finish_reason) == (TEXT, "length")
    assert (completion.usage.input_tokens, completion.usage.output_tokens) == (3, len(pair.ids))
    assert completion.token_ids == tuple(pair.ids)
    assert completion.log_probs == (-1.0,) * len(pair.ids)
    assert pair.token_ids.calls[0].prompt == [7, 8, 9]
    assert pair.texts.calls == []


async def test_half_a_character_is_not_sent(pair: Pair) -> None:
    async with pair.router.stream((7,), sampling=SamplingParams(), request_id="r") as stream:
        texts = [chunk.text async for chunk in stream]
    assert "".join(texts) == TEXT
    assert "\ufffd" not in "".join(texts)
    assert len(texts) == len(pair.ids) + 1


async def test_a_stop_word_ends_the_engine(pair: Pair) -> None:
    sampling = SamplingParams(stop_words=("en",))
    completion = await pair.router.generate((7,), sampling=sampling, request_id="r")
    assert completion.text.startswith("né 🙂 en")
    assert completion.finish_reason == "stop"
    assert completion.usage.output_tokens is not None
    assert completion.usage.output_tokens < len(pair.ids)
    assert pair.token_ids.cancelled == ["r"]
    assert pair.token_ids.calls[0].sampling.stop_words == ()


async def test_a_text_goes_to_the_text_model(pair: Pair) -> None:
    completion = await pair.router.generate("x", sampling=SamplingParams(), request_id="r")
    assert (completion.text, completion.usage.input_tokens) == ("abc", PROMPT_TOKENS)
    assert pair.token_ids.calls == []
    assert (await pair.router.health()).ready


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_are_echoed_as_text(tiny_minitron: Path, stream: bool) -> None:
    backend = Tokenizer.from_file(str(tiny_minitron / "tokenizer.json"))
    prompts = [backend.encode(text, add_special_tokens=False).ids for text in ("été", "or")]
    async with open_door(PlayingClient(), tokenizer_dir=tiny_minitron) as door:
        answer = await door.post(prompt=prompts, echo=True, stream=stream)
    for lead in ("étéa", "ora") if stream else ("étéabc", "orabc"):
        assert f'"text":"{lead}"' in answer.text


async def test_an_unknown_token_id_cannot_be_echoed(tiny_minitron: Path) -> None:
    async with open_door(PlayingClient(), tokenizer_dir=tiny_minitron) as door:
        answer = await door.post(prompt=[999999], echo=True)
    assert answer.status_code == 400
    assert "token id 999999 is not in the vocabulary of 512 tokens" in answer.text
