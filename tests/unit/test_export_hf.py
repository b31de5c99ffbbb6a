"""`minitron export-hf`: records, refusals, and the calibration of a build used again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_build.calibration.amax import Calibration
from minitron_build.cli import main

IDS = Path(__file__).parents[1] / "golden" / "data" / "calibration_ids.json"


def export(source: Path, output_dir: Path, *flags: str) -> int:
    return main(["export-hf", "--checkpoint", str(source), "--output-dir", str(output_dir), *flags])


@pytest.fixture
def calibrated(tiny_minitron: Path, tmp_path: Path) -> Path:
    """The output folder of an FP8 build that stopped at the checkpoint."""
    command = ["build", "--arch", "cpu", "--precision", "fp8", "--checkpoint", str(tiny_minitron)]
    command += ["--calib-data", str(IDS), "--stop-after", "checkpoint", "--no-verify"]
    assert main([*command, "--output-dir", str(tmp_path / "build")]) == 0
    return tmp_path / "build"


def test_calibration_of_a_build_is_used_again(
    tiny_minitron: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tiny_minitron, tmp_path / "again", "--calibration", str(calibrated)) == 0
    assert export(tiny_minitron, tmp_path / "new", "--calib-data", str(IDS)) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"model.safetensors", "hf_quant_config.json", "config.json", "tokenizer.json"} <= set(
        last["files"]
    )
    again, new = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "new"))
    assert again == new
    assert Calibration.read(tmp_path / "again" / "calibration.json").data["num_samples"] == 8


def test_scaling_factors_are_each_projections_own(tiny_minitron: Path, tmp_path: Path) -> None:
    assert export(tiny_minitron, tmp_path / "out", "--calib-data", str(IDS)) == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert len(tensors) == 3 + 25 * 4
    layer = "model.layers.0."
    scales = {tensors[f"{layer}self_attn.{name}_proj.weight_scale"].item() for name in "qkv"}
    assert len(scales) == 3
    assert 0 < tensors[f"{layer}self_attn.k_proj.k_scale"].item() < 1, "not clamped"
    source = load_file(tiny_minitron / "model.safetensors")
    for name in ("mlp.gate_proj", "self_attn.v_proj"):
        weight = source[f"{layer}{name}.weight"]
        restored = tensors[f"{layer}{name}.weight"].float() * tensors[f"{layer}{name}.weight_scale"]
        assert torch.linalg.norm(restored - weight) / torch.linalg.norm(weight.float()) < 0.04


def test_excluded_modules_are_named_as_hf_names_them(tiny_minitron: Path, tmp_path: Path) -> None:
    flags = ("--calib-data", str(IDS), "--fp8-exclude", "*.layers.0.attention.*")
    assert export(tiny_minitron, tmp_path / "out", *flags) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = [f"model.layers.0.self_attn.{name}_proj" for name in "koqv"]
    assert config["quantization_config"]["ignore"] == ["lm_head", "model.embed_tokens", *kept]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors[f"{kept[0]}.weight"].dtype == torch.bfloat16
    assert f"{kept[0]}.input_scale" not in tensors


def test_refusals(
    tiny_minitron: Path,
    tiny_copy: Path,
    calibrated: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*arguments: object, code: int = 1) -> str:
        assert export(*arguments) == code  # type: ignore[arg-type]
        return capsys.readouterr().err.splitlines()[-1]

    out, flags = tmp_path / "out", ("--calibration", str(calibrated))
    both = refused(tiny_minitron, out, *flags, "--calib-samples", "4", code=2)
    assert "--calib-samples with --calibration" in both
    assert "calibration.json is missing" in refused(tiny_minitron, out, "--calibration", str(tmp_path))
    (tmp_path / "bundle" / "model_repo").mkdir(parents=True)
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    assert "inside the bundle" in refused(tiny_minitron, tmp_path / "bundle" / "hf", *flags)
    tensors = load_file(tiny_copy / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, tiny_copy / "model.safetensors")
    assert "a calibration of other weights" in refused(tiny_copy, out, *flags)
    assert not out.exists()
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    assert "not a checkpoint of this toolkit" in refused(tiny_minitron, out, *flags)


def test_bf16_holds_no_calibration(
    tiny_minitron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", "--arch", "cpu", "--precision", "bf16", "--checkpoint", str(tiny_minitron)]
    assert main([*command, "--output-dir", str(tmp_path / "bundle")]) == 0
    out = tmp_path / "out"
    for folder in (tmp_path / "bundle", tmp_path / "bundle" / "checkpoint"):
        assert export(tiny_minitron, out, "--calibration", str(folder)) == 1
        message = capsys.readouterr().err.splitlines()[-1]
        assert f"{folder}: bf16, which holds no calibration; expected an FP8 checkpoint" in message
    shutil.rmtree(tmp_path / "bundle" / "checkpoint")  # as a bundle for a GPU, which keeps none
    assert export(tiny_minitron, out, "--calibration", str(tmp_path / "bundle")) == 1
    assert "bf16, which holds no calibration" in capsys.readouterr().err
    assert not out.exists()


def test_a_finished_export_is_told_and_left(
    tiny_minitron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, flags = tmp_path / "out", ("--calib-data", str(IDS))
    assert export(tiny_minitron, out, *flags) == 0
    first, written = capsys.readouterr(), (out / "model.safetensors").stat()
    assert "already" not in first.err
    assert export(tiny_minitron, out, *flags) == 0
    again = capsys.readouterr()
    assert f"{out} holds this export already: nothing is written" in again.err
    assert again.out == first.out
    assert (out / "model.safetensors").stat() == written
    assert export(tiny_minitron, out, *flags, "--force") == 0
    assert "already" not in capsys.readouterr().err
