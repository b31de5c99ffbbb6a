"""The machine is held against the plan before any work: refused, sent elsewhere, or fit."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu_machine import H100, GpuMachine, make_gpu_machine
from minitron_build.engine.precheck import (
    Machine,
    Room,
    check_room,
    precheck,
    read_gpus,
    read_machine,
    visible_gpus,
)
from minitron_build.errors import MachineError
from minitron_build.planning.plan import BuildPlan, PlanRequest, make_plan
from minitron_build.source.model_config import ModelConfig

DATA = Path(__file__).parents[1] / "golden" / "data"
L40S = ("NVIDIA L40S", "8.9", 46068, 45589)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GpuMachine:
    """A machine with nothing on it yet."""
    return make_gpu_machine(tmp_path / "machine", monkeypatch)


@pytest.fixture
def plan(tmp_path: Path) -> BuildPlan:
    """The real model's shape for hopper in bf16."""
    config = ModelConfig.read(write_config(tmp_path / "hf"))
    request = PlanRequest(arch="hopper", precision="bf16")
    return make_plan("width-base", config, request, gpus=(), available_bytes=1 << 36)


def write_config(hf_dir: Path) -> Path:
    hf_dir.mkdir()
    (hf_dir / "config.json").write_bytes((DATA / "width_base_config.json").read_bytes())
    return hf_dir


def look(
    plan: BuildPlan, output_dir: Path, *, container: bool = False, force: bool = False, **room: Any
) -> MachineError | None:
    """Precheck of this machine as it stands, with room enough unless told otherwise."""
    found = replace(read_machine(output_dir), **{"ram_bytes": 1 << 36, "disk_bytes": 1 << 36, **room})
    return precheck(plan, found, output_dir, container=container, force=force)


@pytest.mark.parametrize("built", ["engine", "manifest.json"])
def test_an_engine_that_stands_there_needs_no_gpu(
    built: str, machine: GpuMachine, plan: BuildPlan, tmp_path: Path
) -> None:
    (tmp_path / built).mkdir()
    if built == "engine":
        (tmp_path / "checkpoint").mkdir()
    assert look(plan, tmp_path, disk_bytes=1_000_000_000) is None
    assert look(plan, tmp_path, force=True) is not None
    machine.add_gpus(L40S)
    assert look(plan, tmp_path) is None
    with pytest.raises(MachineError, match="L40S is SM 89"):
        look(plan, tmp_path, force=True)


def test_a_fit_machine(machine: GpuMachine, plan: BuildPlan, tmp_path: Path) -> None:
    machine.add_gpus(H100)
    machine.add_tool()
    assert look(plan, tmp_path / "bundle") is None
    machine.add_docker()
    assert look(plan, tmp_path / "bundle", container=True) is None


def test_pips_republished_tensorrt_is_the_same(machine: GpuMachine, plan: BuildPlan, tmp_path: Path) -> None:
    """What `pip install tensorrt_llm==1.2.1` brings."""
    machine.add_gpus(H100)
    machine.add_tool("1.2.1", "10.14.1.48.post1")
    assert look(plan, tmp_path) is None


def test_what_is_read(machine: GpuMachine, tmp_path: Path) -> None:
    machine.add_gpus(H100, L40S)
    found = read_machine(tmp_path / "not" / "yet" / "there")
    assert [(state.gpu.name, state.gpu.sm) for state in found.gpus] == [(H100[0], 90), (L40S[0], 89)]
    assert found.gpus[0].free_bytes == 80995 << 20
    assert found.gpus[0].driver == "590.44.01"
    assert (found.tool, found.has_docker) == (None, False)
    assert found.ram_bytes > 0
    assert found.disk_bytes > 0
    (machine.bin_dir / "nvidia-smi").write_text("#!/bin/sh\necho no devices; exit 9\n")
    assert read_gpus() == ()


def test_visible_devices_as_cuda_takes_them(machine: GpuMachine) -> None:
    machine.add_gpus(H100, L40S)
    gpus = read_gpus()

    def names(visible: str | None) -> list[str]:
        return [state.gpu.name.split()[1] for state in visible_gpus(gpus, visible)]

    assert names(None) == names("0,1") == ["H100", "L40S"]
    assert names("1") == names("GPU-1a") == ["L40S"]
    assert names("1, 0") == ["L40S", "H100"]
    assert names("0,7,1") == ["H100"]
    assert names("") == names("-1") == names("GPU-") == []


def test_another_sm_is_refused(machine: GpuMachine, plan: BuildPlan, tmp_path: Path) -> None:
    machine.add_gpus(L40S, H100)
    machine.add_tool()
    with pytest.raises(
        MachineError, match=r"GPU: NVIDIA L40S is SM 89 \(ada\); expected SM 90 \(hopper\), .*--arch auto"
    ):
        look(plan, tmp_path)
    machine.monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert look(plan, tmp_path) is None


def test_busy_gpu_is_refused(machine: GpuMachine, plan: BuildPlan, tmp_path: Path) -> None:
    machine.add_gpus((*H100[:3], 8000))
    with pytest.raises(
        MachineError, match=r"H100.*: 8\.4 GB of 85\.5 GB GPU memory free; expected 1\d\.\d GB;"
    ):
        look(plan, tmp_path)


def test_old_driver_is_refused(machine: GpuMachine, plan: BuildPlan, tmp_path: Path) -> None:
    machine.add_gpus(H100, driver="550.54.15")
    with pytest.raises(MachineError, match=r"NVIDIA driver 550\.54\.15; expected 580 or later"):
        look(plan, tmp_path)


@pytest.mark.parametrize(
    ("tensorrt_llm", "tensorrt", "said"),
    [
        (
            "1.3.0rc20",
            "10.15.1.29",
            r"1\.3\.0rc20 has no TensorRT engine path: upstream removed",
        ),
        ("1.4.0", "10.15.1.29", r"1\.4\.0 has no TensorRT engine path"),
        ("1.1.0", "10.13.3.9", r"TensorRT-LLM 1\.1\.0; expected 1\.2\.1"),
        ("1.2.1", "10.14.1.42", r"TensorRT 10\.14\.1\.42; expected 10\.14\.1\.48"),
        (None, "", r"belongs to a Python without TensorRT-LLM's metadata.*--container"),
    ],
)
def test_other_versions_are_refused(
    tensorrt_llm: str | None, tensorrt: str, said: str, machine: GpuMachine, plan: BuildPlan, tmp_path: Path
) -> None:
    machine.add_gpus(H100)
    machine.add_tool(tensorrt_llm, tensorrt)
    with pytest.raises(MachineError, match=said) as caught:
        look(plan, tmp_path)
    assert "--container" in str(caught.value)
    assert "\n" not in str(caught.value)
    machine.add_docker()
    assert look(plan, tmp_path, container=True) is None


def test_room_is_counted_for_stages_still_to_run(
    machine: GpuMachine, plan: BuildPlan, tmp_path: Path
) -> None:
    machine.add_gpus(H100)
    machine.add_tool()
    bundle = tmp_path / "bundle"
    said = r"12\.0 GB of disk free; expected 18\.\d GB for checkpoint and engine"
    with pytest.raises(MachineError, match=said):
        look(plan, bundle, disk_bytes=12_000_000_000)
    (bundle / "checkpoint").mkdir(parents=True)
    assert look(plan, bundle, disk_bytes=12_000_000_000) is None
    with pytest.raises(MachineError, match=r"4\.0 GB of RAM free .*expected 2\d\.\d GB for the engine stage"):
        look(plan, bundle, ram_bytes=4_000_000_000)
    (bundle / "engine").mkdir()
    assert look(plan, bundle, ram_bytes=4_000_000_000) is None


def test_room_is_counted_for_stages_that_need_no_gpu(tmp_path: Path) -> None:
    config = ModelConfig.read(write_config(tmp_path / "hf"))
    plan = make_plan("width-base", config, PlanRequest(arch="cpu"), gpus=(), available_bytes=1 << 36)
    bundle = tmp_path / "bundle"
    both, first = ("checkpoint", "engine", "bundle"), ("checkpoint",)
    for room, stages, said in (
        (
            Room(1 << 36, 9_050_000_000),
            both,
            r"9\.1 GB of disk free; expected 9\.1 GB for checkpoint and bundle",
        ),
        (Room(1 << 36, 9_000_000_000), first, r"9\.0 GB of disk free; expected 9\.0 GB for checkpoint"),
        (
            Room(400_000_000, 1 << 36),
            both,
            r"0\.4 GB of RAM free .*expected 0\.5 GB for the checkpoint stage",
        ),
    ):
        with pytest.raises(MachineError, match=said):
            check_room(plan, room, bundle, stages, force=False)
    check_room(plan, Room(1 << 36, 9_050_000_000), bundle, first, force=False)
    (bundle / "checkpoint").mkdir(parents=True)
    check_room(plan, Room(1 << 36, 100_000_000), bundle, both, force=False)
    check_room(plan, Room(0, 0), bundle, first, force=False)
    with pytest.raises(MachineError, match="of disk free"):
        check_room(plan, Room(1 << 36, 100_000_000), bundle, both, force=True)
    (bundle / "manifest.json").touch()
    check_room(plan, Room(0, 0), bundle, both, force=False)


def test_an_interrupted_conversion_counts(machine: GpuMachine, plan: BuildPlan, tmp_path: Path) -> None:
    partial = tmp_path / "checkpoint.partial"
    partial.mkdir()
    with (partial / "rank0.safetensors").open("wb") as file:
        file.truncate(9_000_000_000)
    missing = look(plan, tmp_path, disk_bytes=1_000_000_000)
    assert missing is not None
    with pytest.raises(MachineError, match="of disk free"):
        look(plan, tmp_path / "other", disk_bytes=1_000_000_000)


def test_no_gpu_is_told_what_remains(machine: GpuMachine, plan: BuildPlan, tmp_path: Path) -> None:
    missing = look(plan, tmp_path / "a b", ram_bytes=4_000_000_000)
    assert isinstance(missing, MachineError)
    begin, _, command = str(missing).partition("run this on a machine with a GPU of SM 90: ")
    assert begin.startswith("this machine: no NVIDIA GPU")
    argv = shlex.split(command)
    assert argv[:3] == ["trtllm-build", "--checkpoint_dir", str(tmp_path / "a b" / "checkpoint")]
    assert argv[4] == str(tmp_path / "a b" / "engine")


def test_no_tool_is_told_what_remains(machine: GpuMachine, plan: BuildPlan, tmp_path: Path) -> None:
    machine.add_gpus(H100)
    missing = str(look(plan, tmp_path))
    assert "no trtllm-build on PATH; expected TensorRT-LLM 1.2.1" in missing
    assert "pip install tensorrt_llm==1.2.1" in missing
    assert "docker run --rm --init --gpus all" in missing
    assert str(plan.container) in missing


@pytest.mark.parametrize("has_gpu", [False, True])
def test_container_without_docker_ends_with_the_command(
    has_gpu: bool, machine: GpuMachine, plan: BuildPlan, tmp_path: Path
) -> None:
    if has_gpu:
        machine.add_gpus(H100)
    missing = str(look(plan, tmp_path, container=True))
    assert "no docker on PATH" in missing
    argv = shlex.split(missing[missing.index("docker run") :])
    assert f"{tmp_path}/checkpoint:/checkpoint:ro" in argv
    assert argv[argv.index(str(plan.container)) + 1 :][:5] == [
        *("trtllm-build", "--checkpoint_dir", "/checkpoint", "--output_dir", "/output/engine")
    ]


def test_reads_a_machine_without_anything_quickly(machine: GpuMachine, tmp_path: Path) -> None:
    begin = time.monotonic()
    found = read_machine(tmp_path)
    assert time.monotonic() - begin < 1
    assert (found.gpus, found.tool, found.has_docker) == ((), None, False)
    assert isinstance(found, Machine)
