"""A thousand streams at once from one process on one channel, and what importing the client costs.

Run with: python tests/bench/client/bench_concurrency.py [--url HOST:PORT] [--streams N] [--tokens N]
Without --url the server is null_server.py, in another process. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from minitron_client import AsyncMinitronClient

SERVER = Path(__file__).with_name("null_server.py")
PROMPT = "def add(a, b):"
IMPORT = "import time; t = time.process_time(); import minitron_client; print(time.process_time() - t)"
NUM_IMPORTS = 9


def import_s() -> float:
    """Processor seconds of `import minitron_client` in a fresh interpreter, the median of some."""
    command = [sys.executable, "-c", IMPORT]
    times = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(NUM_IMPORTS)
    ]
    return statistics.median(times)


async def measure(url: str, num_streams: int, num_tokens: int) -> dict[str, Any]:
    """All streams are open before the first may read on: they do run at once."""
    all_open = asyncio.Event()
    num_open = 0

    async def one(client: AsyncMinitronClient) -> tuple[int, float | None]:
        nonlocal num_open
        async with client.stream(PROMPT, max_tokens=num_tokens, timeout_s=300) as stream:
            await stream.__anext__()
            num_open += 1
            if num_open == num_streams:
                all_open.set()
            await all_open.wait()
            completion = await stream.final()
        return completion.usage.output_tokens or 0, completion.timings.ttft_s

    before = len(asyncio.all_tasks())
    began_s, cpu_s = time.monotonic(), time.process_time()
    async with AsyncMinitronClient(url) as client:
        done = await asyncio.gather(*(one(client) for _ in range(num_streams)))
    wall_s, cpu_s = time.monotonic() - began_s, time.process_time() - cpu_s
    await asyncio.sleep(0)
    ttfts = sorted(ttft_s for _, ttft_s in done if ttft_s is not None)
    return {
        "streams": num_streams,
        "complete": sum(tokens > 0 for tokens, _ in done),
        "wall_s": round(wall_s, 2),
        "client_cpu_s": round(cpu_s, 2),
        "streams_per_s": round(num_streams / wall_s),
        "ttft_p50_s": round(ttfts[len(ttfts) // 2], 3),
        "ttft_max_s": round(ttfts[-1], 3),
        "tasks_left": len(asyncio.all_tasks()) - before,
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=20)
    args = parser.parse_args()
    report: dict[str, Any] = {"import_s": round(import_s(), 4)}
    if args.url:
        report |= asyncio.run(measure(args.url, args.streams, args.tokens))
    else:
        command = [sys.executable, str(SERVER)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            url = f"127.0.0.1:{int(server.stdout.readline())}"
            report |= asyncio.run(measure(url, args.streams, args.tokens))
            server.stdin.close()
    for name, value in report.items():
        print(f"{name:14} {value}")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
