"""The Triton model `tensorrt_llm` in Python: token ids in, token ids out, through one of two engines.

The parameter `engine` chooses: the reference engine on a CPU, or TensorRT-LLM's executor on a GPU.

It knows Triton's decoupled protocol: who may send, when a request ends, how it is stopped. It knows nothing
of text. Four parties meet here: Triton calls `execute`, the engine thread hands over tokens, one sender
thread owns every response, one watcher polls cancellation and deadlines. The text models of the same server
do not come this way: `linked_requests.py` serves them.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from . import tensors
from .executor_engine import ExecutorEngine, ExecutorSettings
from .link_server import LinkServer
from .linked_requests import LinkedRequests
from .metrics import ENGINE_METRICS, REQUEST_METRICS, MetricBook, RequestMeter, TokenMeter
from .orphan import end_with_parent
from .parameters import ParameterError, Parameters
from .priority import PriorityLevels
from .reference_engine import EngineLimits, EngineOutput, QueueFullError, ReferenceEngine, RequestError
from .status import CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE, StatusError, invalid
from .token_request import ROWS_OF, SequenceRequest, TokenRequest, is_stop, read_token_request
from .token_response import Piece, empty_arrays, joined_ids, to_arrays

POLL_INTERVAL_S = 0.02
POLL_COST_S = 0.0006
"""Added to the interval per open request: a poll costs about 30 us, so polling takes below 5 % of a core."""


@dataclass(slots=True, eq=False)
class _Sequence:
    """One sequence in the engine; the engine thread fills `pending`, the sender thread owns the rest."""

    request: SequenceRequest
    meter: TokenMeter
    pending: deque[EngineOutput] = field(default_factory=deque)
    held: list[EngineOutput] = field(default_factory=list)
    output_tokens: int = 0

    @property
    def key(self) -> str:
        return self.request.generation.key


@dataclass(slots=True, eq=False)
class _Call:
    """One open Triton request."""

    number: int
    request_id: str
    triton_request: Any
    sender: Any
    meter: RequestMeter
    asked: TokenRequest
    wanted: frozenset[str]
    deadline_s: float | None
    sequences: tuple[_Sequence, ...]
    remaining: int
    submitted: bool = False
    ending: StatusError | None = None
    """Why the request is being cancelled; None also when a `stop` request did it."""
    closed: bool = False
    # Polling a request whose final response has gone out would touch freed memory in the server.
    lock: threading.Lock = field(default_factory=threading.Lock)


class TritonPythonModel:
    """What Triton's Python backend loads; the method names are Triton's."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the engine and start the threads.

        Raises:
            RuntimeError: numpy 2 is installed, or tensorrt_llm is not and `engine` needs it.
            ParameterError: a parameter is missing or wrong, or its folder is not there.
            ValueError: the limits contradict each other, or what is in the folder is nothing for the engine.
        """
        tensors.check_numpy()
        end_with_parent()
        parameters = Parameters(args)
        limits = EngineLimits(**{name: parameters.number(name) for name in EngineLimits.__dataclass_fields__})
        self._max_request_bytes = parameters.number("max_request_bytes")
        self._exclude_input = parameters.flag("exclude_input_in_output")
        self._priorities = PriorityLevels(parameters)
        self._engine = _open_engine(parameters, limits)
        self._numbers = itertools.count()
        self._calls: dict[int, _Call] = {}
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._metrics = MetricBook(
            (*REQUEST_METRICS, *ENGINE_METRICS),
            {"model": parameters.model_name},
            tensors.make_metric_family,
            self._collect,
        )
        self._metrics.start()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("sender", self._send_work), ("watcher", self._watch))
        ]
        for thread in self._threads:
            thread.start()
        self._linked = LinkedRequests(self._engine, self._metrics, _as_status)
        self._link = LinkServer(parameters.model_name, self._linked.on_message, self._linked.on_gone)

    def execute(self, requests: list[Any]) -> None:
        """Hand every request to the engine and return at once; the sender thread answers."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except Exception as error:
                status = _as_status(error)
                self._metrics.refused(status.status)
                tensors.send_final(sender, tensors.error_response(status))

    def finalize(self) -> None:
        """Let the text models' requests finish, as Triton does with its own, and close the engine."""
        self._linked.wait_until_idle()
        self._closing.set()
        self._engine.close()
        self._link.close()
        self._work.put(None)
        for thread in self._threads:
            thread.join()
        self._metrics.close()
        tensors.free_circles()

    def _collect(self, book: MetricBook) -> None:
        """What the engine is doing, for the metrics."""
        stats = self._engine.stats()
        book.count_to("minitron_engine_steps_total", stats.steps)
        for name, value in (
            ("minitron_engine_running_requests", stats.running),
            ("minitron_engine_waiting_requests", stats.waiting),
            ("minitron_engine_slots", stats.max_running),
            ("minitron_kv_cache_used_tokens", stats.kv_tokens_used),
            ("minitron_kv_cache_reserved_tokens", stats.kv_tokens_reserved),
            ("minitron_kv_cache_capacity_tokens", stats.kv_tokens_capacity),
            ("minitron_engine_stalled_seconds", stats.stalled_s),
            ("minitron_engine_up", stats.is_alive),
        ):
            book.set(name, value)

    def _accept(self, request: Any, sender: Any) -> None:
        arrived_s = time.monotonic()
        inputs = tensors.read_inputs(request, ROWS_OF, self._max_request_bytes)
        wanted = frozenset(request.requested_output_names())
        if is_stop(inputs):
            self._stop(request.request_id())
            tensors.send_final(sender, tensors.response(empty_arrays(wanted)))
            return
        number = next(self._numbers)
        asked = read_token_request(
            inputs,
            key=str(number),
            exclude_input_default=self._exclude_input,
            priority_level=self._priorities.read(request.parameters()),
        )
        meter = RequestMeter(self._metrics, arrived_s)
        meter.accepted(sum(len(one.generation.input_ids) for one in asked.sequences))
        call = _Call(
            number=number,
            request_id=request.request_id(),
            triton_request=request,
            sender=sender,
            meter=meter,
            asked=asked,
            wanted=wanted,
            deadline_s=_deadline_s(request),
            sequences=tuple(
                _Sequence(sequence, TokenMeter(self._metrics, meter)) for sequence in asked.sequences
            ),
            remaining=len(asked.sequences),
        )
        self._calls[number] = call
        self._submit(call)

    def _submit(self, call: _Call) -> None:
        """Submit every sequence; when one is refused the whole request is, and the others are cancelled."""
        try:
            for sequence in call.sequences:
                self._engine.submit(sequence.request.generation, partial(self._on_output, call, sequence))
        except Exception as error:
            # Through the sender thread: a sequence that was accepted may already be sending.
            self._work.put(partial(self._fail, call, _as_status(error)))
        call.submitted = True

    def _stop(self, request_id: str) -> None:
        if not request_id:
            raise invalid("a stop request has no request id; expected the id of the request to stop")
        for call in list(self._calls.values()):
            if call.request_id == request_id:
                self._cancel(call)

    def _cancel(self, call: _Call) -> None:
        for sequence in call.sequences:
            self._engine.cancel(sequence.key)

    # --- engine thread

    def _on_output(self, call: _Call, sequence: _Sequence, output: EngineOutput) -> None:
        sequence.pending.append(output)
        self._work.put(partial(self._deliver, call, sequence))

    # --- sender thread: the only one that sends once a request is accepted

    def _send_work(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception as error:  # one request's trouble must not silence the others
                tensors.as_status(error, "the sender of tensorrt_llm")

    def _deliver(self, call: _Call, sequence: _Sequence) -> None:
        """Send what the engine has made since the last time; several steps are one response."""
        outputs = _drain(sequence.pending)
        if not outputs or call.closed:
            return
        try:
            self._respond(call, sequence, outputs)
        except Exception as error:
            self._fail(call, _as_status(error))

    def _respond(self, call: _Call, sequence: _Sequence, outputs: list[EngineOutput]) -> None:
        reason = outputs[-1].finish_reason
        if reason == "error":
            self._fail(call, StatusError.read(outputs[-1].error or "the engine gave no reason"))
        elif reason == "cancelled":
            self._end_cancelled(call)
        else:
            self._measure(call, sequence, outputs)
            sequence.held.extend(outputs)
            if reason is not None or call.asked.streaming:
                self._send_held(call, sequence, is_last=reason is not None)

    def _measure(self, call: _Call, sequence: _Sequence, outputs: list[EngineOutput]) -> None:
        if not (sequence.held or sequence.output_tokens):
            times = outputs[0].times
            call.meter.scheduled((times.first_scheduled_ns - times.arrival_ns) / 1e9)
        sequence.meter.tokens(sum(len(output.token_ids) for output in outputs))

    def _end_cancelled(self, call: _Call) -> None:
        if call.ending is not None:
            self._fail(call, call.ending)
            return
        call.meter.end(CANCELLED)
        self._send(call, empty_arrays(call.wanted), ends_sequence=True)

    def _send_held(self, call: _Call, sequence: _Sequence, *, is_last: bool) -> None:
        outputs, sequence.held = tuple(sequence.held), []
        new_ids = joined_ids(outputs)
        sequence.output_tokens += len(new_ids)
        with_prompt = not (call.asked.streaming or call.asked.exclude_input)
        ids = sequence.request.generation.input_ids + new_ids if with_prompt else new_ids
        piece = Piece(sequence.request, ids, outputs, sequence.output_tokens)
        self._send(call, to_arrays(piece, call.wanted, call.asked.returns), ends_sequence=is_last)

    def _send(self, call: _Call, arrays: dict[str, Any], *, ends_sequence: bool) -> None:
        call.remaining -= ends_sequence
        if call.remaining:
            call.sender.send(tensors.response(arrays))
        else:
            self._close(call, tensors.response(arrays))

    def _fail(self, call: _Call, error: StatusError) -> None:
        if not call.closed:
            self._cancel(call)
            call.meter.end(error.status)
            self._close(call, tensors.error_response(error))

    def _close(self, call: _Call, response: Any) -> None:
        """Send the one final response; whatever happens to it, the request is over."""
        with call.lock:
            call.closed = True
            call.meter.end()
            self._calls.pop(call.number, None)
            tensors.send_final(call.sender, response)

    # --- watcher thread

    def _watch(self) -> None:
        while not self._closing.wait(POLL_INTERVAL_S + POLL_COST_S * len(self._calls)):
            for call in list(self._calls.values()):
                if call.submitted and call.ending is None and (reason := _reason_to_end(call)) is not None:
                    call.ending = reason
                    self._cancel(call)


def _open_reference(parameters: Parameters, limits: EngineLimits) -> ReferenceEngine:
    return ReferenceEngine(
        parameters.folder("checkpoint_dir"),
        limits,
        compute_dtype=parameters.text("compute_dtype"),
        max_queue_size=parameters.number("max_queue_size"),
    )


def _open_executor(parameters: Parameters, limits: EngineLimits) -> ExecutorEngine:
    return ExecutorEngine(
        parameters.folder("engine_dir"),
        limits,
        ExecutorSettings.read(parameters),
        max_queue_size=parameters.number("max_queue_size"),
    )


_ENGINES: dict[str, Callable[[Parameters, EngineLimits], ReferenceEngine | ExecutorEngine]] = {
    "reference": _open_reference,
    "executor": _open_executor,
}


def _open_engine(parameters: Parameters, limits: EngineLimits) -> ReferenceEngine | ExecutorEngine:
    if (name := parameters.text("engine")) not in _ENGINES:
        expected = " or ".join(_ENGINES)
        raise ParameterError(
            f"parameter engine of model {parameters.model_name} is {name!r}; expected {expected}"
        )
    return _ENGINES[name](parameters, limits)


def _reason_to_end(call: _Call) -> StatusError | None:
    if call.deadline_s is not None and time.monotonic() >= call.deadline_s:
        return StatusError(DEADLINE_EXCEEDED, "the request's own timeout has passed")
    with call.lock:
        if not call.closed and call.triton_request.is_cancelled():
            return StatusError(CANCELLED, "the client cancelled the request")
    return None


def _as_status(error: Exception) -> StatusError:
    """What the caller reads of a refusal by the engine, or of anything unexpected."""
    if isinstance(error, RequestError):
        return invalid(str(error))
    if isinstance(error, QueueFullError):
        return StatusError(UNAVAILABLE, str(error))
    return tensors.as_status(error, "tensorrt_llm")


def _deadline_s(request: Any) -> float | None:
    timeout_us = request.timeout()
    return time.monotonic() + timeout_us / 1e6 if timeout_us else None


def _drain(pending: deque[EngineOutput]) -> list[EngineOutput]:
    """Everything in the queue now; the engine thread may be adding more."""
    return [pending.popleft() for _ in range(len(pending))]
