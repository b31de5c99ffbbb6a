"""What `minitron bench` itself costs: chunks per second of one core, against the layers under it.

    python tests/bench/serving/bench_load_generator.py                       # ready-made messages, no Triton
    python tests/bench/serving/bench_load_generator.py --server link         # Triton with the null engine
    python tests/bench/serving/bench_load_generator.py --server one-each     # the same, one token a response

In turns, with the same requests: `raw`, tritonclient's generated stub on grpc.aio with nothing done per
message; `client`, AsyncMinitronClient; `generator`, all of `minitron bench` but its printing. The server runs
in processes of its own. CPU seconds are this process's alone: chunks per core second are what one core could
drive if the server were no limit. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from null_repo import NullSettings, build_once, serving, write_null_repo
from tritonclient.grpc import service_pb2_grpc

from minitron_build.serving.triton_server import free_ports
from minitron_client import AsyncMinitronClient, SamplingParams
from minitron_client._triton import request_message
from minitron_client.bench.generator import Generator
from minitron_client.bench.load import Extent, LoadPoint
from minitron_client.bench.measure import measure
from minitron_client.bench.workload import Ask
from minitron_client.text_request import text_request

PROMPT = "The way of the world"


async def run_raw(client: AsyncMinitronClient, args: argparse.Namespace, concurrency: int) -> int:
    """The floor: read every message and drop it."""
    metadata = await client.metadata()
    sampling = SamplingParams(max_tokens=args.output_tokens)
    request = request_message(
        text_request(metadata, PROMPT, sampling, request_id="raw".ljust(32, "-"), is_streaming=True)
    )
    numbers, num_chunks = itertools.count(), 0
    async with grpc.aio.insecure_channel(client.url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        async def work() -> None:
            nonlocal num_chunks
            while next(numbers) < args.num_requests:
                async for _ in stub.ModelStreamInfer(iter([request]), timeout=60):
                    num_chunks += 1

        await asyncio.gather(*(work() for _ in range(concurrency)))
    return num_chunks


async def run_client(client: AsyncMinitronClient, args: argparse.Namespace, concurrency: int) -> int:
    """The client as anyone would use it."""
    numbers, num_chunks = itertools.count(), 0

    async def work() -> None:
        nonlocal num_chunks
        while next(numbers) < args.num_requests:
            async with client.stream(PROMPT, max_tokens=args.output_tokens) as stream:
                async for _ in stream:
                    num_chunks += 1

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return num_chunks


async def run_generator(client: AsyncMinitronClient, args: argparse.Namespace, concurrency: int) -> int:
    """Everything that `minitron bench` does for each request, and its arithmetic at the end."""
    asks = (Ask(number, PROMPT, None, args.output_tokens) for number in itertools.count())

    def start(ask: Ask) -> Any:
        return client.stream(ask.prompt, sampling=SamplingParams(max_tokens=ask.output_tokens))

    extent = Extent(args.num_requests, warmup_requests=0)
    run = await Generator(start, LoadPoint("closed", concurrency), extent, asks).drive()
    assert measure(run, ()).num_ok == args.num_requests
    return sum(len(record.chunk_times) for record in run.records)


LAYERS: dict[str, Callable[[AsyncMinitronClient, argparse.Namespace, int], Awaitable[int]]] = {
    "raw": run_raw,
    "client": run_client,
    "generator": run_generator,
}


async def measure_layers(url: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The best of a few runs of every layer, which take turns."""
    rows = []
    async with AsyncMinitronClient(url, timeout_s=120, max_retries=0) as client:
        await client.generate(PROMPT, max_tokens=1)
        for concurrency in args.concurrency:
            best: dict[str, dict[str, Any]] = {}
            for _, (name, run) in itertools.product(range(args.repeats), LAYERS.items()):
                wall_s, cpu_s = time.perf_counter(), time.process_time()
                num_chunks = await run(client, args, concurrency)
                wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
                row = {
                    "layer": name,
                    "concurrency": concurrency,
                    "tokens_per_s": round(args.num_requests * args.output_tokens / wall_s),
                    "tokens_per_core_s": round(args.num_requests * args.output_tokens / cpu_s),
                    "chunks_per_s": round(num_chunks / wall_s),
                    "chunks_per_core_s": round(num_chunks / cpu_s),
                    "cpu_us_per_chunk": round(1e6 * cpu_s / num_chunks, 1),
                    "cpu_share": round(cpu_s / wall_s, 2),
                }
                if name not in best or row["cpu_us_per_chunk"] < best[name]["cpu_us_per_chunk"]:
                    best[name] = row
            rows += best.values()
            for row in best.values():
                print(row, file=sys.stderr)
    return rows


@contextmanager
def null_triton() -> Iterator[str]:
    """The server of `null_triton.py`, in a process of its own."""
    (port,) = free_ports(1)
    command = [sys.executable, str(Path(__file__).with_name("null_triton.py")), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.kill()


@contextmanager
def null_engine(*, runs_ahead: bool) -> Iterator[str]:
    """A real Triton with the real text models, and the null engine behind them."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = build_once(Path(folder), "demo")
        repo = write_null_repo(bundle, Path(folder) / "null", NullSettings(runs_ahead=runs_ahead))
        with serving(repo) as server:
            yield server.grpc_url


SERVERS: dict[str, Callable[[], AbstractContextManager[str]]] = {
    "messages": null_triton,
    "link": partial(null_engine, runs_ahead=True),
    "one-each": partial(null_engine, runs_ahead=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", choices=list(SERVERS), default="messages")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--output-tokens", type=int, default=200)
    parser.add_argument("--num-requests", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with SERVERS[args.server]() as url:
        rows = asyncio.run(measure_layers(url, args))
    load = [round(value, 2) for value in os.getloadavg()]
    settings = {"server": args.server, "output_tokens": args.output_tokens, "load_average": load}
    print(json.dumps({**settings, "rows": rows}))


if __name__ == "__main__":
    main()
