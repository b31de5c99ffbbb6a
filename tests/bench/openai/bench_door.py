"""What the OpenAI-compatible door adds to the gRPC client, in front of a server that costs almost nothing.

    python tests/bench/openai/bench_door.py

The same requests go straight through `AsyncMinitronClient`, through the door by bare sockets, and through the
door by the openai SDK, in turns. TTFT and time per token are the caller's, one request at a time; processor
time is the door's own (user and system), split into a part per request and a part per token by requests of
two lengths. Throughput is that of one door process with many streams at once. The last line of stdout is one
JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import openai
import psutil

from door_process import RunningDoor, door_process
from minitron_client import AsyncMinitronClient

NULL_SERVER = Path(__file__).parents[1] / "client" / "null_server.py"
PROMPT, MODEL = "def add(a, b):", "tensorrt_llm_bls"
SHORT, LONG = 1, 256


class Timed(NamedTuple):
    """One request: seconds to the first text and to the end."""

    first_s: float
    total_s: float


Ask = Callable[[int], Awaitable[Timed]]


def direct(client: AsyncMinitronClient) -> Ask:
    async def ask(num_tokens: int) -> Timed:
        started_s, first_s = time.perf_counter(), 0.0
        async with client.stream(PROMPT, max_tokens=num_tokens) as stream:
            async for _ in stream:
                first_s = first_s or time.perf_counter() - started_s
        return Timed(first_s, time.perf_counter() - started_s)

    return ask


def by_socket(url: str) -> Ask:
    """Kept-alive connections that are read for as little as a caller could."""
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(num_tokens: int) -> Timed:
        reader, writer = free.pop() if free else await asyncio.open_connection(host, int(port))
        body = json.dumps({"prompt": PROMPT, "max_tokens": num_tokens, "stream": True, "temperature": 0})
        started_s = time.perf_counter()
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n{body}".encode()
        )
        await reader.readuntil(b"data: ")
        first_s = time.perf_counter() - started_s
        await reader.readuntil(b"data: [DONE]\n\n")
        await reader.readuntil(b"0\r\n\r\n")
        free.append((reader, writer))
        return Timed(first_s, time.perf_counter() - started_s)

    return ask


def by_sdk(client: openai.AsyncOpenAI) -> Ask:
    async def ask(num_tokens: int) -> Timed:
        started_s, first_s = time.perf_counter(), 0.0
        stream = await client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=num_tokens, stream=True, temperature=0
        )
        async for _ in stream:
            first_s = first_s or time.perf_counter() - started_s
        return Timed(first_s, time.perf_counter() - started_s)

    return ask


async def alone(ask: Ask, num_requests: int) -> list[Timed]:
    return [await ask(LONG) for _ in range(num_requests)]


async def door_cpu_s(ask: Ask, door: psutil.Process, num_tokens: int, num_requests: int) -> float:
    """Processor seconds of the door per request of so many tokens."""
    before = door.cpu_times()
    for _ in range(num_requests):
        await ask(num_tokens)
    after = door.cpu_times()
    return (after.user + after.system - before.user - before.system) / num_requests


async def tokens_per_s(ask: Ask, num_streams: int, num_requests: int) -> float:
    """Of all streams together, each asking again as soon as it is answered."""

    async def stream() -> None:
        for _ in range(num_requests):
            await ask(LONG)

    started_s = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(num_streams)))
    return num_streams * num_requests * LONG / (time.perf_counter() - started_s)


async def measure(args: argparse.Namespace, grpc_url: str, door: RunningDoor) -> dict[str, Any]:
    async with (
        AsyncMinitronClient(grpc_url) as client,
        openai.AsyncOpenAI(base_url=door.url, api_key="none", max_retries=0) as sdk,
    ):
        asks = {"direct": direct(client), "door": by_socket(door.url), "sdk": by_sdk(sdk)}
        for ask in asks.values():  # connections, metadata, first use of modules
            await alone(ask, 5)
        timed: dict[str, list[Timed]] = {name: [] for name in asks}
        rates: dict[str, list[float]] = {name: [] for name in asks}
        for _ in range(args.rounds):
            for name, ask in asks.items():
                timed[name] += await alone(ask, args.requests)
                rates[name].append(await tokens_per_s(ask, args.streams, args.requests // 4))
        process = psutil.Process(door.pid)
        short_s = await door_cpu_s(asks["door"], process, SHORT, 8 * args.requests)
        long_s = await door_cpu_s(asks["door"], process, LONG, args.requests)
    figures = {name: summary(timed[name], rates[name]) for name in asks}
    per_token_s = (long_s - short_s) / (LONG - SHORT)
    return {
        **figures,
        "added_ttft_ms": figures["door"]["ttft_ms"] - figures["direct"]["ttft_ms"],
        "added_us_per_token": figures["door"]["us_per_token"] - figures["direct"]["us_per_token"],
        "door_cpu_us_per_token": 1e6 * per_token_s,
        "door_cpu_ms_per_request": 1e3 * (short_s - per_token_s),
    }


def summary(timed: list[Timed], rates: list[float]) -> dict[str, float]:
    return {
        "ttft_ms": 1e3 * statistics.median(one.first_s for one in timed),
        "us_per_token": 1e6 * statistics.median((one.total_s - one.first_s) / (LONG - 1) for one in timed),
        "tokens_per_s": statistics.median(rates),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=40, help="of each path in a round, one at a time")
    parser.add_argument("--streams", type=int, default=32, help="at once, for the throughput")
    args = parser.parse_args()
    command = [sys.executable, str(NULL_SERVER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        grpc_url = f"127.0.0.1:{int(server.stdout.readline())}"
        with door_process(grpc_url) as door:
            figures = asyncio.run(measure(args, grpc_url, door))
        server.stdin.close()
    for name in ("direct", "door", "sdk"):
        one = figures[name]
        print(
            f"{name:<7} TTFT {one['ttft_ms']:.2f} ms, {one['us_per_token']:.0f} us per token alone, "
            f"{one['tokens_per_s']:.0f} tokens/s from {args.streams} streams"
        )
    print(
        f"the door adds {figures['added_ttft_ms']:.2f} ms to the first token; it takes "
        f"{figures['door_cpu_ms_per_request']:.2f} ms of processor time per request and "
        f"{figures['door_cpu_us_per_token']:.0f} us per token"
    )
    print(json.dumps({"asked": vars(args), **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
