"""`minitron generate`: completions from a server: of one prompt as text or JSON, or of a file of prompts.

It knows flags and printing; prompts in files are `batch_file.py`'s.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from minitron_client.client import MinitronClient
from minitron_client.connection_flags import add_connection_flags, client_options
from minitron_client.errors import InvalidValueError, MinitronClientError, StreamBrokenError
from minitron_client.flag_types import UsageError, integer
from minitron_client.results import Completion
from minitron_client.sampling import SamplingParams
from minitron_client.sampling_flags import add_sampling_flags, sampling_of

DEFAULT_CONCURRENCY = 32


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minitron generate`."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to go on from; - reads stdin")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from a file")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")
    parser.add_argument("--json", action="store_true", help="one JSON document on the last line of stdout")
    many = parser.add_argument_group("many prompts")
    many.add_argument(
        "--batch", type=Path, metavar="FILE.jsonl",
        help='a prompt a line: "text", or {"prompt": …, "id": …, "max_tokens": …}; - reads stdin',
    )  # fmt: skip
    many.add_argument(
        "--output", type=Path, metavar="FILE.jsonl",
        help="an answer a line, in the same order; run again, only what is missing or failed is asked",
    )  # fmt: skip
    many.add_argument(
        "--concurrency", type=integer(1), default=DEFAULT_CONCURRENCY, metavar="N",
        help="requests at once (default %(default)s)",
    )  # fmt: skip
    add_sampling_flags(parser)
    add_connection_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Generate and print; Ctrl-C cancels on the server on its way out.

    Returns:
        0 when every completion came; 1 when one of a batch failed.

    Raises:
        UsageError: flags that do not go together.
    """
    _check_together(args)
    sampling = sampling_of(args)
    if args.batch is not None:
        return _run_batch(args, sampling)
    prompt = _prompt(args)
    with MinitronClient(**client_options(args)) as client:
        completion = _generate(client, prompt, sampling, is_streamed=args.stream)
        url = client.url
    if not args.stream and not args.json:
        print(completion.text)
    if args.json:
        print(json.dumps({"model": args.model, "url": url, **dataclasses.asdict(completion)}))
    print(_summary(completion), file=sys.stderr)
    return 0


def _check_together(args: argparse.Namespace) -> None:
    if (args.batch is None) != (args.output is None):
        raise UsageError("--batch and --output belong together; give both")
    if args.batch is not None:
        has_own = args.prompt is not None or args.prompt_file is not None or args.stream
        if has_own:
            raise UsageError("--batch has its own prompts; leave out PROMPT, --prompt-file and --stream")
    elif (args.prompt is None) == (args.prompt_file is None):
        raise UsageError("give one of PROMPT, - for stdin, --prompt-file and --batch")


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt_file is not None:
        try:
            return str(args.prompt_file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise InvalidValueError(
                f"--prompt-file {args.prompt_file} is not UTF-8: {error.reason}"
            ) from error
    return sys.stdin.read() if args.prompt == "-" else str(args.prompt)


def _run_batch(args: argparse.Namespace, sampling: SamplingParams) -> int:
    from minitron_client.batch_file import complete_file

    report = complete_file(
        args.batch, args.output, sampling, client_options(args), concurrency=args.concurrency
    )
    print(json.dumps(report))
    return 1 if report["failed"] else 0


def _generate(
    client: MinitronClient, prompt: str, sampling: SamplingParams, *, is_streamed: bool
) -> Completion:
    try:
        if is_streamed:
            return _print_stream(client, prompt, sampling)
        return client.generate(prompt, sampling=sampling)
    except StreamBrokenError as error:  # its own advice is for who holds the stream
        cut = "the text ends where it broke off; " if is_streamed else ""
        raise StreamBrokenError(
            error.message,
            code=error.code,
            request_id=error.request_id,
            advice=f"{cut}ask again for the whole",
        ) from error


def _print_stream(client: MinitronClient, prompt: str, sampling: SamplingParams) -> Completion:
    with client.stream(prompt, sampling=sampling) as stream:
        is_begun = False
        try:
            for chunk in stream:
                is_begun = sys.stdout.write(chunk.text) > 0 or is_begun
                sys.stdout.flush()
        except MinitronClientError:
            if is_begun:
                print()  # what is said next has a line of its own
            raise
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
