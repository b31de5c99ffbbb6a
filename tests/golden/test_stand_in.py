"""The stand-in trtllm-build resolves as the recorded builder does, and reads as strictly as its loader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gpu_machine import STAND_IN, write_fp8_checkpoint, write_zeros
from minitron_build.checkpoint.convert import convert_checkpoint
from minitron_build.source.safetensors_file import read_header

DATA = Path(__file__).parent / "data"
RESOLVED = sorted(DATA.glob("resolved_build_*.json"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The tiny model as a checkpoint of each kind, by the name of its golden config.json."""
    root = tmp_path_factory.mktemp("checkpoints")
    convert_checkpoint(DATA / "tiny_minitron", root / "bf16")
    write_fp8_checkpoint(json.loads((DATA / "config_fp8_1x1.json").read_text()), root / "fp8")
    return {"config_1x1.json": root / "bf16", "config_fp8_1x1.json": root / "fp8"}


def build(
    checkpoint_dir: Path, output_dir: Path, *flags: str, sm: int = 90
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(STAND_IN), "--checkpoint_dir", str(checkpoint_dir)]
    return subprocess.run(
        [*command, "--output_dir", str(output_dir), *flags],
        env={**os.environ, "STAND_IN_SM": str(sm)},
        cwd=output_dir.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def last_error(answer: subprocess.CompletedProcess[str]) -> str:
    assert answer.returncode == 1, answer.stdout
    return answer.stderr.splitlines()[-1]


@pytest.mark.parametrize("path", RESOLVED, ids=lambda path: path.stem)
def test_resolves_as_recorded(path: Path, checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    recorded = json.loads(path.read_text())
    flags = recorded["command"][5:]
    answer = build(checkpoints[recorded["checkpoint_config"]], tmp_path / "engine", *flags, sm=recorded["sm"])
    assert answer.returncode == 0, answer.stderr
    found = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert found == recorded["engine_config"]
    assert [list(found[name]) for name in found] == [list(part) for part in blocks(recorded)]
    for warning in recorded["warnings"]:
        assert f"[W] {warning}" in answer.stdout


def blocks(recorded: dict[str, Any]) -> list[Any]:
    """The values of the recorded engine config, a string among them."""
    return list(recorded["engine_config"].values())


def test_records_cover_both_precisions() -> None:
    assert len(RESOLVED) == 7


def test_takes_exactly_the_flags(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    checkpoint_dir = checkpoints["config_1x1.json"]
    wrong = {
        "--strongly_typed": "unrecognized arguments",
        "--max_batch 8": "unrecognized arguments",  # an abbreviation
        "--gemm_plugin bf16": "invalid choice: 'bf16'",
        "--max_batch_size many": "invalid int value",
        "--use_fused_mlp true": "invalid choice",
    }
    for flags, said in wrong.items():
        answer = build(checkpoint_dir, tmp_path / "engine", *flags.split())
        assert answer.returncode == 2
        assert said in answer.stderr
    assert not (tmp_path / "engine").exists()
    answer = build(checkpoint_dir, tmp_path / "engine", "--max_decoder_seq_len", "4096")
    assert answer.returncode == 0, answer.stderr
    found = json.loads((tmp_path / "engine" / "config.json").read_text())["build_config"]
    assert (found["max_seq_len"], found["max_batch_size"], found["opt_num_tokens"]) == (4096, 2048, 2048)


@pytest.mark.parametrize(
    ("flags", "sm", "said"),
    [
        ("--gemm_swiglu_plugin fp8", 100, "gemm_swiglu_plugin=fp8 is not supported on SM 100"),
        ("--low_latency_gemm_plugin fp8", 100, "low_latency_gemm_plugin=fp8 is not supported on SM 100"),
        ("--gemm_swiglu_plugin fp8", 90, "gemm_swiglu_plugin requires"),
        ("--multiple_profiles enable --opt_num_tokens 8", 90, "multiple_profiles is enabled, while opt_num"),
        ("--max_num_tokens 16", 90, "max_num_tokens (16) should be greater than tokens_per_block"),
        ("--streamingllm enable", 90, "streamingllm is not supported"),
    ],
)
def test_refuses_what_the_builder_refuses(
    flags: str, sm: int, said: str, checkpoints: Mapping[str, Path], tmp_path: Path
) -> None:
    answer = build(checkpoints["config_1x1.json"], tmp_path / "engine", *flags.split(), sm=sm)
    assert said in last_error(answer)


@pytest.mark.parametrize(
    ("flags", "sm", "paged", "fp8"),
    [
        ("", 90, True, True),
        ("--use_paged_context_fmha disable", 90, False, True),
        ("--use_paged_context_fmha disable --use_fp8_context_fmha disable", 90, False, False),
        ("--use_fp8_context_fmha disable", 90, True, True),  # forced on by paged context with FP8 KV
        ("--context_fmha disable", 90, False, False),
    ],
)
def test_context_fmha_ladder(
    flags: str, sm: int, paged: bool, fp8: bool, checkpoints: Mapping[str, Path], tmp_path: Path
) -> None:
    answer = build(checkpoints["config_fp8_1x1.json"], tmp_path / "engine", *flags.split(), sm=sm)
    assert answer.returncode == 0, answer.stderr
    plugins = json.loads((tmp_path / "engine" / "config.json").read_text())["build_config"]["plugin_config"]
    assert (plugins["use_paged_context_fmha"], plugins["use_fp8_context_fmha"]) == (paged, fp8)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 3)])
def test_loads_what_is_converted(tp_size: int, pp_size: int, tmp_path: Path) -> None:
    convert_checkpoint(DATA / "tiny_minitron", tmp_path / "checkpoint", tp_size=tp_size, pp_size=pp_size)
    answer = build(tmp_path / "checkpoint", tmp_path / "engine")
    assert answer.returncode == 0, answer.stderr
    assert "Provided but not required" not in answer.stdout
    assert len(list((tmp_path / "engine").glob("rank*.engine"))) == tp_size * pp_size
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert config["pretrained_config"]["mapping"]["attn_tp_size"] == tp_size
    nccl = config["build_config"]["plugin_config"]["nccl_plugin"]
    assert nccl == ("bfloat16" if tp_size * pp_size > 1 else None)


BROKEN: dict[str, tuple[str, str]] = {
    "transformer.layers.3.mlp.proj.activation_scaling_factor": ("", "Required but not provided tensors"),
    "transformer.layers.1.attention.qkv.weight": (
        "dtype",
        "for parameter 'transformer.layers.1.attention.qkv",
    ),
    "transformer.ln_f.weight": ("shape", "for parameter 'transformer.ln_f.weight'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_loader_refuses_missing_and_wrong_tensors(
    name: str, checkpoints: Mapping[str, Path], tmp_path: Path
) -> None:
    how, said = BROKEN[name]
    source = checkpoints["config_fp8_1x1.json"]
    tensors = {
        tensor.name: (tensor.dtype, tensor.shape)
        for tensor in read_header(source / "rank0.safetensors").tensors
    }
    dtype, shape = tensors.pop(name)
    if how:
        tensors[name] = ("BF16", shape) if how == "dtype" else (dtype, (shape[0] + 1,))
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_bytes((source / "config.json").read_bytes())
    write_zeros(tmp_path / "checkpoint" / "rank0.safetensors", tensors)
    assert said in last_error(build(tmp_path / "checkpoint", tmp_path / "engine"))
    assert not (tmp_path / "engine").exists()
