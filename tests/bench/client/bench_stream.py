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
from null_server import LAST, TOKEN, metadata
from tritonclient.grpc import InferResult, service_pb2

from minitron_client import AsyncMinitronClient
from minitron_client._aio import AioResponses
from minitron_client._fork import CallMark
from minitron_client._triton import ResponseReader, read_metadata
from minitron_client.exchange import Exchange

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
            us = {who: [1e6 * one / units for one in times] for who, times in spent.items()}
            rows.append(row(name, us))
    return rows


def row(name: str, us: dict[str, list[float]]) -> dict[str, Any]:
    """One line of the report; the first round of each has warmed up and does not count."""
    raw_us, ours_us = us["raw"][1:], us["ours"][1:]
    made = {
        "what": name,
        "raw_us": round(min(raw_us), 1),
        "ours_us": round(min(ours_us), 1),
        "ratio_of_least": round(min(ours_us) / min(raw_us), 3),
        "ratio_median": round(statistics.median(m / t for m, t in zip(ours_us, raw_us, strict=True)), 3),
    }
    print(
        f"{name:32} raw {made['raw_us']:7.1f} us, stream() {made['ours_us']:7.1f} us: "
        f"{made['ratio_of_least']:.2f} x (median of the rounds {made['ratio_median']:.2f} x)"
    )
    return made


class Replay:
    """A call that has all responses already: what is left is the clients' own code."""

    def __init__(self, num_tokens: int) -> None:
        self._left = num_tokens

    async def __aiter__(self) -> AsyncIterator[Any]:
        while self._left:
            self._left -= 1
            yield service_pb2.ModelStreamInferResponse.FromString(TOKEN if self._left else LAST)

    def cancel(self) -> None:
        """Nothing runs that could be cancelled."""


async def replay_raw(num_tokens: int) -> int:
    """What tritonclient's `stream_infer` does with each response, and what its caller does."""
    seen = 0
    async for message in Replay(num_tokens):
        if message.error_message:
            raise RuntimeError(message.error_message)
        seen += len(InferResult(message.infer_response).as_numpy("text_output")[0][0].decode()) > 0
    return seen


async def replay_ours(num_tokens: int) -> int:
    client = AsyncMinitronClient("127.0.0.1:1")
    described = read_metadata(service_pb2.ModelMetadataResponse.FromString(metadata()), True)

    async def opened(exchange: Exchange) -> AioResponses:
        exchange.next_url()
        exchange.request(described)
        reader = ResponseReader(exchange.url, exchange.request_id, 60)
        return AioResponses(Replay(num_tokens), reader, CallMark())

    client._open = opened  # type: ignore[method-assign]
    return await ask_ours(client, num_tokens)


async def measure_code(rounds: int, num_tokens: int = 20_000) -> dict[str, Any]:
    """The clients' own code alone: the difference is what `stream()` adds to a token."""
    spent: dict[str, list[float]] = {"raw": [], "ours": []}
    for _ in range(rounds + 1):
        for who, ask in (("raw", replay_raw), ("ours", replay_ours)):
            spent[who].append(1e6 * await spent_s(ask, 1, num_tokens, 1) / num_tokens)
    return row("client code alone, no network", spent)


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
    rows.append(asyncio.run(measure_code(rounds)))
    print(json.dumps({"rounds": rounds, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
