"""The way from a text model to the engine model through Triton, for an engine model that has no link.

TensorRT-LLM's backend is such a one. It knows Triton's requests between models, threads, and how that
backend's answers read. It knows nothing of text.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from . import tensors
from .engine_route import Steps
from .engine_step import EngineStep
from .inputs import Array
from .status import INTERNAL, UNAVAILABLE, StatusError

STOP_THREADS = 4
STOP_AGAIN_S = 0.25
"""A stop that overtook the request it names finds nothing to stop; it is repeated until the engine has
ended."""
_OWN_FIELDS = frozenset({"output_ids", "sequence_length", "output_log_probs", "cum_log_probs"})


class TritonRoute:
    """Asks the engine model as one model of a server asks another.

    Args:
        model_name: the engine model.
        max_streams: sequences that may be open at once: each takes a thread, because Triton's iterator over
            responses blocks.
        max_silence_s: how long a sequence that has begun may go without a response. Triton loses an error
            that follows a response, and its iterator then waits for ever.
    """

    def __init__(self, model_name: str, max_streams: int, max_silence_s: float) -> None:
        self._model_name, self._max_silence_s = model_name, max_silence_s
        self._steps: queue.SimpleQueue[tuple[int, EngineStep] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        # Never the client's ids: they may repeat, and a stop would then end a stranger's request.
        self._ids: dict[int, str] = {}
        self._stop_again_s: dict[int, float] = {}
        self._silent_since_s: dict[int, float] = {}
        self._stream_threads = ThreadPoolExecutor(max(1, max_streams), "stream")
        self._stop_threads = ThreadPoolExecutor(STOP_THREADS, "stop")

    def ask(self, number: int, arrays: Mapping[str, Array], outputs: list[str], priority_level: int) -> None:
        """Begin a sequence; a thread steps through its responses. That backend knows no priorities."""
        with self._lock:
            engine_id = self._ids[number] = uuid.uuid4().hex
        self._stream_threads.submit(self._follow, number, engine_id, arrays, outputs)

    def stop(self, number: int, *, is_whole: bool = False) -> None:
        """End a sequence early, by the id it has in the engine model, which has no word for a whole one."""
        with self._lock:
            engine_id = self._ids.get(number)
            if engine_id is None or number in self._stop_again_s:
                return
            self._stop_again_s[number] = time.monotonic() + STOP_AGAIN_S
        self._stop_threads.submit(self._ask_stop, engine_id)

    def take(self, timeout_s: float | None) -> Steps:
        """Wait for steps; everything that has come is taken at once."""
        self._repeat_stops()
        self._give_up_silent()
        if self._ids:
            timeout_s = STOP_AGAIN_S if timeout_s is None else min(timeout_s, STOP_AGAIN_S)
        steps: Steps = []
        try:
            item = self._steps.get(timeout=timeout_s)
            while item is not None:
                steps.append(item)
                item = self._steps.get_nowait()
        except queue.Empty:
            pass
        return steps

    def wake(self) -> None:
        """Make a waiting `take` return."""
        self._steps.put(None)

    def close(self) -> None:
        """Let the threads go; what Triton may still hold is dropped in order."""
        self._stream_threads.shutdown(wait=False, cancel_futures=True)
        self._stop_threads.shutdown(wait=False, cancel_futures=True)
        tensors.drop_finished()

    def _repeat_stops(self) -> None:
        now_s = time.monotonic()
        with self._lock:
            due = [number for number, when_s in self._stop_again_s.items() if now_s >= when_s]
            for number in due:
                self._stop_again_s[number] = now_s + STOP_AGAIN_S
            ids = [self._ids[number] for number in due]
        for engine_id in ids:
            self._stop_threads.submit(self._ask_stop, engine_id)

    def _give_up_silent(self) -> None:
        now_s = time.monotonic()
        with self._lock:
            for number, since_s in list(self._silent_since_s.items()):
                if now_s - since_s > self._max_silence_s:
                    sentence = f"model {self._model_name} has sent nothing for {self._max_silence_s:g} s"
                    self._end(number, StatusError(UNAVAILABLE, sentence))

    def _end(self, number: int, error: StatusError | None) -> None:
        """Put the last step of a sequence, once; with the lock held."""
        self._silent_since_s.pop(number, None)
        if self._ids.pop(number, None) is None:
            return
        was_stopped = self._stop_again_s.pop(number, None) is not None
        # The backend does not say why it ended; an end id has been seen among the tokens.
        reason = None if error else "cancelled" if was_stopped else "length"
        self._steps.put((number, EngineStep(finish_reason=reason, error=error)))

    # --- threads

    def _follow(self, number: int, engine_id: str, arrays: Mapping[str, Array], outputs: list[str]) -> None:
        """Put every response of one sequence in the queue, and its end."""
        error: StatusError | None = None
        try:
            for answer in tensors.ask_model(self._model_name, arrays, request_id=engine_id, outputs=outputs):
                step = _step(tensors.read_response(answer))
                if step is not None:
                    self._silent_since_s[number] = time.monotonic()
                    self._steps.put((number, step))
        except Exception as caught:
            error = tensors.as_status(caught, self._model_name)
        with self._lock:
            self._end(number, error)

    def _ask_stop(self, engine_id: str) -> None:
        one = np.array([[1]], dtype=np.int32)
        inputs = {
            "input_ids": one,
            "input_lengths": one,
            "request_output_len": one,
            "stop": np.array([[True]]),
        }
        outputs = ["output_ids", "sequence_length"]
        try:
            for answer in tensors.ask_model(self._model_name, inputs, request_id=engine_id, outputs=outputs):
                tensors.read_response(answer)
        except Exception as error:  # the server is shutting down: the engine runs to its end instead
            tensors.log_warning(f"the engine could not be told to stop {engine_id}: {error}")


def _step(arrays: dict[str, Array]) -> EngineStep | None:
    """One response as a step; an empty final response is none."""
    if "output_ids" not in arrays:
        return None
    ids = arrays["output_ids"]
    if ids.size and ids.shape[:-1] != (1, 1):
        raise StatusError(
            INTERNAL, f"the engine sent output_ids of shape {list(ids.shape)}; expected one beam"
        )
    log_probs = arrays["output_log_probs"].reshape(-1).tolist() if "output_log_probs" in arrays else ()
    others = {name: array for name, array in arrays.items() if name not in _OWN_FIELDS}
    return EngineStep(ids.reshape(-1).tolist(), log_probs, others)
