"""What the text models add to an engine that costs nothing: tokens per second, waits and CPU time.

    flock /tmp/heavy.lock python tests/bench/serving/bench_serving.py
    python tests/bench/serving/bench_serving.py --case link --streams 1 64 --tokens 100 --repeats 1

The same requests go to `tensorrt_llm` itself (the bare decoupled model), to `tensorrt_llm_bls` and to
`ensemble`, taking turns; the median of the repeats counts. Every text is checked against the script. Cases:
    link      the engine runs as fast as it can; what waits while a response is under way goes with the next
    one-each  the same, but the engine waits until its last step is read: one token per response
    paced     a step every 10 ms, as a GPU's would be
    executor  the bundle's engine model over TensorRT-LLM's executor as the stand-in plays it, at full speed
    executor-paced  the same with a step every 10 ms
    triton    no link: one response per token from model to model, as with TensorRT-LLM's backend
    triton-4  the same with four processes of each text model
    demo      no null engine: the demo model on this machine's cores; token ids beside the text, to count by
Times are the client's, on the same machine as the server. NVIDIA's own templates are not part of this: their
numbers, from another day and by the same method, are printed beside as quoted. The last line of stdout is one
JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from load import Figures, Load, TokenCounter, text_request, token_request
from null_repo import NullSettings, build_once, script_texts, serving, write_null_repo

CASES: dict[str, NullSettings | None] = {
    "link": NullSettings(),
    "one-each": NullSettings(runs_ahead=False),
    "paced": NullSettings(step_s=0.01),
    "executor": NullSettings(executor=True),
    "executor-paced": NullSettings(executor=True, step_s=0.01),
    "triton": NullSettings(link=False),
    "triton-4": NullSettings(link=False, instances=4),
    "demo": None,
}
"""None: the reference engine, as in the bundle."""
PATHS = ("tensorrt_llm", "tensorrt_llm_bls", "ensemble")
TTFT_REQUESTS = 100
UNARY_REQUESTS = 200
UNARY_CONCURRENCIES = (1, 8, 64)
NVIDIA_BLS = {1: "1292-1504", 8: "1367-2260", 64: "1367-1927"}
"""Tokens per second, one to four instances, measured elsewhere on two cores with the same kind of engine."""


def make_request(path: str, num_tokens: int, *, stream: bool, with_ids: bool = False) -> Callable[[], Any]:
    if path == "tensorrt_llm":
        return partial(token_request, num_tokens, stream=stream)
    return partial(text_request, path, num_tokens, stream=stream, with_ids=with_ids)


def median(runs: list[Figures]) -> Figures:
    """The run in the middle by its rate."""
    return sorted(runs, key=lambda run: run.tokens_per_s)[len(runs) // 2]


async def measure(
    load: Load, texts: list[str] | None, args: argparse.Namespace, *, has_unary: bool
) -> dict[str, Any]:
    """All figures of one server; `texts` None: what it says is not known before."""
    counter, with_ids = TokenCounter(texts, args.tokens) if texts else None, texts is None
    counters = {path: None if path == "tensorrt_llm" else counter for path in PATHS}
    for path in PATHS:  # the first request after a start is slower
        make = make_request(path, args.tokens, stream=True, with_ids=with_ids)
        await load.run(path, make, 2, counters[path])
    streams = []
    for num_streams in args.streams:
        runs: dict[str, list[Figures]] = {path: [] for path in PATHS}
        for _ in range(args.repeats):
            for path in PATHS:
                make = make_request(path, args.tokens, stream=True, with_ids=with_ids)
                runs[path].append(await load.run(path, make, num_streams, counters[path]))
        streams += [asdict(median(of_path)) for of_path in runs.values()]
    single = await measure_single(load, counters, with_ids=with_ids)
    # Unary answers of an engine with a pace take its pace: 600 of them say nothing and last ten minutes.
    unary = await measure_unary(load) if has_unary else {"unary": []}
    return {"streams": streams, **single, **unary}


async def measure_single(
    load: Load, counters: dict[str, TokenCounter | None], *, with_ids: bool
) -> dict[str, Any]:
    waits: dict[str, list[float]] = {path: [] for path in PATHS}
    for _ in range(4):
        for path in PATHS:
            make = make_request(path, 4, stream=True, with_ids=with_ids)
            waits[path] += await load.first_token_ms(make, counters[path], TTFT_REQUESTS // 4)
    return {"ttft_alone_ms": {path: statistics.median(found) for path, found in waits.items()}}


async def measure_unary(load: Load) -> dict[str, Any]:
    found = []
    for concurrency in UNARY_CONCURRENCIES:
        for path in PATHS:
            make = make_request(path, 100, stream=False)
            rate, time_ms = await load.requests_per_s(make, concurrency, UNARY_REQUESTS)
            found.append(
                {"path": path, "concurrency": concurrency, "requests_per_s": rate, "p50_ms": time_ms}
            )
    return {"unary": found}


def table(case: str, measured: dict[str, Any]) -> str:
    lines = [
        "",
        f"### {case}",
        "| streams | path | tokens/s | of bare | TTFT p50/p99 ms | inter-token p50/p99 ms | "
        "tokens per response | CPU us per token by process |",
        "|---|---|---|---|---|---|---|---|",
    ]
    bare = {run["streams"]: run for run in measured["streams"] if run["path"] == "tensorrt_llm"}
    for run in measured["streams"]:
        cpu = ", ".join(f"{name} {value:.0f}" for name, value in sorted(run["cpu_us_per_token"].items()))
        lines.append(
            f"| {run['streams']} | {run['path']} | {run['tokens_per_s']:.0f} | "
            f"{run['tokens_per_s'] / bare[run['streams']]['tokens_per_s']:.0%} | "
            f"{run['ttft_p50_ms']:.1f} / {run['ttft_p99_ms']:.1f} | "
            f"{run['gap_p50_ms']:.2f} / {run['gap_p99_ms']:.2f} | {run['tokens_per_response']:.1f} | {cpu} |"
        )
    alone = ", ".join(f"{path} {value:.2f}" for path, value in measured["ttft_alone_ms"].items())
    lines += ["", f"First token, one request at a time, p50 ms: {alone}", ""]
    lines += ["| unary, at once | path | requests/s | p50 ms |", "|---|---|---|---|"]
    lines += [
        f"| {run['concurrency']} | {run['path']} | {run['requests_per_s']:.0f} | {run['p50_ms']:.1f} |"
        for run in measured["unary"]
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoint", default="demo", help="whose tokenizer is used")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        bundle = build_once(Path(name), args.checkpoint)
        for case in args.case:
            settings = CASES[case]
            repo = write_null_repo(bundle, Path(name, case), settings) if settings else bundle / "model_repo"
            with serving(repo) as server:

                async def measured(
                    server: Any = server, settings: Any = settings, case: str = case
                ) -> dict[str, Any]:
                    load = Load(server.grpc_url, server.pid)
                    try:
                        texts = script_texts(bundle) if settings else None
                        return await measure(load, texts, args, has_unary=case != "executor-paced")
                    finally:
                        await load.close()

                results[case] = asyncio.run(measured())
            print(table(case, results[case]), flush=True)
    quoted = ", ".join(f"{streams}: {rate}" for streams, rate in NVIDIA_BLS.items())
    print(f"\nNVIDIA's tensorrt_llm_bls, quoted, tokens/s by streams: {quoted}\n")
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
