"""`minitron export-hf`: a unified Hugging Face FP8 checkpoint, for runtimes without TensorRT engines.

It knows the flags; the calibration is read from a checkpoint that a build made, or made here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_build.bundle.bundle import Bundle, check_not_in_bundle
from minitron_build.bundle.manifest import MANIFEST_NAME
from minitron_build.calibration.amax import CALIBRATION_NAME, Calibration
from minitron_build.calibration.samples import (
    DEFAULT_SEQ_LEN,
    CalibrationSet,
    SampleRequest,
    read_calibration_set,
)
from minitron_build.checkpoint.fp8_stage import calibration_bar
from minitron_build.checkpoint.trtllm_checkpoint import COPY_OR_BUILD
from minitron_build.errors import CheckpointError, UsageError
from minitron_build.planning.plan_flags import add_calibration_flags
from minitron_build.source.hub import DEFAULT_CHECKPOINT, resolve_checkpoint
from minitron_build.source.model_config import ModelConfig, read_json_object

if TYPE_CHECKING:
    from minitron_build.source.hub import Source


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Flags of `minitron export-hf`."""
    add = parser.add_argument
    add("--checkpoint", default=DEFAULT_CHECKPOINT, metavar="DIR|HF_ID|demo", help="default: %(default)s")
    add("--revision", help="commit, tag or branch on the hub")
    add("--output-dir", type=Path, required=True, help="the folder to write")
    add(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="an FP8 checkpoint or bundle of the same source: its calibration is used, none is made",
    )
    add("--kv-cache-dtype", choices=("fp8", "bf16"), default="fp8", help="default: %(default)s")
    add("--force", action="store_true", help="replace what stands in --output-dir")
    add_calibration_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Export; the last line of stdout is JSON."""
    from minitron_build.checkpoint.export_hf import export_hf_checkpoint
    from minitron_build.checkpoint.fp8_folder import Fp8Choice

    check_not_in_bundle(args.output_dir)
    source = resolve_checkpoint(args.checkpoint, args.revision)
    calibration = _calibration(args, source)
    num_tokens = calibration.num_tokens if isinstance(calibration, CalibrationSet) else 1
    args.output_dir.parent.mkdir(parents=True, exist_ok=True)
    num_layers = ModelConfig.read(source.hf_dir).num_hidden_layers
    with calibration_bar(num_layers, num_tokens) as progress:
        files = export_hf_checkpoint(
            source.hf_dir,
            args.output_dir,
            calibration,
            choice=Fp8Choice(args.kv_cache_dtype, tuple(args.fp8_exclude)),
            force=args.force,
            progress=progress,
        )
    print(json.dumps({"hf_checkpoint": str(args.output_dir), "files": list(files)}))
    return 0


def _calibration(args: argparse.Namespace, source: Source) -> CalibrationSet | Calibration:
    if args.calibration is None:
        seq_len = DEFAULT_SEQ_LEN if args.calib_seq_len is None else args.calib_seq_len
        request = SampleRequest(args.calib_data, args.calib_samples, seq_len)
        data = read_calibration_set(request, source.hf_dir, ModelConfig.read(source.hf_dir).vocab_size)
        for warning in data.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return data
    given = [
        name for name in ("calib_data", "calib_samples", "calib_seq_len") if getattr(args, name) is not None
    ]
    if given:
        flag = "--" + given[0].replace("_", "-")
        raise UsageError(f"{flag} with --calibration", todo="leave one of them out")
    folders = (args.calibration, args.calibration / "checkpoint")
    folder = next((path for path in folders if (path / CALIBRATION_NAME).is_file()), None)
    if folder is None:
        raise _no_calibration(args.calibration, folders)
    return Calibration.read(folder / CALIBRATION_NAME)


def _no_calibration(given: Path, folders: tuple[Path, ...]) -> CheckpointError:
    """Why a folder has none: it is bf16, or it is no checkpoint or bundle that keeps one."""
    configs = [path / "config.json" for path in folders]
    is_bf16 = any(_is_bf16(read_json_object(path, todo=COPY_OR_BUILD)) for path in configs if path.is_file())
    if (given / MANIFEST_NAME).is_file():
        is_bf16 = is_bf16 or Bundle.load(given).manifest.plan.get("precision") == "bf16"
    return CheckpointError(
        "bf16, which holds no calibration" if is_bf16 else f"{CALIBRATION_NAME} is missing",
        expected="an FP8 checkpoint, or an FP8 bundle that keeps its checkpoint",
        where=str(given),
        todo="leave --calibration out to calibrate here",
    )


def _is_bf16(config: Mapping[str, Any]) -> bool:
    """Whether a TensorRT-LLM checkpoint's config.json names no quantization."""
    quantization = config.get("quantization") or {}
    return "architecture" in config and quantization.get("quant_algo") is None
