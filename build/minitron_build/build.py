"""`minitron build`: source -> plan -> checkpoint -> engine -> bundle, each stage skipped when it is whole.

The story of a build, its flags and its progress bar. What a stage does is the stage's own module.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minitron_build.bundle.bundle import CHECKPOINT_DIR, ENGINE_DIR, Bundle, check_output_dir, write_bundle
from minitron_build.bundle.manifest import MANIFEST_NAME, digest_file
from minitron_build.calibration.samples import read_calibration_set
from minitron_build.checkpoint.convert import Progress, convert_checkpoint, plan_conversion
from minitron_build.checkpoint.fp8_stage import build_fp8_checkpoint
from minitron_build.checkpoint.trtllm_checkpoint import CONVERSION_NAME, TrtllmCheckpoint
from minitron_build.engine.engine import build_engine, remaining_work
from minitron_build.engine.precheck import check_room, precheck, read_machine, read_room
from minitron_build.errors import CheckpointError, MachineError, PlanError
from minitron_build.planning.fp8_plan import Fp8Plan
from minitron_build.planning.plan import BuildPlan, PlanRequest, available_memory_bytes, make_plan
from minitron_build.planning.plan_flags import add_plan_flags, plan_request
from minitron_build.planning.targets import find_gpus
from minitron_build.source.hf_checkpoint import HfCheckpoint, check_folder
from minitron_build.source.hub import Source, resolve_checkpoint, resolve_config
from minitron_build.source.model_config import ModelConfig

STAGES = ("checkpoint", "engine", "bundle")
SAME_PLAN = (
    *("source", "arch", "sm", "precision", "kv_cache_dtype", "compute_dtype", "tp_size", "pp_size"),
    *("plugins", "trtllm_build_argv", "versions", "container", "fp8"),
    "engine_backend",
)
"""What equal bundles agree in; limits for the CPU are left out, they follow the memory that is free."""


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Flags of `minitron build`; names are fixed."""
    add_plan_flags(parser, auto_arch="the GPU here, else cpu")
    add = parser.add_argument
    add(
        "--output-dir",
        type=_folder_name,
        required=True,
        help="the bundle; ROOT/NAME for one of several under a root that minitron serve chooses from",
    )
    add("--stop-after", choices=STAGES, default="bundle", help="last stage to run")
    add("--container", action="store_true", help="build the engine in NVIDIA's container, with Docker")
    add("--keep-checkpoint", action="store_true", help="leave the checkpoint in a GPU bundle")
    add("--no-verify", action="store_true", help="do not hold a new FP8 checkpoint against its source")
    add(
        "--dry-run",
        action="store_true",
        help="print the plan, as text and as JSON on the last line; do nothing",
    )
    add("--force", action="store_true", help="replace what stands in --output-dir")


def run(args: argparse.Namespace) -> int:
    """Plan, print, then build; the last line of stdout is JSON."""
    request = plan_request(args)
    if args.dry_run:
        return _print_plan(args.checkpoint, args.revision, request, args.output_dir)
    known = resolve_config(args.checkpoint, args.revision)
    plan, verify = plan_build(known, request), not args.no_verify
    print("\n".join(plan.lines()), file=sys.stderr)
    missing = check_build(plan, args.output_dir, args.stop_after, container=args.container, force=args.force)
    source = resolve_checkpoint(args.checkpoint, known.revision)  # gigabytes, when it is on the hub
    if args.stop_after == "bundle":  # told now, not after hours
        _check_tokenizer(HfCheckpoint.open(source.hf_dir))
    if args.stop_after == "checkpoint":
        checkpoint = build_checkpoint(plan, source, args.output_dir, force=args.force, verify=verify)
        print(json.dumps({"checkpoint": str(checkpoint.path), "files": sorted(checkpoint.files)}))
        return 0
    if missing is not None:
        _say_what_remains(
            plan, build_checkpoint(plan, source, args.output_dir, force=args.force, verify=verify)
        )
        raise missing
    if args.stop_after == "engine":
        engine_dir = build_engine_stage(
            plan, source, args.output_dir, force=args.force, container=args.container, verify=verify
        )
        print(
            json.dumps(
                {"engine": str(engine_dir), "files": sorted(path.name for path in engine_dir.iterdir())}
            )
        )
        return 0
    options = {name: getattr(args, name) for name in ("force", "container", "keep_checkpoint")}
    options["verify"] = verify
    bundle = build_bundle(plan, source, args.output_dir, **options)
    print(f"serve it: minitron serve {bundle.path}", file=sys.stderr)
    print(
        json.dumps(
            {"bundle": str(bundle.path), "arch": bundle.manifest.arch, "files": len(bundle.manifest.files)}
        )
    )
    return 0


def _folder_name(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("a folder's name is needed")
    return Path(text)


def plan_build(source: Source, request: PlanRequest, output_dir: Path | None = None) -> BuildPlan:
    """The plan of a build on this machine; see `make_plan` for what it raises.

    Args:
        output_dir: for a plan that is printed; one that is kept names no folder of this machine.
    """
    check_folder(source.hf_dir)
    config = ModelConfig.read(source.hf_dir)
    gpus = () if request.arch == "cpu" else find_gpus()
    available_bytes = available_memory_bytes()
    return make_plan(
        source.name, config, request, gpus=gpus, available_bytes=available_bytes, output_dir=output_dir
    )


def check_build(
    plan: BuildPlan, output_dir: Path, stop_after: str, *, container: bool, force: bool = False
) -> MachineError | None:
    """Everything that can be refused before the first byte of work.

    Returns:
        What this machine lacks for the engine, if the checkpoint can be made here all the same.

    Raises:
        PlanError: the stages asked for do not fit the target.
        MachineError: this machine contradicts the plan, or has too little memory or disk.
        CheckpointError: `output_dir` holds somebody else's things.
    """
    if plan.sm is None and stop_after == "engine":
        raise PlanError(
            "--stop-after engine with --arch cpu", todo="a CPU has no engine: use checkpoint or bundle"
        )
    if plan.sm is None and container:
        raise PlanError("--container with --arch cpu", todo="a CPU has no engine to build: leave it out")
    check_output_dir(output_dir)
    if plan.sm is None or stop_after == "checkpoint":
        stages = STAGES[: STAGES.index(stop_after) + 1]
        check_room(plan, read_room(output_dir), output_dir, stages, force=force)
        return None
    return precheck(plan, read_machine(output_dir), output_dir, container=container, force=force)


def build_checkpoint(
    plan: BuildPlan, source: Source, output_dir: Path, *, force: bool = False, verify: bool = True
) -> TrtllmCheckpoint:
    """The TensorRT-LLM checkpoint in `output_dir/checkpoint`; an interrupted one is resumed.

    Args:
        verify: hold a new FP8 checkpoint against its source, and write the verdict beside it.
    """
    check_output_dir(output_dir)
    if not force and (output_dir / CHECKPOINT_DIR / CONVERSION_NAME).is_file():
        print(f"{output_dir / CHECKPOINT_DIR} stands there already", file=sys.stderr)
    if plan.fp8 is not None:
        return build_fp8_checkpoint(plan, source, output_dir / CHECKPOINT_DIR, force=force, verify=verify)
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


def build_engine_stage(
    plan: BuildPlan,
    source: Source,
    output_dir: Path,
    *,
    force: bool = False,
    container: bool = False,
    verify: bool = True,
) -> Path:
    """The engine in `output_dir/engine`, the checkpoint before it; whole stages are taken as they are."""
    checkpoint = build_checkpoint(plan, source, output_dir, force=force, verify=verify)
    gpus = read_machine(output_dir).gpus
    engine = build_engine(
        plan,
        checkpoint.path,
        output_dir / ENGINE_DIR,
        container=container,
        force=force,
        gpu=gpus[0].gpu.name if gpus else None,
        driver=gpus[0].driver if gpus else None,
        on_line=lambda line: print(line, file=sys.stderr),
    )
    for difference in engine.differences(plan):
        print(f"TensorRT-LLM resolved otherwise than planned: {difference}", file=sys.stderr)
    return output_dir / ENGINE_DIR


def build_bundle(
    plan: BuildPlan,
    source: Source,
    output_dir: Path,
    *,
    force: bool = False,
    container: bool = False,
    keep_checkpoint: bool = False,
    verify: bool = True,
) -> Bundle:
    """The whole bundle; a finished one of the same plan is verified and returned as it is.

    Raises:
        CheckpointError: `output_dir` holds another bundle or foreign files, and not `force`.
        StageError: a stage failed; a rerun resumes after the last whole stage.
    """
    check_output_dir(output_dir)
    if (output_dir / MANIFEST_NAME).exists() and not force:
        return _finished_bundle(plan, source, output_dir)
    if plan.sm is None:
        checkpoint = build_checkpoint(plan, source, output_dir, force=force, verify=verify)
    else:
        build_engine_stage(plan, source, output_dir, force=force, container=container, verify=verify)
        checkpoint = TrtllmCheckpoint.load(output_dir / CHECKPOINT_DIR)
    return write_bundle(plan, source, checkpoint, output_dir, keep_checkpoint=keep_checkpoint)


def _check_tokenizer(hf: HfCheckpoint) -> None:
    """The tokenizer is there, loads as it will when served, and fits the model."""
    from minitron_build.source.hf_tokenizer import check_tokenizer

    _ = hf.tokenizer_files
    check_tokenizer(hf.path, hf.config.vocab_size)


def _print_plan(checkpoint: str, revision: str | None, request: PlanRequest, output_dir: Path) -> int:
    """The plan as text, then as JSON on one line; of a hub id only the config files are fetched."""
    plan = plan_build(resolve_config(checkpoint, revision), request, output_dir)
    print("\n".join(plan.lines()))
    print(json.dumps(plan.as_dict()))
    return 0


def _say_what_remains(plan: BuildPlan, checkpoint: TrtllmCheckpoint) -> None:
    """The checkpoint is made; the commands that make the engine from it elsewhere, for people and as JSON."""
    work = remaining_work(plan, checkpoint.path, checkpoint.path.with_name(ENGINE_DIR))
    print("\n".join(work.lines()))
    print(json.dumps({"checkpoint": str(checkpoint.path), "remaining": work.as_dict()}))


def _finished_bundle(plan: BuildPlan, source: Source, output_dir: Path) -> Bundle:
    """A bundle that stands there already, if this build would make the same one."""
    bundle = Bundle.load(output_dir)
    wanted = json.loads(json.dumps(plan.as_dict()))
    is_same = all(bundle.manifest.plan.get(key) == wanted[key] for key in SAME_PLAN)
    weights = {shard.path.name: shard.file_bytes for shard in HfCheckpoint.open(source.hf_dir).shards}
    recorded = bundle.manifest.source["files"]
    is_same &= all(recorded.get(name, {}).get("size_bytes") == size for name, size in weights.items())
    is_same &= recorded["config.json"] == digest_file(source.hf_dir / "config.json").as_dict()
    is_same &= plan.fp8 is None or _is_calibrated_alike(plan.fp8, source, bundle)
    if not is_same:
        raise CheckpointError(
            "holds a bundle of another plan or source",
            where=str(output_dir),
            todo="give another folder, or --force",
        )
    bundle.check_files()
    print(f"{output_dir} is built already", file=sys.stderr)
    return bundle


def _is_calibrated_alike(fp8: Fp8Plan, source: Source, bundle: Bundle) -> bool:
    vocab_size = ModelConfig.read(source.hf_dir).vocab_size
    data = read_calibration_set(fp8.samples, source.hf_dir, vocab_size)
    return (bundle.manifest.calibration or {}).get("input_ids_sha256") == data.digest


@contextmanager
def _progress_bar(what: str, total_bytes: int) -> Iterator[Progress]:
    """A bar on stderr with speed and time left, from the first call on; only its end without a terminal."""
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
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(what, total=total_bytes)

    with ExitStack() as stack:

        def progress(num_bytes: int) -> None:
            if not bar.live.is_started:
                stack.enter_context(bar)
            bar.advance(task, num_bytes)

        yield progress
