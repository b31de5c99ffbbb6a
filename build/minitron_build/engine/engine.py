"""TensorRT-LLM checkpoint -> TensorRT engine: the one module that runs TensorRT-LLM.

`trtllm-build` runs as a child, on this machine or in NVIDIA's container, and works in `<engine>.partial`; an
engine gets its name when it has been read back whole. A finished engine of the same plan is taken as it is,
also one that was built elsewhere and brought here. It knows nothing of whether this machine suits
(precheck.py) nor of what a failure's output means (engine_errors.py).
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_build.checkpoint.contract import check_tensors
from minitron_build.checkpoint.work_folder import publish, write_durably
from minitron_build.engine.engine_config import EngineConfig
from minitron_build.engine.engine_errors import explain_failure
from minitron_build.engine.engine_file import read_tensorrt_version
from minitron_build.engine.engine_record import (
    RECORD_NAME,
    EngineRecord,
    digest_engine,
    plan_digest,
    portable_argv,
)
from minitron_build.engine.process_group import OnLine, Outcome, run_in_group
from minitron_build.engine.timing_cache import TimingCache
from minitron_build.errors import CheckpointError, MachineError, StageError
from minitron_build.planning.host_memory import available_memory_bytes
from minitron_build.planning.trtllm_flags import PROGRAM, with_paths
from minitron_build.planning.versions import PIN, check_tensorrt, check_tensorrt_llm

if TYPE_CHECKING:
    from minitron_build.planning.plan import BuildPlan

ENGINE_NAME = "engine"
PROBE_TIMEOUT_S = 60
PACKAGES = ("tensorrt_llm", "tensorrt")
PROMISED = (
    *("tp_size", "pp_size", "quant_algo", "kv_cache_quant_algo"),
    *("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens"),
)
"""What an engine must have as planned; of other fields `EngineConfig.differences` is only a report."""
CUDA_PACKAGE = "nvidia-cuda-runtime"
_PROBE = (
    "import sys; from importlib.metadata import distributions; "
    "[print(name, found.version) for name in sys.argv[1:] for found in distributions(name=name)]"
)
_POST_RELEASE = re.compile(r"\.post\d+$")
CHECKPOINT_MOUNT, WORK_MOUNT = "/checkpoint", "/output"
CONTAINER_FLAGS = (
    *("--rm", "--init", "--gpus", "all", "--ipc", "host"),
    # NVIDIA's own advice for its TensorRT-LLM images.
    *("--ulimit", "memlock=-1", "--ulimit", "stack=67108864"),
    # A user without an entry in the image's passwd still needs a name and a home.
    *("--env", "HOME=/tmp", "--env", "USER=minitron", "--env", "CUDA_DEVICE_ORDER=PCI_BUS_ID"),
)


@dataclass(frozen=True, slots=True)
class BuildTool:
    """A `trtllm-build` on this machine, with the versions of its own Python environment.

    Attributes:
        versions: tensorrt_llm, tensorrt and, where it is known, cuda; empty where its environment does not
            tell the first two.
    """

    path: Path
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class RemainingWork:
    """What is left to do where the GPU is: either command makes the engine from the finished checkpoint."""

    local: tuple[str, ...]
    container: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """For people: both commands, ready to paste."""
        yield f"with TensorRT-LLM {PIN.tensorrt_llm} installed:"
        yield f"  {shlex.join(self.local)}"
        yield "or with Docker and the NVIDIA Container Toolkit:"
        yield f"  {shlex.join(self.container)}"
        yield "then run the same minitron build command again: it takes the engine and goes on"

    def as_dict(self) -> dict[str, list[str]]:
        """JSON form."""
        return {"local": list(self.local), "container": list(self.container)}


@dataclass(frozen=True, slots=True)
class _Job:
    """One run of trtllm-build: the command, its environment, and what it will have been built under."""

    command: tuple[str, ...]
    environ: Mapping[str, str]
    versions: Mapping[str, str]
    image: str | None
    container_name: str | None


def build_engine(
    plan: BuildPlan,
    checkpoint_dir: Path,
    engine_dir: Path,
    *,
    container: bool = False,
    force: bool = False,
    gpu: str | None = None,
    driver: str | None = None,
    on_line: OnLine | None = None,
) -> EngineConfig:
    """Build the engine of a plan, or take the one that stands there already.

    Args:
        checkpoint_dir: the whole TensorRT-LLM checkpoint.
        engine_dir: gets its name when the engine is whole; `engine.json` in it says where it comes from.
        container: build inside the plan's container with Docker.
        force: replace an engine of another plan.
        gpu: name of the GPU it is built on, for the record.
        driver: version of that GPU's driver, for the record.
        on_line: called with each line of output.

    Raises:
        CheckpointError: the checkpoint is not what the loader wants, or engine_dir holds another engine.
        MachineError: there is no trtllm-build (or Docker), or another build works here.
        StageError: the build failed, or what it wrote is not whole; engine_dir is as it was before.
    """
    check_tensors(checkpoint_dir)
    finished = None if force else finished_engine(plan, checkpoint_dir, engine_dir)
    if finished is not None:
        return finished
    say = on_line or (lambda line: None)
    work_dir = engine_dir.with_name(engine_dir.name + ".partial")
    with _work_folder(work_dir) as lock:
        cache = TimingCache.of(plan.versions["tensorrt"], _sm(plan))
        extra = cache.copy_to(work_dir)
        make_job = _container_job if container else _local_job
        job = make_job(plan, checkpoint_dir.resolve(), work_dir.resolve(), extra)
        say(shlex.join(job.command))
        outcome = _run(job, work_dir, say, lock)
        if outcome.returncode:
            raise explain_failure(outcome, program=PROGRAM, memory_note=_memory_note())
        config = _read_result(plan, work_dir / ENGINE_NAME)
        versions = {**job.versions, **({"driver": driver} if driver else {})}
        record = _record(plan, checkpoint_dir, work_dir / ENGINE_NAME, versions, image=job.image, gpu=gpu)
        write_durably(work_dir / ENGINE_NAME / RECORD_NAME, record.dump())
        not_kept = cache.keep(work_dir)
        if not_kept:
            say(f"timing cache not kept: {not_kept}")
        publish(work_dir / ENGINE_NAME, engine_dir)
    return config


def finished_engine(plan: BuildPlan, checkpoint_dir: Path, engine_dir: Path) -> EngineConfig | None:
    """The engine that stands in `engine_dir`, if this plan would make the same one; None without one.

    An engine without our record was built by the command that `remaining_work` gives: it is read strictly,
    compared with the plan and given a record.

    Raises:
        CheckpointError: it is broken, or another plan's.
    """
    if not engine_dir.exists():
        return None
    if not (engine_dir / RECORD_NAME).exists():
        return _adopt(plan, checkpoint_dir, engine_dir)
    record = EngineRecord.load(engine_dir)
    if record.plan_digest != plan_digest(plan, checkpoint_dir):
        raise _another(engine_dir, "an engine of another plan or checkpoint")
    config = EngineConfig.read(engine_dir)
    config.check_rank_files(engine_dir)
    return config


def remaining_work(plan: BuildPlan, checkpoint_dir: Path, engine_dir: Path) -> RemainingWork:
    """The commands that make the engine elsewhere, with this machine's folders in them."""
    checkpoint, engine = (Path(os.path.abspath(path)) for path in (checkpoint_dir, engine_dir))
    inside = with_paths(plan.trtllm_build_argv, CHECKPOINT_MOUNT, f"{WORK_MOUNT}/{engine.name}")
    return RemainingWork(
        with_paths(plan.trtllm_build_argv, checkpoint, engine),
        docker_command(_image(plan), checkpoint, engine.parent, inside, work_dir="/tmp"),
    )


def docker_command(
    image: str,
    checkpoint_dir: Path,
    work_dir_here: Path,
    argv: tuple[str, ...],
    *,
    work_dir: str = WORK_MOUNT,
    name: str | None = None,
) -> tuple[str, ...]:
    """`docker run` of a command line with the checkpoint read-only at /checkpoint.

    Args:
        work_dir_here: this machine's folder that is /work inside, where the engine goes.
        work_dir: working folder inside.
        name: of the container, so that it can be killed.
    """
    mounts = (
        *("--volume", f"{checkpoint_dir}:{CHECKPOINT_MOUNT}:ro"),
        *("--volume", f"{work_dir_here}:{WORK_MOUNT}", "--workdir", work_dir),
    )
    named = ("--name", name) if name else ()
    user = ("--user", f"{os.getuid()}:{os.getgid()}")
    return ("docker", "run", *CONTAINER_FLAGS, *named, *user, *mounts, image, *argv)


def find_build_tool() -> BuildTool | None:
    """The trtllm-build on PATH; its versions are those of the Python that its first line names."""
    found = shutil.which(PROGRAM)
    if found is None:
        return None
    path = Path(found)
    return BuildTool(path, dict(_probe_versions(path)))


def _probe_versions(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        first = file.readline(1024)
    if not first.startswith(b"#!"):
        return
    probe = [*shlex.split(first[2:].decode(errors="replace")), "-c", _PROBE, *PACKAGES, CUDA_PACKAGE]
    try:
        answer = subprocess.run(probe, capture_output=True, text=True, check=False, timeout=PROBE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return  # a Python that does not start tells nothing
    # The first on a Python's path is the one it imports.
    told = dict(line.split(" ", 1) for line in reversed(answer.stdout.splitlines()) if " " in line)
    if answer.returncode == 0 and told.keys() >= set(PACKAGES):
        for package in PACKAGES:
            # pip's TensorRT is 10.14.1.48.post1: the same libraries, published again.
            yield package, _POST_RELEASE.sub("", told[package])
        # NVIDIA's images hold CUDA outside Python and name it in the environment.
        cuda = told.get(CUDA_PACKAGE) or os.environ.get("CUDA_VERSION")
        if cuda:
            yield "cuda", cuda


def _local_job(plan: BuildPlan, checkpoint_dir: Path, work_dir: Path, extra: tuple[str, ...]) -> _Job:
    tool = find_build_tool()
    if tool is None:
        raise MachineError(f"no {PROGRAM} on PATH", expected=f"TensorRT-LLM {PIN.tensorrt_llm}")
    argv = with_paths(plan.trtllm_build_argv, checkpoint_dir, work_dir / ENGINE_NAME)
    # PCI order is nvidia-smi's, which the checks went by; CUDA's own is fastest first.
    environ = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **os.environ, "PYTHONUNBUFFERED": "1"}
    return _Job((str(tool.path), *argv[1:], *extra), environ, tool.versions, None, None)


def _container_job(plan: BuildPlan, checkpoint_dir: Path, work_dir: Path, extra: tuple[str, ...]) -> _Job:
    if shutil.which("docker") is None:
        raise MachineError("no docker on PATH", expected="Docker with the NVIDIA Container Toolkit")
    inside = with_paths(plan.trtllm_build_argv, CHECKPOINT_MOUNT, f"{WORK_MOUNT}/{ENGINE_NAME}")
    name = f"minitron-build-{uuid.uuid4().hex[:12]}"
    command = docker_command(_image(plan), checkpoint_dir, work_dir, (*inside, *extra), name=name)
    pinned = {package: plan.versions[package] for package in PACKAGES}
    return _Job(command, os.environ, pinned, plan.container, name)


def _run(job: _Job, work_dir: Path, on_line: OnLine, lock: int) -> Outcome:
    try:
        return run_in_group(job.command, cwd=work_dir, environ=job.environ, on_line=on_line, pass_fds=(lock,))
    except OSError as error:
        raise MachineError(f"{job.command[0]} cannot be run: {error.strerror or error}") from error
    except BaseException:
        if job.container_name:  # the client is gone; the container is the daemon's child, not ours
            subprocess.run(["docker", "kill", job.container_name], capture_output=True, check=False)
        raise


def _read_result(plan: BuildPlan, engine_dir: Path) -> EngineConfig:
    """What trtllm-build wrote, read back; whatever is wrong with it is the build's failure."""
    try:
        return _read_whole(plan, engine_dir)
    except (CheckpointError, MachineError) as error:
        raise StageError(f"{PROGRAM} ended without an error, but {error}") from error


def _read_whole(plan: BuildPlan, engine_dir: Path) -> EngineConfig:
    """An engine's config, after everything that can be checked without a GPU.

    Raises:
        CheckpointError: a file is missing or broken, or the engine is not the plan's.
        MachineError: another TensorRT-LLM or TensorRT built it.
    """
    config = EngineConfig.read(engine_dir)
    check_tensorrt_llm(config.version, where=str(engine_dir / "config.json"))
    config.check_rank_files(engine_dir)
    for path in sorted(engine_dir.glob("rank*.engine")):
        check_tensorrt(read_tensorrt_version(path), where=str(path))
    wrong = [str(found) for found in config.differences(plan) if found.name in PROMISED]
    if wrong:
        raise CheckpointError(f"another engine than the plan's: {'; '.join(wrong)}", where=str(engine_dir))
    return config


def _adopt(plan: BuildPlan, checkpoint_dir: Path, engine_dir: Path) -> EngineConfig:
    """Take an engine that was built elsewhere from this plan's command line."""
    try:
        config = _read_whole(plan, engine_dir)
    except CheckpointError as error:
        raise CheckpointError(
            error.found, expected=error.expected, where=error.where, todo="build it again, or give --force"
        ) from None
    tensorrt = read_tensorrt_version(engine_dir / config.rank_files[0])
    versions = {"tensorrt_llm": config.version, "tensorrt": tensorrt}
    record = _record(plan, checkpoint_dir, engine_dir, versions, image=None, gpu=None)
    write_durably(engine_dir / RECORD_NAME, record.dump())
    return config


def _another(engine_dir: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"exists and holds {found}",
        where=str(engine_dir),
        todo="give another folder, or --force to replace it",
    )


def _record(
    plan: BuildPlan,
    checkpoint_dir: Path,
    engine_dir: Path,
    versions: Mapping[str, str],
    *,
    image: str | None,
    gpu: str | None,
) -> EngineRecord:
    return EngineRecord(
        plan_digest=plan_digest(plan, checkpoint_dir),
        sm=_sm(plan),
        gpu=gpu,
        versions=versions,
        container=image,
        argv=portable_argv(plan),
        files=digest_engine(engine_dir),
    )


def _sm(plan: BuildPlan) -> int:
    if plan.sm is None:
        raise MachineError("an engine for the CPU", expected="a plan for a GPU target")
    return plan.sm


def _image(plan: BuildPlan) -> str:
    if plan.container is None:
        raise MachineError("a container for the CPU", expected="a plan for a GPU target")
    return plan.container


def _memory_note() -> str:
    return f"{available_memory_bytes() / 1e9:.1f} GB are free now"


@contextmanager
def _work_folder(work_dir: Path) -> Iterator[int]:
    """An empty locked folder for one build, gone afterwards; yields the lock's descriptor.

    The child inherits it: a build whose parent was killed keeps its folder locked while it lives.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(work_dir, os.O_RDONLY)
    try:
        _lock_or_refuse(lock, work_dir)
        for stale in work_dir.iterdir():
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        try:
            yield lock
        finally:
            shutil.rmtree(work_dir, ignore_errors=True)
    finally:
        os.close(lock)


def _lock_or_refuse(lock: int, work_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise MachineError(
            "another build is writing here", where=str(work_dir), todo="wait for it or stop it"
        ) from None
