"""A door in front of a client that plays a script, on a real loopback socket in the test's own event loop.

`test_openai_contract.py` holds the playing client to the real one's surface.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import uvicorn

from minitron_client import Chunk, Completion, Health, MinitronClientError, SamplingParams, Timings, Usage
from minitron_client.openai.app import make_app
from minitron_client.openai.door import Door, DoorSettings
from minitron_client.openai.http_server import HttpSettings, listen, make_server, url_of
from minitron_client.openai.served_tokenizer import ServedTokenizer, read_tokenizer_dir

Step = Chunk | MinitronClientError | asyncio.Event
"""A piece of text, a failure, or something to wait for."""
MODEL = "tensorrt_llm_bls"
PROMPT_TOKENS = 5


@dataclass
class Call:
    """What the client was asked."""

    prompt: str | Sequence[int]
    sampling: SamplingParams
    timeout_s: float | None
    request_id: str
    headers: Mapping[str, str]


def words(*texts: str, finish: str | None = "length") -> list[Step]:
    """One token a chunk, as the server sends them: the finish reason comes with the last text."""
    last = len(texts) - 1
    return [
        Chunk(text, (place,), finish if place == last else None, (-0.5 * (place + 1),))  # type: ignore[arg-type]
        for place, text in enumerate(texts)
    ]


@dataclass
class PlayingClient:
    """Plays a script for every request."""

    script: Callable[[Call], Iterable[Step]] = lambda call: words("a", "b", "c")
    calls: list[Call] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    is_ready: bool = True
    health_error: MinitronClientError | None = None
    parameters_error: MinitronClientError | None = None

    def stream(
        self,
        prompt: Any,
        *,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> PlayingStream:
        assert sampling is not None
        assert request_id
        call = Call(prompt, sampling, timeout_s, request_id, headers or {})
        self.calls.append(call)
        return PlayingStream(self, call)

    async def generate(
        self,
        prompt: Any,
        *,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Completion:
        async with self.stream(
            prompt, sampling=sampling, timeout_s=timeout_s, request_id=request_id, headers=headers
        ) as stream:
            return await stream.final()

    async def parameters(self, model: str | None = None) -> dict[str, str]:
        if self.parameters_error is not None:
            raise self.parameters_error
        return {}

    async def health(self) -> Health:
        if self.health_error is not None:
            raise self.health_error
        return Health(live=True, ready=self.is_ready, models={MODEL: self.is_ready})


class PlayingStream:
    def __init__(self, client: PlayingClient, call: Call) -> None:
        self._client, self._call = client, call
        self._chunks: list[Chunk] = []
        self._has_ended = False
        self._steps = self._play()

    async def __aenter__(self) -> PlayingStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._steps

    async def final(self) -> Completion:
        async for _ in self._steps:
            pass
        sampling = self._call.sampling
        ids = tuple(token for chunk in self._chunks for token in chunk.token_ids)
        log_probs = tuple(value for chunk in self._chunks for value in chunk.log_probs)
        return Completion(
            text="".join(chunk.text for chunk in self._chunks),
            finish_reason=self._chunks[-1].finish_reason,
            usage=Usage(PROMPT_TOKENS, len(self._chunks)),
            timings=Timings(0.1, 0.05),
            request_id=self._call.request_id,
            token_ids=ids if sampling.return_output_ids else None,
            log_probs=log_probs if sampling.return_log_probs else None,
        )

    async def close(self) -> None:
        if not self._has_ended:
            self._client.cancelled.append(self._call.request_id)
            self._has_ended = True

    async def _play(self) -> AsyncIterator[Chunk]:
        for step in self._client.script(self._call):
            if self._has_ended:
                return
            if isinstance(step, MinitronClientError):
                self._has_ended = True
                raise step
            if isinstance(step, asyncio.Event):
                await step.wait()
                continue
            self._chunks.append(step)
            yield step
        self._has_ended = True


@dataclass
class OpenDoor:
    """A door that serves, and how to reach it."""

    url: str
    door: Door
    client: PlayingClient
    http: httpx.AsyncClient
    server: uvicorn.Server

    async def post(self, path: str = "completions", **fields: Any) -> httpx.Response:
        return await self.http.post(f"{self.url}/v1/{path}", json=fields)


@asynccontextmanager
async def open_door(
    client: PlayingClient,
    *,
    tokenizer_dir: Path | None = None,
    tls: tuple[Path, Path, Path] | None = None,
    **settings: Any,
) -> AsyncIterator[OpenDoor]:
    """A door; `tls` is certificate, key and the authority behind them."""

    async def load() -> ServedTokenizer:
        assert tokenizer_dir is not None, "this test gave no tokenizer"
        return read_tokenizer_dir(tokenizer_dir)

    door = Door(client, DoorSettings(**{"model": MODEL, "served_names": (MODEL,)} | settings), load)
    cert, key, authority = tls or (None, None, None)
    where = HttpSettings("127.0.0.1", 0, drain_timeout_s=5, tls_cert=cert, tls_key=key)
    trusted: Any = ssl.create_default_context(cafile=authority) if authority else True
    with listen(where) as listening:
        server = make_server(make_app(door), where)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            async with httpx.AsyncClient(timeout=10, trust_env=False, verify=trusted) as http:
                yield OpenDoor(url_of(where, listening), door, client, http, server)
        finally:
            server.should_exit = True
            await serving
            await door.running.wait(1)
