"""Text through a real Triton from tokens that are known: every byte arrives once, whole, and up to its end.

The engine is a scripted one; tokenizer, text models, ensemble and every kind of client are the real ones.
Run with: pytest tests/server/test_scripted_text.py
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from triton_calls import PROMPT, Channel, chunks, http_chunks, post, sync_answers
from triton_repos import add_variant, copy_bundle, serving

from minitron_build.bundle.bundle import Bundle
from minitron_build.serving.triton_server import TritonServer

TOKENIZER = Tokenizer.from_file(
    str(Path(__file__).parents[1] / "golden" / "data" / "tiny_minitron" / "tokenizer.json")
)
BOS, EOS, RESERVED = (
    [TOKENIZER.token_to_id(f"<|{name}|>")]
    for name in ("begin_of_text", "end_of_text", "reserved_special_token_0")
)
ENGINE_FILE = Path(__file__).with_name("scripted_engine.py")
MODELS = ("tensorrt_llm_bls", "ensemble")
THROUGH_TRITON = "tensorrt_llm_bls_through_triton"
"""The text model without the link, as it asks TensorRT-LLM's backend."""
VERBATIM = "tensorrt_llm_bls_verbatim"
"""The text model with skip_special_tokens off."""
MAX_TOKENS = 600


def _byte_ids() -> dict[int, int]:
    """The token of each byte: a printable byte is its own character, the rest follow from U+0100 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    characters = {ord(character): character for character in alphabet if ord(character) < 256}
    rest = [byte for byte in range(256) if byte not in characters]
    characters |= zip(rest, alphabet[-len(rest) :], strict=True)
    return {byte: TOKENIZER.token_to_id(character) for byte, character in characters.items()}


BYTE_IDS = _byte_ids()


def encoded(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def cut(text: str | bytes) -> list[int]:
    """A token per byte, so that every character of several bytes is cut everywhere."""
    return [BYTE_IDS[byte] for byte in (text.encode() if isinstance(text, str) else text)]


def tokens(text: str) -> list[int]:
    """Ids of tokens that are written with | between them."""
    return [TOKENIZER.token_to_id(token.replace(" ", "Ġ")) for token in text.split("|")]


TEXTS = {
    "emoji": cut("👩‍👩‍👧‍👦 🇩🇪🇯🇵 👍🏽 ❤️"),
    "cjk": cut("汉字とかな、한국어 ") + encoded("汉字とかな、한국어"),
    "accents": cut("Café déjà e\u0301 — ﷽ \u200f\u05e8\u05d9\u05de\u05d5\u05df"),
    "spaces": encoded("  two spaces\tand\r\n\n lines  isn't lazy , it 's … dogs .  # done !  "),
    "bytes": cut(bytes(range(256))),
    "bytes backwards": cut(bytes(reversed(range(256)))),
    "overlong and surrogates": cut(b"a\xc0\xafb\xed\xa0\x80c\xf4\x90\x80\x80d\xe6\xb1e\xf0\x9f\x91f"),
    "half at the end": encoded("ends in half a ") + cut("汉".encode()[:2]),
    "only half": cut("👍".encode()[:3]),
    "special tokens": RESERVED + encoded("a") + BOS + cut("é") + RESERVED + encoded(" b") + RESERVED,
    "special token inside a character": cut("x汉".encode()[:2]) + RESERVED + cut("汉".encode()[1:]),
    "special token spelled out": cut("<|end_of_text|>") + encoded(" and on"),
    "end id, then more": encoded("The end.") + EOS + encoded(" never seen"),
    "end id inside a character": cut("ab汉".encode()[:4]) + EOS + cut("汉".encode()[2:]),
    "end id at once": EOS + encoded(" never seen"),
}
"""What the engine generates; an engine that has said its last id goes on when that was an end id."""


@dataclass(frozen=True, slots=True)
class StopCase:
    """Tokens, the words to stop at, and the text that ends with the one that ends first."""

    ids: list[int]
    words: tuple[str, ...]
    text: str


STOPS = {
    "inside one token": StopCase(tokens("The| return|er|s"), ("tur",), "The retur"),
    "begins and ends inside tokens": StopCase(tokens(" a| model|weight| is"), ("delwei",), " a modelwei"),
    "across three tokens": StopCase(tokens("The| the|re|ame| in"), ("heream",), "The theream"),
    "across five tokens": StopCase(cut("a STOP!b"), ("STOP!",), "a STOP!"),
    "first of two": StopCase(tokens("The| capital| of| it"), ("of", "ital"), "The capital"),
    "two that end in one token": StopCase(tokens("The| return|er"), ("return", "etu"), "The retu"),
    "one the beginning of the other": StopCase(cut("say aab"), ("aab", "aa"), "say aa"),
    "false start": StopCase(cut("ababac."), ("abac",), "ababac"),
    "of several bytes": StopCase(cut("x 汉字 y"), ("汉字",), "x 汉字"),
    "emoji inside a sequence": StopCase(cut("a 👩‍👩‍👧 b"), ("\u200d👧",), "a 👩‍👩‍👧"),
    "line break": StopCase(tokens("The|):Ċ|Ċ|x"), (":\n\n",), "The):\n\n"),
    "across a special token": StopCase(tokens("The| st|o") + RESERVED + tokens("p|s"), ("stop",), "The stop"),
    "what was half a character": StopCase(cut(b"a\xe6\xb1 b"), ("\ufffd ",), "a\ufffd "),
}


def _random_ids(seed: int) -> list[int]:
    """Ids of every kind: whole tokens, single bytes, special tokens, pieces of emoji and of CJK."""
    draw = random.Random(seed)
    ids: list[int] = []
    for _ in range(draw.randint(1, 30)):
        text = "".join(draw.choices("aé汉👩‍👧 \n\t'.,<|", k=draw.randint(1, 4)))
        kinds = (
            lambda: [draw.randrange(TOKENIZER.get_vocab_size())],
            lambda: [BYTE_IDS[draw.randrange(256)]],
            lambda: draw.choice((BOS, RESERVED)),
            lambda text=text: encoded(text),
            lambda text=text: cut(text)[: draw.randint(1, 5)],
        )
        ids += draw.choice(kinds)()
    return [token_id for token_id in ids if token_id != EOS[0]] or RESERVED


RANDOM = {f"random {seed}": _random_ids(seed) for seed in range(24)}
FAILING = "fails in the middle"
SCRIPTS = {
    **TEXTS,
    **RANDOM,
    **{name: case.ids for name, case in STOPS.items()},
    FAILING: [*encoded("so far"), -1],
}
"""All tables as the engine knows them, by place."""


def script(name: str) -> dict[str, Any]:
    """When the text is to end before its ids do, the engine says x after them, until it is stopped."""
    goes_on = name in STOPS or EOS[0] in SCRIPTS[name]
    return {"ids": SCRIPTS[name], "then": BYTE_IDS[ord("x")] if goes_on else None}


class Served:
    """A server whose engine plays the scripts, asked in every way there is."""

    def __init__(self, server: TritonServer, ended: Path) -> None:
        self.server, self._ended = server, ended
        self._places = {name: place for place, name in enumerate(SCRIPTS)}
        self._rounds = itertools.count()
        self.seeds: list[int] = []

    def request(self, name: str, **more: Any) -> dict[str, Any]:
        """A request that the script answers; every one has a seed of its own."""
        self.seeds.append(next(self._rounds) * len(SCRIPTS) + self._places[name])
        fixed = {"text_input": PROMPT, "max_tokens": MAX_TOKENS, "exclude_input_in_output": True}
        return fixed | {"seed": self.seeds[-1]} | more

    async def streams(self, model: str, name: str, **more: Any) -> dict[str, list[str]]:
        """The chunks of a streamed answer, by client."""
        channel = Channel(self.server.grpc_url)
        requests = [self.request(name, stream=True, **more) for _ in range(3)]
        found = {
            "grpc.aio": chunks(await channel.ask(model, **requests[0])),
            "tritonclient": chunks(sync_answers(self.server, model, requests[1])),
            "http": http_chunks(self.server, model, requests[2]),
        }
        await channel.close()
        return found

    async def texts(self, model: str, name: str, **more: Any) -> dict[str, str]:
        """The text of an answer in one response, by client."""
        channel = Channel(self.server.grpc_url)
        requests = [self.request(name, stream=False, **more) for _ in range(2)]
        (chunk,) = chunks(await channel.ask(model, **requests[0]))
        await channel.close()
        answer = json.loads(post(self.server, model, "generate", requests[1]))
        return {"grpc.aio": chunk, "http": answer["text_output"]}

    def ends(self) -> list[dict[str, Any]]:
        """What the engine wrote of each request since the last time, once all of them are over."""
        asked, self.seeds = set(self.seeds), []
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            lines = self._ended.read_text().splitlines() if self._ended.exists() else []
            found = [line for line in map(json.loads, lines) if line["seed"] in asked]
            if len(found) == len(asked):
                return found
            time.sleep(0.01)
        raise AssertionError(f"{len(asked) - len(found)} of {len(asked)} requests never ended in the engine")


@pytest.fixture(scope="module")
def served(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    repo = copy_bundle(tiny_bundle, tmp_path_factory.mktemp("scripted") / "bundle")
    shutil.rmtree(repo / "postprocessing")  # takes no part
    engine_dir = repo / "tensorrt_llm" / "1"
    shutil.copyfile(ENGINE_FILE, engine_dir / "model.py")
    (engine_dir / "scripts.json").write_text(json.dumps([script(name) for name in SCRIPTS]))
    add_variant(repo, "tensorrt_llm_bls", VERBATIM, skip_special_tokens="false")
    add_variant(repo, "tensorrt_llm_bls", THROUGH_TRITON, engine_link="false", max_engine_silence_s="1")
    # The request whose error Triton loses stays open in the server, which waits for it as long as it is let.
    with serving(repo, drain_timeout_s=3) as server:
        yield Served(server, engine_dir / "ended.jsonl")


def whole(ids: list[int], *, skip_special_tokens: bool = True) -> str:
    """The tokenizer's own decode of everything before the end id."""
    shown = list(itertools.takewhile(lambda token_id: token_id != EOS[0], ids))
    return TOKENIZER.decode(shown, skip_special_tokens=skip_special_tokens)


def check_chunks(streams: dict[str, list[str]], want: str) -> None:
    for client, pieces in streams.items():
        assert "".join(pieces) == want, client
        assert "\ufffd" in want or not any("\ufffd" in piece for piece in pieces), client


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", TEXTS)
async def test_chunks_joined_are_the_whole_decode(served: Served, model: str, name: str) -> None:
    want = whole(TEXTS[name])
    streams = await served.streams(model, name)
    check_chunks(streams, want)
    assert set((await served.texts(model, name)).values()) == {want}
    # A word that never comes makes the model watch the text, which must change nothing.
    assert set((await served.texts(model, name, stop_words="\x00never")).values()) == {want}


@pytest.mark.parametrize("name", [name for name, ids in TEXTS.items() if {*BOS, *RESERVED} & {*ids}])
async def test_special_tokens_are_spelled_out_where_they_are_not_skipped(served: Served, name: str) -> None:
    want = whole(TEXTS[name], skip_special_tokens=False)
    assert "<|" in want
    check_chunks(await served.streams(VERBATIM, name), want)
    assert set((await served.texts(VERBATIM, name)).values()) == {want}


async def test_all_scripts_at_once_keep_apart(served: Served) -> None:
    channel = Channel(served.server.grpc_url)
    asked = [(model, name) for name in TEXTS for model in (*MODELS, THROUGH_TRITON)]
    answers = await asyncio.gather(
        *(channel.ask(model, **served.request(name, stream=True)) for model, name in asked)
    )
    await channel.close()
    for (_, name), answer in zip(asked, answers, strict=True):
        check_chunks({name: chunks(answer)}, whole(TEXTS[name]))


async def token_path(served: Served, channel: Channel, name: str, *, stream: bool) -> str:
    """What a client with a tokenizer of its own makes of the ids that the engine model gives it."""
    request = served.request(name)
    answers = await channel.ask(
        "tensorrt_llm",
        input_ids=[encoded(PROMPT)],
        input_lengths=len(encoded(PROMPT)),
        request_output_len=MAX_TOKENS,
        seed=request["seed"],
        streaming=stream,
    )
    return whole([token_id for answer in answers for token_id in answer["output_ids"].reshape(-1).tolist()])


async def test_random_ids_give_one_text_on_every_path(served: Served) -> None:
    channel = Channel(served.server.grpc_url)

    async def texts_of(name: str) -> set[str]:
        texts = [await token_path(served, channel, name, stream=stream) for stream in (True, False)]
        for model in (*MODELS, THROUGH_TRITON):
            for more in ({}, {"stop_words": "\x00never"}):
                for stream in (True, False):
                    answers = await channel.ask(model, **served.request(name, stream=stream, **more))
                    texts.append("".join(chunks(answers)))
        return set(texts)

    found = await asyncio.gather(*map(texts_of, RANDOM))
    await channel.close()
    assert found == [{whole(ids)} for ids in RANDOM.values()]


@pytest.mark.parametrize("model", MODELS)
async def test_a_request_that_fails_in_the_engine_fails_alone(served: Served, model: str) -> None:
    channel = Channel(served.server.grpc_url)
    good = [channel.ask(model, **served.request(name, stream=True)) for name in list(TEXTS)[:8]]
    bad = [channel.ask(model, **served.request(FAILING, stream=stream)) for stream in (True, False)]
    results = await asyncio.gather(*good, *bad, return_exceptions=True)
    await channel.close()
    for name, answer in zip(TEXTS, results[:8], strict=False):
        check_chunks({name: chunks(answer)}, whole(TEXTS[name]))
    assert [str(error) for error in results[8:]] == ["INTERNAL: the script says so"] * 2


async def test_an_error_that_triton_loses_ends_the_request_after_the_silence(served: Served) -> None:
    channel = Channel(served.server.grpc_url)
    good = channel.ask(THROUGH_TRITON, **served.request("spaces", stream=True))
    lost = channel.ask(THROUGH_TRITON, **served.request(FAILING, stream=True))
    answer, error = await asyncio.gather(good, lost, return_exceptions=True)
    await channel.close()
    check_chunks({THROUGH_TRITON: chunks(answer)}, whole(TEXTS["spaces"]))
    assert str(error) == "UNAVAILABLE: model tensorrt_llm has sent nothing for 1 s"


async def test_ids_are_those_of_the_text_beside_them(served: Served) -> None:
    channel = Channel(served.server.grpc_url)
    request = served.request("special token inside a character", stream=True, return_output_ids=True)
    answers = await channel.ask("tensorrt_llm_bls", **request)
    await channel.close()
    told = [(answer["output_ids"].reshape(-1).tolist(), *chunks([answer])) for answer in answers]
    assert [token_id for ids, _ in told for token_id in ids] == TEXTS["special token inside a character"]
    for ids, text in told:
        assert whole(ids) == text


# --- stop words


@pytest.mark.parametrize("model", ["ensemble", THROUGH_TRITON])
@pytest.mark.parametrize("name", STOPS)
async def test_text_ends_with_the_stop_word_and_the_engine_is_told(
    served: Served, model: str, name: str
) -> None:
    case = STOPS[name]
    words = {"stop_words": list(case.words)}
    served.ends()
    check_chunks(await served.streams(model, name, **words), case.text)
    assert set((await served.texts(model, name, **words)).values()) == {case.text}
    ends = served.ends()
    assert [end["was_stopped"] for end in ends] == [True] * 5
    assert all(end["sent"] < MAX_TOKENS for end in ends)


@pytest.mark.parametrize("name", [name for name, ids in TEXTS.items() if EOS[0] in ids])
async def test_engine_that_goes_on_after_the_end_id_is_told(served: Served, name: str) -> None:
    served.ends()
    await served.streams("tensorrt_llm_bls", name)
    assert all(end["was_stopped"] and end["sent"] < MAX_TOKENS for end in served.ends())


@pytest.mark.parametrize(
    ("name", "cuts_inside", "cuts_at_its_ends"),
    [
        ("inside one token", 0, 0),
        ("begins and ends inside tokens", 1, 0),
        ("across three tokens", 2, 0),
        ("across five tokens", 4, 2),
    ],
)
def test_stop_words_are_cut_as_their_names_say(name: str, cuts_inside: int, cuts_at_its_ends: int) -> None:
    case = STOPS[name]
    cuts = {len(TOKENIZER.decode(case.ids[:place])) for place in range(len(case.ids) + 1)}
    start, end = len(case.text) - len(case.words[0]), len(case.text)
    assert len(cuts & set(range(start + 1, end))) == cuts_inside
    assert len(cuts & {start, end}) == cuts_at_its_ends
