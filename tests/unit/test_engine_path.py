"""The whole path of a GPU bundle with the stand-in: build, resume, inspect, lint; elsewhere what can be."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gpu_machine import H100, GpuMachine, make_gpu_machine
from minitron_build.cli import main

DATA = Path(__file__).parents[1] / "golden" / "data"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GpuMachine:
    """A machine with nothing on it yet."""
    return make_gpu_machine(tmp_path / "machine", monkeypatch)


def build(bundle: Path, *flags: str) -> int:
    """`minitron build` of the tiny model for hopper in bf16."""
    wanted = ["--arch", "hopper", "--precision", "bf16", "--max-batch-size", "8", "--tp-size", "2"]
    return main(
        ["build", "--checkpoint", str(DATA / "tiny_minitron"), "--output-dir", str(bundle), *wanted, *flags]
    )


def last_json(text: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(text.splitlines()[-1])
    return value


def names_in(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


@pytest.mark.parametrize("container", [False, True])
def test_build_inspect_lint(
    container: bool, machine: GpuMachine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.add_gpus(H100)
    machine.add_docker() if container else machine.add_tool()
    bundle, flags = tmp_path / "bundle", ["--container"] * container
    assert build(bundle, *flags) == 0, capsys.readouterr().err
    assert names_in(bundle) == {"manifest.json", "model_repo"}
    engine_dir = bundle / "model_repo" / "tensorrt_llm" / "1"
    assert {"config.json", "engine.json", "rank0.engine", "rank1.engine"} <= names_in(engine_dir)
    capsys.readouterr()
    assert main(["inspect", str(bundle), "--json"]) == 0
    report = last_json(capsys.readouterr().out)
    assert (report["kind"], report["parts"][0]["kind"]) == ("bundle", "engine")
    assert report["facts"]["target"] == "hopper (SM 90)"
    assert main(["lint", str(bundle / "model_repo")]) == 0, capsys.readouterr().out
    assert build(bundle, *flags) == 0
    assert len(machine.tool_calls()) == 1


def test_an_fp8_build_ends_in_an_fp8_engine(
    machine: GpuMachine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calibrated, verified, built: the models in front declare the logits that an FP8 engine makes."""
    machine.add_gpus(H100)
    machine.add_tool()
    bundle, ids = tmp_path / "bundle", DATA / "calibration_ids.json"
    flags = ["--precision", "fp8", "--calib-data", str(ids), "--fp8-exclude", "*.layers.0.mlp.proj"]
    assert build(bundle, *flags) == 0, capsys.readouterr().err
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert (manifest["plan"]["precision"], manifest["plan"]["kv_cache_dtype"]) == ("fp8", "fp8")
    assert manifest["calibration"]["num_samples"] == 8
    assert {"passed", "checks"} <= manifest["verification"].keys()
    assert str(tmp_path) not in json.dumps(manifest)
    engine = json.loads((bundle / "model_repo" / "tensorrt_llm" / "1" / "config.json").read_text())
    quantization = engine["pretrained_config"]["quantization"]
    assert (quantization["quant_algo"], quantization["kv_cache_quant_algo"]) == ("FP8", "FP8")
    assert "transformer.layers.0.mlp.proj" in quantization["exclude_modules"]
    for model in ("tensorrt_llm", "tensorrt_llm_bls", "ensemble"):
        text = (bundle / "model_repo" / model / "config.pbtxt").read_text()
        logits = [line for line in text.split("output {")[1:] if "context_logits" in line]
        assert len(logits) >= 1, model
        assert all("TYPE_FP16" in part for part in logits), model
    assert main(["lint", str(bundle / "model_repo")]) == 0, capsys.readouterr().out
    assert build(bundle, *flags) == 0
    assert len(machine.tool_calls()) == 1


def test_a_failed_engine_stage_is_resumed(
    machine: GpuMachine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.add_gpus(H100)
    machine.add_tool()
    bundle = tmp_path / "bundle"
    machine.monkeypatch.setenv("STAND_IN_FAULT", "gpu_memory")
    assert build(bundle) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("minitron: trtllm-build failed: GPU memory")
    assert names_in(bundle) == {"checkpoint"}
    written = (bundle / "checkpoint" / "rank0.safetensors").stat().st_mtime_ns
    machine.monkeypatch.delenv("STAND_IN_FAULT")
    assert build(bundle, "--keep-checkpoint") == 0
    assert (bundle / "checkpoint" / "rank0.safetensors").stat().st_mtime_ns == written
    assert len(machine.tool_calls()) == 2


def test_without_a_gpu_all_but_the_engine_is_done(
    machine: GpuMachine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint is made, the rest is said; the command run elsewhere is all that was missing."""
    bundle = tmp_path / "bundle"
    assert build(bundle) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("minitron: this machine: no NVIDIA GPU")
    assert names_in(bundle) == {"checkpoint"}
    argv = last_json(out)["remaining"]["local"]
    assert err.splitlines()[-1].endswith(shlex.join(argv))
    assert shlex.join(last_json(out)["remaining"]["container"]) in out
    machine.add_tool()
    machine.monkeypatch.setenv("STAND_IN_SM", "90")
    subprocess.run(argv, check=True, cwd=machine.root, capture_output=True)
    assert build(bundle) == 0, capsys.readouterr().err
    assert names_in(bundle) == {"manifest.json", "model_repo"}
    assert not {"driver", "cuda"} & without_plan(bundle)["versions"].keys()


def test_a_machine_that_contradicts_the_plan_is_refused_before_any_work(
    machine: GpuMachine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.add_gpus(("NVIDIA A100", "8.0", 81920, 80000))
    machine.add_tool()
    assert build(tmp_path / "bundle") == 1
    assert "NVIDIA A100 is SM 80 (ampere); expected SM 90" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def without_plan(bundle: Path) -> dict[str, Any]:
    """The manifest but the plan, whose versions are those that were pinned."""
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return {name: part for name, part in manifest.items() if name != "plan"}


@pytest.mark.parametrize(
    ("package", "environ", "cuda"),
    [("13.0.96", "13.1.0.036", "13.0.96"), (None, "13.1.0.036", "13.1.0.036"), (None, None, None)],
)
def test_the_manifest_names_the_driver_and_cuda_of_the_machine_that_built(
    package: str | None, environ: str | None, cuda: str | None, machine: GpuMachine, tmp_path: Path
) -> None:
    """What nothing here tells is left out: a pin is what should have been there, not what was."""
    machine.add_gpus(H100, driver="580.65.06")
    machine.add_tool(cuda=package)
    if environ:
        machine.monkeypatch.setenv("CUDA_VERSION", environ)
    assert build(tmp_path / "bundle") == 0
    manifest = without_plan(tmp_path / "bundle")
    versions = manifest["versions"]
    assert {"toolkit", "tensorrt_llm", "tensorrt", "torch", "python"} <= versions.keys()
    assert (versions["driver"], versions.get("cuda")) == ("580.65.06", cuda)
    assert manifest["gpu"] == {"name": H100[0], "sm": 90}
    assert "590.44.01" not in json.dumps(manifest)
    record = json.loads((tmp_path / "bundle/model_repo/tensorrt_llm/1/engine.json").read_text())
    assert (record["versions"]["driver"], record["versions"].get("cuda")) == ("580.65.06", cuda)


def test_a_container_build_names_the_driver_and_leaves_out_the_cuda_it_cannot_see(
    machine: GpuMachine, tmp_path: Path
) -> None:
    machine.add_gpus(H100, driver="580.65.06")
    machine.add_docker()
    machine.monkeypatch.setenv("CUDA_VERSION", "12.9.1")  # of this machine, not of the image
    assert build(tmp_path / "bundle", "--container") == 0
    versions = without_plan(tmp_path / "bundle")["versions"]
    assert versions["driver"] == "580.65.06"
    assert "cuda" not in versions
