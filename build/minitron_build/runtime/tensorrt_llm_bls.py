"""The Triton model `tensorrt_llm_bls`, served as `ensemble` too: text in, text out, many requests in flight.

It tokenises and detokenises itself and asks one other model, the engine. It knows Triton's decoupled
protocol, cancellation and deadlines; what a text is made of is `text_generation.py`, how the engine is
reached `engine_route.py`. Triton's own thread reads requests and hands them to the engine; one thread of this
module sends every response and polls every request, so no two of those ever meet.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import tensors
from .engine_route import EngineRoute, LinkRoute, Steps
from .engine_step import EngineStep
from .inputs import Array, Inputs
from .metrics import REQUEST_METRICS, MetricBook, RequestMeter, TokenMeter
from .orphan import end_with_parent
from .parameters import Parameters
from .priority import PriorityLevels
from .prompts import PromptEncoder
from .status import CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE, StatusError, invalid
from .text_generation import LATEST, TextGeneration
from .text_request import ROWS_OF, TextRequest, is_stop, read_text_request
from .triton_route import TritonRoute

POLL_INTERVAL_S = 0.02
POLL_COST_S = 0.0003
"""Added to the interval per open request: a poll costs about 30 us, so polling stays below 10 % of a core."""
LONG_TEXT_BYTES = 16384
"""Requests with more text are tokenised on a thread of their own, so that others are read meanwhile."""
DESK_THREADS = 4
LOG_PROMPTS_VARIABLE = "MINITRON_LOG_PROMPTS"
"""Set to 1 by who starts the server: prompts are written to its log, and otherwise no text of a request."""

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
PLACES = frozenset({"batch_index", "sequence_index"})
"""Outputs that tell sequences apart: one alone is sent without them, unless they are asked for by name."""


@dataclass(frozen=True, slots=True, eq=False)
class _Arrival:
    """A request as Triton handed it over, and when, on the monotonic clock."""

    request: Any
    sender: Any
    arrived_s: float


@dataclass(slots=True, eq=False)
class _Call:
    """One open request of a client."""

    request: Any
    request_id: str
    sender: Any
    meter: RequestMeter
    asked: TextRequest
    outputs: frozenset[str]
    priority_level: int
    deadline_s: float | None
    remaining: int
    numbers: tuple[int, ...] = ()
    """Of its sequences. Not the streams, which have it already: what refers to itself is freed late."""
    was_stopped: bool = False
    """One of its sequences was stopped before it was complete."""
    is_closed: bool = False
    """The final response has gone out; from here on Triton must not be asked about the request."""


@dataclass(slots=True, eq=False)
class _Stream:
    """One sequence in the engine."""

    call: _Call
    number: int
    text: TextGeneration
    meter: TokenMeter
    has_ended: bool = False
    """The engine has given its last step."""
    is_told: bool = False
    """The caller has had the last response of this sequence."""


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
        self._name = parameters.model_name
        self._all_outputs = frozenset(output["name"] for output in json.loads(args["model_config"])["output"])
        self._encoder = PromptEncoder(parameters)
        self._priorities = PriorityLevels(parameters)
        self._skip_special_tokens = parameters.flag("skip_special_tokens")
        self._max_streams = parameters.number("max_concurrent_requests")
        self._max_request_bytes = parameters.number("max_request_bytes")
        self._logs_prompts = os.environ.get(LOG_PROMPTS_VARIABLE) == "1"
        self._route = _route(parameters, self._max_streams)
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # held to add calls and streams; the loop alone removes them
        self._calls: set[_Call] = set()
        self._streams: dict[int, _Stream] = {}
        self._failed: queue.SimpleQueue[tuple[_Call, StatusError]] = queue.SimpleQueue()
        self._next_watch_s = 0.0
        self._closing = threading.Event()
        self._metrics = MetricBook(REQUEST_METRICS, {"model": self._name}, tensors.make_metric_family)
        self._metrics.start()
        self._desk = ThreadPoolExecutor(DESK_THREADS, "desk")
        self._thread = threading.Thread(target=self._loop, name="text", daemon=True)
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Hand every request to the engine and return at once; the loop answers."""
        for request in requests:
            arrival = _Arrival(request, request.get_response_sender(), time.monotonic())
            try:
                inputs = tensors.read_inputs(request, ROWS_OF, self._max_request_bytes)
                if is_stop(inputs):
                    self._stop_calls(request.request_id())
                    tensors.send_final(arrival.sender, tensors.response(_stop_answer(request)))
                elif inputs.num_bytes(ROWS_OF) > LONG_TEXT_BYTES:
                    self._desk.submit(self._accept, arrival, inputs)
                else:
                    self._accept(arrival, inputs)
            except Exception as error:
                self._refuse(arrival, error)

    def finalize(self) -> None:
        """Let the threads go; Triton has waited for open requests before."""
        self._closing.set()
        self._route.wake()
        self._thread.join()
        self._desk.shutdown(wait=False, cancel_futures=True)
        self._route.close()
        self._metrics.close()
        tensors.free_circles()

    # --- accepting: Triton's thread, or one of the desk

    def _accept(self, arrival: _Arrival, inputs: Inputs) -> None:
        try:
            streams = self._open(arrival, inputs)
        except Exception as error:
            self._refuse(arrival, error)
            return
        call = streams[0].call
        engine_outputs = _engine_outputs(call.asked)
        try:
            for stream in streams:
                inputs_of = stream.text.sequence.engine_inputs
                self._route.ask(stream.number, inputs_of, engine_outputs, call.priority_level)
        except Exception as error:
            # Through the loop: a sequence that was accepted may already be sending.
            for number in call.numbers:
                self._streams.pop(number, None)
            self._failed.put((call, tensors.as_status(error, self._name)))
            self._route.wake()

    def _refuse(self, arrival: _Arrival, error: Exception) -> None:
        status = tensors.as_status(error, self._name)
        self._metrics.refused(status.status)
        tensors.send_final(arrival.sender, tensors.error_response(status))

    def _open(self, arrival: _Arrival, inputs: Inputs) -> tuple[_Stream, ...]:
        if self._logs_prompts:
            _log_prompts(arrival.request.request_id(), inputs)
        asked = read_text_request(inputs, self._encoder)
        priority_level = self._priorities.read(arrival.request.parameters())
        with self._lock:
            self._check_room(len(asked.sequences))
            call = self._new_call(arrival, asked, priority_level)
            streams = self._new_streams(call)
            call.numbers = tuple(stream.number for stream in streams)
            is_first = not self._calls
            self._calls.add(call)
            self._streams.update(zip(call.numbers, streams, strict=True))
        if is_first:
            self._route.wake()  # the loop waits without an end while nothing is open
        return streams

    def _new_call(self, arrival: _Arrival, asked: TextRequest, priority_level: int) -> _Call:
        meter = RequestMeter(self._metrics, arrival.arrived_s)
        meter.accepted(sum(sequence.input_tokens for sequence in asked.sequences))
        meter.scheduled()
        return _Call(
            request=arrival.request,
            request_id=arrival.request.request_id(),
            sender=arrival.sender,
            meter=meter,
            asked=asked,
            outputs=self._outputs_of(arrival.request, asked),
            priority_level=priority_level,
            deadline_s=_deadline_s(arrival),
            remaining=len(asked.sequences),
        )

    def _check_room(self, num_sequences: int) -> None:
        if len(self._streams) + num_sequences > self._max_streams:
            raise StatusError(
                UNAVAILABLE,
                f"{len(self._streams)} sequences are in flight and {num_sequences} more were asked for; "
                f"max_concurrent_requests is {self._max_streams}, try again later",
            )

    def _new_streams(self, call: _Call) -> tuple[_Stream, ...]:
        asked, tokenizer = call.asked, self._encoder.tokenizer
        with_prompt = not (asked.streaming or asked.exclude_input)
        skip = self._skip_special_tokens
        return tuple(
            _Stream(
                call=call,
                number=next(self._numbers),
                text=TextGeneration(
                    sequence,
                    tokenizer,
                    skip_special_tokens=skip,
                    lead=sequence.prompt if with_prompt else "",
                ),
                meter=TokenMeter(self._metrics, call.meter),
            )
            for sequence in asked.sequences
        )

    def _outputs_of(self, request: Any, asked: TextRequest) -> frozenset[str]:
        names = frozenset(request.requested_output_names())
        if names == self._all_outputs and len(asked.sequences) == 1:
            names -= PLACES
        return frozenset(name for name in names if name not in ON_FLAG or ON_FLAG[name] in asked.flags)

    # --- the loop: the only one that sends once a request is accepted

    def _loop(self) -> None:
        while not self._closing.is_set():
            try:
                self._forward(self._route.take(self._pause_s() if self._calls else None))
                self._fail_refused()
                self._watch()
            except Exception as error:  # one request's trouble must not silence the others
                tensors.as_status(error, f"the loop of {self._name}")

    def _forward(self, steps: Steps) -> None:
        """Feed every step to its sequence; what has come for one sequence is one response."""
        touched: dict[int, _Stream] = {}
        for number, step in steps:
            stream = self._streams.get(number)
            if stream is not None:
                touched[number] = stream
                self._feed(stream, step)
        for stream in touched.values():
            try:
                self._send_text(stream)
            except Exception as error:
                self._fail(stream.call, tensors.as_status(error, self._name))

    def _feed(self, stream: _Stream, step: EngineStep) -> None:
        if step.is_last:
            stream.has_ended = True
            self._streams.pop(stream.number, None)
        if step.error is not None:  # not raised: its traceback would refer to the step, and be freed late
            self._fail(stream.call, step.error)
            return
        try:
            so_far = stream.text.output_tokens
            stream.text.feed(step)
            stream.meter.tokens(stream.text.output_tokens - so_far)
        except Exception as error:
            self._fail(stream.call, tensors.as_status(error, self._name))

    def _send_text(self, stream: _Stream) -> None:
        call, has_finished = stream.call, stream.text.finish_reason is not None
        if call.is_closed or stream.is_told or not (has_finished or call.asked.streaming):
            return
        arrays = stream.text.take(call.outputs)
        if arrays is None:
            return
        response = tensors.response(arrays)
        stream.is_told = has_finished
        call.was_stopped |= stream.text.finish_reason == "cancelled"
        call.remaining -= has_finished
        if has_finished and not stream.has_ended:
            # The text is complete: the engine's slot is free for another.
            self._route.stop(stream.number, is_whole=True)
        if call.remaining:
            call.sender.send(response)
        else:
            self._close(call, response)

    def _fail_refused(self) -> None:
        while not self._failed.empty():
            self._fail(*self._failed.get())

    def _fail(self, call: _Call, error: StatusError) -> None:
        if not call.is_closed:
            self._stop_streams(call)
            call.meter.end(error.status)
            self._close(call, tensors.error_response(error))

    def _close(self, call: _Call, response: Any) -> None:
        """Send the one final response; whatever happens to it, the request is over."""
        call.is_closed = True
        call.meter.end(CANCELLED if call.was_stopped else None)
        self._calls.discard(call)
        try:
            tensors.send_final(call.sender, response)
        except Exception as error:
            self._stop_streams(call)
            tensors.as_status(error, f"the sender of {self._name}")

    # --- stopping

    def _pause_s(self) -> float:
        return max(0.0, self._next_watch_s - time.monotonic())

    def _watch(self) -> None:
        """From time to time, end what its client has given up and what is out of time."""
        now_s = time.monotonic()
        if now_s < self._next_watch_s:
            return
        for call in list(self._calls):
            self._end_if_over(call, now_s)
        self._next_watch_s = time.monotonic() + POLL_INTERVAL_S + POLL_COST_S * len(self._calls)

    def _end_if_over(self, call: _Call, now_s: float) -> None:
        try:
            if call.deadline_s is not None and now_s >= call.deadline_s:
                self._fail(call, StatusError(DEADLINE_EXCEEDED, "the request's own timeout has passed"))
            elif call.request.is_cancelled():
                self._fail(call, StatusError(CANCELLED, "the client cancelled the request"))
        except Exception as error:
            self._fail(call, tensors.as_status(error, self._name))

    def _stop_calls(self, request_id: str) -> None:
        if not request_id:
            raise invalid("a stop request has no request id; expected the id of the request to stop")
        for call in list(self._calls):
            if call.request_id == request_id:
                self._stop_streams(call)

    def _stop_streams(self, call: _Call) -> None:
        for number in call.numbers:
            self._route.stop(number)


def _route(parameters: Parameters, max_streams: int) -> EngineRoute:
    model_name = parameters.text("tensorrt_llm_model_name")
    if parameters.flag("engine_link"):
        return LinkRoute(model_name)
    return TritonRoute(model_name, max_streams, parameters.number("max_engine_silence_s"))


def _deadline_s(arrival: _Arrival) -> float | None:
    timeout_us = arrival.request.timeout()
    return arrival.arrived_s + timeout_us / 1e6 if timeout_us else None


def _engine_outputs(asked: TextRequest) -> list[str]:
    return [
        "output_ids",
        *(name for name, flag in ENGINE_ON_FLAG.items() if flag in asked.flags),
    ]


def _log_prompts(request_id: str, inputs: Inputs) -> None:
    for row in range(inputs.batch_size):
        prompt = inputs.texts(ROWS_OF, row)
        tensors.log_info(f"request {request_id or '(no id)'}: {json.dumps(prompt, ensure_ascii=False)}")


def _stop_answer(request: Any) -> dict[str, Array]:
    """What a stop request itself is answered with."""
    empty = {"text_output": np.array([b""], dtype=np.object_)}
    return {name: array for name, array in empty.items() if name in request.requested_output_names()}
