"""What `stream()` costs over tritonclient's own aio client: processor time per token and per request.

Both read the same responses of the same server in another process, one after the other in the same rounds;
the raw loop does what a caller would have to do: build the tensors, decode the text, look for errors.

Run with: python tests/bench/client/bench_stream.py
The last line of stdout is JSON. Times are of this process alone (user and system).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc.aio as raw

from minitron_client import AsyncMinitronClient

SERVER = Path(__file__).with_name("null_server.py")
PROMPT = "def add(a, b):"
Ask = Callable[[int], Awaitable[int]]


def raw_inputs(num_tokens: int) -> list[Any]:
    values = {
        "text_input": (np.array([[PROMPT.encode()]], dtype=np.object_), "BYTES"),
        "max_tokens": (np.array([[num_tokens]], dtype=np.int32), "INT32"),
        "stream": (np.array([[True]]), "BOOL"),
        "exclude_input_in_output": (np.array([[True]]), "BOOL"),
        "return_num_input_tokens": (np.array([[True]]), "BOOL"),
        "return_num_output_tokens": (np.array([[True]]), "BOOL"),
    }
    inputs = []
    for name, (array, datatype) in values.items():
        made = raw.InferInput(name, list(array.shape), datatype)
        made.set_data_from_numpy(array)
        inputs.append(made)
    return inputs


async def ask_raw(client: Any, num_tokens: int) -> int:
    async def one() -> AsyncIterator[dict[str, Any]]:
        yield {
            "model_name": "tensorrt_llm_bls",
            "inputs": raw_inputs(num_tokens),
            "outputs": [
                raw.InferRequestedOutput(name)
                for name in ("text_output", "finish_reason", "num_input_tokens", "num_output_tokens")
            ],
        }

    seen = 0
    async for result, error in client.stream_infer(one()):
        if error is not None:
            raise error
        seen += len(result.as_numpy("text_output")[0][0].decode()) > 0
    return seen


async def ask_ours(client: AsyncMinitronClient, num_tokens: int) -> int:
    seen = 0
    async with client.stream(PROMPT, max_tokens=num_tokens) as stream:
        async for chunk in stream:
            seen += len(chunk.text) > 0
    return seen


async def spent_s(ask: Ask, num_requests: int, num_tokens: int, concurrency: int) -> float:
    """Processor seconds of this process for so many requests."""
    left = iter(range(num_requests))

    async def work() -> None:
        for _ in left:
            assert await ask(num_tokens) == num_tokens

    began_s = time.process_time()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return time.process_time() - began_s


SHAPES = {
    "one stream, 2000 tokens": (4, 2000, 1),
    "64 streams, 100 tokens": (128, 100, 64),
    "one request at a time, 1 token": (400, 1, 1),
    "64 requests at a time, 1 token": (800, 1, 64),
}
"""What is asked: requests, tokens of each, how many at once."""


async def measure(url: str, rounds: int) -> list[dict[str, Any]]:
    rows = []
    async with raw.InferenceServerClient(url) as theirs, AsyncMinitronClient(url) as ours:
        asks: dict[str, Ask] = {"raw": lambda n: ask_raw(theirs, n), "ours": lambda n: ask_ours(ours, n)}
        for name, (num_requests, num_tokens, concurrency) in SHAPES.items():
            spent: dict[str, list[float]] = {"raw": [], "ours": []}
            for turn in range(rounds + 1):  # the first warms up
                for who in ("raw", "ours") if turn % 2 else ("ours", "raw"):
                    spent[who].append(
                        await spent_s(
                            asks[who],
                            num_requests=num_requests,
                            num_tokens=num_tokens,
                            concurrency=concurrency,
                        )
                    )
            units = num_requests * num_tokens
            us = {who: 1e6 * min(times[1:]) / units for who, times in spent.items()}
            ratios = [mine / their for mine, their in zip(spent["ours"][1:], spent["raw"][1:], strict=True)]
            rows.append(
                {
                    "what": name,
                    "raw_us": round(us["raw"], 1),
                    "ours_us": round(us["ours"], 1),
                    "ratio": round(statistics.median(ratios), 3),
                    "ratio_min": round(min(ratios), 3),
                    "ratio_max": round(max(ratios), 3),
                }
            )
            print(f"{name:32} raw {us['raw']:7.1f} us, stream() {us['ours']:7.1f} us per token: {rows[-1]}")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    command = [sys.executable, str(SERVER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        port = int(server.stdout.readline())
        rows = asyncio.run(measure(f"127.0.0.1:{port}", rounds))
        server.stdin.close()
    print(json.dumps({"rounds": rounds, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
