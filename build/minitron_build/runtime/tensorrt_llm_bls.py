"""The Triton model `tensorrt_llm_bls`: text in, text out, many requests in flight in one instance.

It tokenises and detokenises itself and asks one other model, the engine. It knows Triton's decoupled
protocol, cancellation and deadlines; what a text is made of is `text_generation.py`. Everything that sends
a response or polls a request runs on the event loop of the backend, so no two of them ever meet; what
blocks runs on threads.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import tensors
from .acknowledgement import PARAMETER, AckSender
from .inputs import Array
from .metrics import REQUEST_METRICS, MetricBook, RequestMeter, TokenMeter
from .orphan import end_with_parent
from .parameters import Parameters
from .prompts import PromptEncoder
from .status import CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE, StatusError, invalid
from .text_generation import LATEST, TextGeneration
from .text_request import ROWS_OF, TextRequest, is_stop, read_text_request

POLL_INTERVAL_S = 0.02
POLL_COST_S = 0.0006
"""Added to the interval per open request: one poll costs about 30 us, so polling stays below 5 % of a
core."""
STOP_AGAIN_S = 0.25
"""A stop that overtook the request it names finds nothing to stop; it is repeated until the engine has
ended."""
DESK_THREADS = 4

ON_FLAG = {
    "output_ids": "return_output_ids",
    "output_log_probs": "return_log_probs",
    "cum_log_probs": "return_log_probs",
    "context_logits": "return_context_logits",
    "generation_logits": "return_generation_logits",
    "num_input_tokens": "return_num_input_tokens",
    "num_output_tokens": "return_num_output_tokens",
    **dict.fromkeys(LATEST, "return_perf_metrics"),
}
"""Outputs sent only to a request that has this flag set."""
ENGINE_ON_FLAG = {
    name: flag for name, flag in ON_FLAG.items() if name not in ("output_ids",) and "num_" not in name
}
"""Those of them that the engine model makes; the rest is made here."""


@dataclass(slots=True, eq=False)
class _Stream:
    """One sequence in the engine; a thread fills `inbox`, the event loop owns the rest."""

    text: TextGeneration
    engine_id: str
    meter: TokenMeter
    inbox: deque[dict[str, Array] | StatusError | None] = field(default_factory=deque)
    """Responses in order; an error or None is the last thing put in."""
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    has_ended: bool = False
    is_told: bool = False
    """The caller has had the last response of this sequence."""
    stop_again_s: float | None = None
    """When to repeat the stop, on the monotonic clock; None while none was asked for."""


@dataclass(slots=True, eq=False)
class _Call:
    """One open request of a client."""

    request: Any
    request_id: str
    sender: Any
    meter: RequestMeter
    asked: TextRequest
    outputs: frozenset[str]
    deadline_s: float | None
    streams: tuple[_Stream, ...]
    remaining: int
    is_closed: bool = False
    """The final response has gone out; from here on Triton must not be asked about the request."""


class TritonPythonModel:
    """What Triton's Python backend loads; the method names are Triton's."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the tokenizer and make the threads.

        Raises:
            RuntimeError: numpy 2 is installed.
            ParameterError: a parameter is missing or wrong.
            TokenizerFileError: the tokenizer cannot be used.
        """
        tensors.check_numpy()
        end_with_parent()
        parameters = Parameters(args)
        self._encoder = PromptEncoder(parameters)
        self._skip_special_tokens = parameters.flag("skip_special_tokens")
        self._engine_model = parameters.text("tensorrt_llm_model_name")
        self._max_streams = parameters.number("max_concurrent_requests")
        acknowledges = parameters.flag("acknowledge_responses")
        self._acks = AckSender(self._engine_model) if acknowledges else None
        # A thread per stream: the engine's responses come through an iterator that blocks.
        self._stream_threads = ThreadPoolExecutor(max(1, self._max_streams), "stream")
        self._desk_threads = ThreadPoolExecutor(DESK_THREADS, "desk")
        self._calls: set[_Call] = set()
        self._streams: set[_Stream] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._metrics = MetricBook(
            REQUEST_METRICS, {"model": parameters.model_name}, tensors.make_metric_family
        )
        self._metrics.start()

    async def execute(self, requests: list[Any]) -> None:
        """Serve requests until each has had its final response; Triton starts the next ones meanwhile."""
        await asyncio.gather(*(self._serve(request) for request in requests))

    def finalize(self) -> None:
        """Let the threads go; Triton has waited for open requests before."""
        self._stream_threads.shutdown(wait=False, cancel_futures=True)
        self._desk_threads.shutdown(wait=False, cancel_futures=True)
        tensors.drop_finished()
        if self._acks:
            self._acks.close()
        self._metrics.close()

    async def _serve(self, request: Any) -> None:
        sender = request.get_response_sender()
        try:
            call = await self._open(request, sender)
        except Exception as error:
            status = tensors.as_status(error, "tensorrt_llm_bls")
            self._metrics.refused(status.status)
            tensors.send_final(sender, tensors.error_response(status))
            return
        if call is not None:
            await asyncio.gather(*(self._run(call, stream) for stream in call.streams))

    async def _open(self, request: Any, sender: Any) -> _Call | None:
        """Read a request; None when it was a stop, which is answered at once."""
        arrived_s, deadline_s = time.monotonic(), _deadline_s(request)
        inputs = tensors.read_inputs(request, rows_of=ROWS_OF)
        if is_stop(inputs):
            self._stop_calls(request.request_id())
            tensors.send_final(sender, tensors.response(_stop_answer(request)))
            return None
        loop = asyncio.get_running_loop()
        asked = await loop.run_in_executor(self._desk_threads, read_text_request, inputs, self._encoder)
        self._check_room(len(asked.sequences))
        meter = RequestMeter(self._metrics, arrived_s)
        meter.accepted(sum(sequence.input_tokens for sequence in asked.sequences))
        meter.scheduled()
        call = _Call(
            request=request,
            request_id=request.request_id(),
            sender=sender,
            meter=meter,
            asked=asked,
            outputs=_outputs_of(request, asked),
            deadline_s=deadline_s,
            streams=self._new_streams(asked, meter),
            remaining=len(asked.sequences),
        )
        self._calls.add(call)
        self._streams.update(call.streams)
        if self._watcher is None or self._watcher.done():
            self._watcher = loop.create_task(self._watch())
        return call

    def _check_room(self, num_sequences: int) -> None:
        if len(self._streams) + num_sequences > self._max_streams:
            raise StatusError(
                UNAVAILABLE,
                f"{len(self._streams)} sequences are in flight and {num_sequences} more were asked for; "
                f"max_concurrent_requests is {self._max_streams}, try again later",
            )

    def _new_streams(self, asked: TextRequest, meter: RequestMeter) -> tuple[_Stream, ...]:
        with_prompt = not (asked.streaming or asked.exclude_input)
        return tuple(
            _Stream(
                TextGeneration(
                    sequence,
                    self._encoder.tokenizer,
                    skip_special_tokens=self._skip_special_tokens,
                    lead=sequence.prompt if with_prompt else "",
                ),
                # Never the client's id: ids may repeat, and a stop would then end a stranger's request.
                engine_id=uuid.uuid4().hex,
                meter=TokenMeter(self._metrics, meter),
            )
            for sequence in asked.sequences
        )

    async def _run(self, call: _Call, stream: _Stream) -> None:
        """Send what one sequence makes, and see its engine request through to the end."""
        loop = asyncio.get_running_loop()
        loop.run_in_executor(
            self._stream_threads, self._ask_engine, stream, _engine_outputs(call.asked), loop
        )
        try:
            while not stream.has_ended:
                await stream.arrived.wait()
                stream.arrived.clear()
                self._forward(call, stream)
        finally:
            self._streams.discard(stream)

    def _forward(self, call: _Call, stream: _Stream) -> None:
        """Send everything that waits as one response."""
        try:
            self._feed(stream)
            if not call.is_closed:
                self._send_text(call, stream)
        except Exception as error:
            self._fail(call, tensors.as_status(error, "tensorrt_llm_bls"))

    def _feed(self, stream: _Stream) -> None:
        while stream.inbox:
            item = stream.inbox.popleft()
            stream.has_ended = not isinstance(item, dict)
            if isinstance(item, StatusError):
                raise item
            if item is None:
                stream.text.finish("length" if stream.stop_again_s is None else "cancelled")
            else:
                so_far = stream.text.output_tokens
                stream.text.feed(item)
                stream.meter.tokens(stream.text.output_tokens - so_far)

    def _send_text(self, call: _Call, stream: _Stream) -> None:
        has_finished = stream.text.finish_reason is not None
        if stream.is_told or not (has_finished or call.asked.streaming):
            return
        arrays = stream.text.take()
        if arrays is None:
            return
        response = tensors.response({name: arrays[name] for name in call.outputs if name in arrays})
        stream.is_told = has_finished
        call.remaining -= has_finished
        if has_finished and not stream.has_ended:
            self._stop_stream(stream)  # the text is complete: the engine's slot is free for another
        if call.remaining:
            call.sender.send(response)
        else:
            self._close(call, response)

    def _fail(self, call: _Call, error: StatusError) -> None:
        if not call.is_closed:
            self._stop_streams(call)
            call.meter.end(error.status)
            self._close(call, tensors.error_response(error))

    def _close(self, call: _Call, response: Any) -> None:
        """Send the one final response; whatever happens to it, the request is over."""
        call.is_closed = True
        call.meter.end(CANCELLED if _was_stopped(call) else None)
        self._calls.discard(call)
        try:
            tensors.send_final(call.sender, response)
        except Exception as error:
            self._stop_streams(call)
            tensors.as_status(error, "the sender of tensorrt_llm_bls")

    # --- stopping

    async def _watch(self) -> None:
        """Poll for cancellation and deadlines, and repeat stops, while anything is open."""
        while self._streams:
            await asyncio.sleep(POLL_INTERVAL_S + POLL_COST_S * len(self._calls))
            for call in list(self._calls):
                self._end_if_over(call)
            now_s = time.monotonic()
            for stream in list(self._streams):
                if stream.stop_again_s is not None and now_s >= stream.stop_again_s:
                    self._stop_stream(stream)

    def _end_if_over(self, call: _Call) -> None:
        try:
            if call.deadline_s is not None and time.monotonic() >= call.deadline_s:
                self._fail(call, StatusError(DEADLINE_EXCEEDED, "the request's own timeout has passed"))
            elif call.request.is_cancelled():
                self._fail(call, StatusError(CANCELLED, "the client cancelled the request"))
        except Exception as error:
            self._fail(call, tensors.as_status(error, "tensorrt_llm_bls"))

    def _stop_calls(self, request_id: str) -> None:
        if not request_id:
            raise invalid("a stop request has no request id; expected the id of the request to stop")
        for call in self._calls:
            if call.request_id == request_id:
                self._stop_streams(call)

    def _stop_streams(self, call: _Call) -> None:
        for stream in call.streams:
            self._stop_stream(stream)

    def _stop_stream(self, stream: _Stream) -> None:
        if not stream.has_ended:
            stream.stop_again_s = time.monotonic() + STOP_AGAIN_S
            self._desk_threads.submit(self._ask_stop, stream.engine_id)

    # --- threads

    def _ask_engine(self, stream: _Stream, outputs: list[str], loop: asyncio.AbstractEventLoop) -> None:
        """Step through the engine model's responses and hand each to the event loop."""
        last: StatusError | None = None
        try:
            for answer in tensors.ask_model(
                self._engine_model,
                stream.text.sequence.engine_inputs,
                request_id=stream.engine_id,
                outputs=outputs,
                parameters={PARAMETER: True} if self._acks else None,
            ):
                if self._acks:
                    self._acks.send(stream.engine_id)
                self._put(stream, tensors.read_response(answer), loop)
        except OSError as error:
            last = StatusError(UNAVAILABLE, f"model {self._engine_model} is gone ({error})")
        except Exception as error:
            last = tensors.as_status(error, "tensorrt_llm_bls")
        self._put(stream, last, loop)

    def _put(
        self, stream: _Stream, item: dict[str, Array] | StatusError | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        stream.inbox.append(item)
        loop.call_soon_threadsafe(stream.arrived.set)

    def _ask_stop(self, engine_id: str) -> None:
        one = np.array([[1]], dtype=np.int32)
        inputs = {
            "input_ids": one,
            "input_lengths": one,
            "request_output_len": one,
            "stop": np.array([[True]]),
        }
        try:
            for answer in tensors.ask_model(
                self._engine_model, inputs, request_id=engine_id, outputs=["output_ids", "sequence_length"]
            ):
                tensors.read_response(answer)
        except Exception as error:  # the server is shutting down: the engine runs to its end instead
            tensors.log_warning(f"the engine could not be told to stop {engine_id}: {error}")


def _was_stopped(call: _Call) -> bool:
    return any(stream.text.finish_reason == "cancelled" for stream in call.streams)


def _deadline_s(request: Any) -> float | None:
    timeout_us = request.timeout()
    return time.monotonic() + timeout_us / 1e6 if timeout_us else None


def _outputs_of(request: Any, asked: TextRequest) -> frozenset[str]:
    names = request.requested_output_names()
    return frozenset(name for name in names if name not in ON_FLAG or ON_FLAG[name] in asked.flags)


def _engine_outputs(asked: TextRequest) -> list[str]:
    return [
        "output_ids",
        "sequence_length",
        *(name for name, flag in ENGINE_ON_FLAG.items() if flag in asked.flags),
    ]


def _stop_answer(request: Any) -> dict[str, Array]:
    """What a stop request itself is answered with."""
    empty = {"text_output": np.array([[b""]], dtype=np.object_)}
    return {name: array for name, array in empty.items() if name in request.requested_output_names()}
