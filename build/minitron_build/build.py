"""`minitron build`: source -> plan -> checkpoint -> bundle, each stage skipped when it is whole already.

The story of a build, its flags and its progress bar. What a stage does is the stage's own module.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron_build.bundle import CHECKPOINT_DIR, Bundle, check_output_dir, write_bundle
from minitron_build.checkpoint import TrtllmCheckpoint
from minitron_build.convert import Progress, convert_checkpoint, plan_conversion
from minitron_build.errors import CheckpointError, PlanError
from minitron_build.hf_checkpoint import HfCheckpoint
from minitron_build.hub import DEFAULT_CHECKPOINT, Source, resolve_checkpoint
from minitron_build.manifest import MANIFEST_NAME
from minitron_build.plan import BuildPlan, PlanRequest, available_memory_bytes, make_plan
from minitron_build.targets import ARCH_CHOICES, find_gpus

STAGES = ("checkpoint", "engine", "bundle")
SIZE_FLAGS = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens")


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Flags of `minitron build`; names are fixed."""
    add = parser.add_argument
    add(
        "--arch",
        choices=ARCH_CHOICES,
        default="auto",
        help="what to build for (default: the GPU here, else cpu)",
    )
    add("--checkpoint", default=DEFAULT_CHECKPOINT, metavar="DIR|HF_ID|demo", help="default: %(default)s")
    add(
        "--revision",
        help="commit, tag or branch on the hub (default: what main is now, recorded as a commit)",
    )
    add("--output-dir", type=Path, required=True, help="the bundle")
    add("--precision", choices=("auto", "bf16", "fp8"), default="auto")
    add("--kv-cache-dtype", choices=("auto", "bf16", "fp8"), default="auto")
    add("--tp-size", type=int, default=1, metavar="N", help="tensor parallel ranks")
    add("--pp-size", type=int, default=1, metavar="N", help="pipeline parallel ranks")
    for name in SIZE_FLAGS:
        add("--" + name.replace("_", "-"), type=int, metavar="N")
    add("--stop-after", choices=STAGES, default="bundle", help="last stage to run")
    add(
        "--dry-run",
        action="store_true",
        help="print the plan, as text and as JSON on the last line; do nothing",
    )
    add("--force", action="store_true", help="replace what stands in --output-dir")


def run(args: argparse.Namespace) -> int:
    """Plan, print, then build; the last line of stdout is JSON."""
    source = resolve_checkpoint(args.checkpoint, args.revision)
    names = ("arch", "precision", "kv_cache_dtype", "tp_size", "pp_size", *SIZE_FLAGS)
    plan = plan_build(source, PlanRequest(**{name: getattr(args, name) for name in names}))
    if args.dry_run:
        print("\n".join(plan.lines()))
        print(json.dumps(plan.as_dict()))
        return 0
    print("\n".join(plan.lines()), file=sys.stderr)
    if args.stop_after == "engine":
        raise PlanError(
            "--stop-after engine with --arch cpu", todo="a CPU has no engine stage: use checkpoint or bundle"
        )
    if args.stop_after == "checkpoint":
        checkpoint = build_checkpoint(plan, source, args.output_dir, force=args.force)
        print(json.dumps({"checkpoint": str(checkpoint.path), "files": sorted(checkpoint.files)}))
        return 0
    bundle = build_bundle(plan, source, args.output_dir, force=args.force)
    print(f"serve it: minitron serve {bundle.path}", file=sys.stderr)
    print(
        json.dumps(
            {"bundle": str(bundle.path), "arch": bundle.manifest.arch, "files": len(bundle.manifest.files)}
        )
    )
    return 0


def plan_build(source: Source, request: PlanRequest) -> BuildPlan:
    """The plan of a build on this machine; see `make_plan` for what it raises."""
    config = HfCheckpoint.open(source.hf_dir).config
    gpus = find_gpus() if request.arch == "auto" else ()
    return make_plan(source.name, config, request, gpus=gpus, available_bytes=available_memory_bytes())


def build_checkpoint(
    plan: BuildPlan, source: Source, output_dir: Path, *, force: bool = False
) -> TrtllmCheckpoint:
    """The TensorRT-LLM checkpoint in `output_dir/checkpoint`; an interrupted one is resumed."""
    check_output_dir(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    total_bytes = plan_conversion(source.hf_dir, plan.mapping).source_bytes
    with _progress_bar("converting", total_bytes) as progress:
        return convert_checkpoint(
            source.hf_dir,
            output_dir / CHECKPOINT_DIR,
            tp_size=plan.mapping.tp_size,
            pp_size=plan.mapping.pp_size,
            force=force,
            progress=progress,
        )


def build_bundle(plan: BuildPlan, source: Source, output_dir: Path, *, force: bool = False) -> Bundle:
    """The whole bundle; a finished one of the same plan is verified and returned as it is.

    Raises:
        CheckpointError: `output_dir` holds another bundle or foreign files, and not `force`.
        StageError: a stage failed; a rerun resumes after the last whole stage.
    """
    check_output_dir(output_dir)
    if (output_dir / MANIFEST_NAME).exists() and not force:
        return _finished_bundle(plan, source, output_dir)
    checkpoint = build_checkpoint(plan, source, output_dir, force=force)
    return write_bundle(plan, source, checkpoint, output_dir)


def _finished_bundle(plan: BuildPlan, source: Source, output_dir: Path) -> Bundle:
    """A bundle that stands there already, if this build would make the same one."""
    bundle = Bundle.load(output_dir)
    same = all(
        bundle.manifest.plan.get(key) == value
        for key, value in plan.as_dict().items()
        if key in ("source", "arch", "precision", "kv_cache_dtype", "tp_size", "pp_size", "versions")
    )
    digest = plan_conversion(source.hf_dir, plan.mapping).digest
    if not same or TrtllmCheckpoint.load(bundle.checkpoint).plan_digest != digest:
        raise CheckpointError(
            "holds a bundle of another plan or source",
            where=str(output_dir),
            todo="give another folder, or --force",
        )
    bundle.check_files()
    print(f"{output_dir} is built already", file=sys.stderr)
    return bundle


@contextmanager
def _progress_bar(what: str, total_bytes: int) -> Iterator[Progress]:
    """A bar on stderr with speed and remaining time; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)
