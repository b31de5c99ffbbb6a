"""Can this machine build the plan's engine? Asked before the first byte of work.

Reads the GPUs, their driver, the build tool's versions, Docker, disk and memory, and holds them against the
plan. A machine that contradicts the plan (another SM, another TensorRT-LLM, too little memory) is refused;
one that merely lacks something can still make the checkpoint, and is told what remains. It starts no build.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_build.bundle.manifest import MANIFEST_NAME
from minitron_build.checkpoint.work_folder import free_disk_bytes
from minitron_build.engine.engine import BuildTool, find_build_tool, remaining_work
from minitron_build.errors import MachineError
from minitron_build.planning.host_memory import available_memory_bytes
from minitron_build.planning.targets import GENERATIONS, Gpu
from minitron_build.planning.trtllm_flags import PROGRAM
from minitron_build.planning.versions import PIN, check_driver, check_tensorrt, check_tensorrt_llm

if TYPE_CHECKING:
    from minitron_build.planning.plan import BuildPlan

GPU_FIELDS = ("name", "compute_cap", "memory.total", "memory.free", "driver_version", "uuid")
QUERY_TIMEOUT_S = 30
STAGE_DIRS = ("checkpoint", "engine")


@dataclass(frozen=True, slots=True)
class GpuState:
    """A GPU as its driver sees it now."""

    gpu: Gpu
    free_bytes: int
    driver: str
    uuid: str


@dataclass(frozen=True, slots=True)
class Room:
    """Memory free for this process, cgroup limits included, and disk free where the bundle goes."""

    ram_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What a build would run on.

    Attributes:
        gpus: those that CUDA programs started here may use, in their order.
        tool: the trtllm-build on PATH.
        has_docker: whether a docker client is on PATH.
        ram_bytes: free for this process, cgroup limits included.
        disk_bytes: free where the bundle goes.
    """

    gpus: tuple[GpuState, ...]
    tool: BuildTool | None
    has_docker: bool
    ram_bytes: int
    disk_bytes: int

    @property
    def room(self) -> Room:
        """Its memory and disk."""
        return Room(self.ram_bytes, self.disk_bytes)


def read_machine(output_dir: Path) -> Machine:
    """Look at this machine.

    Args:
        output_dir: the bundle, which need not exist yet.
    """
    room = read_room(output_dir)
    return Machine(
        gpus=visible_gpus(read_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")),
        tool=find_build_tool(),
        has_docker=shutil.which("docker") is not None,
        ram_bytes=room.ram_bytes,
        disk_bytes=room.disk_bytes,
    )


def read_room(output_dir: Path) -> Room:
    """Look at memory and disk only; `output_dir` need not exist yet."""
    return Room(available_memory_bytes(), free_disk_bytes(output_dir))


def read_gpus() -> tuple[GpuState, ...]:
    """GPUs that nvidia-smi lists, with their free memory; empty without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=QUERY_TIMEOUT_S)
    if answer.returncode:
        return ()
    lines = (line for line in answer.stdout.splitlines() if line.count(",") == len(GPU_FIELDS) - 1)
    return tuple(_read_gpu(line) for line in lines)


def visible_gpus(gpus: tuple[GpuState, ...], visible: str | None) -> tuple[GpuState, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; as CUDA does, up to the first wrong entry."""
    if visible is None:
        return gpus
    chosen: list[GpuState] = []
    for word in (word.strip() for word in visible.split(",")):
        by_index = word.isdigit() and int(word) < len(gpus)
        found = [gpus[int(word)]] if by_index else [gpu for gpu in gpus if word and gpu.uuid.startswith(word)]
        if len(found) != 1:
            break
        chosen += found
    return tuple(chosen)


def precheck(
    plan: BuildPlan, machine: Machine, output_dir: Path, *, container: bool, force: bool = False
) -> MachineError | None:
    """Hold a machine against a plan for a GPU target.

    An engine that stands in `output_dir` already, perhaps built elsewhere and brought here, needs no GPU.

    Args:
        force: what stands there will be built again.

    Returns:
        None when the engine can be built here; else what is missing. Such a machine can still make the
        checkpoint: raise the error after that.

    Raises:
        MachineError: this machine contradicts the plan: nothing should be begun.
    """
    done = () if force else tuple(name for name in STAGE_DIRS if (output_dir / name).exists())
    if not force and (output_dir / MANIFEST_NAME).exists():
        return None
    if "engine" in done:
        _check_room(plan, machine.room, output_dir, done)
        return None
    for gpu in machine.gpus[:1]:
        _check_gpu(plan, gpu)
    if machine.tool is not None and not container:
        _check_tool(machine.tool)
    # Without a GPU the engine stage does not run here.
    _check_room(plan, machine.room, output_dir, done if machine.gpus else (*done, "engine"))
    return _missing(plan, machine, output_dir, container=container)


def check_room(
    plan: BuildPlan, room: Room, output_dir: Path, stages: Collection[str], *, force: bool
) -> None:
    """Hold memory and disk against stages that need no GPU; a whole one that stands there is not run again.

    Raises:
        MachineError: too little memory or disk: nothing should be begun.
    """
    if not force and (output_dir / MANIFEST_NAME).exists():
        return
    done = () if force else tuple(name for name in STAGE_DIRS if (output_dir / name).exists())
    _check_room(plan, room, output_dir, (*done, *(name for name in plan.memory.stages if name not in stages)))


def _check_gpu(plan: BuildPlan, state: GpuState) -> None:
    if state.gpu.sm != plan.sm:
        generation = GENERATIONS.get(state.gpu.sm)
        raise MachineError(
            f"{state.gpu.name} is SM {state.gpu.sm}" + (f" ({generation})" if generation else ""),
            expected=f"SM {plan.sm} ({plan.arch}), which the plan is for",
            where="this machine's GPU",
            todo="an engine is built on a GPU of the same SM: use --arch auto here, build there, or give "
            "--stop-after checkpoint",
        )
    check_driver(state.driver, where=state.gpu.name)
    need = plan.memory.stages["engine"].gpu_bytes
    if state.free_bytes < need:
        raise MachineError(
            f"{_gb(state.free_bytes)} of {_gb(state.gpu.memory_bytes)} GPU memory free",
            expected=f"{_gb(need)}",
            where=state.gpu.name,
            todo="stop what else uses the GPU (nvidia-smi lists it), or lower --max-num-tokens or "
            "--max-batch-size",
        )


def _check_tool(tool: BuildTool) -> None:
    if not tool.versions:
        raise MachineError(
            "belongs to a Python without TensorRT-LLM's metadata",
            expected=f"the {PROGRAM} of TensorRT-LLM {PIN.tensorrt_llm}",
            where=str(tool.path),
            todo="activate the environment that TensorRT-LLM is installed in, or build with --container",
        )
    try:
        check_tensorrt_llm(tool.versions["tensorrt_llm"], where=str(tool.path))
        check_tensorrt(tool.versions["tensorrt"], where=str(tool.path))
    except MachineError as error:
        raise MachineError(
            error.found,
            expected=error.expected,
            where=error.where,
            todo=f"build with --container, or pip install tensorrt_llm=={PIN.tensorrt_llm} from NVIDIA's "
            f"package index; {error.todo}",
        ) from None


def _check_room(plan: BuildPlan, room: Room, output_dir: Path, not_to_run: tuple[str, ...]) -> None:
    """RAM and disk of the stages that are to run here."""
    stages = {name: need for name, need in plan.memory.stages.items() if name not in not_to_run}
    if not stages:
        return
    disk_bytes = sum(need.disk_bytes for need in stages.values()) - _bytes_done(output_dir)
    if room.disk_bytes < disk_bytes:
        raise MachineError(
            f"{_gb(room.disk_bytes)} of disk free",
            expected=f"{_gb(disk_bytes)} for {' and '.join(stages)}",
            where=str(output_dir),
            todo="free some space or give another --output-dir",
        )
    name, need = max(stages.items(), key=lambda item: item[1].ram_bytes)
    if room.ram_bytes < need.ram_bytes:
        raise MachineError(
            f"{_gb(room.ram_bytes)} of RAM free (container limits included)",
            expected=f"{_gb(need.ram_bytes)} for the {name} stage",
            where="this machine",
            todo="stop other programs or raise the container's memory limit",
        )


def _bytes_done(output_dir: Path) -> int:
    """What an interrupted conversion wrote already and a resumed one keeps."""
    partial = output_dir / "checkpoint.partial"
    return sum(path.stat().st_size for path in partial.glob("*") if path.is_file())


def _missing(plan: BuildPlan, machine: Machine, output_dir: Path, *, container: bool) -> MachineError | None:
    """What this machine lacks, with the command that remains as the last words."""
    work = remaining_work(plan, output_dir / "checkpoint", output_dir / "engine")
    where = f"run this on a machine with a GPU of SM {plan.sm}"
    if container and not machine.has_docker:
        return MachineError(
            "no docker on PATH",
            expected="Docker with the NVIDIA Container Toolkit for --container",
            where="this machine",
            todo=f"{where} and Docker: {shlex.join(work.container)}",
        )
    if not machine.gpus:
        argv = work.container if container else work.local
        return MachineError(
            "no NVIDIA GPU that a program can use",
            expected=f"one of SM {plan.sm} to build the engine on",
            where="this machine",
            todo=f"{where}: {shlex.join(argv)}",
        )
    if machine.tool is None and not container:
        return MachineError(
            f"no {PROGRAM} on PATH",
            expected=f"TensorRT-LLM {PIN.tensorrt_llm}",
            where="this machine",
            todo=f"pip install tensorrt_llm=={PIN.tensorrt_llm} from NVIDIA's package index, give "
            f"--container, or run: {shlex.join(work.container)}",
        )
    return None


def _read_gpu(line: str) -> GpuState:
    name, capability, total_mib, free_mib, driver, uuid = (word.strip() for word in line.split(","))
    major, _, minor = capability.partition(".")
    gpu = Gpu(name, int(major) * 10 + int(minor), int(total_mib) << 20)
    return GpuState(gpu, int(free_mib) << 20, driver, uuid)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
