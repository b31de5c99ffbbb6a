"""The text models' requests to the engine, as they come over the link: no Triton in between.

It knows the link's messages, engine requests and outputs. It knows nothing of sockets and of text.

A text model says `("ask", number, arrays, priority_level)` and `("stop", number, is_whole)`, where a stop
word in the text makes a sequence whole; it hears items `(number, token_ids, log_probs, arrays, finish_reason,
error)`, the last of which has a reason or an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from .executor_engine import ExecutorEngine
from .inputs import Inputs
from .link_frames import PlainArrays, from_plain, to_plain
from .link_server import LinkConnection
from .metrics import MetricBook, RequestMeter, TokenMeter
from .reference_engine import EngineOutput, ReferenceEngine
from .status import CANCELLED, INTERNAL, StatusError
from .token_request import ROWS_OF, SequenceRequest, TokenRequest, read_token_request
from .token_response import OPTIONAL_OUTPUTS, Piece, joined_ids, to_arrays

_SENT_PLAIN = frozenset({"output_log_probs", "cum_log_probs"})  # log-probs have a place of their own
_EXTRA_OUTPUTS = OPTIONAL_OUTPUTS - _SENT_PLAIN


IDLE_POLL_S = 0.02

_STATUS_OF_END = {"cancelled": CANCELLED, "error": INTERNAL}


class _Linked:
    """One open request: what the engine gives it, and where it goes."""

    def __init__(
        self, connection: LinkConnection, number: int, asked: TokenRequest, metrics: MetricBook
    ) -> None:
        self.connection, self.number, self.asked = connection, number, asked
        self.sequence: SequenceRequest
        (self.sequence,) = asked.sequences  # a text model asks for each sequence by itself
        self.held: list[EngineOutput] = []
        self.output_tokens = 0
        self.is_whole = False
        self._request_meter = RequestMeter(metrics, time.monotonic())
        self._request_meter.accepted(len(self.sequence.generation.input_ids))
        self._token_meter = TokenMeter(metrics, self._request_meter)
        self._is_scheduled = False

    @property
    def key(self) -> str:
        return self.sequence.generation.key

    def measure(self, output: EngineOutput) -> None:
        """Count one output in the metrics."""
        if output.token_ids and not self._is_scheduled:
            self._is_scheduled = True
            times = output.times
            self._request_meter.scheduled((times.first_scheduled_ns - times.arrival_ns) / 1e9)
        self._token_meter.tokens(len(output.token_ids))
        if output.finish_reason is not None:
            status = _STATUS_OF_END.get(output.finish_reason)
            self._request_meter.end(None if status == CANCELLED and self.is_whole else status)

    def refuse(self, error: StatusError) -> None:
        """Count a refusal by the engine, and pass it on."""
        self._request_meter.end(error.status)
        self.connection.put((self.number, (), (), [], None, str(error)))

    def item(self, outputs: list[EngineOutput]) -> tuple[Any, ...]:
        """What these outputs are on the link."""
        last, ids = outputs[-1], joined_ids(outputs)
        self.output_tokens += len(ids)
        extras = []
        if self.asked.returns.wants_arrays:
            piece = Piece(self.sequence, ids, tuple(outputs), self.output_tokens)
            extras = to_plain(to_arrays(piece, _EXTRA_OUTPUTS, self.asked.returns))
        log_probs = tuple(value for output in outputs for value in output.log_probs)
        reason, error = last.finish_reason, None
        if reason == "error":
            reason, error = None, str(StatusError.read(last.error or "the engine gave no reason"))
        return (self.number, ids, log_probs, extras, reason, error)


class LinkedRequests:
    """Owner of a `LinkServer`: passes requests to the engine and its outputs back.

    Args:
        engine: what generates.
        metrics: where requests and tokens are counted.
        as_status: what the caller reads of a refusal by the engine, or of anything unexpected.
    """

    def __init__(
        self,
        engine: ReferenceEngine | ExecutorEngine,
        metrics: MetricBook,
        as_status: Callable[[Exception], StatusError],
    ) -> None:
        self._engine, self._metrics, self._as_status = engine, metrics, as_status
        self._open: dict[tuple[LinkConnection, int], _Linked] = {}

    def on_message(self, connection: LinkConnection, message: Any) -> None:
        """Take one message; whatever is wrong with it fails its own request."""
        verb, number, *rest = message
        if verb == "stop":
            self._stop(connection, number, is_whole=rest[0])
            return
        try:
            linked = self._read(connection, number, *rest)
        except Exception as error:
            status = self._as_status(error)
            self._metrics.refused(status.status)
            connection.put((number, (), (), [], None, str(status)))
            return
        self._open[connection, number] = linked
        try:
            self._engine.submit(linked.sequence.generation, partial(self._on_output, linked))
        except Exception as error:
            del self._open[connection, number]
            linked.refuse(self._as_status(error))

    def on_gone(self, connection: LinkConnection) -> None:
        """Nobody reads any more: compute nothing more for it."""
        for owner, number in list(self._open):
            if owner is connection:
                self._stop(connection, number, is_whole=False)

    def wait_until_idle(self) -> None:
        """Return once no request is open; Triton knows of none, and would close the engine under them."""
        while self._open:
            time.sleep(IDLE_POLL_S)

    def _read(
        self, connection: LinkConnection, number: int, plain: PlainArrays, priority_level: int
    ) -> _Linked:
        inputs = Inputs(arrays := from_plain(plain), int(arrays[ROWS_OF].shape[0]))
        asked = read_token_request(
            inputs,
            key=f"link.{id(connection)}.{number}",
            exclude_input_default=True,
            priority_level=priority_level,
        )
        return _Linked(connection, number, asked, self._metrics)

    def _stop(self, connection: LinkConnection, number: int, *, is_whole: bool) -> None:
        linked = self._open.get((connection, number))
        if linked is not None:
            linked.is_whole = is_whole
            self._engine.cancel(linked.key)

    def _on_output(self, linked: _Linked, output: EngineOutput) -> None:
        is_last = output.finish_reason is not None
        linked.measure(output)
        if is_last:
            self._open.pop((linked.connection, linked.number), None)
        linked.held.append(output)
        if is_last or linked.asked.streaming:
            outputs, linked.held = linked.held, []
            linked.connection.put(linked.item(outputs))
