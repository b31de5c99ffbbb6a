"""`minitron openai`: an OpenAI-compatible HTTP server in front of a Minitron server's gRPC port.

It knows flags and the order in which the door is put up and taken down.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_client.flag_types import UsageError, checked, integer, seconds
from minitron_client.settings import check_urls

if TYPE_CHECKING:
    from minitron_client.openai.door import Door, DoorSettings
    from minitron_client.openai.http_server import HttpSettings

_log = logging.getLogger("minitron_client.openai")
KEYS_VARIABLE = "MINITRON_OPENAI_API_KEY"
DEFAULT_PORT = 9000
DEFAULT_MODEL = "tensorrt_llm_bls"
DEFAULT_TIMEOUT_S = 600.0
DEFAULT_CHAT_TOKENS = 512
DEFAULT_DRAIN_S = 30
DEFAULT_BODY_BYTES = 8 * 2**20
_CANCEL_S = 5.0


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minitron openai`."""
    parser.add_argument(
        "--url", type=checked(check_urls), help="HOST:PORT of gRPC (default $MINITRON_URL or 127.0.0.1:8001)"
    )
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="Triton model that answers (default %(default)s)"
    )
    parser.add_argument(
        "--served-model-name", action="append", default=[], metavar="NAME",
        help="name that requests give, repeatable; answers carry the first (default: the Triton model's)",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument(
        "--port", type=integer(0, 65535), default=DEFAULT_PORT, metavar="N",
        help="0 takes a free one (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE",
        help=f"keys that are accepted, one a line (default: those in ${KEYS_VARIABLE})",
    )  # fmt: skip
    parser.add_argument(
        "--allow-anonymous", action="store_true",
        help="let anybody in without an API key: from beyond this machine, and by any host name",
    )  # fmt: skip
    parser.add_argument(
        "--allow-origin", type=_origin, action="append", default=[], metavar="ORIGIN",
        help="another site whose pages may call, such as https://chat.example.org; repeatable (default none)",
    )  # fmt: skip
    parser.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="serve HTTPS with this certificate chain (PEM)"
    )
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key (PEM)")
    parser.add_argument(
        "--tokenizer-dir", type=Path, metavar="DIR",
        help="the served model's tokenizer, for chat and log probabilities (default: ask the server)",
    )  # fmt: skip
    for flag, kind, default, text in (
        ("--timeout-s", seconds, DEFAULT_TIMEOUT_S, "deadline of a request at the server"),
        (
            "--default-chat-tokens",
            integer(1),
            DEFAULT_CHAT_TOKENS,
            "length of a chat answer where none is asked for",
        ),
        ("--max-body-bytes", integer(1), DEFAULT_BODY_BYTES, "largest request body"),
        ("--drain-timeout-s", integer(1), DEFAULT_DRAIN_S, "how long open answers may go on after SIGTERM"),
    ):
        parser.add_argument(
            flag, type=kind, default=default, metavar="N", help=f"{text} (default %(default)s)"
        )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM; the address is printed as JSON once requests are taken."""
    from minitron_client.openai.http_server import HttpSettings

    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    http = HttpSettings(args.host, args.port, args.drain_timeout_s, args.tls_cert, args.tls_key)
    settings = _settings(args)
    if asyncio.run(_serve(args, http, settings)) == signal.SIGINT:
        raise KeyboardInterrupt
    return 0


def _settings(args: argparse.Namespace) -> DoorSettings:
    from minitron_client.openai.api_keys import read_api_keys
    from minitron_client.openai.door import DoorSettings
    from minitron_client.openai.http_server import LOOPBACK

    keys = read_api_keys(args.api_key_file)
    if not keys and args.host not in LOOPBACK and not args.allow_anonymous:
        raise UsageError(
            f"--host {args.host} lets other machines in and there is no API key; give --api-key-file, set "
            f"{KEYS_VARIABLE}, or say --allow-anonymous"
        )
    return DoorSettings(
        model=args.model,
        served_names=tuple(args.served_model_name) or (args.model,),
        keys=keys,
        timeout_s=args.timeout_s,
        default_chat_tokens=args.default_chat_tokens,
        max_body_bytes=args.max_body_bytes,
        origins=tuple(args.allow_origin),
        host_names=frozenset() if keys or args.allow_anonymous else LOOPBACK,
    )


def _origin(text: str) -> str:
    """An origin as browsers send it; `*` would let every page of the web in and is none."""
    if not re.fullmatch(r"https?://[^\s/*]+", text):
        raise argparse.ArgumentTypeError(f"{text} is not SCHEME://HOST[:PORT] without a path")
    return text


async def _warn_of_faults(door: Door, url: str) -> None:
    """One line where the server cannot answer yet; it may come later, so the door stays open."""
    fault = await door.fault()
    if fault:
        _log.warning("%s cannot answer this door's requests yet: %s", url, fault)


async def _serve(args: argparse.Namespace, http: HttpSettings, settings: DoorSettings) -> signal.Signals:
    from minitron_client import AsyncMinitronClient
    from minitron_client.openai.app import make_app
    from minitron_client.openai.door import Door
    from minitron_client.openai.http_server import listen, serve, url_of
    from minitron_client.openai.token_path import ENGINE_MODEL, PromptRouter
    from minitron_client.openai.tokenizer_source import tokenizer_source

    texts = AsyncMinitronClient(args.url, model=args.model, timeout_s=settings.timeout_s)
    token_ids = AsyncMinitronClient(args.url, model=ENGINE_MODEL, timeout_s=settings.timeout_s)
    try:
        load_tokenizer = await tokenizer_source(args.tokenizer_dir, texts)
        door = Door(PromptRouter(texts, token_ids, load_tokenizer), settings, load_tokenizer)
        app = make_app(door)

        def drain() -> None:
            door.is_draining = True

        with listen(http) as listening:
            address = {"url": f"{url_of(http, listening)}/v1", "models": list(settings.served_names)}
            print(json.dumps(address | {"triton": texts.url}), flush=True)
            trying = asyncio.create_task(_warn_of_faults(door, texts.url))
            ended_by = await serve(app, http, listening, on_drain=drain, on_drain_over=door.running.end_all)
            trying.cancel()
            await asyncio.gather(trying, return_exceptions=True)
        await door.running.wait(_CANCEL_S)
        return ended_by
    finally:
        await asyncio.gather(texts.close(), token_ids.close())
