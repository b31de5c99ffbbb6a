"""Does a bundle fit the machine that is to serve it? Asked before Triton starts and before files are hashed.

An engine runs on GPUs of the SM it was built for, one per rank, under the TensorRT-LLM and TensorRT that
built it. This module holds what the engine says of itself (record, config, first bytes of each rank) against
GPUs, driver and packages of this machine. It knows nothing of Triton's process, nor of other bundles.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from minitron_build.bundle.agreement import check_plan
from minitron_build.bundle.bundle import MODEL_REPO_DIR, Bundle
from minitron_build.engine.engine import PACKAGES, find_build_tool
from minitron_build.engine.engine_config import EngineConfig
from minitron_build.engine.engine_file import read_tensorrt_version
from minitron_build.engine.engine_record import EngineRecord
from minitron_build.engine.precheck import GpuState, read_gpus, visible_gpus
from minitron_build.errors import CheckpointError, MachineError
from minitron_build.planning.targets import GENERATIONS
from minitron_build.planning.versions import (
    PIN,
    check_driver,
    check_tensorrt_llm,
    release_of,
    serving_container,
)
from minitron_build.repository.model_repo import ENGINE_MODEL
from minitron_build.serving.triton_preflight import TritonInstall

CPU_ARCH = "cpu"
BACKEND_OF_CPU = "python"
BACKEND_OF_ENGINE = {"cpp": "tensorrtllm", "executor": "python"}
"""What a GPU bundle's tensorrt_llm runs on, by the plan's engine_backend."""
PACKAGE_NAMES = {"tensorrt_llm": "TensorRT-LLM", "tensorrt": "TensorRT"}
VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"

_PROBE_TIMEOUT_S = 60
_PROBE = "import sys; from importlib.metadata import version; [print(version(n)) for n in sys.argv[1:]]"


@dataclass(frozen=True, slots=True)
class ServingMachine:
    """What a bundle would be served on.

    Attributes:
        gpus: those that CUDA programs started here may use, in their order.
        install: the tritonserver that would run.
        versions: tensorrt_llm and tensorrt of this machine; empty where nothing tells.
        versions_source: the program whose environment told them.
    """

    gpus: tuple[GpuState, ...]
    install: TritonInstall
    versions: Mapping[str, str]
    versions_source: str

    @property
    def gpu_words(self) -> str:
        """The GPUs in a few words: `2 x NVIDIA H100 (SM 90)`."""
        kinds = [f"{state.gpu.name} (SM {state.gpu.sm})" for state in self.gpus]
        counted = (f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
        return ", ".join(counted) or "no NVIDIA GPU"


@dataclass(frozen=True, slots=True)
class BundleEngine:
    """A bundle's TensorRT engine, as its own files describe it."""

    path: Path
    record: EngineRecord
    config: EngineConfig

    @classmethod
    def read(cls, bundle: Bundle) -> BundleEngine | None:
        """Read it; None for a bundle that runs on the CPU.

        Raises:
            CheckpointError: a file is missing or cannot be read, or the rank files are not those of one
                engine.
        """
        if bundle.manifest.arch == CPU_ARCH:
            return None
        path = bundle.path / MODEL_REPO_DIR / ENGINE_MODEL / "1"
        config = EngineConfig.read(path)
        config.check_rank_files(path)
        engine = cls(path, EngineRecord.load(path), config)
        engine._check_agreement()
        return engine

    @property
    def label(self) -> str:
        """The GPU it is for: `SM 90 (hopper)`."""
        generation = GENERATIONS.get(self.record.sm)
        return f"SM {self.record.sm}" + (f" ({generation})" if generation else "")

    @property
    def container(self) -> str:
        """An image that holds the versions it needs."""
        image = self.record.container
        return image if image is not None and "tritonserver" in image else serving_container()

    def _check_agreement(self) -> None:
        """The record against `config.json`, and against the version in the first bytes of each rank."""
        missing = [name for name in PACKAGES if name not in self.record.versions]
        if missing:
            raise CheckpointError(f"engine.json does not tell the {missing[0]} version", where=str(self.path))
        for name, package, found in self._versions_inside():
            if not _is_same_release(found, self.record.versions[package]):
                raise CheckpointError(
                    f"{PACKAGE_NAMES[package]} {found} wrote it",
                    expected=f"{self.record.versions[package]}, as engine.json says",
                    where=str(self.path / name),
                    todo="copy the whole bundle again, or build it again",
                )

    def _versions_inside(self) -> Iterator[tuple[str, str, str]]:
        """File, package, and the package's version that the file itself tells."""
        yield "config.json", "tensorrt_llm", self.config.version
        for name in self.config.rank_files:
            yield name, "tensorrt", read_tensorrt_version(self.path / name)


def read_serving_machine(install: TritonInstall) -> ServingMachine:
    """Look at this machine.

    Args:
        install: the tritonserver that would run.
    """
    gpus = visible_gpus(read_gpus(), os.environ.get(VISIBLE_VARIABLE))
    # Without a backend that runs engines nothing else of TensorRT-LLM here could serve.
    serves_engines = any(install.has_backend(name) for name in BACKEND_OF_ENGINE.values())
    source, versions = _serving_versions() if gpus and serves_engines else ("", {})
    return ServingMachine(gpus, install, versions, source)


def check_fit(bundle: Bundle, machine: ServingMachine) -> BundleEngine | None:
    """Refuse a bundle that this machine cannot serve; hashes are not compared here.

    Returns:
        The engine; None for a bundle that runs on the CPU.

    Raises:
        CheckpointError: the bundle's engine is not whole, or its files or its plan contradict each other.
        MachineError: GPU, driver, backend or a version is not what the engine needs.
    """
    engine = BundleEngine.read(bundle)
    check_plan(bundle)
    if engine is not None:
        _check_gpus(engine, machine)
    engine_backend = str(bundle.manifest.plan.get("engine_backend") or "cpp")
    check_backend(bundle.manifest.arch, machine.install, engine_backend)
    if engine is not None:
        for state in machine.gpus[: engine.config.world_size]:
            check_driver(state.driver, where=state.gpu.name)
        _check_versions(engine, machine)
        if engine_backend == "executor":
            _check_bindings()
    return engine


def check_backend(arch: str, install: TritonInstall, engine_backend: str = "cpp") -> None:
    """Refuse a bundle whose engine this tritonserver has no backend for.

    Args:
        engine_backend: the plan's, of a GPU bundle.

    Raises:
        MachineError: the backend is missing.
    """
    backend = BACKEND_OF_CPU if arch == CPU_ARCH else BACKEND_OF_ENGINE[engine_backend]
    if not install.has_backend(backend):
        raise MachineError(
            f"no {backend} backend, and the bundle's engine is for {arch}",
            expected=f"a tritonserver with the {backend} backend",
            where=str(install.binary),
            todo="run minitron serve inside NVIDIA's Triton container for TensorRT-LLM",
        )


def _check_bindings() -> None:
    """Refuse an executor bundle where no Python that Triton may run has tensorrt_llm.

    It is looked for, not imported: that takes seconds and starts CUDA. Triton's Python is isolated (-I).
    """
    pythons = tuple(dict.fromkeys(filter(None, (shutil.which("python3"), sys.executable))))
    if not any(_has_tensorrt_llm(python) for python in pythons):
        raise MachineError(
            "no Python package tensorrt_llm, and the bundle's engine runs in Triton's Python backend",
            expected=f"TensorRT-LLM {PIN.tensorrt_llm}",
            where=" and ".join(pythons),
            todo="run minitron serve inside NVIDIA's Triton container for TensorRT-LLM",
        )


def _has_tensorrt_llm(python: str) -> bool:
    probe = "import sys; from importlib.util import find_spec; sys.exit(find_spec('tensorrt_llm') is None)"
    try:
        answer = subprocess.run([python, "-I", "-c", probe], check=False, timeout=_PROBE_TIMEOUT_S, cwd="/")
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0


def _check_gpus(engine: BundleEngine, machine: ServingMachine) -> None:
    """One GPU of the engine's SM per rank: rank N takes the Nth that is visible."""
    world_size = engine.config.world_size
    used = machine.gpus[:world_size]
    wrong = next((state for state in used if state.gpu.sm != engine.record.sm), None)
    if wrong is not None:
        raise MachineError(
            f"{wrong.gpu.name} is SM {wrong.gpu.sm}, and rank {used.index(wrong)} would run on it",
            expected=f"{engine.label}, which the engine was built for",
            where=f"GPU {used.index(wrong)} of this machine",
            todo=_way_to_fitting_gpus(engine, machine),
        )
    if len(used) < world_size:
        raise MachineError(
            f"{machine.gpu_words} that a program can use",
            expected=f"{world_size} of {engine.label} for tp {engine.config.tp_size} "
            f"x pp {engine.config.pp_size}",
            where="this machine",
            todo=_way_to_more_gpus(machine),
        )


def _way_to_fitting_gpus(engine: BundleEngine, machine: ServingMachine) -> str:
    """The variable that leaves the right GPUs, if there are enough."""
    fitting = [state.uuid for state in machine.gpus if state.gpu.sm == engine.record.sm]
    if len(fitting) >= engine.config.world_size:
        return f"set {VISIBLE_VARIABLE}={','.join(fitting[: engine.config.world_size])}"
    return "serve a bundle built with --arch auto on this machine"


def _way_to_more_gpus(machine: ServingMachine) -> str:
    hidden = f"{VISIBLE_VARIABLE}={os.environ[VISIBLE_VARIABLE]}" if VISIBLE_VARIABLE in os.environ else ""
    if not machine.gpus:
        return f"serve a bundle built with --arch cpu{f', or unset {hidden}' if hidden else ''}"
    return f"build with a smaller --tp-size{f', or unset {hidden}' if hidden else ''}"


def _check_versions(engine: BundleEngine, machine: ServingMachine) -> None:
    where = machine.versions_source or "this machine"
    todo = f"an engine runs only under the version that built it: use {engine.container}"
    for package in PACKAGES:
        name, wanted = PACKAGE_NAMES[package], engine.record.versions[package]
        found = machine.versions.get(package)
        if found is None:
            raise MachineError(
                f"no {name} that tells its version", expected=f"{name} {wanted}", where=where, todo=todo
            )
        if _is_same_release(found, wanted):
            continue
        if package == "tensorrt_llm" and _is_same_release(wanted, PIN.tensorrt_llm):
            check_tensorrt_llm(found, where=where)  # its line for 1.3 and later names their reason
        raise MachineError(
            f"{name} {found}", expected=f"{wanted}, which built the engine", where=where, todo=todo
        )


def _is_same_release(found: str, wanted: str) -> bool:
    return release_of(found) == release_of(wanted)


def _serving_versions() -> tuple[str, dict[str, str]]:
    """Versions of the TensorRT-LLM beside the backend, and the program whose environment told them."""
    tool = find_build_tool()
    if tool is not None and tool.versions:
        return str(tool.path), dict(tool.versions)
    for python in dict.fromkeys(filter(None, (shutil.which("python3"), sys.executable))):
        versions = _versions_of(python)
        if versions:
            return python, versions
    return "", {}


def _versions_of(python: str) -> dict[str, str]:
    """TensorRT-LLM and TensorRT of a Python's environment; empty unless both are there."""
    probe = [python, "-c", _PROBE, *PACKAGES]
    try:
        answer = subprocess.run(probe, capture_output=True, text=True, check=False, timeout=_PROBE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return {}  # a Python that does not start tells nothing
    versions = answer.stdout.split() if answer.returncode == 0 else []
    return dict(zip(PACKAGES, versions, strict=True)) if len(versions) == len(PACKAGES) else {}
