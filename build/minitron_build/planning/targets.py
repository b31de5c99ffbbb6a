"""The targets a bundle can be built for: one table, and how the GPU at hand picks its row.

It knows SM numbers and what each generation's hardware can multiply. It knows nothing of models.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, replace

from minitron_build.errors import PlanError


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU generation, or the CPU.

    Attributes:
        sm: compute capability x 10 that is built for, exactly; None for the CPU.
        precisions: what it can run, the default first.
        note: what its hardware is, said of `label`.
    """

    arch: str
    sm: int | None
    precisions: tuple[str, ...]
    note: str

    @property
    def label(self) -> str:
        """The target as messages name it."""
        return self.arch if self.sm is None else f"{self.arch} (SM {self.sm})"

    @property
    def reason(self) -> str:
        """Why its default precision is the default."""
        return f"{self.label} {self.note}"


TARGETS: dict[str, Target] = {
    target.arch: target
    for target in (
        Target("ampere", 80, ("bf16",), "has no FP8 tensor cores"),
        Target("ada", 89, ("fp8", "bf16"), "has FP8 tensor cores"),
        Target("hopper", 90, ("fp8", "bf16"), "has FP8 tensor cores"),
        Target("blackwell", 100, ("fp8", "bf16"), "has FP8 tensor cores, with per-tensor scales"),
        Target("cpu", None, ("bf16", "fp8"), "has no FP8 hardware: the reference engine emulates it"),
    )
}
ARCH_CHOICES = (*TARGETS, "auto")

GENERATIONS: dict[int, str] = {
    80: "ampere",
    86: "ampere",
    89: "ada",
    90: "hopper",
    100: "blackwell",
    103: "blackwell",
    120: "blackwell",
}
"""Every SM that TensorRT-LLM 1.2.1 supports, by generation; `--arch` means the one of TARGETS."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of this machine as its driver names it."""

    name: str
    sm: int
    memory_bytes: int


def find_gpus() -> tuple[Gpu, ...]:
    """GPUs that nvidia-smi lists; empty without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    if answer.returncode:
        return ()
    return tuple(_read_gpu(line) for line in answer.stdout.splitlines() if line.count(",") == 2)


def _read_gpu(line: str) -> Gpu:
    name, capability, memory_mib = (word.strip() for word in line.split(","))
    major, _, minor = capability.partition(".")
    return Gpu(name, int(major) * 10 + int(minor), int(memory_mib) << 20)


def resolve_target(arch: str, gpus: tuple[Gpu, ...], sm: int | None = None) -> tuple[Target, str]:
    """The target that `--arch` and `--sm` mean here, with the reason.

    Raises:
        PlanError: `auto` met a GPU that no target means, or the SM is unknown or of another generation.
    """
    if sm is not None:
        return _target_of_sm(arch, sm), "asked for with --sm"
    if arch != "auto":
        return TARGETS[arch], "asked for with --arch"
    if not gpus:
        return TARGETS["cpu"], "no NVIDIA GPU was found on this machine"
    for target in TARGETS.values():
        if target.sm == gpus[0].sm:
            return target, f"{gpus[0].name} is SM {gpus[0].sm}"
    known = ", ".join(f"{target.arch} {target.sm}" for target in TARGETS.values() if target.sm)
    raise PlanError(
        f"{gpus[0].name} is SM {gpus[0].sm}",
        expected=f"one of {known}",
        where="--arch auto",
        todo=f"say so with --sm {gpus[0].sm}" if gpus[0].sm in GENERATIONS else "",
    )


def _target_of_sm(arch: str, sm: int) -> Target:
    """A generation's target at another of its SMs."""
    if sm not in GENERATIONS:
        known = ", ".join(f"{number} {name}" for number, name in GENERATIONS.items())
        raise PlanError(f"--sm {sm}", expected=f"one of {known}")
    generation = GENERATIONS[sm]
    if arch not in ("auto", generation):
        raise PlanError(
            f"--sm {sm} with --arch {arch}",
            expected=f"--arch {generation}",
            todo=f"SM {sm} is {generation}: leave --arch or --sm out",
        )
    return replace(TARGETS[generation], sm=sm)
