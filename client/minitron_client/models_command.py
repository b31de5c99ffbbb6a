"""`minitron models`: which models a server has, and in which vocabulary each can be asked.

It knows how to print metadata; the client finds it out.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from minitron_client.client import MinitronClient
from minitron_client.connection_flags import add_connection_flags, client_options
from minitron_client.errors import (
    MinitronClientError,
    ServerConnectionError,
    UnsupportedError,
)
from minitron_client.readiness import servers_of
from minitron_client.results import Health
from minitron_client.tensors import ModelMetadata, TensorSpec
from minitron_client.vocabulary import vocabulary_of


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minitron models`."""
    parser.add_argument("--tensors", action="store_true", help="list each model's inputs and outputs")
    add_connection_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print a table of the models, and the same as JSON on the last line.

    Raises:
        ServerConnectionError: no server at the address.
    """
    options = client_options(args)
    with MinitronClient(**options) as client:
        health, url = client.health(), client.url
    if not health.live:
        raise ServerConnectionError(f"no live server at {url}: {health.reason}", advice=health.advice)
    rows = [_row(options, name, health) for name in sorted(health.models)]
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:<{width}}  {_told(row)}")
        if args.tensors and row["ready"]:
            print(_tensors(row))
    print(json.dumps({"url": url, "models": rows}))
    return 0


def _row(options: dict[str, Any], name: str, health: Health) -> dict[str, Any]:
    servers = servers_of(health, name)
    row: dict[str, Any] = {"name": name, "ready": bool(servers)}
    if not servers:
        return row
    try:
        with MinitronClient(**{**options, "url": servers[0]}) as client:
            metadata = client.metadata(name)
    except MinitronClientError as error:  # it went meanwhile
        print(f"minitron: {name}: {error}", file=sys.stderr)
        return {**row, "ready": False}
    return {
        **row,
        "vocabulary": _vocabulary(metadata),
        "platform": metadata.platform,
        "versions": list(metadata.versions),
        "decoupled": metadata.is_decoupled,
        "inputs": [_tensor(spec) for spec in metadata.inputs.values()],
        "outputs": [_tensor(spec) for spec in metadata.outputs.values()],
    }


def _vocabulary(metadata: ModelMetadata) -> str | None:
    try:
        return vocabulary_of(metadata).name
    except UnsupportedError:
        return None


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _told(row: dict[str, Any]) -> str:
    if not row["ready"]:
        return "not ready"
    asked = f"takes {row['vocabulary']}" if row["vocabulary"] else "a step of another model"
    streams = {True: "streams", False: "answers once", None: "policy not told"}[row["decoupled"]]
    return f"ready, {asked}, {streams}"


def _tensors(row: dict[str, Any]) -> str:
    return "\n".join(
        f"    {kind} {tensor['name']} {tensor['datatype']} {tensor['shape']}"
        for kind in ("inputs", "outputs")
        for tensor in row[kind]
    )
