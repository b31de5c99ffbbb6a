"""`minitron health`: is a server ready, with which models, and what is it doing.

It knows how to print a `Health` and a `ServerLoad`; the client and load.py find them out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os

from minitron_client.client import MinitronClient
from minitron_client.connection_flags import add_connection_flags, client_options
from minitron_client.errors import MinitronClientError, ServerConnectionError, error_from_status
from minitron_client.flag_types import seconds
from minitron_client.load import DEFAULT_METRICS_PORT, ServerLoad, read_load
from minitron_client.results import Health
from minitron_client.settings import DEFAULT_CONNECT_TIMEOUT_S

EXIT_READY, EXIT_NOT_READY = 0, 1
METRICS_URL_VARIABLE = "MINITRON_METRICS_URL"


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minitron health`."""
    parser.add_argument(
        "--wait-s", type=seconds, metavar="S", help="wait so long at most until server and model are ready"
    )
    parser.add_argument(
        "--metrics-url",
        metavar="URL",
        help=f"the server's Prometheus metrics (default ${METRICS_URL_VARIABLE} or "
        f"http://HOST:{DEFAULT_METRICS_PORT}/metrics of the gRPC host); none: do not ask",
    )
    parser.add_argument(
        "--interval-s",
        type=seconds,
        default=1.0,
        metavar="S",
        help="tokens per second are counted for so long (default %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="the JSON document alone")
    add_connection_flags(parser, timeout_s=DEFAULT_CONNECT_TIMEOUT_S)


def run(args: argparse.Namespace) -> int:
    """Print tables of models and load, and the same as JSON on the last line; 1 when not ready."""
    with MinitronClient(**client_options(args)) as client:
        health = (
            client.health(timeout_s=args.timeout_s)
            if args.wait_s is None
            else client.wait_until_ready(args.wait_s)
        )
        versions = _versions(client, health)
        load, no_load = _load(args, client.settings.urls[0]) if health.live else (None, "")
    if not args.json:
        print(_table(client.url, health, versions))
        if not health.live:
            print(f"  {error_from_status('UNAVAILABLE', health.reason).advice}")
        if load or no_load:
            print(_load_table(load) if load else f"  load      unknown: {no_load}")
    document = {
        "url": client.url,
        **dataclasses.asdict(health),
        "versions": versions,
        "load": dataclasses.asdict(load) if load else None,
        "load_reason": no_load,
    }
    print(json.dumps(document))
    return EXIT_READY if health.ready else EXIT_NOT_READY


def _versions(client: MinitronClient, health: Health) -> dict[str, list[str]]:
    """Versions of each model that is ready; one that is being unloaded has none."""
    versions: dict[str, list[str]] = {}
    for name, is_ready in health.models.items():
        try:
            versions[name] = list(client.metadata(name).versions) if is_ready else []
        except MinitronClientError:
            versions[name] = []
    return versions


def _load(args: argparse.Namespace, grpc_url: str) -> tuple[ServerLoad | None, str]:
    """The load, or why it is not known."""
    host = grpc_url.rpartition(":")[0]
    default = f"http://{host}:{DEFAULT_METRICS_PORT}/metrics"
    url = args.metrics_url or os.environ.get(METRICS_URL_VARIABLE) or default
    if url == "none":
        return None, "not asked for"
    try:
        return read_load(url, interval_s=args.interval_s, timeout_s=args.timeout_s), ""
    except ServerConnectionError as error:
        return None, error.message


def _table(url: str, health: Health, versions: dict[str, list[str]]) -> str:
    state = "ready" if health.ready else "live, not ready" if health.live else f"not live: {health.reason}"
    width = max((len(name) for name in health.models), default=0)
    rows = [
        f"  {name:<{width}}  {_ready_words(is_ready, versions[name])}"
        for name, is_ready in sorted(health.models.items())
    ]
    return "\n".join([f"{url}  {state}", *rows])


def _ready_words(is_ready: bool, versions: list[str]) -> str:
    if not is_ready:
        return "not ready"
    return f"ready, version {', '.join(versions)}" if versions else "ready"


def _load_table(load: ServerLoad) -> str:
    ended = ", ".join(f"{count} {outcome}" for outcome, count in load.outcomes.items() if count)
    kv_cache = "unknown"
    if load.kv_cache_used is not None:
        kv_cache = f"{100 * load.kv_cache_used:.1f} % of {load.kv_cache_tokens or 'unknown'} tokens"
    return "\n".join(
        [
            f"  requests  {_or_unknown(load.running_requests)} running, "
            f"{_or_unknown(load.waiting_requests)} waiting; ended: {ended or 'none'}",
            f"  KV cache  {kv_cache}",
            f"  speed     {_or_unknown(load.output_tokens_per_s, '.1f')} tokens/s, "
            f"{_or_unknown(load.requests_per_s, '.1f')} requests/s over {load.interval_s:.1f} s",
        ]
    )


def _or_unknown(value: float | None, form: str = "d") -> str:
    return "unknown" if value is None else format(value, form)
