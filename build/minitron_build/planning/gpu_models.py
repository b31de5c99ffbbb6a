"""The GPU models that a plan can be made for: memory, bandwidth and arithmetic of each.

Numbers are the makers' for the whole board, without sparsity; memory is what the driver reports, which is
less than the name says on boards with ECC. This module knows boards; it looks at no machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from minitron_build.errors import PlanError
from minitron_build.planning.targets import GENERATIONS, Gpu

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A board.

    Attributes:
        bandwidth_bytes_per_s: of its memory; None when only the memory's size is known.
        bf16_flops_per_s: dense, on tensor cores.
        fp8_flops_per_s: dense; None without FP8 tensor cores.
    """

    name: str
    sm: int
    memory_bytes: int
    bandwidth_bytes_per_s: float | None = None
    bf16_flops_per_s: float | None = None
    fp8_flops_per_s: float | None = None

    @property
    def arch(self) -> str:
        """The generation, as `--arch` calls it."""
        return GENERATIONS[self.sm]


GPU_MODELS: tuple[GpuModel, ...] = (
    GpuModel("A10", 86, 23028 * MIB, 0.600e12, 125e12),
    GpuModel("L4", 89, 23034 * MIB, 0.300e12, 121e12, 242e12),
    GpuModel("L40S", 89, 46068 * MIB, 0.864e12, 362e12, 733e12),
    GpuModel("A100-40GB", 80, 40960 * MIB, 1.555e12, 312e12),
    GpuModel("A100-80GB", 80, 81920 * MIB, 2.039e12, 312e12),
    GpuModel("H100", 90, 81559 * MIB, 3.35e12, 989e12, 1979e12),
    GpuModel("H200", 90, 143771 * MIB, 4.8e12, 989e12, 1979e12),
    GpuModel("B200", 100, 183359 * MIB, 8.0e12, 2250e12, 4500e12),
    GpuModel("B300", 103, 275040 * MIB, 8.0e12, 2250e12, 4500e12),
    GpuModel("RTX-PRO-6000", 120, 97887 * MIB, 1.597e12, 500e12, 1000e12),
)
"""H100, H200, A100, B200 and B300 are the SXM boards. Sources: the boards' datasheets (half of the figures
given with sparsity) and the memory that nvidia-smi shows for them."""


OTHER_FORMS = {"pcie", "nvl"}
"""Words in the name of a board that is slower than the table's of the same name."""


def find_models(name: str) -> tuple[GpuModel, ...]:
    """Every model that a name means: `h100`, `A100` (both sizes), `NVIDIA A100-SXM4-80GB`.

    Raises:
        PlanError: no model of the table.
    """
    found = tuple(model for model in GPU_MODELS if _is_named(model, name))
    if not found:
        known = ", ".join(model.name for model in GPU_MODELS)
        raise PlanError(
            f"--gpu {name}",
            expected=f"one of {known}",
            todo="for another GPU give --arch or --sm and --gpu-memory-gb N",
        )
    return found


def find_model(name: str) -> GpuModel:
    """The one model that a name means.

    Raises:
        PlanError: none, or more than one.
    """
    found = find_models(name)
    if len(found) > 1:
        raise PlanError(f"--gpu {name}", expected=" or ".join(model.name for model in found))
    return found[0]


def smallest_model(sm: int) -> GpuModel:
    """The model with the least memory of an SM: what fits there fits on every other of the table."""
    return min((model for model in GPU_MODELS if model.sm == sm), key=lambda model: model.memory_bytes)


def model_of(gpu: Gpu) -> GpuModel:
    """A GPU of this machine as a model: its own memory, and the rates of the table when it is in it."""
    for model in GPU_MODELS:
        if model.sm == gpu.sm and _is_named(model, gpu.name):
            return replace(model, name=gpu.name, memory_bytes=gpu.memory_bytes)
    return GpuModel(gpu.name, gpu.sm, gpu.memory_bytes)


def _is_named(model: GpuModel, name: str) -> bool:
    """Whether every word of one of the two is in the other; a board of another form has other rates."""
    words, own = _words(name), _words(model.name)
    return bool(words) and not words & OTHER_FORMS and (own <= words or words <= own)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower())) - {"nvidia"}
