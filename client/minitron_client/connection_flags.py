"""The flags by which every command of the client says which server to ask, and how.

It knows flags and what they become for `MinitronClient`. Secrets come from files or the environment: a
command line is for everyone to see.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from minitron_client.errors import InvalidValueError
from minitron_client.flag_types import UsageError, checked, integer, seconds
from minitron_client.settings import (
    API_KEY_VARIABLE,
    DEFAULT_CONNECT_TIMEOUT_S,
    DEFAULT_MAX_RETRIES,
    DEFAULT_MODEL,
    DEFAULT_TIMEOUT_S,
    DEFAULT_URL,
    TLS_VARIABLE,
    TLS_VARIABLES,
    URL_VARIABLE,
    TlsConfig,
    check_urls,
    checked_headers,
)


def add_connection_flags(parser: argparse.ArgumentParser, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Add the flags; `client_options` reads them."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--url", type=checked(check_urls), metavar="URL",
        help=f"HOST:PORT of gRPC, or several with commas (default ${URL_VARIABLE} or {DEFAULT_URL})",
    )  # fmt: skip
    group.add_argument(
        "--model", type=_model, default=DEFAULT_MODEL, help="model that answers (default %(default)s)"
    )
    group.add_argument(
        "--timeout-s", type=seconds, default=timeout_s, metavar="S", help="default %(default)s"
    )
    group.add_argument(
        "--connect-timeout-s", type=seconds, default=DEFAULT_CONNECT_TIMEOUT_S, metavar="S",
        help="default %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--max-retries", type=integer(0), default=DEFAULT_MAX_RETRIES, metavar="N", help="default %(default)s"
    )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"holds the key (default ${API_KEY_VARIABLE})",
    )
    group.add_argument("--tls", action="store_true", help=f"use TLS (default ${TLS_VARIABLE})")
    for name, variable in TLS_VARIABLES.items():
        flag = f"--tls-{name.removesuffix('_file').replace('_', '-')}"
        metavar = "FILE" if name.endswith("_file") else "NAME"
        group.add_argument(flag, dest=f"tls_{name}", metavar=metavar, help=f"default ${variable}")
    group.add_argument(
        "--header",
        type=checked(_header),
        action="append",
        default=[],
        metavar="NAME:VALUE",
        help="further gRPC metadata",
    )


def client_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `MinitronClient` and of `AsyncMinitronClient`.

    Raises:
        UsageError: a certificate without its key, or the other way round.
        InvalidValueError: a file cannot be read.
    """
    return {
        "url": args.url,
        "model": args.model,
        "timeout_s": args.timeout_s,
        "connect_timeout_s": args.connect_timeout_s,
        "max_retries": args.max_retries,
        "tls": _tls(args),
        "api_key": _api_key(args.api_key_file),
        "headers": dict(args.header),
    }


def _tls(args: argparse.Namespace) -> TlsConfig | None:
    given = {name: value for name in TLS_VARIABLES if (value := getattr(args, f"tls_{name}"))}
    if ("cert_file" in given) != ("key_file" in given):
        raise UsageError("mutual TLS needs --tls-cert and --tls-key; give both or neither")
    return TlsConfig(**given) if given or args.tls else None


def _api_key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValueError(f"--api-key-file {path} cannot be read: {error}") from error
    if not key:
        raise InvalidValueError(f"--api-key-file {path} is empty; it must hold the key")
    return key


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon:
        raise InvalidValueError(f"{text!r} has no colon; write NAME:VALUE")
    checked_headers({name.strip(): value.strip()})
    return name.strip(), value.strip()


def _model(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a model")
    return text
