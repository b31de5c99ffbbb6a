"""Memory of server and models over a long, light load: does anything grow that nobody reads or frees?

    python tests/bench/serving/bench_memory.py --minutes 30 --csv memory.csv

16 streams at a time against the null engine with a step every 20 ms, half of them through `ensemble`, each of
100 tokens and then the next; one in eight is cancelled in the middle. The first line of the CSV names the
columns: seconds, requests so far, and the memory of each process in MiB (USS: what its end would give back).
The last line of stdout is one JSON document with the slope of each over the second half.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
from load import Load, text_request
from null_repo import NullSettings, build_once, serving, write_null_repo

STREAMS = 16
TOKENS = 100
CANCEL_EVERY = 8
STEP_S = 0.02
SAMPLE_INTERVAL_S = 10.0
PATHS = ("tensorrt_llm_bls", "ensemble")


class Users:
    """Clients that ask again and again until they are told to leave."""

    def __init__(self, load: Load) -> None:
        self._load, self.requests, self.is_over = load, 0, False

    async def run(self, number: int) -> None:
        while not self.is_over:
            self.requests += 1
            await self._ask(PATHS[number % 2], is_cancelled=self.requests % CANCEL_EVERY == 0)

    async def _ask(self, path: str, *, is_cancelled: bool) -> None:
        async def one() -> AsyncIterator[Any]:
            yield text_request(path, TOKENS)

        call = self._load.stub.ModelStreamInfer(one(), timeout=60)
        received = 0
        async for answer in call:
            if answer.error_message:
                raise RuntimeError(answer.error_message)
            received += 1
            if is_cancelled and received == TOKENS // 2:
                call.cancel()
                return


def memory_mib(load: Load) -> dict[str, float]:
    """USS by process name."""
    return {
        name: sum(process.memory_full_info().uss for process in processes) / 2**20
        for name, processes in load.processes().items()
        if name != "client"
    }


async def watch(url: str, pid: int, minutes: float, csv_path: Path) -> list[dict[str, float]]:
    load, rows = Load(url, pid), []
    users = Users(load)
    tasks = [asyncio.create_task(users.run(number)) for number in range(STREAMS)]
    begun_s = time.monotonic()
    with csv_path.open("w", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        while (elapsed_s := time.monotonic() - begun_s) < minutes * 60:
            await asyncio.sleep(SAMPLE_INTERVAL_S)
            row = {"seconds": round(elapsed_s), "requests": users.requests}
            row |= {name: round(value, 2) for name, value in sorted(memory_mib(load).items())}
            if writer is None:
                writer = csv.DictWriter(file, fieldnames=list(row))
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            rows.append(row)
    users.is_over = True
    await asyncio.gather(*tasks)
    await load.close()
    return rows


def slopes(rows: list[dict[str, float]]) -> dict[str, float]:
    """MiB an hour of each process over the second half, by least squares."""
    half = rows[len(rows) // 2 :]
    hours = np.array([row["seconds"] for row in half]) / 3600
    return {
        name: float(np.polyfit(hours, [row[name] for row in half], 1)[0])
        for name in half[0]
        if name not in ("seconds", "requests")
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--csv", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bundle = build_once(Path(name), "demo")
        repo = write_null_repo(bundle, Path(name, "null"), NullSettings(step_s=STEP_S))
        with serving(repo) as server:
            rows = asyncio.run(watch(server.grpc_url, server.pid, args.minutes, args.csv))
    first, last = rows[len(rows) // 2], rows[-1]
    print(json.dumps({"mib_per_hour": slopes(rows), "half": first, "last": last}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
