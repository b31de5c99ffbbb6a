"""`minitron bench`: load a server, or compare or draw results that were measured before.

It knows flags, files and printing; what a flag means is its module's business.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib.util
import json
import signal
import sys
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_client.bench.arrivals import ARRIVALS
from minitron_client.bench.lengths import FORMS, parse_lengths
from minitron_client.bench.load import Extent, LoadPoint, closed_points, open_points
from minitron_client.bench.refusal import BenchError, BenchUsageError
from minitron_client.bench.slo import SLO_METRICS, parse_slos
from minitron_client.bench.trace import TraceRow, mean_rate, read_trace
from minitron_client.connection_flags import add_connection_flags, client_options
from minitron_client.errors import InvalidValueError
from minitron_client.flag_types import integer
from minitron_client.output_file import check_output, write_whole

if TYPE_CHECKING:
    from minitron_client.bench.fleet import Fleet
    from minitron_client.bench.result import BenchResult
    from minitron_client.bench.sweep import BenchSettings, Sweep

EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
DEFAULT_PROMPT_TOKENS, DEFAULT_OUTPUT_TOKENS, DEFAULT_DURATION_S = "128", "64", 10.0
MAX_PROCESSES = 32
FILE_FLAGS = ("json", "csv", "requests_csv", "html")
_MEASURING_FLAGS = tuple(
    [
        *("url", "concurrency", "request_rate", "arrival", "trace", "num_requests", "duration_s"),
        *("processes", "requests_csv"),
    ]
)


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minitron bench`."""
    parser.epilog = (
        "Every request is streamed: without a stream there is no first token to take the time of. "
        "Exit 0: every measured request ended well; 1: refused, or a measured request failed (the result is "
        "printed and written all the same); 2: bad usage; 130: interrupted."
    )
    add_connection_flags(parser)
    parser.set_defaults(max_retries=0)  # a retry would hide a failure, and its wait
    _add_load(
        parser.add_argument_group("load", "one of --concurrency, --request-rate, or a trace with timestamps")
    )
    _add_workload(parser.add_argument_group("workload", f"lengths in tokens: {FORMS}"))
    _add_output(
        parser.add_argument_group("results", "stdout: a table, then one JSON document on the last line")
    )


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--concurrency", metavar="N,…", help="closed loop: requests in flight, such as 1,8,64")
    group.add_argument(
        "--request-rate", metavar="R,…", help="open loop: arrivals per second, such as 0.5,2,10"
    )
    group.add_argument("--arrival", choices=list(ARRIVALS), help="of --request-rate (default poisson)")
    group.add_argument("--num-requests", type=int, metavar="N", help="measured requests per load point")
    group.add_argument(
        "--duration-s", type=float, metavar="S",
        help=f"seconds per load point in which requests start (default {DEFAULT_DURATION_S:g})",
    )  # fmt: skip
    group.add_argument(
        "--warmup-requests", type=int, metavar="N",
        help="sent first and not measured (default: one for each in flight, or a second of arrivals)",
    )  # fmt: skip
    group.add_argument(
        "--repeats", type=int, default=1, metavar="N",
        help="runs of every load point, in turns; 3 or more give noise bounds (default %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--processes", type=integer(1, MAX_PROCESSES), metavar="N",
        help="that share the load, where one core is too slow for it; the warnings tell (default 1)",
    )  # fmt: skip


def _add_workload(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt-tokens", metavar="LENGTHS", help=f"default {DEFAULT_PROMPT_TOKENS}")
    group.add_argument("--output-tokens", metavar="LENGTHS", help=f"default {DEFAULT_OUTPUT_TOKENS}")
    group.add_argument(
        "--trace", type=Path, metavar="FILE.jsonl",
        help="a request a line: prompt or input_tokens, output_tokens, and perhaps timestamp (seconds)",
    )  # fmt: skip
    group.add_argument(
        "--natural-end",
        action="store_true",
        help="let the model end early; else min_tokens holds it to the length",
    )
    group.add_argument(
        "--sampling", metavar="NAME=VALUE,…", help="sampling options, such as temperature=0.8,top_p=0.9"
    )
    group.add_argument(
        "--tokenizer", type=Path, metavar="FILE",
        help="tokenizer.json, or its folder, to make prompts with (default: the server's own)",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of lengths, words, arrivals (default 0)"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--slo", metavar="NAME=MS,…", help=f"what a good request meets, of {', '.join(SLO_METRICS)}"
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="the whole result")
    group.add_argument("--csv", type=Path, metavar="FILE", help="a row a load point and repeat")
    group.add_argument("--requests-csv", type=Path, metavar="FILE", help="a row a request")
    group.add_argument("--html", type=Path, metavar="FILE", help="report with curves, in one file")
    group.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A.json", "B.json"),
        help="B against A, with noise bounds from repeats; measures nothing",
    )  # fmt: skip
    group.add_argument(
        "--draw", type=Path, metavar="A.json", help="--html or --csv of a result; measures nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, compare or draw.

    Returns:
        0 done, 1 a measured request failed, 130 interrupted.

    Raises:
        BenchError: the flags, a file or the server cannot be used.
    """
    _check_files(args)
    if args.compare and args.draw:
        raise BenchUsageError("--compare and --draw contradict one another; give one of them")
    if args.compare or args.draw:
        _check_measures_nothing(args)
        return _compare(args) if args.compare else _draw(args)
    return _measure(args)


def _check_files(args: argparse.Namespace) -> None:
    """Before any work: every file can be written, and what draws the report is installed."""
    for name in FILE_FLAGS:
        path: Path | None = getattr(args, name)
        if path is not None:
            _check_file(path, f"--{name.replace('_', '-')}")
    for package in ("jinja2", "matplotlib") if args.html else ():
        if importlib.util.find_spec(package) is None:
            raise BenchError(
                f"--html needs the package {package}; install it: pip install 'minitron-trtllm[bench]'"
            )


def _check_file(path: Path, flag: str) -> None:
    try:
        check_output(path, flag)
    except InvalidValueError as error:
        raise BenchError(error.message) from None


def _check_measures_nothing(args: argparse.Namespace) -> None:
    mode = "--compare" if args.compare else "--draw"
    for name in _MEASURING_FLAGS:
        if getattr(args, name) is not None:
            raise BenchUsageError(f"{mode} measures nothing, so --{name.replace('_', '-')} contradicts it")
    if args.compare and args.csv:
        raise BenchUsageError("--compare writes no --csv; its last line of stdout is JSON")
    if args.draw and args.json:
        raise BenchUsageError("--draw writes no --json: it would be the same file")


def _compare(args: argparse.Namespace) -> int:
    from minitron_client.bench import comparison
    from minitron_client.bench.result import load_result
    from minitron_client.bench.table import comparison_table

    before, after = (load_result(path) for path in args.compare)
    ratios = comparison.compare(before, after)
    notes = comparison.comparison_notes(before, after)
    document = {
        "before": str(args.compare[0]),
        "after": str(args.compare[1]),
        "ratios": comparison.comparison_document(ratios),
        "notes": list(notes),
    }
    if args.html:
        from minitron_client.bench.report import write_report

        write_report(args.html, [before, after], _names(args.compare), ratios, notes)
    if args.json:
        write_whole(args.json, json.dumps(document, indent=1) + "\n")
    print(comparison_table(ratios))
    for note in notes:
        print(f"note: {note}")
    print(json.dumps(document))
    return EXIT_DONE


def _names(paths: list[Path]) -> list[str]:
    """Short names where they tell the files apart."""
    short = [path.name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def _draw(args: argparse.Namespace) -> int:
    from minitron_client.bench.result import load_result

    if not args.html and not args.csv:
        raise BenchUsageError("--draw needs --html FILE or --csv FILE")
    _write_files(load_result(args.draw), [], args)
    print(json.dumps({name: str(getattr(args, name)) for name in FILE_FLAGS if getattr(args, name)}))
    return EXIT_DONE


def _measure(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    sweep, is_interrupted = asyncio.run(_run_sweep(args, settings))
    result = sweep.result()
    try:
        _write_files(result, sweep.request_rows, args)
    finally:  # a file that fails takes nothing else with it
        _print_result(result)
    if is_interrupted:
        print("minitron: interrupted; what was measured until then is marked partial", file=sys.stderr)
        return EXIT_INTERRUPTED
    return _check_all_ok(result)


def _print_result(result: BenchResult) -> None:
    from minitron_client.bench.table import result_table

    document = result.document()
    print(result_table(result))
    for word, lines in (
        ("load", document["loops"].values()),
        ("note", result.notes),
        ("warning", result.warnings),
    ):
        for line in lines:
            print(f"{word}: {line}")
    print(json.dumps(document), flush=True)


def _check_all_ok(result: BenchResult) -> int:
    """A run in which a request failed has failed, though its failures are a result."""
    repeats = [repeat for point in result.points for repeat in point.repeats]
    num_requests = sum(repeat.num_requests for repeat in repeats)
    errors = [error for repeat in repeats for error in repeat.errors.values()]
    num_failed = sum(error.count for error in errors)
    if num_requests and not num_failed:
        return EXIT_DONE
    example = max(errors, key=lambda error: error.count).example if errors else "none was sent"
    said = f"{num_failed} of {num_requests} requests failed"
    if num_failed == num_requests:
        said = "no request succeeded"
    print(f"minitron: {said}: {example}", file=sys.stderr)
    return EXIT_FAILED


async def _run_sweep(args: argparse.Namespace, settings: BenchSettings) -> tuple[Sweep, bool]:
    """The sweep, run to its end or to Ctrl-C; a second Ctrl-C does not wait."""
    from minitron_client import AsyncMinitronClient
    from minitron_client.bench.progress import showing_progress
    from minitron_client.bench.sweep import Sweep

    loop = asyncio.get_running_loop()
    options = client_options(args)
    async with (
        AsyncMinitronClient(**options) as client,
        _fleet(settings.processes, options) as fleet,
        showing_progress() as on_progress,
    ):
        sweep = Sweep(client, settings, on_progress, fleet)
        work = asyncio.ensure_future(sweep.run())

        def interrupt() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            work.cancel()

        loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            await work
        except asyncio.CancelledError:
            return sweep, True
        finally:
            loop.remove_signal_handler(signal.SIGINT)
    return sweep, False


def _fleet(processes: int, options: dict[str, Any]) -> AbstractAsyncContextManager[Fleet | None]:
    """The processes that drive the load; none where this one does."""
    if processes == 1:
        return nullcontext()
    from minitron_client.bench.fleet import Fleet

    return Fleet(processes, options)


def settings_of(args: argparse.Namespace) -> BenchSettings:
    """The flags as settings; every contradiction is refused here, before any call.

    Raises:
        BenchUsageError: flags that say what cannot be; see its line.
        BenchError: the trace cannot be used.
    """
    from minitron_client.bench.sweep import BenchSettings

    trace = read_trace(args.trace) if args.trace else ()
    points = _points(args, trace)
    if trace and (args.prompt_tokens or args.output_tokens):
        raise BenchUsageError("--trace has lengths of its own; leave --prompt-tokens and --output-tokens out")
    return BenchSettings(
        points=points,
        extent=_extent(args, points, trace),
        prompt_tokens=parse_lengths(args.prompt_tokens or DEFAULT_PROMPT_TOKENS),
        output_tokens=parse_lengths(args.output_tokens or DEFAULT_OUTPUT_TOKENS),
        trace=trace,
        trace_sha256=hashlib.sha256(args.trace.read_bytes()).hexdigest() if args.trace else "",
        sampling=parse_sampling(args.sampling) if args.sampling else {},
        is_exact_output=not args.natural_end,
        slos=parse_slos(args.slo) if args.slo else (),
        repeats=args.repeats,
        seed=args.seed,
        tokenizer=args.tokenizer,
        timeout_s=args.timeout_s,
        processes=args.processes or 1,
    )


def _points(args: argparse.Namespace, trace: tuple[TraceRow, ...]) -> tuple[LoadPoint, ...]:
    if args.concurrency and args.request_rate:
        raise BenchUsageError("--concurrency and --request-rate contradict one another; give one of them")
    if args.arrival and not args.request_rate:
        raise BenchUsageError("--arrival belongs to --request-rate; give that too, or leave it out")
    if args.concurrency:
        return closed_points(args.concurrency)
    if args.request_rate:
        return open_points(args.request_rate, args.arrival or next(iter(ARRIVALS)))
    if not trace:
        raise BenchUsageError(
            "no load: give --concurrency 1,8,64 or --request-rate 0.5,2 or a --trace with timestamps"
        )
    if trace[-1].timestamp_s is None:
        raise BenchError(
            f"--trace {args.trace} has no timestamps; give --concurrency or --request-rate with it"
        )
    return (LoadPoint("trace", round(mean_rate(trace), 6)),)


def _extent(args: argparse.Namespace, points: tuple[LoadPoint, ...], trace: tuple[TraceRow, ...]) -> Extent:
    """As long as the flags say; a trace left to itself is sent once, anything else for the default time."""
    num_requests, duration_s = args.num_requests, args.duration_s
    is_played = points[0].loop == "trace"
    num_warmup = (args.warmup_requests or 0) if is_played else 0
    if num_requests is None and duration_s is None:
        num_requests = len(trace) - num_warmup if trace else None
        duration_s = None if trace else DEFAULT_DURATION_S
    if is_played and num_warmup + max(num_requests or 1, 1) > len(trace):
        raise BenchError(
            f"--trace {args.trace} has {len(trace)} requests, too few for {num_warmup} of warm-up and "
            f"{max(num_requests or 1, 1)} measured ones; lower --num-requests or --warmup-requests"
        )
    return Extent(num_requests, duration_s, args.warmup_requests)


def parse_sampling(text: str) -> dict[str, Any]:
    """`temperature=0.8,top_p=0.9`: numbers; what they may be is `SamplingParams`' business.

    Raises:
        BenchUsageError: not NAME=NUMBER.
    """
    options: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        try:
            options[name] = json.loads(value) if equals and name else None
        except json.JSONDecodeError:
            options[name] = None
        if not isinstance(options[name], int | float) or isinstance(options[name], bool):
            raise BenchUsageError(
                f"--sampling {part!r}: expected NAME=NUMBER, such as temperature=0.8,top_p=0.9"
            )
    return options


def _write_files(result: BenchResult, request_rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    from minitron_client.bench.result import write_points_csv, write_requests_csv, write_result

    if args.json:
        write_result(result, args.json)
    if args.csv:
        write_points_csv(result, args.csv)
    if args.requests_csv:
        write_requests_csv(request_rows, args.requests_csv)
    if args.html:
        from minitron_client.bench.report import write_report

        write_report(args.html, [result], [result.url])
