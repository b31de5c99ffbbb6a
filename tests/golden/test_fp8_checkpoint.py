"""FP8 checkpoints against NVIDIA ModelOpt's own export of the tiny model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minitron_build.calibration.samples import SampleRequest, read_calibration_set
from minitron_build.checkpoint.contract import check_tensors
from minitron_build.checkpoint.convert_fp8 import Fp8Choice, convert_fp8_checkpoint
from minitron_build.checkpoint.trtllm_checkpoint import TrtllmCheckpoint
from minitron_build.checkpoint.weight_map import Mapping
from minitron_build.cli import main

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "golden_fp8.json").read_text())
GOLDEN_SCALES = json.loads((DATA / "golden_fp8_scales.json").read_text())
IDS = DATA / "calibration_ids.json"
BF16_STEP = 0.01
"""The forward pass is bf16: other kernels may round one activation the other way, which is at most 0.8 %."""


def convert(hf_dir: Path, output_dir: Path, mapping: Mapping, **choice: Any) -> TrtllmCheckpoint:
    data = read_calibration_set(SampleRequest(IDS), hf_dir, 512)
    return convert_fp8_checkpoint(hf_dir, output_dir, data, mapping=mapping, choice=Fp8Choice(**choice))


def describe(tensor: torch.Tensor) -> list[Any]:
    """Shape, dtype and digest, as the golden file has them."""
    digest = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch."), digest]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_tensors_are_modelopts(tiny_minitron: Path, tmp_path: Path, tp_size: int) -> None:
    convert(tiny_minitron, tmp_path / "out", Mapping(tp_size))
    variant = f"{tp_size}x1"
    for rank in range(tp_size):
        tensors = load_file(tmp_path / "out" / f"rank{rank}.safetensors")
        golden = GOLDEN[variant][f"rank{rank}"]
        assert tensors.keys() == golden.keys()
        for name, tensor in tensors.items():
            if not name.endswith("activation_scaling_factor"):
                assert describe(tensor) == golden[name], name
        for name, factor in GOLDEN_SCALES[variant][f"rank{rank}"].items():
            assert tensors[name].item() == pytest.approx(factor, rel=BF16_STEP), name


@pytest.mark.parametrize("tp_size", [1, 2])
def test_config_is_modelopts_byte_for_byte(tiny_minitron: Path, tmp_path: Path, tp_size: int) -> None:
    convert(tiny_minitron, tmp_path / "out", Mapping(tp_size))
    golden = DATA / f"config_fp8_{tp_size}x1.json"
    assert (tmp_path / "out" / "config.json").read_bytes() == golden.read_bytes()


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 2), (2, 2), (4, 1), (8, 1)])
def test_ranks_hold_the_same_numbers(tiny_minitron: Path, tmp_path: Path, tp_size: int, pp_size: int) -> None:
    """Scaling factors are of whole tensors: every rank holds the same ones, and parts of the whole."""
    convert(tiny_minitron, tmp_path / "whole", Mapping())
    convert(tiny_minitron, tmp_path / "parts", Mapping(tp_size, pp_size))
    whole = load_file(tmp_path / "whole" / "rank0.safetensors")
    check_tensors(tmp_path / "parts")
    per_stage = 4 // pp_size
    for rank in range(tp_size * pp_size):
        pp_rank, tp_rank = divmod(rank, tp_size)
        tensors = load_file(tmp_path / "parts" / f"rank{rank}.safetensors")
        for local in range(per_stage):
            here = f"transformer.layers.{local}."
            there = f"transformer.layers.{local + pp_rank * per_stage}."
            names = [name for name in tensors if name.startswith(here) and name.endswith("scaling_factor")]
            assert len(names) == 13
            assert all(torch.equal(tensors[name], whole[name.replace(here, there)]) for name in names)
            part = tensors[f"{here}mlp.fc.weight"].view(torch.uint8)
            assert torch.equal(part, whole[f"{there}mlp.fc.weight"].view(torch.uint8).chunk(tp_size)[tp_rank])


def test_without_an_fp8_kv_cache(tiny_minitron: Path, tmp_path: Path) -> None:
    checkpoint = convert(tiny_minitron, tmp_path / "out", Mapping(), kv_cache_dtype="bf16")
    assert checkpoint.config["quantization"]["kv_cache_quant_algo"] is None
    tensors = load_file(tmp_path / "out" / "rank0.safetensors")
    assert len(tensors) == 3 + 17 * 4
    golden = GOLDEN["1x1"]["rank0"]
    assert {name for name in golden if name not in tensors} == {name for name in golden if "cache" in name}
    assert check_tensors(checkpoint.path).kv_cache_quant_algo is None


def test_through_the_command(tiny_minitron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["build", "--arch", "hopper", "--precision", "fp8", "--checkpoint", str(tiny_minitron)]
    command += ["--calib-data", str(IDS), "--stop-after", "checkpoint", "--no-verify"]
    command += ["--max-seq-len", "1024", "--max-input-len", "512", "--output-dir", str(tmp_path / "out")]
    assert main(command) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["files"] == ["calibration.json", "config.json", "rank0.safetensors"]
    convert(tiny_minitron, tmp_path / "direct", Mapping())
    made = tmp_path / "out" / "checkpoint" / "rank0.safetensors"
    assert made.read_bytes() == (tmp_path / "direct" / "rank0.safetensors").read_bytes()
    assert main(["inspect", last["checkpoint"]]) == 0
    assert "FP8 weights, FP8 KV cache" in capsys.readouterr().out
