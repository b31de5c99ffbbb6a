"""The playing client of these tests has the real client's surface, and the door's answers are OpenAI's."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai_door import PlayingClient, PlayingStream

from minitron_client import AsyncMinitronClient, AsyncTextStream, Chunk, Timings, Usage
from minitron_client import Completion as ServerCompletion
from minitron_client.openai.chat import ChatReply
from minitron_client.openai.choice_text import Piece
from minitron_client.openai.completions import CompletionReply
from minitron_client.openai.fields import ChatFields, CompletionFields, Message
from minitron_client.openai.reply import Reply
from minitron_client.openai.token_texts import TokenText


@pytest.mark.parametrize("name", ["stream", "generate", "health", "parameters"])
def test_the_playing_client_is_called_as_the_real_one(name: str) -> None:
    played = inspect.signature(getattr(PlayingClient, name))
    real = inspect.signature(getattr(AsyncMinitronClient, name))
    for parameter in played.parameters.values():
        assert parameter.name in real.parameters
        assert parameter.kind == real.parameters[parameter.name].kind
        assert parameter.default == real.parameters[parameter.name].default
    assert inspect.iscoroutinefunction(getattr(PlayingClient, name)) == inspect.iscoroutinefunction(
        getattr(AsyncMinitronClient, name)
    )


@pytest.mark.parametrize("name", ["__aenter__", "__aexit__", "final", "close"])
def test_the_playing_stream_is_awaited_as_the_real_one(name: str) -> None:
    for kind in (PlayingStream, AsyncTextStream):
        assert inspect.iscoroutinefunction(getattr(kind, name))
    assert hasattr(AsyncTextStream, "__aiter__")


def exact(model: type[Any], answer: dict[str, Any]) -> None:
    """The SDK's own types, without its leniency: no unknown field, no missing one, right kinds."""
    parsed = model.model_validate(answer, strict=True, extra="forbid")
    assert parsed.to_dict() == {key: value for key, value in answer.items() if key in parsed.to_dict()}


def ended(reply: Reply) -> Piece:
    whole = ServerCompletion("a", "stop", Usage(2, 1), Timings(1, None), "id", (1,), (-0.5,))
    job = reply.jobs[0]
    reply.texts[job.index].end(whole)
    return Piece(0, "a", (TokenText(b"a", -0.5, 0),), "stop", True)


@pytest.mark.parametrize("logprobs", [None, 0, 1])
def test_completion_objects(logprobs: int | None) -> None:
    fields = CompletionFields(prompt=("x",), logprobs=logprobs, temperature=0)
    reply = CompletionReply(fields, fields.prompt, model="m")
    piece = ended(reply)
    exact(Completion, reply.whole([piece]))
    assert reply.whole([piece])["usage"] == {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}


@pytest.mark.parametrize("top", [None, 0, 1])
def test_chat_objects(top: int | None) -> None:
    fields = ChatFields(
        messages=(Message(role="user", content="x"),), logprobs=top is not None, top_logprobs=top or 0,
        temperature=0, stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    reply = ChatReply(fields, "x", model="m", default_max_tokens=5)
    piece = ended(reply)
    exact(ChatCompletion, reply.whole([piece]))
    for event in (reply.chunk(piece), reply.usage_chunk()):
        assert event.startswith(b"data: {")
        ChatCompletionChunk.model_validate_json(event.removeprefix(b"data: "), strict=True, extra="forbid")


def test_a_server_that_does_not_count_gives_no_usage() -> None:
    fields = CompletionFields(prompt=("x",))
    reply = CompletionReply(fields, fields.prompt, model="m")
    whole = ServerCompletion("a", None, Usage(None, None), Timings(1, None), "id")
    piece = reply.texts[0].end(whole)
    assert reply.usage() is None
    exact(Completion, reply.whole([piece]))


@pytest.mark.parametrize(("tokens", "reason"), [(16, "length"), (3, "stop"), (None, "stop")])
def test_a_server_that_does_not_say_why_it_ended(tokens: int | None, reason: str) -> None:
    fields = CompletionFields(prompt=("x",))
    reply = CompletionReply(fields, fields.prompt, model="m")
    whole = ServerCompletion("a", None, Usage(1, tokens), Timings(1, None), "id")
    assert reply.texts[0].end(whole).finish_reason == reason


def test_chunks_that_hold_nothing_to_show() -> None:
    fields = CompletionFields(prompt=("x",), stop=("ab",))
    reply = CompletionReply(fields, fields.prompt, model="m")
    assert reply.texts[0].add(Chunk("")) is None
    assert reply.texts[0].add(Chunk("a")) is None


def test_the_base_client_does_not_import_the_door() -> None:
    code = "import sys, minitron_client; print([m for m in sys.modules if 'openai' in m or 'fastapi' in m])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
