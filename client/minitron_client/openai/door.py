"""The door: what a request becomes, from its body to its answer.

It knows the order of things: key, body, fields, prompt, generation, answer, metrics. What each of them means
is another module's.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from minitron_client.errors import AuthError, MinitronClientError
from minitron_client.openai.api_errors import ApiError, api_error
from minitron_client.openai.api_keys import ApiKeys
from minitron_client.openai.chat import DEFAULT_CHAT_TOKENS, ChatReply, check_chat
from minitron_client.openai.choice_text import Piece
from minitron_client.openai.completions import (
    CompletionReply,
    begun_prompts,
    check_completion,
    needs_tokenizer,
)
from minitron_client.openai.door_metrics import DoorMetrics
from minitron_client.openai.fields import ChatFields, CompletionFields, SamplingFields, read_fields
from minitron_client.openai.generation import Generation, Running, TextClient
from minitron_client.openai.http_body import read_json_body, until_disconnect
from minitron_client.openai.reply import DONE, Reply, sse
from minitron_client.openai.tokenizer_source import LoadTokenizer
from minitron_client.readiness import why_not_ready
from minitron_client.results import Completion, Health
from minitron_client.settings import API_KEY_HEADER

# W3C trace context, passed on to the server where it is well formed
TRACE_HEADERS: dict[str, re.Pattern[str]] = {
    "traceparent": re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"),
    "tracestate": re.compile(r"[\x20-\x7e]{1,512}"),
}
MAX_BODY_BYTES = 8 * 2**20
REQUEST_TIMEOUT_S = 600.0  # the openai SDK's own patience


@dataclass(frozen=True, slots=True)
class DoorSettings:
    """What the operator decides.

    Attributes:
        model: the Triton model that answers.
        served_names: names that requests may give; answers carry the first.
        keys: who may come in.
        timeout_s: deadline of each choice.
        default_chat_tokens: tokens of a chat answer where the request does not say.
        max_body_bytes: the largest body that is read.
        host_names: names that requests may call the door by; none: any.
        origins: other sites whose pages may call the door, such as "https://chat.example.org".
    """

    model: str
    served_names: tuple[str, ...]
    keys: ApiKeys = field(default_factory=ApiKeys)
    timeout_s: float = REQUEST_TIMEOUT_S
    default_chat_tokens: int = DEFAULT_CHAT_TOKENS
    max_body_bytes: int = MAX_BODY_BYTES
    host_names: frozenset[str] = frozenset()
    origins: tuple[str, ...] = ()


class Door:
    """Answers requests by asking a gRPC client.

    Args:
        client: who generates.
        settings: what the operator decided.
        load_tokenizer: gives the served tokenizer; asked only where it is needed.
    """

    def __init__(self, client: TextClient, settings: DoorSettings, load_tokenizer: LoadTokenizer) -> None:
        self.client, self.settings = client, settings
        self.metrics, self.running = DoorMetrics(), Running()
        self.is_draining = False
        self._load_tokenizer = load_tokenizer

    async def complete(self, request: Request) -> Response:
        """Answer `POST /v1/completions`.

        Raises:
            ApiError, MinitronClientError: the request cannot be served.
        """
        fields = read_fields(CompletionFields, await read_json_body(request, self.settings.max_body_bytes))
        name = self._served_name(fields)
        check_completion(fields)
        tokenizer = await self._load_tokenizer() if needs_tokenizer(fields) else None
        prompts = begun_prompts(fields, tokenizer)
        reply = CompletionReply(fields, prompts, model=name, tokenizer=tokenizer)
        return await self._answer(request, reply)

    async def chat(self, request: Request) -> Response:
        """Answer `POST /v1/chat/completions`.

        Raises:
            ApiError, MinitronClientError: it cannot be served, or the model has no chat template.
        """
        fields = read_fields(ChatFields, await read_json_body(request, self.settings.max_body_bytes))
        name = self._served_name(fields)
        check_chat(fields)
        tokenizer = await self._load_tokenizer()
        if tokenizer.template is None:
            raise ApiError(
                f"model {name} has no chat template: it is a base model that goes on with a text; "
                "use /v1/completions",
                code="no_chat_template",
            )
        messages = [message.for_template() for message in fields.messages]
        reply = ChatReply(
            fields,
            tokenizer.template.render(messages, adds_bos=tokenizer.tokenizer.rules.add_special_tokens),
            model=name,
            default_max_tokens=self.settings.default_chat_tokens,
            tokenizer=tokenizer,
        )
        return await self._answer(request, reply)

    async def health(self) -> tuple[bool, dict[str, object]]:
        """Whether requests can be served now, and what is known about it."""
        health, refusal = await self._look()
        reason = api_error(refusal).message if refusal else why_not_ready(health, self.settings.model)
        is_ready = not reason and not self.is_draining
        state = "ready" if is_ready else "draining" if self.is_draining else "not ready"
        said = {"status": state, "server_live": health.live, "server_ready": health.ready}
        return is_ready, said | {"model": self.settings.model, "reason": reason}

    async def fault(self) -> str:
        """Why requests cannot be served now and what to do, for the operator; "" where they can."""
        health, refusal = await self._look()
        if refusal is not None:
            return f"{refusal.message}; {refusal.advice}"
        reason = why_not_ready(health, self.settings.model)
        return f"{reason}; {health.advice}" if health.advice else reason

    async def _look(self) -> tuple[Health, MinitronClientError | None]:
        """The server's state, and the error by which it turns this door itself away."""
        health = Health(live=False, ready=False)
        try:
            health = await self.client.health()
            if health.live:  # open to everybody as a rule: whether the key is right is asked elsewhere
                await self.client.parameters(self.settings.model)
        except AuthError as error:
            # A configuration that is the administrator's alone, under another key, says nothing of ours.
            is_ours = API_KEY_HEADER in error.message or "expecting header" not in error.message
            return health, error if is_ours or not health.live else None
        except MinitronClientError as error:
            return health, None if health.live else error
        return health, None

    def _served_name(self, fields: SamplingFields) -> str:
        names = self.settings.served_names
        if fields.model is not None and fields.model not in names:
            raise ApiError(
                f"the model {fields.model!r} does not exist; this door serves {', '.join(names)}",
                404,
                param="model",
                code="model_not_found",
            )
        return names[0]

    async def _answer(self, request: Request, reply: Reply) -> Response:
        generation = Generation(
            self.client,
            reply.jobs,
            self.running,
            timeout_s=self.settings.timeout_s,
            headers=trace_headers(request.headers),
        )
        answer_headers = {"x-request-id": reply.id}
        try:
            if not reply.fields.stream:
                whole = await until_disconnect(request, self._whole(reply, generation))
                return JSONResponse(whole, headers=answer_headers)
            events = self._events(reply, generation)
            # An error has a status until the first text is out; from then on it is told in the stream.
            first = await until_disconnect(request, anext(events))
        except ApiError as error:
            error.headers += tuple(answer_headers.items())
            raise
        return EventStream(_told(first, events), generation, headers=answer_headers)

    async def _whole(self, reply: Reply, generation: Generation) -> dict[str, object]:
        pieces: dict[int, Piece] = {}
        async for came in generation.events(is_streaming=False):
            for job, part in came:
                if isinstance(part, Completion):
                    pieces[job.index] = reply.texts[job.index].end(part)
        self.metrics.count_tokens(reply.usage())
        return reply.whole([pieces[index] for index in sorted(pieces)])

    async def _events(self, reply: Reply, generation: Generation) -> AsyncGenerator[bytes, None]:
        watch = _Watch()
        async for came in generation.events(is_streaming=True):
            pieces = [piece for job, part in came if (piece := reply.piece(job, part)) is not None]
            if pieces:
                watch.see(pieces)
                yield b"".join(reply.chunk(piece) for piece in pieces)
        usage = reply.usage()
        self._measure(watch, usage)
        if reply.fields.includes_usage and usage is not None:
            yield reply.usage_chunk()
        yield DONE

    def _measure(self, watch: _Watch, usage: dict[str, int] | None) -> None:
        self.metrics.count_tokens(usage)
        if watch.first_s is None:
            return
        self.metrics.ttft.observe(watch.first_s - watch.started_s)
        tokens = usage["completion_tokens"] if usage else 0
        if tokens > 1:
            self.metrics.tpot.observe((time.monotonic() - watch.first_s) / (tokens - 1))


class _Watch:
    """When a stream began and when its first text came."""

    def __init__(self) -> None:
        self.started_s = time.monotonic()
        self.first_s: float | None = None

    def see(self, pieces: list[Piece]) -> None:
        """Take what is sent now."""
        if self.first_s is None and any(piece.text for piece in pieces):
            self.first_s = time.monotonic()


class EventStream(StreamingResponse):
    """Server-sent events; however it ends, its generation is cancelled if it still runs."""

    media_type = "text/event-stream"

    def __init__(self, body: AsyncIterator[bytes], generation: Generation, headers: dict[str, str]) -> None:
        # A proxy that collects the stream before it passes it on would defeat it.
        headers = headers | {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(body, headers=headers)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until their end, or until the caller goes."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


def trace_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The caller's trace context, for the server."""
    given = {name: headers[name] for name in TRACE_HEADERS if name in headers}
    return {name: value for name, value in given.items() if TRACE_HEADERS[name].fullmatch(value)}


async def _told(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The events; an error in the midst of them is the last but one."""
    yield first
    try:
        async for event in rest:
            yield event
    except (ApiError, MinitronClientError) as error:
        yield sse((error if isinstance(error, ApiError) else api_error(error)).body())
        yield DONE
