"""A stand-in for the engine behind the same tensors: it plays back token ids, one at a time.

Triton's Python backend loads it as `model.py` of the model `tensorrt_llm`. It is asked as both of the engines
are: over the link, as the reference engine, and through Triton, as TensorRT-LLM's backend. `seed` chooses one
of the scripts in `scripts.json`: its ids, and the id that follows them until the length is reached; a
negative id is an error of the engine. Each request leaves a line in `ended.jsonl`, by which a test sees why
it ended. It knows nothing of text.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Hashable
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from minitron_runtime.link_frames import from_plain
from minitron_runtime.link_server import LinkConnection, LinkServer

TOKEN_INTERVAL_S = 0.001
HERE = Path(__file__).parent
Send = Callable[[list[int], str | None], None]
"""New ids, and on the last of them why there are no more."""


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.scripts = json.loads((HERE / "scripts.json").read_text())
        self.stopped: dict[Hashable, threading.Event] = {}
        self.link = LinkServer(args["model_name"], self.on_message, lambda connection: None)

    def finalize(self) -> None:
        self.link.close()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender, request_id = request.get_response_sender(), request.request_id()
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            if inputs.get("stop", np.zeros(1)).any():
                self.stop(request_id)
                respond(sender, [], "stopped")
            else:
                key = request_id or object()  # ids may be missing, and then cannot be told apart
                self.begin(key, inputs, lambda ids, end, sender=sender: respond(sender, ids, end))

    def on_message(self, connection: LinkConnection, message: Any) -> None:
        verb, number, *rest = message
        if verb == "stop":
            self.stop((connection, number))
            return

        def send(ids: list[int], end: str | None) -> None:
            error = "INTERNAL: the script says so" if end == "error" else None
            connection.put((number, tuple(ids), (), [], None if error else end, error))

        self.begin((connection, number), from_plain(rest[0]), send)

    def stop(self, key: Hashable) -> None:
        if key in self.stopped:
            self.stopped[key].set()

    def begin(self, key: Hashable, inputs: dict[str, np.ndarray], send: Send) -> None:
        self.stopped[key] = threading.Event()
        threading.Thread(target=self.play, args=(key, inputs, send)).start()

    def play(self, key: Hashable, inputs: dict[str, np.ndarray], send: Send) -> None:
        seed, num_tokens = inputs["seed"].item(), inputs["request_output_len"].item()
        script = self.scripts[seed % len(self.scripts)]
        tail = () if script["then"] is None else repeat(script["then"])
        ids = list(islice(chain(script["ids"], tail), num_tokens))
        if not inputs.get("streaming", np.zeros(1)).any():
            send(ids, "error" if min(ids) < 0 else "length")
            sent = len(ids)
        else:
            sent = self.stream(self.stopped[key], ids, send)
        line = {"seed": seed, "sent": sent, "was_stopped": self.stopped.pop(key).is_set()}
        with (HERE / "ended.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def stream(self, stopped: threading.Event, ids: list[int], send: Send) -> int:
        for place, token_id in enumerate(ids):
            time.sleep(TOKEN_INTERVAL_S)
            if stopped.is_set():
                send([], "cancelled")
                return place
            if token_id < 0:
                send([], "error")
                return place
            send([token_id], "length" if place == len(ids) - 1 else None)
        return len(ids)


def respond(sender: Any, ids: list[int], end: str | None) -> None:
    """The new ids as TensorRT-LLM sends them: [batch 1, beam 1, n]."""
    final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if end else 0
    if end == "error":
        sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("the script says so")), flags=final)
        return
    tensors = [
        pb_utils.Tensor("output_ids", np.array(ids, dtype=np.int32).reshape(1, 1, -1)),
        pb_utils.Tensor("sequence_length", np.array([[len(ids)]], dtype=np.int32)),
    ]
    sender.send(pb_utils.InferenceResponse(tensors), flags=final)
