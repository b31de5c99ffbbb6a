"""FP8 conversion beyond the golden bytes: resume, exclusions, refusals, records."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_build.build import build_bundle, build_checkpoint, plan_build
from minitron_build.bundle.bundle import Bundle
from minitron_build.bundle.manifest import digest_file
from minitron_build.calibration.amax import Calibration
from minitron_build.calibration.samples import SampleRequest, read_calibration_set
from minitron_build.checkpoint import fp8_stream
from minitron_build.checkpoint.contract import check_tensors
from minitron_build.checkpoint.convert_fp8 import Fp8Choice, convert_fp8_checkpoint
from minitron_build.checkpoint.fp8_exclude import resolve_exclusions
from minitron_build.checkpoint.trtllm_checkpoint import TrtllmCheckpoint
from minitron_build.checkpoint.weight_map import Mapping
from minitron_build.errors import CheckpointError, MachineError, PlanError, StageError
from minitron_build.planning.plan import PlanRequest
from minitron_build.source.hub import resolve_checkpoint
from minitron_build.source.model_config import ModelConfig

IDS = Path(__file__).parents[1] / "golden" / "data" / "calibration_ids.json"
EditJson = Callable[[Path, dict[str, Any]], None]


def convert(hf_dir: Path, output_dir: Path, *, ids: Path = IDS, **options: Any) -> TrtllmCheckpoint:
    data = read_calibration_set(SampleRequest(ids), hf_dir, 512)
    return convert_fp8_checkpoint(hf_dir, output_dir, data, **options)


def same(left: Path, right: Path) -> bool:
    names = sorted(path.name for path in left.iterdir())
    return names == sorted(path.name for path in right.iterdir()) and all(
        (left / name).read_bytes() == (right / name).read_bytes() for name in names
    )


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from minitron_build.calibration.samples import SampleRequest, read_calibration_set
from minitron_build.checkpoint import fp8_stream
from minitron_build.checkpoint.convert_fp8 import convert_fp8_checkpoint
from minitron_build.checkpoint.weight_map import Mapping
fp8_stream.JOURNAL_EVERY_S = 0.0
write_layer = fp8_stream._write_layer
layers = 0
def killed_behind_the_second(*arguments):
    global layers
    write_layer(*arguments)
    layers += 1
    if layers == 2:
        os.kill(os.getpid(), int(sys.argv[4]))
fp8_stream._write_layer = killed_behind_the_second
hf_dir, ids, output_dir = map(Path, sys.argv[1:4])
data = read_calibration_set(SampleRequest(ids), hf_dir, 512)
convert_fp8_checkpoint(hf_dir, output_dir, data, mapping=Mapping(2, 2))
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_killed_run_is_resumed_to_the_same_bytes(
    tiny_minitron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: int
) -> None:
    output_dir = tmp_path / "out"
    command = [
        sys.executable,
        "-c",
        KILLED_RUN,
        str(tiny_minitron),
        str(IDS),
        str(output_dir),
        str(int(kill)),
    ]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    assert not output_dir.exists()
    journal = json.loads((tmp_path / "out.partial" / "journal.json").read_text())
    assert len(journal["layers"]) >= 2
    calibrated: list[int] = []
    convert(tiny_minitron, output_dir, mapping=Mapping(2, 2), progress=calibrated.append)
    assert calibrated[0] == len(journal["layers"]) * 512, "what is durable is not calibrated again"
    assert sum(calibrated) == 4 * 512
    convert(tiny_minitron, tmp_path / "fresh", mapping=Mapping(2, 2))
    assert same(output_dir, tmp_path / "fresh")
    assert not (tmp_path / "out.partial").exists()


def test_work_of_another_plan_is_not_resumed(
    tiny_minitron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_stream, "JOURNAL_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_minitron, tmp_path / "out", progress=_interrupt_after(3 * 512))
    assert (tmp_path / "out.partial" / "journal.json").is_file()
    ids = tmp_path / "other.json"
    ids.write_text(json.dumps([[7] * 40]))
    calibrated: list[int] = []
    convert(tiny_minitron, tmp_path / "out", ids=ids, progress=calibrated.append)
    assert sum(calibrated) == 4 * 40
    convert(tiny_minitron, tmp_path / "fresh", ids=ids)
    assert same(tmp_path / "out", tmp_path / "fresh")


def _interrupt_after(limit: int) -> Callable[[int], None]:
    seen = 0

    def progress(tokens: int) -> None:
        nonlocal seen
        seen += tokens
        if seen > limit:
            raise KeyboardInterrupt

    return progress


def test_finished_checkpoint_is_taken_as_it_is(tiny_minitron: Path, tmp_path: Path) -> None:
    convert(tiny_minitron, tmp_path / "out")
    before = (tmp_path / "out" / "rank0.safetensors").stat().st_mtime_ns
    convert(tiny_minitron, tmp_path / "out")
    assert (tmp_path / "out" / "rank0.safetensors").stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match=r"a checkpoint of another .*--force"):
        convert(tiny_minitron, tmp_path / "out", choice=Fp8Choice("bf16"))


def test_digests_are_those_of_the_files(tiny_minitron: Path, tmp_path: Path) -> None:
    checkpoint = convert(tiny_minitron, tmp_path / "out", mapping=Mapping(2))
    assert set(checkpoint.files) == {
        *("calibration.json", "config.json", "rank0.safetensors", "rank1.safetensors"),
    }
    for name, digest in checkpoint.files.items():
        assert digest == digest_file(checkpoint.path / name)
    for name, digest in checkpoint.sources.items():
        assert digest == digest_file(tiny_minitron / name)
    calibration = Calibration.read(checkpoint.path / "calibration.json")
    assert (calibration.data["num_samples"], calibration.data["num_tokens"]) == (8, 512)
    assert len(calibration.layers) == 4


def test_full_disk_is_one_line_and_resumable(
    tiny_minitron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(
            StageError, match="the disk is full; free some space and run the same command again"
        ):
            convert(tiny_minitron, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(tiny_minitron, tmp_path / "out")


def test_too_little_disk_and_a_second_writer_are_refused(
    tiny_minitron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minitron_build.checkpoint import work_folder

    def second(_: int) -> None:
        with pytest.raises(MachineError, match="another conversion is writing here"):
            convert(tiny_minitron, tmp_path / "out")

    convert(tiny_minitron, tmp_path / "out", progress=second)
    monkeypatch.setattr(
        work_folder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000, "total": 1 << 40})
    )
    with pytest.raises(MachineError, match=r"0.0 GB free; expected 0.1 GB for 1 rank file"):
        convert(tiny_minitron, tmp_path / "other")
    assert not (tmp_path / "other.partial").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.2.mlp.up_proj.weight", float("nan"), "layer 2: amax of down_input is nan"),
        ("model.layers.1.input_layernorm.weight", 0.0, "layer 1: amax of qkv_input is 0.0"),
    ],
)
def test_broken_weights_are_refused(
    tiny_copy: Path, tmp_path: Path, name: str, value: float, message: str
) -> None:
    tensors = load_file(tiny_copy / "model.safetensors")
    tensors[name].fill_(value)
    save_file(tensors, tiny_copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert(tiny_copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wider_sources_are_rounded_first(
    tiny_copy: Path, tiny_minitron: Path, tmp_path: Path, edit_json: EditJson
) -> None:
    tensors = {name: tensor.float() for name, tensor in load_file(tiny_copy / "model.safetensors").items()}
    save_file(tensors, tiny_copy / "model.safetensors")
    edit_json(tiny_copy / "config.json", {"torch_dtype": "float32"})
    convert(tiny_copy, tmp_path / "wide")
    convert(tiny_minitron, tmp_path / "bf16")
    ranks = [(tmp_path / name / "rank0.safetensors").read_bytes() for name in ("wide", "bf16")]
    assert ranks[0] == ranks[1]


EXCLUSIONS: dict[str, tuple[tuple[str, ...], int]] = {
    "a kind, TensorRT-LLM's name": (("*.mlp.proj",), 4),
    "a kind, HF's name": (("*.down_proj",), 4),
    "one layer": (("transformer.layers.0.*",), 5),
    "one layer, HF's name": (("model.layers.3.mlp.*",), 3),
    "fused halves": (("*.layers.1.mlp.fc", "*.layers.1.mlp.gate"), 2),
}


@pytest.mark.parametrize("case", EXCLUSIONS)
def test_excluded_layers_stay_bf16(tiny_minitron: Path, tmp_path: Path, case: str) -> None:
    patterns, count = EXCLUSIONS[case]
    checkpoint = convert(tiny_minitron, tmp_path / "out", choice=Fp8Choice("fp8", patterns))
    recorded = checkpoint.config["quantization"]["exclude_modules"]
    assert recorded[0] == "lm_head"
    tensors = load_file(tmp_path / "out" / "rank0.safetensors")
    kept = [
        name
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and tensor.dtype == torch.bfloat16 and name.startswith("transformer.layers.")
    ]
    assert len(kept) == count
    for name in kept:
        module = name.removesuffix(".weight")
        assert module in recorded, "TensorRT-LLM looks some names up literally"
        assert f"{module}.weights_scaling_factor" not in tensors
    check_tensors(tmp_path / "out")


def test_exclusions_count_layers_as_each_pipeline_rank_does(tiny_minitron: Path, tmp_path: Path) -> None:
    choice = Fp8Choice("fp8", ("*.layers.0.mlp.proj", "*.layers.2.mlp.proj"))
    checkpoint = convert(tiny_minitron, tmp_path / "out", mapping=Mapping(1, 2), choice=choice)
    assert "transformer.layers.0.mlp.proj" in checkpoint.config["quantization"]["exclude_modules"]
    for rank in range(2):
        tensors = load_file(tmp_path / "out" / f"rank{rank}.safetensors")
        assert tensors["transformer.layers.0.mlp.proj.weight"].dtype == torch.bfloat16
        assert tensors["transformer.layers.1.mlp.proj.weight"].dtype == torch.float8_e4m3fn
    check_tensors(tmp_path / "out")


@pytest.mark.parametrize(
    ("patterns", "pp_size", "message"),
    [
        (
            ("*.nonsense",),
            1,
            "matches no linear layer; expected a pattern for names such as transformer.layers.0",
        ),
        (("*.q_proj",), 1, "names a part of transformer.layers.0.attention.qkv; expected .*k_proj"),
        (("*.mlp.fc",), 1, "mlp.fc without transformer.layers.0.mlp.gate.*multiplies them as one"),
        (("*",), 1, "leaves no linear layer in FP8"),
        (("*.layers.0.mlp.proj",), 2, "--pp-size 2; expected the same layers on each pipeline rank"),
    ],
)
def test_exclusions_that_cannot_be(
    tiny_minitron: Path, patterns: tuple[str, ...], pp_size: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        resolve_exclusions(ModelConfig.read(tiny_minitron), Mapping(1, pp_size), patterns)


def test_bundle_records_what_it_was_calibrated_with(tiny_minitron: Path, tmp_path: Path) -> None:
    source = resolve_checkpoint(str(tiny_minitron), None)
    request = PlanRequest(arch="cpu", precision="fp8", calib_data=IDS, max_batch_size=2)
    plan = plan_build(source, request)
    assert (plan.precision, plan.kv_cache_dtype) == ("fp8", "fp8")
    build_bundle(plan, source, tmp_path / "out")
    manifest = Bundle.load(tmp_path / "out").manifest
    assert manifest.calibration is not None
    assert (manifest.calibration["name"], manifest.calibration["num_tokens"]) == (IDS.name, 512)
    assert len(manifest.calibration["input_ids_sha256"]) == 64
    assert manifest.plan["fp8"]["exclude_modules"] == ["lm_head"]
    assert manifest.verification is not None
    assert manifest.verification["source"] == source.name
    assert str(tmp_path) not in json.dumps(manifest.verification)
    build_bundle(plan, source, tmp_path / "out")  # the same again: taken as it is
    other = plan_build(source, PlanRequest(arch="cpu", precision="fp8", max_batch_size=2, calib_samples=4))
    with pytest.raises(CheckpointError, match="a bundle of another plan or source"):
        build_bundle(other, source, tmp_path / "out")


def test_without_verification_nothing_is_claimed(tiny_minitron: Path, tmp_path: Path) -> None:
    source = resolve_checkpoint(str(tiny_minitron), None)
    plan = plan_build(source, PlanRequest(arch="cpu", precision="fp8", calib_data=IDS, max_batch_size=2))
    bundle = build_bundle(plan, source, tmp_path / "out", verify=False)
    assert bundle.manifest.verification is None
    assert not (bundle.checkpoint / "verification.json").exists()


def test_a_stopped_run_does_not_go_on_hashing(tiny_minitron: Path, tmp_path: Path) -> None:
    """An interrupt in the first layer ends the other threads too, and leaves nothing that looks whole."""
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_minitron, tmp_path / "out", progress=_interrupt_after(0))
    assert not (tmp_path / "out").exists()
    convert(tiny_minitron, tmp_path / "out")
    convert(tiny_minitron, tmp_path / "fresh")
    assert same(tmp_path / "out", tmp_path / "fresh")


def test_large_keys_are_warned_about(
    tiny_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(tiny_copy / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 2000
    save_file(tensors, tiny_copy / "model.safetensors")
    source = resolve_checkpoint(str(tiny_copy), None)
    plan = plan_build(source, PlanRequest(arch="cpu", precision="fp8", calib_data=IDS, max_batch_size=2))
    checkpoint = build_checkpoint(plan, source, tmp_path / "out", verify=False)
    assert "an FP8 KV cache may cost accuracy" in capsys.readouterr().err
    scales = load_file(checkpoint.path / "rank0.safetensors")
    key, value, both = (
        scales[f"transformer.layers.1.attention.{name}_cache_scaling_factor"].item()
        for name in ("k", "v", "kv")
    )
    assert key > 1
    assert value == 1
    assert both == key
