"""HF checkpoint -> FP8 TensorRT-LLM checkpoint: calibrated, quantised and written layer by layer.

The result is what NVIDIA ModelOpt would have written, byte for byte but for activation scaling factors, which
may differ by a bf16 rounding step between machines. It needs torch, a GPU only if there is one, and a few GB.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from minitron_build import __version__
from minitron_build.calibration.amax import CALIBRATION_NAME, Calibration
from minitron_build.calibration.samples import CalibrationSet
from minitron_build.checkpoint.fp8_exclude import resolve_exclusions
from minitron_build.checkpoint.fp8_stream import Fp8Job, Progress, remove_leavings, run_fp8
from minitron_build.checkpoint.fp8_tensors import TrtllmFp8
from minitron_build.checkpoint.planned_file import layout_bytes
from minitron_build.checkpoint.trtllm_checkpoint import (
    CONVERSION_NAME,
    FileDigest,
    TrtllmCheckpoint,
    dump_config,
    dump_conversion,
    fp8_checkpoint_config,
    rank_name,
)
from minitron_build.checkpoint.weight_map import Mapping
from minitron_build.checkpoint.work_folder import (
    check_disk,
    finished_checkpoint,
    publish,
    stage_error,
    work_dir_of,
    work_folder,
    write_durably,
)
from minitron_build.source.hf_checkpoint import HfCheckpoint


@dataclass(frozen=True, slots=True)
class Fp8Choice:
    """What is quantised.

    Attributes:
        kv_cache_dtype: "fp8" or "bf16".
        exclude: patterns of linear layers that stay bf16.
    """

    kv_cache_dtype: str = "fp8"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kv_cache_dtype not in ("fp8", "bf16"):
            raise ValueError(f"kv_cache_dtype {self.kv_cache_dtype!r}")


def convert_fp8_checkpoint(
    hf_dir: Path,
    output_dir: Path,
    data: CalibrationSet,
    *,
    mapping: Mapping = Mapping(),  # noqa: B008 - frozen
    choice: Fp8Choice = Fp8Choice(),
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
    target = TrtllmFp8.plan(source.config, mapping, choice.kv_cache_dtype == "fp8", excluded)
    digest = _plan_digest(source, mapping, choice, data)
    finished = finished_checkpoint(digest, output_dir, force)
    if finished:
        return finished
    names = tuple(rank_name(rank) for rank in range(mapping.world_size))
    job = Fp8Job(source, target, names, digest, data)
    work_dir = work_dir_of(output_dir)
    with work_folder(work_dir) as is_resumed:
        check_disk(work_dir, _disk_bytes(job), f"{mapping.world_size} rank file(s)")
        try:
            result = run_fp8(job, work_dir, is_resumed=is_resumed, progress=progress or (lambda tokens: None))
            config = fp8_checkpoint_config(
                source.config,
                mapping,
                has_fp8_kv=choice.kv_cache_dtype == "fp8",
                exclude_modules=excluded.recorded,
            )
            sources = {name: digest.sha256 for name, digest in result.sources.items()}
            calibration = Calibration(data.as_dict(), sources, result.layers)
            texts = {"config.json": dump_config(config), CALIBRATION_NAME: calibration.dump()}
            _write_records(job, work_dir, texts, result.sources, result.files)
            publish(work_dir, output_dir)
        except OSError as error:
            raise stage_error(error, work_dir) from error
    return TrtllmCheckpoint.load(output_dir)


def _disk_bytes(job: Fp8Job) -> int:
    """Of the rank files and the hidden states, twice."""
    tokens = job.data.num_tokens if job.data else 0
    return sum(map(layout_bytes, job.target.layouts())) + 2 * 2 * tokens * job.source.config.hidden_size


def _plan_digest(source: HfCheckpoint, mapping: Mapping, choice: Fp8Choice, data: CalibrationSet) -> str:
    identity = (__version__, "fp8", mapping, choice, data.digest, source.identity())
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def _write_records(
    job: Fp8Job,
    work_dir: Path,
    texts: dict[str, str],
    sources: dict[str, FileDigest],
    files: dict[str, FileDigest],
) -> None:
    """The small files, conversion.json last; the folder is now whole but for its name."""
    for name, text in texts.items():
        write_durably(work_dir / name, text)
    written = {name: FileDigest.of_bytes(text.encode()) for name, text in texts.items()}
    source_config = FileDigest.of_bytes((job.source.path / "config.json").read_bytes())
    record = dump_conversion(job.digest, {**sources, "config.json": source_config}, {**files, **written})
    write_durably(work_dir / CONVERSION_NAME, record)
    remove_leavings(work_dir)
