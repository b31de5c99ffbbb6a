"""A stand-in for the engine behind the same tensors: it plays back token ids, one per response.

Triton's Python backend loads it as `model.py` of the model `tensorrt_llm`. `seed` chooses one of the scripts
in `scripts.json`: its ids, and the id that follows them until the length is reached. Each request leaves a
line in `ended.jsonl`, by which a test sees why it ended. It knows nothing of text.
"""

from __future__ import annotations

import json
import threading
import time
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from minitron_runtime.acknowledgement import PARAMETER, AckReceiver

TOKEN_INTERVAL_S = 0.001
HERE = Path(__file__).parent


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.scripts = json.loads((HERE / "scripts.json").read_text())
        self.stopped: dict[str, threading.Event] = {}
        self.read: dict[str, threading.Semaphore] = {}
        self.acks = AckReceiver(args["model_name"])
        threading.Thread(target=self.read_acks, daemon=True).start()

    def finalize(self) -> None:
        self.acks.wake()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender, request_id = request.get_response_sender(), request.request_id()
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            if inputs.get("stop", np.zeros(1)).any():
                if request_id in self.stopped:
                    self.stopped[request_id].set()
                send(sender, [], is_last=True)
                continue
            self.stopped[request_id] = threading.Event()
            if PARAMETER in json.loads(request.parameters()):
                self.read[request_id] = threading.Semaphore(0)
            threading.Thread(target=self.play, args=(request_id, sender, inputs)).start()

    def play(self, request_id: str, sender: Any, inputs: dict[str, np.ndarray]) -> None:
        seed, num_tokens = inputs["seed"].item(), inputs["request_output_len"].item()
        script = self.scripts[seed % len(self.scripts)]
        tail = () if script["then"] is None else repeat(script["then"])
        ids = list(islice(chain(script["ids"], tail), num_tokens))
        if not inputs["streaming"].item():
            send(sender, ids, is_last=True)
            sent = len(ids)
        else:
            sent = self.stream(request_id, sender, ids)
        self.read.pop(request_id, None)
        line = {"seed": seed, "sent": sent, "was_stopped": self.stopped.pop(request_id).is_set()}
        with (HERE / "ended.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def stream(self, request_id: str, sender: Any, ids: list[int]) -> int:
        read = self.read.get(request_id)
        for place, token_id in enumerate(ids):
            time.sleep(TOKEN_INTERVAL_S)
            if self.stopped[request_id].is_set():
                send(sender, [], is_last=True)
                return place
            is_last = place == len(ids) - 1
            send(sender, [token_id], is_last=is_last)
            if read is not None and not is_last:
                read.acquire()
        return len(ids)

    def read_acks(self) -> None:
        while request_id := self.acks.receive():
            if request_id in self.read:  # the last response is acknowledged as well
                self.read[request_id].release()


def send(sender: Any, ids: list[int], *, is_last: bool) -> None:
    """The new ids as TensorRT-LLM sends them: [batch 1, beam 1, n]."""
    tensors = [
        pb_utils.Tensor("output_ids", np.array(ids, dtype=np.int32).reshape(1, 1, -1)),
        pb_utils.Tensor("sequence_length", np.array([[len(ids)]], dtype=np.int32)),
    ]
    final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0
    sender.send(pb_utils.InferenceResponse(tensors), flags=final)
