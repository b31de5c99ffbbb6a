"""HF checkpoint -> FP8 TensorRT-LLM checkpoint: calibrated, quantised and written layer by layer.

The result is what NVIDIA ModelOpt would have written, byte for byte but for activation scaling factors, which
may differ by a bf16 rounding step between machines. It needs torch, a GPU only if there is one, and a few GB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping as MappingType
from pathlib import Path

from minitron_build import __version__
from minitron_build.calibration.samples import CalibrationSet
from minitron_build.checkpoint.fp8_exclude import resolve_exclusions
from minitron_build.checkpoint.fp8_folder import Fp8Choice, write_fp8_folder
from minitron_build.checkpoint.fp8_stream import Fp8Job, Progress
from minitron_build.checkpoint.fp8_tensors import TrtllmFp8
from minitron_build.checkpoint.trtllm_checkpoint import (
    TrtllmCheckpoint,
    dump_config,
    fp8_checkpoint_config,
    rank_name,
)
from minitron_build.checkpoint.weight_map import Mapping
from minitron_build.checkpoint.work_folder import finished_checkpoint
from minitron_build.source.hf_checkpoint import HfCheckpoint

__all__ = ["Fp8Choice", "convert_fp8_checkpoint"]

ONE_RANK, ALL_FP8 = Mapping(), Fp8Choice()


def convert_fp8_checkpoint(
    hf_dir: Path,
    output_dir: Path,
    data: CalibrationSet,
    *,
    mapping: Mapping = ONE_RANK,
    choice: Fp8Choice = ALL_FP8,
    force: bool = False,
    progress: Progress | None = None,
) -> TrtllmCheckpoint:
    """Calibrate and convert; a finished checkpoint of the same plan is returned as it is.

    Raises:
        CheckpointError: the source is not what it must be, its activations are not finite, or output_dir
            holds something else.
        PlanError: mapping or exclusions do not fit the model.
        MachineError: too little disk.
        StageError: writing failed; output_dir does not exist, and a rerun resumes.
    """
    source = HfCheckpoint.open(hf_dir)
    excluded = resolve_exclusions(source.config, mapping, choice.exclude)
    digest = _plan_digest(source, mapping, choice, data)
    finished = finished_checkpoint(digest, output_dir, force)
    if finished:
        return finished

    def texts() -> MappingType[str, str]:
        config = fp8_checkpoint_config(
            source.config, mapping, has_fp8_kv=choice.has_fp8_kv, exclude_modules=excluded.recorded
        )
        return {"config.json": dump_config(config)}

    target = TrtllmFp8.plan(source.config, mapping, choice.has_fp8_kv, excluded)
    names = tuple(rank_name(rank) for rank in range(mapping.world_size))
    write_fp8_folder(Fp8Job(source, target, names, digest, data), output_dir, texts, progress)
    return TrtllmCheckpoint.load(output_dir)


def _plan_digest(source: HfCheckpoint, mapping: Mapping, choice: Fp8Choice, data: CalibrationSet) -> str:
    identity = (__version__, "fp8", mapping, choice, data.digest, source.identity())
    return hashlib.sha256(repr(identity).encode()).hexdigest()
