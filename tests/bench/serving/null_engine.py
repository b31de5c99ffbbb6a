"""A stand-in for the engine that costs nothing: scripted token ids at a set rate, to measure everything else.

Triton's Python backend loads it as `model.py` of the model `tensorrt_llm`, with all of its tensors. It is
asked as both of the engines are: over the link, as the reference engine, and through Triton, as
TensorRT-LLM's backend. Every step gives each open request one token, as in-flight batching does.
`null_engine.json` beside it has the ids and the settings. It knows nothing of text.
"""

from __future__ import annotations

import fcntl
import json
import struct
import termios
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from minitron_runtime.link_frames import from_plain
from minitron_runtime.link_server import LinkConnection, LinkServer

CANCEL_CHECK_TOKENS = 16
READ_POLL_S = 0.00005
Send = Callable[[list[int], str | None], None]
"""New ids, and on the last of them why there are no more."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What `null_engine.json` holds.

    Attributes:
        ids: what every request is answered with, over and over until its length is reached.
        step_s: time from step to step; 0: as fast as what is sent is taken.
        runs_ahead: whether a step begins before the text models have read the last one's tokens. If so they
            get several tokens at once as soon as they are slower than the engine; if not, one.
    """

    ids: list[int]
    step_s: float
    runs_ahead: bool


@dataclass(slots=True, eq=False)
class Sequence:
    """One open request."""

    send: Send
    num_tokens: int
    streaming: bool
    is_cancelled: Callable[[], bool]
    place: int = 0
    was_stopped: bool = False


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"], args["model_version"])
        self.settings = Settings(**json.loads((folder / "null_engine.json").read_text()))
        self.ready = threading.Condition()
        self.sequences: dict[Hashable, Sequence] = {}
        self.connections: set[LinkConnection] = set()
        self.is_closing = False
        self.link = LinkServer(args["model_name"], self.on_message, self.on_gone)
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def finalize(self) -> None:
        with self.ready:
            self.is_closing = True
            self.ready.notify()
        self.thread.join()
        self.link.close()

    # --- asking

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            if inputs.get("stop", np.zeros(1)).any():
                self.stop(request.request_id())
                respond(sender, [], "cancelled")
                continue
            key = request.request_id() or object()
            send = lambda ids, end, sender=sender: respond(sender, ids, end)  # noqa: E731
            self.begin(key, inputs, send, request.is_cancelled)

    def on_message(self, connection: LinkConnection, message: Any) -> None:
        verb, number, *rest = message
        if verb == "stop":
            self.stop((connection, number))
            return
        self.connections.add(connection)
        send = lambda ids, end: connection.put((number, tuple(ids), (), [], end, None))  # noqa: E731
        self.begin((connection, number), from_plain(rest[0]), send, lambda: False)

    def on_gone(self, connection: LinkConnection) -> None:
        self.connections.discard(connection)
        for key in list(self.sequences):
            if isinstance(key, tuple) and key[0] is connection:
                self.stop(key)

    def begin(
        self, key: Hashable, inputs: dict[str, np.ndarray], send: Send, is_cancelled: Callable[[], bool]
    ) -> None:
        streaming = bool(inputs.get("streaming", np.zeros(1)).any())
        sequence = Sequence(send, int(inputs["request_output_len"].item()), streaming, is_cancelled)
        with self.ready:
            self.sequences[key] = sequence
            self.ready.notify()

    def stop(self, key: Hashable) -> None:
        if key in self.sequences:
            self.sequences[key].was_stopped = True

    # --- generating

    def run(self) -> None:
        next_step_s = time.monotonic()
        while self.wait_for_work():
            for key, sequence in list(self.sequences.items()):
                if self.step(sequence):
                    with self.ready:
                        del self.sequences[key]
            if not self.settings.runs_ahead:
                self.wait_until_read()
            next_step_s = max(next_step_s + self.settings.step_s, time.monotonic() - self.settings.step_s)
            if (pause_s := next_step_s - time.monotonic()) > 0:
                time.sleep(pause_s)

    def wait_for_work(self) -> bool:
        with self.ready:
            while not (self.sequences or self.is_closing):
                self.ready.wait()
            return not self.is_closing

    def step(self, sequence: Sequence) -> bool:
        """One token, or all of them for a request that does not stream; True when it has ended."""
        ids = self.settings.ids
        if not sequence.streaming:
            turns = -(-sequence.num_tokens // len(ids))
            sequence.send((ids * turns)[: sequence.num_tokens], "length")
            return True
        if sequence.place % CANCEL_CHECK_TOKENS == 0 and sequence.is_cancelled():
            sequence.was_stopped = True
        if sequence.was_stopped:
            sequence.send([], "cancelled")
            return True
        token_id = ids[sequence.place % len(ids)]
        sequence.place += 1
        is_last = sequence.place == sequence.num_tokens
        sequence.send([token_id], "length" if is_last else None)
        return is_last

    def wait_until_read(self) -> None:
        """Until no text model has anything of the link before it."""
        while any(unread_bytes(connection) for connection in list(self.connections)):
            time.sleep(READ_POLL_S)


def unread_bytes(connection: LinkConnection) -> int:
    """What is waiting to be written, or written and not read."""
    if connection.num_waiting:
        return 1
    try:
        raw = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, ValueError):  # hung up
        return 0
    return int(struct.unpack("i", raw)[0])


def respond(sender: Any, ids: list[int], end: str | None) -> None:
    """The new ids as TensorRT-LLM sends them: [batch 1, beam 1, n] and their number."""
    tensors = [
        pb_utils.Tensor("output_ids", np.array(ids, dtype=np.int32).reshape(1, 1, -1)),
        pb_utils.Tensor("sequence_length", np.array([[len(ids)]], dtype=np.int32)),
    ]
    final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if end else 0
    sender.send(pb_utils.InferenceResponse(tensors), flags=final)
