"""A finished folder out of an FP8 run: disk checked, work resumed, small files written, the name given last.

Shared by the TensorRT-LLM checkpoint and the Hugging Face export, which say what the files are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from minitron_build.calibration.amax import CALIBRATION_NAME, Calibration
from minitron_build.checkpoint.fp8_stream import Fp8Job, Fp8Result, Progress, remove_leavings, run_fp8
from minitron_build.checkpoint.planned_file import layout_bytes
from minitron_build.checkpoint.trtllm_checkpoint import CONVERSION_NAME, FileDigest, dump_conversion
from minitron_build.checkpoint.work_folder import (
    check_disk,
    publish,
    stage_error,
    work_dir_of,
    work_folder,
    write_durably,
)
from minitron_build.errors import CheckpointError


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

    @property
    def has_fp8_kv(self) -> bool:
        """Whether keys and values get scaling factors."""
        return self.kv_cache_dtype == "fp8"


def write_fp8_folder(
    job: Fp8Job, output_dir: Path, texts: Callable[[], Mapping[str, str]], progress: Progress | None
) -> None:
    """Run the job and publish its folder; a rerun of an interrupted one resumes.

    Args:
        texts: the small files beside the weights, by name.

    Raises:
        CheckpointError: activations that cannot be scaled, or a recorded calibration of another source.
        MachineError: too little disk, or another process writes there.
        StageError: writing failed; output_dir does not exist.
    """
    work_dir = work_dir_of(output_dir)
    check_disk(work_dir, _disk_bytes(job), f"{len(job.file_names)} rank file(s)")
    with work_folder(work_dir) as is_resumed:
        try:
            result = run_fp8(job, work_dir, is_resumed=is_resumed, progress=progress or (lambda tokens: None))
            _check_source(job, result)
            _write_records(
                job, work_dir, {**texts(), CALIBRATION_NAME: _calibration(job, result).dump()}, result
            )
            publish(work_dir, output_dir)
        except OSError as error:
            raise stage_error(error, work_dir) from error


def _disk_bytes(job: Fp8Job) -> int:
    """Of the large files, and of the hidden states twice."""
    tokens = job.data.num_tokens if job.data else 0
    return sum(map(layout_bytes, job.target.layouts())) + 2 * 2 * tokens * job.source.config.hidden_size


def _check_source(job: Fp8Job, result: Fp8Result) -> None:
    """A recorded calibration holds for the very weights that it was made from."""
    if job.recorded is None:
        return
    found = {name: digest.sha256 for name, digest in result.sources.items()}
    if found != dict(job.recorded.source_digest):
        raise CheckpointError(
            "a calibration of other weights",
            expected="the calibration of this source",
            where=str(job.source.path),
            todo="calibrate again: leave --calibration out",
        )


def _calibration(job: Fp8Job, result: Fp8Result) -> Calibration:
    if job.recorded is not None:
        return job.recorded
    if job.data is None:
        raise ValueError("neither a calibration set nor a recorded calibration")
    sources = {name: digest.sha256 for name, digest in result.sources.items()}
    return Calibration(job.data.as_dict(), sources, result.layers)


def _write_records(job: Fp8Job, work_dir: Path, texts: Mapping[str, str], result: Fp8Result) -> None:
    """The small files, conversion.json last; the folder is now whole but for its name."""
    for name, text in texts.items():
        write_durably(work_dir / name, text)
    written = {name: FileDigest.of_bytes(text.encode()) for name, text in texts.items()}
    config = FileDigest.of_bytes((job.source.path / "config.json").read_bytes())
    record = dump_conversion(
        job.digest, {**result.sources, "config.json": config}, {**result.files, **written}
    )
    write_durably(work_dir / CONVERSION_NAME, record)
    remove_leavings(work_dir)
