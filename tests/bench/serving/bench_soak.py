"""Ten thousand requests, one after the other, on a real server: memory, shared memory and what is left open.

    flock /tmp/heavy.lock python tests/bench/serving/bench_soak.py
    python tests/bench/serving/bench_soak.py --requests 500

Serves the demo model. Every tenth request is refused, every tenth left by its client half-way, the others
are answered whole, streamed and unary by turns. Resident memory of the server and its models is read twenty
times; growth is the difference between the means of the second and the last quarter. The last line of stdout
is one JSON document; exit 1 when requests are left open.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import psutil
from tritonclient.grpc import service_pb2_grpc

from minitron_build.build import build_bundle, plan_build
from minitron_build.planning.plan import PlanRequest
from minitron_build.runtime.metrics import FLUSH_INTERVAL_S
from minitron_build.serving.triton_server import ServerOptions, TritonServer, free_ports
from minitron_build.source.hub import DEMO, resolve_checkpoint
from minitron_client.load import scrape

sys.path.insert(0, str(Path(__file__).parents[2] / "server"))
from triton_calls import message  # the tests' own way to make a request

MODEL = "tensorrt_llm_bls"
NUM_SAMPLES = 20
OPEN = ("minitron_running_requests", "minitron_waiting_requests", "minitron_engine_running_requests")
SETTLE_S = 20.0


def ask(stub: Any, at: int) -> str:
    """One request, and how it ended."""
    request: dict[str, Any] = {"text_input": "def f(", "max_tokens": 4, "stream": at % 2 == 0}
    kind = {0: "refused", 5: "left"}.get(at % 10, "whole")
    if kind == "refused":
        request["max_tokens"] = 0
    if kind == "left":
        request |= {"max_tokens": 1000, "stream": True, "end_id": -1}
    call = stub.ModelStreamInfer(iter([message(MODEL, request, request_id=f"soak-{at}")]), timeout=60)
    for answer in call:
        if kind == "left":
            call.cancel()
            break
        if bool(answer.error_message) != (kind == "refused"):
            raise SystemExit(f"request {at}: {answer.error_message or 'served, not refused'}")
    return kind


def memory_bytes(server: TritonServer) -> dict[str, int]:
    """Resident bytes of the server, and of each model's process."""
    process = psutil.Process(server.pid)
    sizes = {"server": process.memory_info().rss}
    for child in process.children(recursive=True):
        words = child.cmdline()
        name = next((word.split("/")[-3] for word in words if word.endswith("/model.py")), "other")
        sizes[name] = sizes.get(name, 0) + child.memory_info().rss
    return sizes


def open_requests(server: TritonServer) -> int:
    return int(sum(value for name, _, value in scrape(server.metrics_url, 10) if name in OPEN))


def growth_bytes(samples: list[dict[str, int]]) -> dict[str, int]:
    """Mean of the last quarter less that of the second: the first is still filling caches."""
    quarter = len(samples) // 4
    return {
        name: round(
            statistics.fmean(sample[name] for sample in samples[-quarter:])
            - statistics.fmean(sample[name] for sample in samples[quarter : 2 * quarter])
        )
        for name in samples[-1]
    }


def soak(server: TritonServer, num_requests: int) -> dict[str, Any]:
    samples, ends = [], {"whole": 0, "refused": 0, "left": 0}
    every = max(1, num_requests // NUM_SAMPLES)
    began_s = time.monotonic()
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for at in range(num_requests):
            ends[ask(stub, at)] += 1
            if at % every == every - 1:
                samples.append(memory_bytes(server))
                total_mb = sum(samples[-1].values()) / 2**20
                print(f"{at + 1:>6} requests  {total_mb:7.1f} MiB", file=sys.stderr, flush=True)
    seconds = time.monotonic() - began_s
    deadline_s = time.monotonic() + SETTLE_S
    while (left := open_requests(server)) and time.monotonic() < deadline_s:
        time.sleep(2 * FLUSH_INTERVAL_S)
    return {
        "requests": num_requests,
        "seconds": round(seconds, 1),
        "requests_per_s": round(num_requests / seconds, 1),
        "ends": ends,
        "left_open": left,
        "memory_bytes": samples[-1],
        "growth_bytes": growth_bytes(samples),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    args = parser.parse_args()
    grpc_port, http_port, metrics_port = free_ports(3)
    with tempfile.TemporaryDirectory(prefix="minitron-soak-") as work:
        source = resolve_checkpoint(DEMO)
        bundle = build_bundle(plan_build(source, PlanRequest(arch="cpu")), source, Path(work) / "bundle")
        options = ServerOptions(
            bundle.model_repo, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port
        )
        with TritonServer.start(options) as server:
            server.wait_until_ready()
            result = soak(server, args.requests)
    print("MiB at the end, and growth from the second quarter of the requests to the last")
    for name, grown in result["growth_bytes"].items():
        print(f"{name:<18} {result['memory_bytes'][name] / 2**20:7.1f} {grown / 2**20:+7.2f}")
    print(json.dumps(result))
    return 1 if result["left_open"] else 0


if __name__ == "__main__":
    sys.exit(main())
