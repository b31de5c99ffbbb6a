"""`minitron serve`: a bundle behind Triton until a signal, with one line for whatever goes wrong.

It knows the flags, the order of checks and what is printed. How the server is kept is supervisor.py's, the
process itself triton_server.py's; whether a bundle fits this machine is bundle/binding.py's, and which of
several does bundle/choice.py's.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_build.errors import UsageError
from minitron_build.serving.supervisor import Care, say, serve
from minitron_build.serving.token_probe import PROBE_PROMPT, probe_token
from minitron_build.serving.triton_preflight import TritonInstall, find_tritonserver
from minitron_build.serving.triton_security import (
    ADMIN_KEY_VARIABLE,
    API_KEY_VARIABLE,
    ServerSecurity,
    read_key,
)
from minitron_build.serving.triton_server import LOOPBACK, ServerOptions, TritonServer, check_before_start
from minitron_build.serving.watch import WatchSettings
from minitron_client.flag_types import integer, port, seconds, seconds_or_0

if TYPE_CHECKING:
    from minitron_build.bundle.binding import ServingMachine
    from minitron_build.bundle.bundle import Bundle
    from minitron_build.bundle.choice import Candidate

DEFAULT_CARE = Care(restarts=3, watch=WatchSettings(stall_timeout_s=60.0, probe_interval_s=10.0))


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
    parser.add_argument(
        "--http-host",
        metavar="HOST",
        help="where HTTP listens (default: --host, but 127.0.0.1 beside TLS, which HTTP cannot have, or on "
        "a Triton whose HTTP a large request ends)",
    )
    for name, default in (
        ("grpc-port", defaults.grpc_port),
        ("http-port", defaults.http_port),
        ("metrics-port", defaults.metrics_port),
    ):
        parser.add_argument(f"--{name}", type=port, default=default, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--start-timeout-s",
        type=seconds,
        metavar="S",
        help=f"seconds the models may take to load (default: {defaults.start_timeout_s:g}, and what reading "
        "the engine takes)",
    )
    parser.add_argument(
        "--drain-timeout-s",
        type=seconds_or_0,
        default=defaults.drain_timeout_s,
        metavar="S",
        help="seconds requests in flight may take after SIGTERM (default: %(default)s)",
    )
    parser.add_argument("--log-path", type=Path, metavar="FILE", help="append Triton's whole log to FILE")
    parser.add_argument("--verbose", action="store_true", help="forward Triton's whole log to stderr")
    parser.add_argument("--skip-hashes", action="store_true", help="do not compare files with the manifest")
    _add_health_arguments(parser.add_argument_group("health"))
    _add_security_arguments(parser.add_argument_group("security"))


def _add_health_arguments(group: argparse._ArgumentGroup) -> None:
    watch = DEFAULT_CARE.watch
    group.add_argument(
        "--restarts",
        type=integer(0),
        default=DEFAULT_CARE.restarts,
        metavar="N",
        help="times in a row Triton is started again when it, a model's process or the tokens are gone; then "
        "exit 1 (default: %(default)s)",
    )
    group.add_argument(
        "--stall-timeout-s",
        type=seconds_or_0,
        default=watch.stall_timeout_s,
        metavar="S",
        help="seconds without a token after which the server is given up; 0: never (default: %(default)g)",
    )
    group.add_argument(
        "--probe-interval-s",
        type=seconds,
        default=watch.probe_interval_s,
        metavar="S",
        help="an idle server is asked for one token so often (default: %(default)g)",
    )
    group.add_argument(
        "--health-port",
        type=port,
        metavar="N",
        help="tell /ready and /live over HTTP there (default: nowhere)",
    )


def _add_security_arguments(group: argparse._ArgumentGroup) -> None:
    for flag, words in (
        ("--tls-cert", "PEM certificate chain: gRPC speaks TLS, and HTTP, which cannot, stays on 127.0.0.1"),
        ("--tls-key", "its private key, without a password"),
        ("--tls-ca", "PEM certificates of who must have signed the callers' (mutual TLS)"),
        (
            "--api-key-file",
            f"the key that callers must send for text (or ${API_KEY_VARIABLE}); default: none",
        ),
        (
            "--admin-key-file",
            f"the key that loading a model takes (or ${ADMIN_KEY_VARIABLE}); default: nobody may",
        ),
    ):
        group.add_argument(flag, type=Path, metavar="FILE", help=words)
    group.add_argument(
        "--allow-shared-memory", action="store_true", help="let callers on this machine pass tensors so"
    )
    group.add_argument("--log-prompts", action="store_true", help="write prompts to the log (default: none)")


def run(args: argparse.Namespace) -> int:
    """Check, start, prove with one token, serve; the cheap checks come before gigabytes are hashed."""
    from minitron_build.bundle.binding import check_fit, read_serving_machine
    from minitron_build.bundle.choice import find_bundles

    care = _check_flags(args)
    found = find_bundles(args.bundle)
    install = find_tritonserver()
    machine = read_serving_machine(install)
    bundle = _choose(args.bundle, found, machine) if isinstance(found, tuple) else found
    engine = check_fit(bundle, machine)
    args.http_host = _http_host(args.http_host, install)
    options = _options(args, bundle.model_repo, engine.config.world_size if engine else 1, _start_s(bundle))
    check_before_start(options, install)
    _warn_if_open(options)
    if not args.skip_hashes:
        say(f"checking the files of {bundle.path}")
        bundle.check_files()
    return serve(options, probe_token, announce, care)


def _check_flags(args: argparse.Namespace) -> Care:
    """What is wrong with the flags by themselves, told before a bundle is looked at.

    Raises:
        UsageError: two of them contradict one another.
        RefusedError: a key file or a key cannot be used.
    """
    ports: dict[int, str] = {}
    for name in ("grpc_port", "http_port", "metrics_port", "health_port"):
        flag, number = f"--{name.replace('_', '-')}", getattr(args, name)
        if number is not None and number in ports:
            raise UsageError(f"{flag} {number} is also {ports[number]}", expected="different ports")
        ports[number] = flag
    _security(args, os.environ)
    return _care(args)


def _warn_if_open(options: ServerOptions) -> None:
    if options.security.is_open(options.address):
        say(
            f"warning: whoever reaches {options.address} can use this server; --api-key-file or --tls-ca "
            "closes it"
        )


def _http_host(asked: str | None, install: TritonInstall) -> str | None:
    """Where HTTP is to listen; a body of 8 MB ends Triton 24.10, before any key is asked for."""
    return LOOPBACK if asked is None and install.is_wheel else asked


def _choose(root: Path, candidates: tuple[Candidate, ...], machine: ServingMachine) -> Bundle:
    from minitron_build.bundle.choice import choose_bundle

    choice = choose_bundle(root, candidates, machine)
    for line in choice.lines():
        say(line)
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
        http_host=args.http_host,
        grpc_port=args.grpc_port,
        http_port=args.http_port,
        metrics_port=args.metrics_port,
        start_timeout_s=defaults.start_timeout_s if asked_s is None else asked_s,
        drain_timeout_s=args.drain_timeout_s,
        verbose=args.verbose,
        log_path=args.log_path,
        world_size=world_size,
        security=_security(args, os.environ),
        log_prompts=args.log_prompts,
    )


def _security(args: argparse.Namespace, environ: Mapping[str, str]) -> ServerSecurity:
    return ServerSecurity(
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        tls_ca=args.tls_ca,
        api_key=read_key(args.api_key_file, API_KEY_VARIABLE, environ, "--api-key-file"),
        admin_key=read_key(args.admin_key_file, ADMIN_KEY_VARIABLE, environ, "--admin-key-file"),
        allow_shared_memory=args.allow_shared_memory,
    )


def _care(args: argparse.Namespace) -> Care:
    return Care(
        restarts=args.restarts,
        watch=WatchSettings(args.stall_timeout_s, args.probe_interval_s),
        health_port=args.health_port,
    )


def announce(server: TritonServer, ready_s: float) -> None:
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
