"""`minitron demo`: build the demo model for this CPU, serve it, stream one completion, leave nothing.

It knows the order of the steps and how they are timed. Each step is the module's that does it for real:
build.py, triton_server.py and the client.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from minitron_build.serving.triton_server import ServerOptions, TritonServer, free_ports
from minitron_build.source.hub import DEMO
from minitron_client.sampling_flags import sampling_number

if TYPE_CHECKING:
    from minitron_client import Completion, SamplingParams

DEFAULT_PROMPT = 'def read_lines(path):\n    """Return the lines of a text file'
DEFAULT_MAX_TOKENS = 64
SAMPLING_TOP_P = 0.9  # the server decodes greedily unless top_p or top_k asks for sampling
REQUEST_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What the demo measured; the last line of its stdout.

    Attributes:
        text: the completion, without the prompt.
        output_tokens: tokens generated.
        ttft_s: request sent to first text.
        tokens_per_s: output_tokens by the seconds from sending the request to the end of the stream.
        build_s: checkpoint to bundle, imports included.
        ready_s: start of the Triton process to all models ready.
    """

    text: str
    output_tokens: int
    ttft_s: float
    tokens_per_s: float
    build_s: float
    ready_s: float


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `minitron demo`."""
    parser.add_argument(
        "prompt", nargs="?", default=DEFAULT_PROMPT, metavar="PROMPT", help="text to go on from"
    )
    parser.add_argument(
        "--max-tokens",
        type=sampling_number("max_tokens", int),
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--temperature",
        type=sampling_number("temperature", float),
        metavar="T",
        help="sample instead of taking the likeliest token",
    )
    parser.add_argument("--seed", type=sampling_number("seed", int), metavar="N", help="sample, repeatably")
    parser.add_argument(
        "--checkpoint", default=DEMO, metavar="DIR|demo", help="another model (default: %(default)s)"
    )
    parser.add_argument("--verbose", action="store_true", help="forward Triton's whole log to stderr")


def run(args: argparse.Namespace) -> int:
    """Build, serve, stream, stop; the completion and one JSON line on stdout, timings on stderr."""
    sampling = _sampling(args)
    with _sigterm_as_interrupt(), tempfile.TemporaryDirectory(prefix="minitron-demo-") as work_dir:
        model_repo, build_s = _build(args.checkpoint, Path(work_dir) / "bundle")
        with _serving(model_repo, verbose=args.verbose) as (grpc_url, ready_s):
            completion = _stream(grpc_url, args.prompt, sampling)
    report = _report(completion, build_s=build_s, ready_s=ready_s)
    _print_timings(report)
    print(json.dumps(dataclasses.asdict(report)), flush=True)
    return 0


def _sampling(args: argparse.Namespace) -> SamplingParams:
    from minitron_client import SamplingParams

    is_sampling = args.seed is not None or args.temperature not in (None, 0)
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=SAMPLING_TOP_P if is_sampling else None,
        seed=args.seed,
    )


def _build(checkpoint: str, output_dir: Path) -> tuple[Path, float]:
    """A CPU bundle of the checkpoint: its model repository, and the seconds it took."""
    began_s = time.monotonic()
    from minitron_build.build import build_bundle, plan_build
    from minitron_build.planning.plan import PlanRequest
    from minitron_build.source.hub import resolve_checkpoint

    source = resolve_checkpoint(checkpoint, None)
    bundle = build_bundle(plan_build(source, PlanRequest(arch="cpu")), source, output_dir)
    return bundle.model_repo, time.monotonic() - began_s


@contextmanager
def _serving(model_repo: Path, *, verbose: bool) -> Iterator[tuple[str, float]]:
    """The model repository on free loopback ports: the gRPC URL and the seconds until it was ready."""
    grpc_port, http_port, metrics_port = free_ports()
    options = ServerOptions(
        model_repo, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port, verbose=verbose
    )
    server = TritonServer.start(options, on_log=lambda line: print(line, file=sys.stderr, flush=True))
    try:
        ready_s = server.wait_until_ready()
        yield server.grpc_url, ready_s
    finally:
        server.stop(timeout_s=0)  # nobody else can have a request in flight


def _stream(grpc_url: str, prompt: str, sampling: SamplingParams) -> Completion:
    """Stream one completion to stdout as it comes, behind its prompt."""
    from minitron_client import MinitronClient

    print(prompt, end="", flush=True)
    with (
        MinitronClient(grpc_url, timeout_s=REQUEST_TIMEOUT_S) as client,
        client.stream(prompt, sampling=sampling) as stream,
    ):
        for chunk in stream:
            print(chunk.text, end="", flush=True)
        print(flush=True)
        return stream.final()


def _report(completion: Completion, *, build_s: float, ready_s: float) -> DemoReport:
    timings, output_tokens = completion.timings, completion.usage.output_tokens or 0
    return DemoReport(
        text=completion.text,
        output_tokens=output_tokens,
        ttft_s=round(timings.total_s if timings.ttft_s is None else timings.ttft_s, 4),
        tokens_per_s=round(output_tokens / timings.total_s, 2),
        build_s=round(build_s, 3),
        ready_s=round(ready_s, 3),
    )


def _print_timings(report: DemoReport) -> None:
    print(
        f"minitron: built in {report.build_s:.2f} s, ready in {report.ready_s:.2f} s, "
        f"first text after {1000 * report.ttft_s:.0f} ms, "
        f"{report.output_tokens} tokens at {report.tokens_per_s:.1f} tokens/s",
        file=sys.stderr,
    )


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that both clean up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
