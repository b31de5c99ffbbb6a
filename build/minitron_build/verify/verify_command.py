"""`minitron verify`: is a checkpoint or a bundle good enough, and what would make it better.

The verb's flags, progress and outputs: a table for people, JSON on the last line, an HTML report. What is
measured is the gate's business.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_build.errors import GateError, MachineError, RefusedError, UsageError
from minitron_build.source.hf_tokenizer import open_tokenizer
from minitron_build.verify.eval_data import (
    DEFAULT_SAMPLES,
    DEFAULT_SEQ_LEN,
    EvalSet,
    read_eval_set,
)
from minitron_build.verify.models import Arithmetic, open_reference, precision_of
from minitron_build.verify.result import PARTS, REPEAT, VerifyResult
from minitron_build.verify.target import GIVE_SOURCE, Target
from minitron_build.verify.thresholds import FP8, add_threshold_flags, given_thresholds
from minitron_client.flag_types import checked, integer
from minitron_client.settings import check_url

if TYPE_CHECKING:
    from minitron_build.runtime.tokenizer import TextTokenizer
    from minitron_build.verify.runner import Progress, Runner

COMPUTE_DTYPES = ("float32", "bfloat16")
SKIP_REASON = "--skip"


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Flags of `minitron verify`; names are fixed."""
    add = parser.add_argument
    add("path", type=Path, metavar="BUNDLE|CHECKPOINT", help="what is verified")
    add("--against", metavar="DIR|HF_ID|demo", help="the Hugging Face checkpoint it was made from")
    add("--gpu", action="store_true", help="compute on the CUDA device")
    add(
        "--url",
        type=checked(check_url),
        metavar="HOST:PORT",
        help="hold what a server generates against the reference engine",
    )
    add("--eval-data", type=Path, metavar="FILE", help="held-out text: .txt, .jsonl or .json of ids")
    add(
        "--eval-samples",
        type=integer(1),
        default=DEFAULT_SAMPLES,
        metavar="N",
        help="sequences (%(default)s)",
    )
    add(
        "--eval-seq-len",
        type=integer(2),
        default=DEFAULT_SEQ_LEN,
        metavar="N",
        help="their tokens (%(default)s)",
    )
    add("--skip", action="append", default=[], choices=PARTS, help="leave a part out; may be repeated")
    add("--skip-source", action="store_true", help="only the checks that need no source")
    add("--compute-dtype", choices=COMPUTE_DTYPES, default="float32", help="arithmetic (%(default)s)")
    add("--suggest", action="store_true", help="modules whose exclusion from FP8 helps most per byte")
    add("--json", type=Path, metavar="FILE", help="the JSON of the last line, in a file")
    add("--html", type=Path, metavar="FILE", help="a report with plots, one self-contained file")
    add_threshold_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, then JSON on the last line.

    Raises:
        GateError: a threshold is missed; everything was printed.
    """
    _check_together(args)
    for path in filter(None, (args.json, args.html)):
        _check_writable(path)
    if args.gpu:
        _check_gpu()
    result = _verified(args)
    print("\n".join(result.lines()))
    text = json.dumps(result.as_dict(), allow_nan=False)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")
    if args.html is not None:
        from minitron_build.verify.html_report import write_html

        write_html(args.html, result)
    print(text, flush=True)
    if not result.passed:
        raise GateError(result.failure)
    return 0


def _verified(args: argparse.Namespace) -> VerifyResult:
    target = Target.open(args.path)
    changes = tuple(f"changed since it was written: {change}" for change in target.changes())
    for change in changes:
        print(f"warning: {args.path}: {change}", file=sys.stderr)
    result = _measured(args, target)
    return replace(result, notes=(*result.notes, *changes))


def _measured(args: argparse.Namespace, target: Target) -> VerifyResult:
    with _progress_bars() as progress:
        if args.url is not None:
            served = _against_server(args, target, progress)
            has_both = args.against is not None and target.checkpoint_dir is not None
            return _against_source(args, target, progress).joined("served", served) if has_both else served
        if args.skip_source:
            return _without_source(args, target, progress)
        return _against_source(args, target, progress)


def _against_source(args: argparse.Namespace, target: Target, progress: Progress) -> VerifyResult:
    from minitron_build.verify.gate import VerifyRequest, verify

    checkpoint_dir = target.needed_checkpoint()
    source_dir = target.resolve_source(args.against)
    for difference in target.differences(source_dir):
        print(f"not the source it was made from: {difference}", file=sys.stderr)
    request = VerifyRequest(
        str(args.path),
        checkpoint_dir,
        source_dir,
        eval_data=args.eval_data,
        num_samples=args.eval_samples,
        seq_len=args.eval_seq_len,
        arithmetic=_arithmetic(args),
        thresholds=given_thresholds(args),
        skipped=_skipped(args),
        has_suggestion=args.suggest,
    )
    return verify(request, progress)


def _without_source(args: argparse.Namespace, target: Target, progress: Progress) -> VerifyResult:
    from minitron_build.verify.alone import verify_alone
    from minitron_build.verify.gate import REPEAT_TOKENS

    if target.tokenizer_dir is None:
        raise RefusedError(
            "a checkpoint alone has no tokenizer",
            where=str(args.path),
            todo=f"name its bundle, or {GIVE_SOURCE}",
        )
    max_tokens = max(args.eval_seq_len, REPEAT_TOKENS)
    model = open_reference(target.needed_checkpoint(), max_tokens=max_tokens, arithmetic=_arithmetic(args))
    eval_set = _eval_set(args, model, open_tokenizer(target.tokenizer_dir))
    return verify_alone(args.path, model, eval_set, given_thresholds(args), progress)


def _against_server(args: argparse.Namespace, target: Target, progress: Progress) -> VerifyResult:
    """The server beside the checkpoint, or beside the source where the bundle holds an engine only."""
    from minitron_build.verify.served import LONG_PROMPT_TOKENS, SERVED_TOKENS, ServedRequest, verify_served

    source_dir = None if args.against is None else target.resolve_source(args.against)
    reference_dir = target.checkpoint_dir or source_dir or target.needed_checkpoint()
    tokenizer = _served_tokenizer(args.url, target.tokenizer_dir or source_dir)
    model = open_reference(
        reference_dir, max_tokens=LONG_PROMPT_TOKENS + SERVED_TOKENS, arithmetic=_arithmetic(args)
    )
    limits = target.limits or {}
    longest = min(
        limits.get("max_input_len", LONG_PROMPT_TOKENS),
        limits.get("max_seq_len", LONG_PROMPT_TOKENS + SERVED_TOKENS) - SERVED_TOKENS,
    )
    request = ServedRequest(
        args.url,
        model,
        str(reference_dir),
        FP8,
        tokenizer,
        _eval_set(args, model, tokenizer),
        max_input_len=longest,
        precision={} if reference_dir == source_dir else precision_of(model.source.config),
        thresholds=given_thresholds(args),
        skipped=_skipped(args),
    )
    return replace(verify_served(request, progress), quality_judged=reference_dir == source_dir)


def _eval_set(args: argparse.Namespace, model: Runner, tokenizer: TextTokenizer) -> EvalSet:
    config = model.source.config
    return read_eval_set(
        args.eval_data,
        tokenizer,
        config.vocab_size,
        num_samples=args.eval_samples,
        seq_len=min(args.eval_seq_len, config.max_position_embeddings),
    )


def _served_tokenizer(url: str, tokenizer_dir: Path | None) -> TextTokenizer:
    """The tokenizer at hand, else the server's own."""
    from tempfile import TemporaryDirectory

    from minitron_client import MinitronClient

    if tokenizer_dir is not None:
        return open_tokenizer(tokenizer_dir)
    with MinitronClient(url) as client, TemporaryDirectory() as folder:
        for name, text in client.tokenizer().files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        return open_tokenizer(Path(folder))


def _arithmetic(args: argparse.Namespace) -> Arithmetic:
    return Arithmetic(args.compute_dtype, "cuda" if args.gpu else "cpu")


def _skipped(args: argparse.Namespace) -> dict[str, str]:
    return dict.fromkeys(args.skip, SKIP_REASON)


def _check_together(args: argparse.Namespace) -> None:
    """Refuse flags of which one would be ignored."""
    for flag in ("against", "suggest", "url"):
        if args.skip_source and getattr(args, flag):
            raise UsageError(f"--skip-source with --{flag}", todo="leave one of the two out")
    if args.skip_source and REPEAT in args.skip:
        raise UsageError(
            f"--skip-source with --skip {REPEAT} leaves nothing to check", todo="leave one of the two out"
        )
    if args.url is not None and args.suggest and args.against is None:
        raise UsageError("--suggest with --url", todo="give the source too: --against DIR|HF_ID|demo")


def _check_writable(path: Path) -> None:
    """Told now, not after an hour of measuring."""
    if not path.parent.is_dir():
        raise RefusedError("no such folder", where=str(path.parent), todo=f"make it, or put {path} elsewhere")
    if path.is_dir():
        raise RefusedError("a folder", expected="a file's name", where=str(path))


def _check_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise MachineError(
            "--gpu: torch finds no CUDA device",
            expected="an NVIDIA GPU and a torch built for CUDA",
            todo="leave --gpu out to verify on the CPU",
        )


@contextmanager
def _progress_bars() -> Iterator[Progress]:
    """A bar on stderr for each thing that is done, with its remaining time; silent on no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=Console(stderr=True)) as bars:

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield progress
