"""The choices of one request, generated side by side, as one sequence of events.

Each choice is a request of its own to the server, in a task of its own: leaving early cancels them, and the
tasks see to it that the server hears of it, however the HTTP side ended. It knows the gRPC client's surface
and nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeAlias

from minitron_client.errors import CancelledError, ClientClosedError, InternalError, MinitronClientError
from minitron_client.openai.api_errors import api_error
from minitron_client.openai.fields import Prompt
from minitron_client.results import Chunk, Completion, Health
from minitron_client.sampling import SamplingParams

_log = logging.getLogger("minitron_client.openai")


class TextStream(Protocol):
    """What the door needs of `minitron_client.AsyncTextStream`."""

    async def __aenter__(self) -> TextStream: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def __aiter__(self) -> AsyncIterator[Chunk]: ...
    async def final(self) -> Completion:
        """The whole completion; after `close`, what had come."""

    async def close(self) -> None:
        """Cancel the request on the server unless it has ended."""


class TextClient(Protocol):
    """What the door needs of `minitron_client.AsyncMinitronClient`."""

    async def generate(
        self,
        prompt: Any,
        *,
        sampling: SamplingParams,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Completion:
        """One completion, when it is whole."""

    def stream(
        self,
        prompt: Any,
        *,
        sampling: SamplingParams,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> TextStream:
        """One completion, piece by piece."""

    async def health(self) -> Health:
        """State of the server."""

    async def parameters(self, model: str | None = None) -> dict[str, str]:
        """Parameters in a model's configuration; where text needs a key, this does too."""


@dataclass(frozen=True, slots=True)
class Job:
    """One choice to generate."""

    index: int
    prompt: Prompt
    sampling: SamplingParams
    request_id: str


Event: TypeAlias = tuple[Job, Chunk | Completion]
"""A piece of one choice, or its end: the whole of it."""


class Running:
    """What is under way, so that the door can wait for it, or end it, before it closes."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._generations: set[Generation] = set()

    def start(self, generation: Generation, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin a task of a generation; it is let go of when it ends."""
        self._generations.add(generation)
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def ended(self, generation: Generation) -> None:
        """Let a generation go."""
        self._generations.discard(generation)

    def end_all(self) -> None:
        """End every answer now: those who wait for it are told why."""
        for generation in list(self._generations):
            generation.fail(ClientClosedError("the door is shutting down"))

    async def wait(self, timeout_s: float) -> None:
        """Wait until all tasks have ended, at most so long."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)


class Generation:
    """Runs the choices of one request.

    Args:
        client: who generates.
        jobs: what to generate.
        running: keeps the tasks.
        timeout_s: deadline of each choice.
        headers: gRPC metadata to pass on.
    """

    def __init__(
        self,
        client: TextClient,
        jobs: Sequence[Job],
        running: Running,
        *,
        timeout_s: float,
        headers: Mapping[str, str],
    ) -> None:
        self._client, self._jobs, self._running = client, jobs, running
        self._options: dict[str, Any] = {"timeout_s": timeout_s, "headers": headers}
        self._events: asyncio.Queue[Event | MinitronClientError] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def events(self, *, is_streaming: bool) -> AsyncIterator[list[Event]]:
        """All that has come since the last time, as it comes; without streaming only `Completion`s.

        Pieces of each choice are in order, its `Completion` is its last.

        Raises:
            ApiError: a choice failed; the others are cancelled.
        """
        run = self._stream if is_streaming else self._generate
        self._tasks = [self._running.start(self, self._run(run(job), job)) for job in self._jobs]
        num_open = len(self._jobs)
        try:
            while num_open:
                came, failure = await self._next()
                num_open -= sum(isinstance(part, Completion) for _, part in came)
                if came:
                    yield came
                if failure is not None:
                    raise api_error(failure)
        finally:
            self.cancel()

    async def _next(self) -> tuple[list[Event], MinitronClientError | None]:
        """At least one event or the failure; what is there already comes along, to be sent in one go."""
        came: list[Event] = []
        item = await self._events.get()
        while not isinstance(item, MinitronClientError):
            came.append(item)
            if self._events.empty():
                return came, None
            item = self._events.get_nowait()
        return came, item

    def cancel(self) -> None:
        """Let what still runs be cancelled on the server; returns at once."""
        self._running.ended(self)
        for task in self._tasks:
            task.cancel()

    def fail(self, error: MinitronClientError) -> None:
        """Let `events` raise this after what has come so far."""
        self._events.put_nowait(error)

    async def _run(self, work: Coroutine[Any, Any, None], job: Job) -> None:
        try:
            await work
        except MinitronClientError as error:
            self._events.put_nowait(error)
        except Exception as error:  # nobody awaits this task: its failure must reach the one who reads events
            _log.exception("request %s failed", job.request_id)
            self._events.put_nowait(InternalError(f"the door failed: {type(error).__name__}"))

    async def _stream(self, job: Job) -> None:
        async with self._client.stream(
            job.prompt, sampling=job.sampling, request_id=job.request_id, **self._options
        ) as stream:
            async for chunk in stream:
                self._events.put_nowait((job, chunk))
            self._end(job, await stream.final())

    async def _generate(self, job: Job) -> None:
        completion = await self._client.generate(
            job.prompt, sampling=job.sampling, request_id=job.request_id, **self._options
        )
        self._end(job, completion)

    def _end(self, job: Job, completion: Completion) -> None:
        if completion.finish_reason == "cancelled":  # not by us: our own cancel does not come here
            raise CancelledError("the inference server cancelled the generation", request_id=job.request_id)
        self._events.put_nowait((job, completion))
