"""What a user asks of a plan, and the record of one decision.

The words are the command line's. It checks single values; whether they fit together, the model and the
target is the plan's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minitron_build.calibration.samples import DEFAULT_SEQ_LEN, SampleRequest
from minitron_build.errors import PlanError

ENGINE_BACKENDS = {
    "cpp": "Triton's C++ tensorrtllm backend; the text models ask it through Triton, token by token",
    "executor": "a Python model that owns TensorRT-LLM's executor; the text models read it over a socket",
}


@dataclass(frozen=True, slots=True)
class Decision:
    """Something that was decided for the user, and why."""

    what: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the user asked for; None leaves the decision to the plan.

    Attributes:
        sm: compute capability x 10, for a member of a generation that `arch` alone does not mean.
        gpu: the GPU model that limits are chosen for, a name of gpu_models.py.
        gpu_memory_gb: its memory in 10^9 bytes, instead of what the table or the driver says.
        kv_cache_fraction: of the GPU memory free beside weights and activations, what the KV cache takes.
        plugins: (name, value) pairs for trtllm-build, over what the plan would choose.
        calib_data: the user's calibration file; None for the texts in the package.
        calib_samples: how many samples at most; None for the default.
        calib_seq_len: tokens of a sample at most; None for the default.
        fp8_exclude: patterns of linear layers that stay bf16 in an FP8 checkpoint.
        engine_backend: what serves the engine, one of ENGINE_BACKENDS.
    """

    arch: str = "auto"
    precision: str = "auto"
    kv_cache_dtype: str = "auto"
    tp_size: int = 1
    pp_size: int = 1
    max_batch_size: int | None = None
    max_input_len: int | None = None
    max_seq_len: int | None = None
    max_num_tokens: int | None = None
    sm: int | None = None
    gpu: str | None = None
    gpu_memory_gb: float | None = None
    kv_cache_fraction: float = 0.9
    plugins: tuple[tuple[str, str], ...] = ()
    calib_data: Path | None = None
    calib_samples: int | None = None
    calib_seq_len: int | None = None
    fp8_exclude: tuple[str, ...] = ()
    engine_backend: str = "cpp"

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlanError(f"{flag_name(name)} is {value}", expected="1 or more")
        if not 0 < self.kv_cache_fraction <= 1:
            raise PlanError(
                f"--kv-cache-fraction is {self.kv_cache_fraction}", expected="more than 0 and at most 1"
            )
        if self.gpu_memory_gb is not None and not 0 < self.gpu_memory_gb < float("inf"):
            raise PlanError(f"--gpu-memory-gb is {self.gpu_memory_gb}", expected="a positive number")
        _ = self.samples

    @property
    def samples(self) -> SampleRequest:
        """The calibration set asked for."""
        return SampleRequest(
            self.calib_data,
            self.calib_samples,
            DEFAULT_SEQ_LEN if self.calib_seq_len is None else self.calib_seq_len,
        )

    @property
    def fp8_flags(self) -> tuple[str, ...]:
        """The flags given that only an FP8 conversion takes."""
        names = ("calib_data", "calib_samples", "calib_seq_len", "fp8_exclude")
        return tuple(flag_name(name) for name in names if getattr(self, name) not in (None, ()))


def flag_name(field: str) -> str:
    """The command line's name of a field."""
    return "--" + field.replace("_", "-")
