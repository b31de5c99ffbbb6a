"""`minitron generate`: one completion from a server, as text or as JSON.

It knows flags and printing; what a flag means is `SamplingParams`' business.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from minitron_client.client import MinitronClient
from minitron_client.results import Completion
from minitron_client.sampling import DEFAULT_MAX_TOKENS, SamplingParams
from minitron_client.settings import (
    DEFAULT_CONNECT_TIMEOUT_S,
    DEFAULT_MODEL,
    DEFAULT_TIMEOUT_S,
    DEFAULT_URL,
    URL_VARIABLE,
)

# flag (and field of SamplingParams), type, help
_NUMBER_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("temperature", float, "above 1 flattens, below 1 sharpens; needs --top-p or --top-k"),
    ("top_k", int, "sample from the K likeliest tokens"),
    ("top_p", float, "sample from the likeliest tokens that reach probability P"),
    ("seed", int, "makes sampling repeatable"),
    ("repetition_penalty", float, "above 1 discourages tokens that occurred"),
    ("presence_penalty", float, "subtracted once for a token that occurred"),
    ("frequency_penalty", float, "subtracted for each time a token occurred"),
    ("min_tokens", int, "no end of text before this many tokens"),
)


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minitron generate`."""
    parser.add_argument("prompt", metavar="PROMPT", help="text to go on from; - reads it from stdin")
    parser.add_argument("--url", help=f"HOST:PORT of gRPC (default ${URL_VARIABLE} or {DEFAULT_URL})")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model that answers (default %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=DEFAULT_MAX_TOKENS, metavar="N", help="default %(default)s"
    )
    for name, kind, text in _NUMBER_FLAGS:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=text
        )
    for name, text in (("stop", "end after this text"), ("bad", "never generate this text")):
        parser.add_argument(
            f"--{name}-word", dest=f"{name}_words", action="append", default=[], metavar="TEXT",
            help=f"{text}; may be repeated",
        )  # fmt: skip
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")
    parser.add_argument("--json", action="store_true", help="one JSON document on the last line of stdout")
    parser.add_argument(
        "--timeout-s", type=float, default=DEFAULT_TIMEOUT_S, metavar="S", help="default %(default)s"
    )
    parser.add_argument(
        "--connect-timeout-s", type=float, default=DEFAULT_CONNECT_TIMEOUT_S, metavar="S",
        help="default %(default)s",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Generate and print; Ctrl-C cancels the request on the server on its way out."""
    sampling = _sampling(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    with MinitronClient(
        args.url, model=args.model, timeout_s=args.timeout_s, connect_timeout_s=args.connect_timeout_s
    ) as client:
        completion = (
            _print_stream(client, prompt, sampling)
            if args.stream
            else client.generate(prompt, sampling=sampling)
        )
    if not args.stream and not args.json:
        print(completion.text)
    if args.json:
        print(json.dumps({"model": args.model, "url": client.url, **dataclasses.asdict(completion)}))
    print(_summary(completion), file=sys.stderr)
    return 0


def _sampling(args: argparse.Namespace) -> SamplingParams:
    names = ("max_tokens", "stop_words", "bad_words", *(name for name, _, _ in _NUMBER_FLAGS))
    return SamplingParams.of({name: getattr(args, name) for name in names})


def _print_stream(client: MinitronClient, prompt: str, sampling: SamplingParams) -> Completion:
    with client.stream(prompt, sampling=sampling) as stream:
        for chunk in stream:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
        print()
        return stream.final()


def _summary(completion: Completion) -> str:
    """One line for stderr: how it ended, how many tokens, how fast."""
    timings, tokens = completion.timings, completion.usage.output_tokens
    parts = [f"finish reason {completion.finish_reason or 'not told'}"]
    if tokens is not None:
        parts.append(f"{tokens} tokens")
    if timings.ttft_s is not None:
        parts.append(f"first after {1000 * timings.ttft_s:.0f} ms")
    parts.append(f"{timings.total_s:.2f} s in all")
    return f"minitron: {', '.join(parts)}"
