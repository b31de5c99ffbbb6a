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
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_build.errors import GateError, MachineError, RefusedError
from minitron_build.verify.eval_data import DEFAULT_SAMPLES, DEFAULT_SEQ_LEN
from minitron_build.verify.gate import PARTS, VerifyRequest, verify
from minitron_build.verify.result import VerifyResult
from minitron_build.verify.target import Target
from minitron_build.verify.thresholds import add_threshold_flags, given_thresholds

if TYPE_CHECKING:
    from minitron_build.verify.runner import Progress

SKIP_REASON = "--skip"


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Flags of `minitron verify`; names are fixed."""
    add = parser.add_argument
    add("path", type=Path, metavar="BUNDLE|CHECKPOINT", help="what is verified")
    add("--against", metavar="DIR|HF_ID|demo", help="the Hugging Face checkpoint it was made from")
    add("--gpu", action="store_true", help="compute on the CUDA device")
    add("--url", metavar="HOST:PORT", help="hold what a server generates against the reference engine")
    add("--eval-data", type=Path, metavar="FILE", help="held-out text: .txt, .jsonl or .json of ids")
    add("--eval-samples", type=int, default=DEFAULT_SAMPLES, metavar="N", help="sequences (%(default)s)")
    add("--eval-seq-len", type=int, default=DEFAULT_SEQ_LEN, metavar="N", help="their tokens (%(default)s)")
    add("--skip", action="append", default=[], choices=PARTS, help="leave a part out; may be repeated")
    add("--skip-source", action="store_true", help="only the checks that need no source")
    add("--suggest", action="store_true", help="modules whose exclusion from FP8 helps most per byte")
    add("--json", type=Path, metavar="FILE", help="the JSON of the last line, in a file")
    add("--html", type=Path, metavar="FILE", help="a report with plots, one self-contained file")
    add_threshold_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, then JSON on the last line.

    Raises:
        GateError: a threshold is missed; everything was printed.
    """
    for path in filter(None, (args.json, args.html)):
        _check_writable(path)
    if args.gpu:
        _check_gpu()
    result = _verified(args)
    print("\n".join(result.lines()))
    text = json.dumps(result.as_dict())
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
        thresholds=given_thresholds(args),
        skipped=dict.fromkeys(args.skip, SKIP_REASON),
    )
    with _progress_bars() as progress:
        return verify(request, progress)


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
