"""The engine stage with a stand-in trtllm-build: built, resumed, adopted, stopped; failures are one line."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu_machine import H100, GpuMachine, is_running, make_gpu_machine, write_fp8_checkpoint
from minitron_build.checkpoint.convert import convert_checkpoint
from minitron_build.engine.engine import (
    build_engine,
    find_build_tool,
    finished_engine,
    remaining_work,
)
from minitron_build.engine.engine_config import EngineConfig
from minitron_build.engine.engine_errors import CAUSES, explain_failure, find_cause
from minitron_build.engine.engine_file import read_tensorrt_version
from minitron_build.engine.engine_record import RECORD_NAME, EngineRecord
from minitron_build.engine.process_group import Outcome, run_in_group
from minitron_build.engine.timing_cache import TimingCache
from minitron_build.errors import CheckpointError, MachineError, MinitronError, StageError
from minitron_build.planning.plan import BuildPlan, PlanRequest, make_plan
from minitron_build.source.model_config import ModelConfig

DATA = Path(__file__).parents[1] / "golden" / "data"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GpuMachine:
    """One H100 with TensorRT-LLM 1.2.1 and Docker."""
    machine = make_gpu_machine(tmp_path / "machine", monkeypatch)
    machine.add_gpus(H100)
    machine.add_tool()
    machine.add_docker()
    return machine


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model converted for tp 2."""
    path = tmp_path_factory.mktemp("converted") / "checkpoint"
    convert_checkpoint(DATA / "tiny_minitron", path, tp_size=2)
    return path


def make(**request: Any) -> BuildPlan:
    """A plan of the tiny model for hopper, bf16 and tp 2 unless asked otherwise."""
    wanted = {"arch": "hopper", "precision": "bf16", "tp_size": 2, "max_batch_size": 8, **request}
    config = ModelConfig.read(DATA / "tiny_minitron")
    return make_plan("tiny", config, PlanRequest(**wanted), gpus=(), available_bytes=1 << 34)


def folder_of(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_builds_records_and_resumes(machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    engine_dir = tmp_path / "out" / "engine"
    config = build_engine(make(), checkpoint_dir, engine_dir, gpu=H100[0], on_line=lines.append)
    assert (config.tp_size, config.max_batch_size, config.version) == (2, 8, "1.2.1")
    assert folder_of(engine_dir) == ["config.json", RECORD_NAME, "rank0.engine", "rank1.engine"]
    assert folder_of(engine_dir.parent) == ["engine"]
    assert lines[0].startswith(str(machine.bin_dir / "trtllm-build"))
    assert any("Total time of building all engines" in line for line in lines)
    record = EngineRecord.load(engine_dir)
    record.check_files(engine_dir)
    assert (record.sm, record.gpu, record.container) == (90, H100[0], None)
    assert record.versions == {"tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48"}
    assert record.argv[1:5] == ("--checkpoint_dir", "checkpoint", "--output_dir", "engine")
    assert str(tmp_path) not in "".join(path.read_text() for path in engine_dir.glob("*.json"))
    again = build_engine(make(), checkpoint_dir, engine_dir)
    assert again == config
    assert len(machine.tool_calls()) == 1


def test_another_plan_is_refused_and_force_replaces(
    machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path
) -> None:
    engine_dir = tmp_path / "engine"
    build_engine(make(), checkpoint_dir, engine_dir)
    with pytest.raises(CheckpointError, match=r"an engine of another plan or checkpoint; .*--force"):
        build_engine(make(max_batch_size=4), checkpoint_dir, engine_dir)
    assert EngineConfig.read(engine_dir).max_batch_size == 8
    build_engine(make(max_batch_size=4), checkpoint_dir, engine_dir, force=True)
    assert EngineConfig.read(engine_dir).max_batch_size == 4
    assert folder_of(tmp_path) == ["engine", "machine"]


def test_a_broken_engine_is_not_taken_for_finished(
    machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path
) -> None:
    engine_dir = tmp_path / "engine"
    build_engine(make(), checkpoint_dir, engine_dir)
    (engine_dir / "rank1.engine").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"rank1\.engine: 5 bytes; expected \d+ bytes; .*--force"):
        build_engine(make(), checkpoint_dir, engine_dir)


def test_fp8_checkpoint_builds(machine: GpuMachine, tmp_path: Path) -> None:
    write_fp8_checkpoint(json.loads((DATA / "config_fp8_1x1.json").read_text()), tmp_path / "checkpoint")
    plan = make(precision="fp8", tp_size=1)
    config = build_engine(plan, tmp_path / "checkpoint", tmp_path / "engine")
    assert (config.quant_algo, config.kv_cache_quant_algo, config.logits_dtype) == ("FP8", "FP8", "float16")


def test_work_left_by_a_killed_build_is_dropped(
    machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path
) -> None:
    stale = tmp_path / "engine.partial" / "engine"
    stale.mkdir(parents=True)
    (stale / "rank7.engine").write_bytes(b"x")
    (stale.parent / "model.cache").write_bytes(b"x")
    build_engine(make(), checkpoint_dir, tmp_path / "engine")
    assert "rank7.engine" not in folder_of(tmp_path / "engine")
    assert folder_of(tmp_path) == ["engine", "machine"]


def test_two_builds_do_not_share_a_folder(machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path) -> None:
    refused: list[Exception] = []

    def second(line: str) -> None:
        if "Build TensorRT engine" in line and not refused:
            with pytest.raises(MachineError, match="another build is writing here") as caught:
                build_engine(make(), checkpoint_dir, tmp_path / "engine")
            refused.append(caught.value)

    build_engine(make(), checkpoint_dir, tmp_path / "engine", on_line=second)
    assert refused
    assert len(machine.tool_calls()) == 1


FAULTS: dict[str, str] = {
    "gpu_memory": r"GPU memory ran out \(.*24793579520 bytes.*\); .*--max-batch-size",
    "host_memory": r"memory ran out \(RAM or the container's limit\) .*751\. MiB",
    "killed": r"SIGKILL, as when memory runs out.* GB are free now.*the checkpoint is kept",
    "wrong_sm": r"compute capability does not support .*unsupported SM version: 90.*--arch",
    "disk": r"the disk is full .*; free space in --output-dir",
    "silent": r"exit code 1 without a word",
    "missing_rank": r"ended without an error, but .*rank1\.engine is missing; expected 2 rank files",
    "empty_rank": r"ended without an error, but .*rank1\.engine is empty",
    "garbage_config": r"ended without an error, but .*config\.json: not JSON",
    "other_limit": r"another engine than the plan's: max_batch_size: the plan asked for 8, .* resolved 9",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_failures_are_one_line_and_leave_nothing(
    fault: str, machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path
) -> None:
    machine.monkeypatch.setenv("STAND_IN_FAULT", fault)
    with pytest.raises(StageError, match=FAULTS[fault]) as caught:
        build_engine(make(), checkpoint_dir, tmp_path / "engine")
    assert "\n" not in str(caught.value)
    assert folder_of(tmp_path) == ["machine"]
    machine.monkeypatch.delenv("STAND_IN_FAULT")
    build_engine(make(), checkpoint_dir, tmp_path / "engine")


def test_a_field_resolved_otherwise_is_reported(
    machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path
) -> None:
    machine.monkeypatch.setenv("STAND_IN_FAULT", "other_plugin")
    config = build_engine(make(), checkpoint_dir, tmp_path / "engine")
    assert [str(found) for found in config.differences(make())] == [
        "multiple_profiles: the plan asked for enable, TensorRT-LLM resolved False"
    ]


def test_no_gpu_and_no_tool(machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path) -> None:
    machine.monkeypatch.delenv("STAND_IN_SM")
    with pytest.raises(StageError, match="no GPU can be used .*Found no NVIDIA driver"):
        build_engine(make(), checkpoint_dir, tmp_path / "engine")
    (machine.bin_dir / "trtllm-build").unlink()
    with pytest.raises(MachineError, match="no trtllm-build on PATH"):
        build_engine(make(), checkpoint_dir, tmp_path / "engine")
    (machine.bin_dir / "docker").unlink()
    with pytest.raises(MachineError, match="no docker on PATH"):
        build_engine(make(), checkpoint_dir, tmp_path / "engine", container=True)


def test_a_tool_that_cannot_start(machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path) -> None:
    (machine.bin_dir / "trtllm-build").write_text("#!/no/such/python\n")
    with pytest.raises(MachineError, match=r"bin/trtllm-build cannot be run: No such file"):
        build_engine(make(), checkpoint_dir, tmp_path / "engine")


def test_a_broken_checkpoint_stops_before_the_tool(
    machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint").mkdir()
    for name in ("config.json", "rank0.safetensors"):
        (tmp_path / "checkpoint" / name).write_bytes((checkpoint_dir / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"rank1\.safetensors is missing; expected 2 rank files"):
        build_engine(make(), tmp_path / "checkpoint", tmp_path / "engine")
    assert machine.tool_calls() == []


def test_timing_cache_is_kept_per_version_and_sm(
    machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path
) -> None:
    for batch in (8, 4):
        build_engine(make(max_batch_size=batch), checkpoint_dir, tmp_path / f"engine{batch}")
    assert [call["timing_cache_lines"] for call in machine.tool_calls()] == [None, 1]
    kept = list((machine.root / "cache").rglob("*.cache"))
    assert [path.name for path in kept] == ["timing-tensorrt-10.14.1.48-sm90.cache"]
    assert len(kept[0].read_text().splitlines()) == 2
    recorded = json.loads((tmp_path / "engine4" / "config.json").read_text())["build_config"]
    assert recorded["input_timing_cache"] == recorded["output_timing_cache"] == "model.cache"


def test_timing_cache_that_cannot_be_kept_is_said(
    machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    machine.monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    lines: list[str] = []
    build_engine(make(), checkpoint_dir, tmp_path / "engine", on_line=lines.append)
    assert lines[-1].startswith("timing cache not kept: ")


def test_timing_cache_folder_follows_xdg() -> None:
    def path_of(**environ: str) -> str:
        return str(TimingCache.of("10.14.1.48", 90, environ).path)

    name = "minitron-trtllm/timing-tensorrt-10.14.1.48-sm90.cache"
    assert path_of(XDG_CACHE_HOME="/cache", HOME="/home/me") == f"/cache/{name}"
    assert path_of(HOME="/home/me") == f"/home/me/.cache/{name}"
    assert path_of(XDG_CACHE_HOME="relative", HOME="/home/me") == f"/home/me/.cache/{name}"


def test_container_build(machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path) -> None:
    plan, engine_dir = make(), tmp_path / "out" / "engine"
    config = build_engine(plan, checkpoint_dir, engine_dir, container=True)
    assert config.tp_size == 2
    argv = machine.docker_calls()[0]
    assert argv[:6] == ["run", "--rm", "--init", "--gpus", "all", "--ipc"]
    assert f"{checkpoint_dir}:/checkpoint:ro" in argv
    assert argv[argv.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
    inside = argv[argv.index(str(plan.container)) + 1 :]
    assert inside[:5] == ["trtllm-build", "--checkpoint_dir", "/checkpoint", "--output_dir", "/output/engine"]
    assert inside[5:-2] == list(plan.trtllm_build_argv[5:])
    assert EngineRecord.load(engine_dir).container == plan.container
    kept = list((machine.root / "cache").rglob("*.cache"))
    assert len(kept) == 1


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        (
            'Error response from daemon: could not select device driver "" with capabilities: [[gpu]].',
            "Docker cannot hand the GPU",
        ),
        (
            "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock",
            "may not talk to Docker",
        ),
        ("docker: Cannot connect to the Docker daemon at unix:///x. Is it running?", "Docker is not running"),
        ("docker: Error response from daemon: manifest unknown.", "cannot fetch the image"),
    ],
)
def test_container_failures(
    said: str, meaning: str, machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path
) -> None:
    machine.monkeypatch.setenv("STAND_IN_DOCKER_FAULT", said)
    with pytest.raises(StageError, match=meaning):
        build_engine(make(), checkpoint_dir, tmp_path / "engine", container=True)


def test_remaining_work_is_complete_and_its_engine_is_taken(
    machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path
) -> None:
    """What is printed on a machine without a GPU, run as it stands on one that has it."""
    plan = make()
    for kind in ("local", "container"):
        engine_dir = tmp_path / kind / "engine"
        engine_dir.parent.mkdir()
        work = remaining_work(plan, checkpoint_dir, engine_dir)
        assert work.as_dict()[kind] == list(getattr(work, kind))
        printed = next(line for line in work.lines() if line.strip() == shlex.join(getattr(work, kind)))
        if kind == "container":
            printed = printed.replace("--workdir /tmp", "--workdir /output")  # the stand-in has no /tmp apart
        subprocess.run(printed, shell=True, check=True, cwd=machine.root, executable="/bin/bash")
        config = finished_engine(plan, checkpoint_dir, engine_dir)
        assert config == EngineConfig.read(engine_dir)
        record = EngineRecord.load(engine_dir)
        assert (record.gpu, record.versions["tensorrt"]) == (None, "10.14.1.48")
        assert finished_engine(plan, checkpoint_dir, engine_dir) == config


def test_an_engine_from_elsewhere_must_be_the_plans(
    machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path
) -> None:
    def brought(plan: BuildPlan, name: str) -> Path:
        work = remaining_work(plan, checkpoint_dir, tmp_path / name)
        subprocess.run(work.local, check=True, cwd=machine.root, capture_output=True)
        return tmp_path / name

    with pytest.raises(CheckpointError, match="another engine than the plan's: max_batch_size"):
        finished_engine(make(), checkpoint_dir, brought(make(max_batch_size=4), "batch"))
    machine.monkeypatch.setenv("STAND_IN_TENSORRT", "10.15.1.2")
    with pytest.raises(MachineError, match=r"rank0\.engine: TensorRT 10\.15\.1\.2; expected 10\.14\.1\.48"):
        finished_engine(make(), checkpoint_dir, brought(make(), "tensorrt"))
    assert not (tmp_path / "tensorrt" / RECORD_NAME).exists()


def test_versions_of_the_tool(machine: GpuMachine, tmp_path: Path) -> None:
    tool = find_build_tool()
    assert tool is not None
    assert tool.versions == {"tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48"}
    machine.monkeypatch.setenv("PYTHONPATH", "")
    tool = find_build_tool()
    assert tool is not None
    assert tool.versions == {}
    tool.path.write_bytes(b"\x7fELF")
    assert find_build_tool() == replace(tool, versions={})


def test_plan_file_header(tmp_path: Path) -> None:
    path = tmp_path / "rank0.engine"
    path.write_bytes(b"ftrt" + bytes(20) + bytes([10, 14, 1, 48]) + b"rest")
    assert read_tensorrt_version(path) == "10.14.1.48"
    wrong = {b"": "empty", b"{" * 40: "not a TensorRT plan", b"ftrt\x01" + bytes(30): "not a TensorRT plan"}
    for content, found in wrong.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=found):
            read_tensorrt_version(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        read_tensorrt_version(path)


BUILD_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from unit.test_engine import make
from minitron_build.cli import _run_verb
import argparse
from minitron_build.engine.engine import build_engine
def run(args):
    build_engine(make(), Path({checkpoint!r}), Path({engine!r}), container={container},
                 on_line=lambda line: print(line, flush=True))
    return 0
sys.exit(_run_verb(argparse.Namespace(run=run, debug=False)))
"""


@pytest.mark.parametrize("container", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_the_whole_group(
    number: signal.Signals, container: bool, machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path
) -> None:
    machine.monkeypatch.setenv("STAND_IN_FAULT", "hang")
    script = BUILD_SCRIPT.format(
        tests=str(Path(__file__).parents[1]),
        checkpoint=str(checkpoint_dir),
        engine=str(tmp_path / "engine"),
        container=container,
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    waiting = next(line for line in process.stdout if "waiting in" in line)
    pids = [int(word) for word in waiting.split() if word.isdigit()]
    process.send_signal(number)
    output = process.communicate(timeout=30)
    assert (process.returncode, output[1]) == (130, "minitron: interrupted\n")
    wait_until(lambda: not any(is_running(pid) for pid in pids))
    assert folder_of(tmp_path) == ["machine"]
    if container:
        name = machine.docker_calls()[0][machine.docker_calls()[0].index("--name") + 1]
        assert machine.docker_calls()[-1] == ["kill", name]


def test_an_orphaned_build_keeps_its_folder(
    machine: GpuMachine, checkpoint_dir: Path, tmp_path: Path
) -> None:
    """Killed with SIGKILL, we cannot stop the tool; nobody may build into its folder while it lives."""
    machine.monkeypatch.setenv("STAND_IN_FAULT", "hang")
    script = BUILD_SCRIPT.format(
        tests=str(Path(__file__).parents[1]),
        checkpoint=str(checkpoint_dir),
        engine=str(tmp_path / "engine"),
        container=False,
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    waiting = next(line for line in process.stdout if "waiting in" in line)
    pids = [int(word) for word in waiting.split() if word.isdigit()]
    process.kill()
    process.communicate()
    try:
        with pytest.raises(MachineError, match="another build is writing here"):
            build_engine(make(), checkpoint_dir, tmp_path / "engine")
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    machine.monkeypatch.delenv("STAND_IN_FAULT")
    wait_until(lambda: not any(is_running(pid) for pid in pids))
    build_engine(make(), checkpoint_dir, tmp_path / "engine")


def wait_until(is_true: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def run_shell(script: str, tmp_path: Path, lines: list[str]) -> Outcome:
    return run_in_group(["/bin/sh", "-c", script], cwd=tmp_path, environ={}, on_line=lines.append)


def test_a_grandchild_that_keeps_the_pipe_open_does_not_hold_us(tmp_path: Path) -> None:
    lines: list[str] = []
    begin = time.monotonic()
    outcome = run_shell("/bin/sleep 60 & echo $!; echo done", tmp_path, lines)
    assert time.monotonic() - begin < 10
    assert (outcome.returncode, lines[1]) == (0, "done")
    wait_until(lambda: not is_running(int(lines[0])))


def test_lines_of_progress_bars_and_broken_text(tmp_path: Path) -> None:
    lines: list[str] = []
    outcome = run_shell(r"printf '10%%\r20%%\r\n\n\377x\nlast'; exit 3", tmp_path, lines)
    assert lines == ["10%", "20%", "\ufffdx", "last"]
    assert (outcome.returncode, outcome.tail) == (3, tuple(lines))


def test_an_error_in_on_line_ends_the_child(tmp_path: Path) -> None:
    def fail(line: str) -> None:
        raise BrokenPipeError(line)

    with pytest.raises(BrokenPipeError) as caught:
        run_in_group(["/bin/sh", "-c", "echo $$; sleep 60"], cwd=tmp_path, environ={}, on_line=fail)
    assert not is_running(int(str(caught.value)))


def test_runs_in_a_thread_too(tmp_path: Path) -> None:
    lines: list[str] = []
    thread = threading.Thread(target=run_shell, args=("echo here", tmp_path, lines))
    thread.start()
    thread.join()
    assert lines == ["here"]


def test_oom_killer_is_named_when_the_kernel_counted() -> None:
    error = explain_failure(Outcome(137, ("line",), 1), program="trtllm-build", memory_note="1.0 GB are free")
    assert "the kernel killed it: this machine's memory ran out" in str(error)
    assert "1.0 GB are free" in str(error)


def test_unknown_failures_quote_the_last_line_that_says_something() -> None:
    tail = (
        "Traceback (most recent call last):",
        '  File "x.py", line 1, in f',
        "ValueError: head_size 7",
    )
    error = explain_failure(Outcome(1, tail, 0), program="trtllm-build")
    assert str(error) == "trtllm-build failed: exit code 1: ValueError: head_size 7; see its output above"
    error = explain_failure(Outcome(-11, (), 0), program="trtllm-build")
    assert "ended by SIGSEGV without a word" in str(error)


SAID: Mapping[str, str] = {
    "RuntimeError: gemm_swiglu_plugin=fp8 is not supported on SM 100.": "compute capability",
    "RuntimeError: CUDA error: no kernel image is available for execution": "compute capability",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB": "GPU memory ran out",
    "[TRT] [E] IBuilder::buildSerializedNetwork: Error Code 2: OutOfMemory (Requested size was 17 bytes.)": (
        "GPU memory ran out"
    ),
    "terminate called after throwing an instance of 'std::bad_alloc'": "RAM or the container's limit",
    "CUDA driver version is insufficient for CUDA runtime version": "driver is too old",
    "trtllm-build: error: unrecognized arguments: --strongly_typed": "takes other flags",
    "ImportError: libnvinfer.so.10: cannot open shared object file: No such file": "installed incompletely",
    "RuntimeError: Required but not provided tensors:{'transformer.ln_f.weight'}": "minitron inspect",
    "OSError: [Errno 28] No space left on device": "disk is full",
}


@pytest.mark.parametrize("said", SAID)
def test_what_tools_print_and_what_it_means(said: str) -> None:
    cause, line = find_cause(("first", said, "last"))
    assert cause in CAUSES
    assert SAID[said] in f"{cause.meaning} {cause.todo}"
    assert line in said


def test_every_failure_is_ours() -> None:
    assert issubclass(StageError, MinitronError)
