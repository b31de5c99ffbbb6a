"""`minitron health`: is a server ready, with which models, and what is it doing.

It knows how to print a `Health` and a `ServerLoad`; the client and load.py find them out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import time
import urllib.parse
from typing import Any

from minitron_client.client import MinitronClient
from minitron_client.connection_flags import add_connection_flags, client_options
from minitron_client.errors import (
    DeadlineError,
    InvalidValueError,
    MinitronClientError,
    NotFoundError,
    ServerConnectionError,
)
from minitron_client.flag_types import checked, seconds
from minitron_client.load import DEFAULT_METRICS_PORT, ServerLoad, read_load
from minitron_client.readiness import ReadyWait, missing, why_not_ready
from minitron_client.results import Health
from minitron_client.settings import DEFAULT_CONNECT_TIMEOUT_S, VariableError

EXIT_READY, EXIT_NOT_READY = 0, 1
METRICS_URL_VARIABLE = "MINITRON_METRICS_URL"
NO_METRICS = "none"


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minitron health`."""
    parser.add_argument(
        "--wait-s", type=seconds, metavar="S", help="wait so long at most until server and model are ready"
    )
    parser.add_argument(
        "--metrics-url",
        type=checked(_metrics_url),
        metavar="URL",
        help=f"the server's Prometheus metrics (default ${METRICS_URL_VARIABLE} or "
        f"http://HOST:{DEFAULT_METRICS_PORT}/metrics of the gRPC host); {NO_METRICS}: do not ask",
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
    """Print tables of models and load, and the same as JSON on the last line; 1 when not ready.

    Raises:
        VariableError: the metrics' URL in the environment is none.
    """
    options, metrics_url = client_options(args), args.metrics_url or _metrics_url_of_environment()
    with MinitronClient(**options) as client:
        health, said = _ask(client, args)
        model, url = client.model, client.url
    said = said or why_not_ready(health, model)
    versions = _versions(options, health)
    load, no_load = _load(args, metrics_url, health)
    if not args.json:
        print(_table(url, health, versions, said))
        if load or no_load:
            print(_load_table(load) if load else f"  load      unknown: {no_load}")
    document = {
        "url": url,
        **_state(health),
        "ready": not said,
        "model": model,
        "reason": said,
        "servers": {one: _state(state) for one, state in health.servers.items()},
        "versions": versions,
        "load": dataclasses.asdict(load) if load else None,
        "load_reason": no_load,
    }
    print(json.dumps(document))
    return EXIT_NOT_READY if said else EXIT_READY


def _ask(client: MinitronClient, args: argparse.Namespace) -> tuple[Health, str]:
    """The state, once it is ready or the time to wait is over, and why a wait was in vain or nothing told."""
    wait = None if args.wait_s is None else ReadyWait(client.url, client.model, args.wait_s)
    limit_s = args.timeout_s if wait is None else client.settings.connect_timeout_s
    while True:
        try:
            health = client.health(timeout_s=limit_s if wait is None else min(wait.left_s, limit_s))
        except MinitronClientError as error:  # it is there, and does not tell: a key, another protocol
            return Health(live=False, ready=False, advice=error.advice), error.message
        try:
            pause_s = None if wait is None else wait.pause_s(health)
        except (DeadlineError, NotFoundError) as error:
            return health, error.message
        if pause_s is None:
            return health, ""
        time.sleep(pause_s)


def _state(health: Health) -> dict[str, object]:
    """A state as JSON, without those of the servers it is made of."""
    told = {item.name: getattr(health, item.name) for item in dataclasses.fields(health)}
    del told["servers"]
    return told


def _versions(options: dict[str, Any], health: Health) -> dict[str, list[str]]:
    """Versions of each model on the servers that have it ready; one that is being unloaded has none."""
    found: dict[str, list[str]] = {name: [] for name in health.models}
    for url, state in health.servers.items():
        ready = [name for name, is_ready in state.models.items() if is_ready]
        if not ready:
            continue
        with MinitronClient(**{**options, "url": url}) as client:
            for name in ready:
                with contextlib.suppress(MinitronClientError):
                    found[name] += client.metadata(name).versions
    return {name: list(dict.fromkeys(versions)) for name, versions in found.items()}


def _load(args: argparse.Namespace, url: str | None, health: Health) -> tuple[ServerLoad | None, str]:
    """The load, of the first server that lives unless a URL is given; or why it is not known."""
    live = [one for one, state in health.servers.items() if state.live]
    if not live:
        return None, ""
    if url == NO_METRICS:
        return None, "not asked for"
    host = live[0].rpartition(":")[0]
    url = url or f"http://{host}:{DEFAULT_METRICS_PORT}/metrics"
    try:
        return read_load(url, interval_s=args.interval_s, timeout_s=args.timeout_s), ""
    except ServerConnectionError as error:
        return None, error.message


def _metrics_url(text: str) -> str:
    """The URL of a server's metrics, or the word for none.

    Raises:
        InvalidValueError: it is neither.
    """
    try:
        parts = urllib.parse.urlsplit(text)
        is_http = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_http = False
    if text != NO_METRICS and not is_http:
        raise InvalidValueError(
            f"{text!r} is not a URL of HTTP; give http://HOST:8002/metrics, or {NO_METRICS}"
        )
    return text


def _metrics_url_of_environment() -> str | None:
    given = os.environ.get(METRICS_URL_VARIABLE)
    try:
        return _metrics_url(given) if given else None
    except InvalidValueError as error:
        raise VariableError(f"{METRICS_URL_VARIABLE}: {error.message}") from None


def _table(url: str, health: Health, versions: dict[str, list[str]], said: str) -> str:
    rows = [f"{url}  {_words(health, said)}"]
    if len(health.servers) > 1:
        rows += [f"  {one}  {_words(state, _missing_of(state))}" for one, state in health.servers.items()]
    if health.advice:
        rows.append(f"  {health.advice}")
    width = max((len(name) for name in health.models), default=0)
    rows += [
        f"  {name:<{width}}  {_ready_words(is_ready, versions[name])}"
        for name, is_ready in sorted(health.models.items())
    ]
    return "\n".join(rows)


def _missing_of(state: Health) -> str:
    return "" if state.ready else missing(state)


def _words(health: Health, said: str) -> str:
    if not said:
        return "ready"
    return f"{'live, not ready' if health.live else 'not live'}: {said}"


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
