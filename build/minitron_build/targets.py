"""The targets a bundle can be built for: one table, and how the GPU at hand picks its row.

It knows SM numbers and what each generation's hardware can multiply. It knows nothing of models.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from minitron_build.errors import PlanError


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU generation, or the CPU.

    Attributes:
        sm: compute capability x 10 that `--arch` means exactly; None for the CPU.
        precisions: what it can run, the default first.
    """

    arch: str
    sm: int | None
    precisions: tuple[str, ...]
    note: str


TARGETS: dict[str, Target] = {
    target.arch: target
    for target in (
        Target("ampere", 80, ("bf16",), "ampere (SM 80) has no FP8 tensor cores"),
        Target("ada", 89, ("fp8", "bf16"), "ada (SM 89) has FP8 tensor cores"),
        Target("hopper", 90, ("fp8", "bf16"), "hopper (SM 90) has FP8 tensor cores"),
        Target(
            "blackwell",
            100,
            ("fp8", "bf16"),
            "blackwell (SM 100) has FP8 tensor cores, per-tensor scales only",
        ),
        Target("cpu", None, ("bf16",), "the reference engine executes bf16 checkpoints"),
    )
}
ARCH_CHOICES = (*TARGETS, "auto")


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


def resolve_target(arch: str, gpus: tuple[Gpu, ...]) -> tuple[Target, str]:
    """The target that `--arch` means here, with the reason.

    Raises:
        PlanError: `auto` met a GPU that no target means.
    """
    if arch != "auto":
        return TARGETS[arch], "asked for with --arch"
    if not gpus:
        return TARGETS["cpu"], "no NVIDIA GPU was found on this machine"
    for target in TARGETS.values():
        if target.sm == gpus[0].sm:
            return target, f"{gpus[0].name} is SM {gpus[0].sm}"
    known = ", ".join(f"{target.arch} {target.sm}" for target in TARGETS.values() if target.sm)
    raise PlanError(f"{gpus[0].name} is SM {gpus[0].sm}", expected=f"one of {known}", where="--arch auto")
