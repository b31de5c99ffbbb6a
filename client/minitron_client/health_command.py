"""`minitron health`: is a server ready, and with which models.

It knows how to print a `Health`; the client finds it out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from minitron_client.client import MinitronClient
from minitron_client.results import Health
from minitron_client.settings import DEFAULT_CONNECT_TIMEOUT_S, DEFAULT_URL, URL_VARIABLE

EXIT_READY, EXIT_NOT_READY = 0, 1


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minitron health`."""
    parser.add_argument("--url", help=f"HOST:PORT of gRPC (default ${URL_VARIABLE} or {DEFAULT_URL})")
    parser.add_argument(
        "--timeout-s", type=float, default=DEFAULT_CONNECT_TIMEOUT_S, metavar="S", help="default %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    """Print a table of the models, and the same as JSON on the last line; 1 when not ready."""
    with MinitronClient(args.url) as client:
        health = client.health(timeout_s=args.timeout_s)
        print(_table(client.url, health))
    print(json.dumps({"url": client.url, **dataclasses.asdict(health)}))
    return EXIT_READY if health.ready else EXIT_NOT_READY


def _table(url: str, health: Health) -> str:
    state = "ready" if health.ready else "live, not ready" if health.live else f"not live: {health.reason}"
    width = max((len(name) for name in health.models), default=0)
    rows = [
        f"  {name:<{width}}  {'ready' if is_ready else 'not ready'}"
        for name, is_ready in sorted(health.models.items())
    ]
    return "\n".join([f"{url}  {state}", *rows])
