"""What an FP8 conversion is planned to do: its calibration set, what stays bf16, and the memory it takes.

It checks the request's FP8 flags against the rest of it. It looks whether the
calibration file is there, and reads neither it nor any weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minitron_build.calibration.samples import DEFAULT_NAME, SampleRequest, check_samples_file
from minitron_build.checkpoint.fp8_exclude import Excluded, resolve_exclusions
from minitron_build.checkpoint.weight_map import Mapping
from minitron_build.errors import PlanError
from minitron_build.planning.request import Decision, PlanRequest
from minitron_build.source.model_config import ModelConfig

CALIBRATION_BASE_BYTES = 520 << 20
"""torch, its kernels' workspaces, the activations of one sequence, buffers of files.

Measured at the real shape with 32 samples of 512 tokens: 1199 MiB in all; this formula says 1282."""
LAYERS_IN_MEMORY = 3
"""The layer being calibrated, the next one being read, and two in FP8, done and being written."""


@dataclass(frozen=True, slots=True)
class Fp8Plan:
    """Attributes are those of the request, resolved.

    Attributes:
        samples: the calibration set to read when the stage runs.
        exclude: patterns as the user gave them.
        excluded: the linear layers that they mean.
    """

    samples: SampleRequest
    exclude: tuple[str, ...]
    excluded: Excluded

    def as_dict(self) -> dict[str, Any]:
        """JSON form; it names no folder of this machine."""
        return {
            "calib_data": self.samples.path.name if self.samples.path else DEFAULT_NAME,
            "calib_samples": self.samples.max_samples,
            "calib_seq_len": self.samples.seq_len,
            "exclude_modules": list(self.excluded.recorded),
        }

    def ram_bytes(self, config: ModelConfig) -> int:
        """Host memory of the conversion: layers in bf16, and the hidden states of all samples."""
        layer = 2 * config.layer_parameters
        tokens = self.samples.max_samples * self.samples.seq_len
        return CALIBRATION_BASE_BYTES + LAYERS_IN_MEMORY * layer + 2 * tokens * config.hidden_size


def plan_fp8(
    config: ModelConfig, mapping: Mapping, request: PlanRequest, precision: str
) -> tuple[Fp8Plan | None, tuple[Decision, ...]]:
    """The plan of an FP8 conversion and its decisions; None for bf16.

    Raises:
        PlanError: FP8 flags with --precision bf16, or exclusions that do not fit the model.
        CheckpointError: --calib-data is no file of samples.
    """
    if precision != "fp8":
        if request.fp8_flags and request.precision == precision:
            raise PlanError(
                f"{request.fp8_flags[0]} with --precision {precision}",
                todo="only FP8 is calibrated: leave it out",
            )
        return None, ()
    samples = request.samples
    if samples.path is not None:
        check_samples_file(samples.path, "--calib-data")
    plan = Fp8Plan(samples, request.fp8_exclude, resolve_exclusions(config, mapping, request.fp8_exclude))
    return plan, tuple(_decisions(plan))


def unused_flags(request: PlanRequest, fp8: Fp8Plan | None) -> tuple[str, ...]:
    """A warning about FP8 flags that a bf16 plan does not use."""
    if fp8 is not None or not request.fp8_flags:
        return ()
    return (f"{', '.join(request.fp8_flags)} not used: the weights stay bf16",)


def _decisions(plan: Fp8Plan) -> list[Decision]:
    samples = plan.samples
    data = samples.path.name if samples.path else "the texts in the package"
    reason = "asked for with --calib-data" if samples.path else "no --calib-data was given"
    decisions = [
        Decision("calibration", f"{data}, up to {samples.max_samples} x {samples.seq_len} tokens", reason),
    ]
    if plan.exclude:
        decisions.append(
            Decision(
                "exclude_modules",
                f"{len(plan.excluded.modules)} linear layers stay bf16",
                f"asked for with --fp8-exclude {' '.join(plan.exclude)}",
            )
        )
    return decisions
