"""The checkpoint stage of an FP8 build: calibration set, conversion, and a verdict on the result.

The verdict is written beside the checkpoint and never stops a build: what is good enough is for the user to
say, with `minitron verify`. It knows the plan and the terminal; the conversion and the gate know the rest.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_build.calibration.amax import CALIBRATION_NAME, KEY_SITE, VALUE_SITE, Calibration
from minitron_build.calibration.samples import CalibrationSet, read_calibration_set
from minitron_build.checkpoint.trtllm_checkpoint import COPY_OR_BUILD, TrtllmCheckpoint
from minitron_build.checkpoint.work_folder import write_durably
from minitron_build.source.model_config import ModelConfig, read_json_object

if TYPE_CHECKING:
    from rich.console import Console

    from minitron_build.checkpoint.fp8_stream import Progress
    from minitron_build.planning.plan import BuildPlan
    from minitron_build.source.hub import Source

VERIFICATION_NAME = "verification.json"
LARGE_KV_AMAX = 224.0
SAY_EVERY_S = 30.0
"""How often a terminal that shows no bar is told how far the calibration is."""


def build_fp8_checkpoint(
    plan: BuildPlan, source: Source, checkpoint_dir: Path, *, force: bool = False, verify: bool = True
) -> TrtllmCheckpoint:
    """The FP8 checkpoint; see `convert_fp8_checkpoint` for what it raises, and `read_calibration_set`."""
    if plan.fp8 is None:
        raise ValueError("the plan's weights are not FP8")
    from minitron_build.checkpoint.convert_fp8 import Fp8Choice, convert_fp8_checkpoint

    config = ModelConfig.read(source.hf_dir)
    data = read_calibration_set(plan.fp8.samples, source.hf_dir, config.vocab_size)
    with calibration_bar(
        config.num_hidden_layers, data.num_tokens, lambda: _say_what_is_calibrated(data)
    ) as progress:
        checkpoint = convert_fp8_checkpoint(
            source.hf_dir,
            checkpoint_dir,
            data,
            mapping=plan.mapping,
            choice=Fp8Choice(plan.kv_cache_dtype, plan.fp8.exclude),
            force=force,
            progress=progress,
        )
    _warn_of_large_kv(Calibration.read(checkpoint_dir / CALIBRATION_NAME))
    if verify and not (checkpoint_dir / VERIFICATION_NAME).exists():
        _verify(checkpoint_dir, source)
    return checkpoint


def read_verification(checkpoint_dir: Path) -> dict[str, Any] | None:
    """The verdict that a build wrote beside a checkpoint, if it did."""
    path = checkpoint_dir / VERIFICATION_NAME
    return read_json_object(path, todo=COPY_OR_BUILD) if path.is_file() else None


def _say_what_is_calibrated(data: CalibrationSet) -> None:
    print(
        f"calibrating with {len(data.samples)} samples, {data.num_tokens} tokens of {data.name}",
        file=sys.stderr,
    )
    for warning in data.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _warn_of_large_kv(calibration: Calibration) -> None:
    """As ModelOpt warns: beyond half of what E4M3 holds, keys and values lose their small numbers."""
    sites = (KEY_SITE, VALUE_SITE)
    largest = max(layer.sites[site] for layer in calibration.layers for site in sites)
    if largest > LARGE_KV_AMAX:
        print(
            f"warning: keys or values reach {largest:g}: an FP8 KV cache may cost accuracy; "
            "compare with --kv-cache-dtype bf16",
            file=sys.stderr,
        )


def _verify(checkpoint_dir: Path, source: Source) -> None:
    """The gate's short form: its table on stderr, its record beside the checkpoint."""
    from minitron_build.verify.gate import short_verify

    if not (source.hf_dir / "tokenizer.json").is_file():
        print("not verified: the source has no tokenizer.json to read held-out text with", file=sys.stderr)
        return
    result = short_verify(checkpoint_dir, source.hf_dir)
    print("\n".join(result.lines()), file=sys.stderr)
    if not result.passed:
        print(f"warning: the FP8 checkpoint fails the gate: {result.failure}", file=sys.stderr)
    record = {**result.as_dict(), "source": source.name}  # a bundle names no folder of this machine
    write_durably(checkpoint_dir / VERIFICATION_NAME, json.dumps(record, indent=2) + "\n")


@contextmanager
def calibration_bar(
    num_layers: int, num_tokens: int, on_start: Callable[[], None] = lambda: None
) -> Iterator[Progress]:
    """Layers done and time left on stderr: a bar in a terminal, a line now and then elsewhere.

    Args:
        on_start: called before the first of them, if there is any work at all.
    """
    from rich.console import Console

    console = Console(stderr=True)
    with ExitStack() as stack:
        shown: list[Progress] = []

        def progress(tokens: int) -> None:
            if not shown:
                on_start()
                is_bar = console.is_terminal
                lines = _Lines(num_layers, num_tokens)
                shown.append(stack.enter_context(_bar(console, num_layers, num_tokens)) if is_bar else lines)
            shown[0](tokens)

        yield progress


@contextmanager
def _bar(console: Console, num_layers: int, num_tokens: int) -> Iterator[Progress]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("calibrating layer {task.fields[layer]}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("calibrating", total=num_layers * num_tokens, layer=f"1 of {num_layers}")

        def progress(tokens: int) -> None:
            bar.advance(task, tokens)
            layer = min(int(bar.tasks[0].completed) // num_tokens + 1, num_layers)
            bar.update(task, layer=f"{layer} of {num_layers}")

        yield progress


class _Lines:
    """Progress where no bar can be drawn."""

    def __init__(self, num_layers: int, num_tokens: int) -> None:
        self._total, self._num_tokens, self._num_layers = num_layers * num_tokens, num_tokens, num_layers
        self._done = self._first = 0
        self._started_s = self._said_s = 0.0

    def __call__(self, tokens: int) -> None:
        now = time.monotonic()
        self._done += tokens
        if not self._first:  # speed is what comes after it: a resumed run begins with a leap
            self._first, self._started_s, self._said_s = tokens, now, now
        if now - self._said_s < SAY_EVERY_S:
            return
        self._said_s = now
        left_s = (now - self._started_s) / (self._done - self._first) * (self._total - self._done)
        layer = self._done // self._num_tokens + 1
        print(
            f"calibrating layer {layer} of {self._num_layers}, about {left_s / 60:.1f} minutes left",
            file=sys.stderr,
            flush=True,
        )
