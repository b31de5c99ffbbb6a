"""`minitron serve`: a bundle behind Triton until a signal, with one line for whatever goes wrong.

It knows the order of checks, what "ready" means to a caller (one token came back) and what each signal
does. The process itself is triton_server.py's; whether a bundle fits this machine is bundle/binding.py's, and
which of several does bundle/choice.py's.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from minitron_build.errors import StageError
from minitron_build.serving.triton_log import exit_words
from minitron_build.serving.triton_preflight import find_tritonserver
from minitron_build.serving.triton_server import ServerOptions, TritonServer, check_before_start

if TYPE_CHECKING:
    from minitron_build.bundle.binding import ServingMachine
    from minitron_build.bundle.bundle import Bundle
    from minitron_build.bundle.choice import Candidate

EXIT_DRAINED, EXIT_INTERRUPTED = 0, 130
WATCH_INTERVAL_S = 0.2
PROBE_PROMPT = "def add(a, b):"
MIN_PROBE_TIMEOUT_S = 10.0

Probe = Callable[[TritonServer], None]


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `minitron serve`."""
    defaults = ServerOptions(Path())
    parser.add_argument(
        "bundle",
        type=Path,
        metavar="BUNDLE",
        help="folder made by minitron build, or one that holds several: the one for the GPU here is served",
    )
    parser.add_argument("--host", default=defaults.host, help="address to listen on (default: %(default)s)")
    for name, default in (
        ("grpc-port", defaults.grpc_port),
        ("http-port", defaults.http_port),
        ("metrics-port", defaults.metrics_port),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--start-timeout-s",
        type=float,
        metavar="S",
        help=f"seconds the models may take to load (default: {defaults.start_timeout_s:g}, and what reading "
        "the engine takes)",
    )
    parser.add_argument(
        "--drain-timeout-s",
        type=float,
        default=defaults.drain_timeout_s,
        metavar="S",
        help="seconds requests in flight may take after SIGTERM (default: %(default)s)",
    )
    parser.add_argument("--log-path", type=Path, metavar="FILE", help="append Triton's whole log to FILE")
    parser.add_argument("--verbose", action="store_true", help="forward Triton's whole log to stderr")
    parser.add_argument("--skip-hashes", action="store_true", help="do not compare files with the manifest")


def run(args: argparse.Namespace) -> int:
    """Check, start, prove with one token, serve; the cheap checks come before gigabytes are hashed."""
    from minitron_build.bundle.binding import check_fit, read_serving_machine
    from minitron_build.bundle.choice import find_bundles

    found = find_bundles(args.bundle)
    install = find_tritonserver()
    machine = read_serving_machine(install)
    bundle = _choose(args.bundle, found, machine) if isinstance(found, tuple) else found
    engine = check_fit(bundle, machine)
    options = _options(args, bundle.model_repo, engine.config.world_size if engine else 1, _start_s(bundle))
    check_before_start(options, install)
    if not args.skip_hashes:
        _say(f"checking the files of {bundle.path}")
        bundle.check_files()
    return serve(options, probe_completion)


def _choose(root: Path, candidates: tuple[Candidate, ...], machine: ServingMachine) -> Bundle:
    from minitron_build.bundle.choice import choose_bundle

    choice = choose_bundle(root, candidates, machine)
    for line in choice.lines():
        _say(line)
    return choice.bundle


def _start_s(bundle: Bundle) -> float:
    """Seconds that a start may take when nobody says."""
    from minitron_build.bundle.binding import CPU_ARCH
    from minitron_build.deploy.deployment import Deployment

    default_s = ServerOptions(Path()).start_timeout_s
    return default_s if bundle.manifest.arch == CPU_ARCH else float(Deployment.of(bundle).start_s)


def _options(
    args: argparse.Namespace, model_repo: Path, world_size: int = 1, start_s: float | None = None
) -> ServerOptions:
    defaults = ServerOptions(model_repo)
    asked_s = args.start_timeout_s if args.start_timeout_s is not None else start_s
    return ServerOptions(
        model_repo,
        host=args.host,
        grpc_port=args.grpc_port,
        http_port=args.http_port,
        metrics_port=args.metrics_port,
        start_timeout_s=defaults.start_timeout_s if asked_s is None else asked_s,
        drain_timeout_s=args.drain_timeout_s,
        verbose=args.verbose,
        log_path=args.log_path,
        world_size=world_size,
    )


def probe_completion(server: TritonServer) -> None:
    """One real token through the text path: Triton calls a model ready whose process is dead.

    Raises:
        StageError: no token came back.
    """
    from minitron_client import MinitronClient
    from minitron_client.errors import MinitronClientError

    timeout_s = max(MIN_PROBE_TIMEOUT_S, server.options.start_timeout_s)
    try:
        with MinitronClient(server.grpc_url, timeout_s=timeout_s) as client:
            client.generate(PROBE_PROMPT, max_tokens=1)
    except MinitronClientError as error:
        raise StageError(f"Triton says it is ready, but a request for one token failed: {error}") from error


def serve(options: ServerOptions, probe: Probe) -> int:
    """Start Triton, probe it, print where it listens, and stay until a signal or its end.

    SIGTERM and SIGINT drain: streams in flight finish. A second one, or one before it is ready, kills.

    Args:
        options: how to run Triton.
        probe: raises StageError when the server, ready by its own word, does not answer.

    Returns:
        0 after a clean drain, 130 when it was told to stop before it was ready or while it drained.

    Raises:
        MachineError: refused before the start.
        StageError: it did not start, did not answer, ended by itself, or did not drain in time.
    """
    with _Signals() as signals:
        server = TritonServer.start(options, on_log=_print_log)
        signals.server = server
        try:
            if not _come_up(server, signals, probe):
                return EXIT_INTERRUPTED
            _wait_for_the_end(server, signals)
            return _drain(server, signals)
        finally:
            server.stop(timeout_s=0)


def _come_up(server: TritonServer, signals: _Signals, probe: Probe) -> bool:
    """Whether it came up; False when a signal ended it before."""
    if signals.have_come():  # while the process was being spawned
        return False
    try:
        server.wait_until_ready()
        probe(server)
    except StageError:
        if signals.have_come():  # the kill was asked for: what failed of it is no news
            return False
        raise
    signals.is_ready = True
    _announce(server, ready_s=time.monotonic() - server.started_s)
    return True


def _announce(server: TritonServer, ready_s: float) -> None:
    """Where it listens, for a person and, on the last line, for a program."""
    document: dict[str, Any] = {
        "grpc": server.grpc_url,
        "http": server.http_url,
        "metrics": server.metrics_url,
        "pid": server.pid,
        "ready_s": round(ready_s, 3),
    }
    for name in ("grpc", "http", "metrics"):
        print(f"{name:<8} {document[name]}")
    print(f"try      minitron generate {shlex.quote(PROBE_PROMPT)} --url {server.grpc_url} --stream")
    print(json.dumps(document), flush=True)


def _wait_for_the_end(server: TritonServer, signals: _Signals) -> None:
    while not signals.have_come():
        if server.stub_died:
            raise StageError(f"{server.stub_died}; Triton does not restart it: start minitron serve again")
        if not server.is_running:
            words = exit_words(server.exit_code)
            raise StageError(f"Triton ended by itself with {words}: {server.failure_reason}")
        time.sleep(WATCH_INTERVAL_S)


def _drain(server: TritonServer, signals: _Signals) -> int:
    drain_s = server.options.drain_timeout_s
    _say(f"draining for at most {drain_s:g} s; a second signal stops at once")
    code = server.stop()
    if signals.count > 1:
        return EXIT_INTERRUPTED
    if code != 0:
        raise StageError(f"requests in flight did not finish within --drain-timeout-s {drain_s:g}: cut off")
    return EXIT_DRAINED


class _Signals:
    """SIGTERM and SIGINT while Triton runs: counted; one before it is ready, or a second one, kills it."""

    def __init__(self) -> None:
        self.count = 0
        self.is_ready = False
        self.server: TritonServer | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def have_come(self) -> bool:
        """Whether any has come."""
        return self.count > 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.server and (self.count > 1 or not self.is_ready):
            self.server.kill()


def _print_log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say(words: str) -> None:
    print(f"minitron: {words}", file=sys.stderr, flush=True)
