"""`minitron inspect`: tells artefacts apart, explains them, and refuses what is broken in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_machine import H100, fp8_tensors, make_gpu_machine, write_fp8_checkpoint, write_zeros
from minitron_build.bundle.inspect_command import Report, inspect
from minitron_build.checkpoint.contract import check_tensors
from minitron_build.checkpoint.convert import convert_checkpoint
from minitron_build.cli import VERBS, Verb, main
from minitron_build.engine.engine import build_engine
from minitron_build.engine.engine_record import RECORD_NAME
from minitron_build.errors import CheckpointError
from minitron_build.planning.plan import PlanRequest, make_plan
from minitron_build.source.model_config import ModelConfig
from minitron_build.source.safetensors_file import read_header

DATA = Path(__file__).parents[1] / "golden" / "data"
FP8_CONFIG = json.loads((DATA / "config_fp8_1x1.json").read_text())
EditJson = Callable[[Path, dict[str, Any]], None]


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint at tp 2 pp 2, an engine of it, and an FP8 checkpoint, in one folder."""
    root = tmp_path_factory.mktemp("artefacts")
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = make_gpu_machine(root / "machine", monkeypatch)
        machine.add_gpus(H100)
        machine.add_tool()
        convert_checkpoint(DATA / "tiny_minitron", root / "checkpoint", tp_size=2, pp_size=2)
        config = ModelConfig.read(DATA / "tiny_minitron")
        request = PlanRequest(arch="hopper", precision="bf16", tp_size=2, pp_size=2, max_batch_size=8)
        plan = make_plan("tiny", config, request, gpus=(), available_bytes=1 << 34)
        build_engine(plan, root / "checkpoint", root / "engine", gpu=H100[0])
    write_fp8_checkpoint(FP8_CONFIG, root / "fp8")
    return root


@pytest.fixture
def copy(artefacts: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an artefact that a test may break."""
    return lambda name: Path(shutil.copytree(artefacts / name, tmp_path / name))


def inspect_cli(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    code = main(["inspect", str(path), *flags])
    out, err = capsys.readouterr()
    return code, out, err


def text_of(report: Report) -> str:
    return "\n".join(report.lines())


def test_checkpoint(artefacts: Path) -> None:
    report = inspect(artefacts / "checkpoint")
    assert report.kind == "checkpoint"
    assert report.facts["shape"] == "4 layers, hidden 96, 8 heads x 16"
    assert report.facts["rope"] == "theta 500000, llama3 factor 8.0"
    assert report.facts["ranks"] == "4 (tp 2 x pp 2)"
    assert report.facts["precision"] == "bfloat16 weights, bfloat16 KV cache"
    assert any("sha256 of 5 files" in check for check in report.checks)
    assert report.warnings == ()


def test_fp8_checkpoint_of_another_tool(artefacts: Path) -> None:
    report = inspect(artefacts / "fp8")
    assert report.facts["precision"] == "FP8 weights, FP8 KV cache"
    assert report.facts["logits_dtype"] == "float16"
    assert "no conversion.json" in report.warnings[0]


def test_engine(artefacts: Path) -> None:
    report = inspect(artefacts / "engine")
    assert report.kind == "engine"
    facts = report.facts
    assert (facts["tensorrt_llm"], facts["tensorrt"]) == ("1.2.1", "10.14.1.48")
    assert (facts["built for"], facts["built on"]) == ("SM 90", H100[0])
    assert (facts["max_batch_size"], facts["max_seq_len"]) == (8, 9216)
    assert "sha256 of 5 files" in report.checks
    assert "4 rank files" in text_of(report)


def test_text_and_json(
    artefacts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VERBS, "inspect", Verb("minitron_build.bundle.inspect_command", "inspect"))
    code, out, err = inspect_cli(artefacts / "engine", capsys, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out.splitlines()[-1]) == inspect(artefacts / "engine").as_dict()
    assert out.splitlines()[0].endswith("a TensorRT-LLM engine directory")
    code, out, err = inspect_cli(artefacts / "nothing", capsys)
    assert (code, out) == (1, "")
    assert err.startswith(f"minitron: {artefacts / 'nothing'}: no such folder; expected a bundle")


def test_what_is_none_of_ours(tmp_path: Path, tiny_minitron: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{}")
    wanted = {
        tiny_minitron: "a Hugging Face checkpoint; .*minitron build --checkpoint",
        tiny_minitron / "config.json": "a file",
        tmp_path / "empty": "neither manifest.json nor config.json",
        tmp_path / "odd": "a config.json without architecture",
    }
    for path, found in wanted.items():
        with pytest.raises(CheckpointError, match=found):
            inspect(path)


def test_changed_bytes(copy: Callable[[str], Path]) -> None:
    for name, file in (("checkpoint", "rank3.safetensors"), ("engine", "rank3.engine")):
        path = copy(name) / file
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{file}: other bytes than when it was"):
            inspect(path.parent)
        assert "sizes of" in text_of(inspect(path.parent, skip_hashes=True))


def test_broken_engines(copy: Callable[[str], Path], edit_json: EditJson) -> None:
    engine = copy("engine")
    (engine / "rank2.engine").rename(engine / "away")
    with pytest.raises(CheckpointError, match=r"rank2\.engine is missing; expected 4 rank files"):
        inspect(engine)
    (engine / "rank2.engine").write_bytes(b"{not a plan file, long enough}")
    with pytest.raises(CheckpointError, match=r"rank2\.engine: not a TensorRT plan file"):
        inspect(engine)
    (engine / "away").replace(engine / "rank2.engine")
    edit_json(engine / "config.json", {"version": "1.1.0"})
    with pytest.raises(Exception, match=r"config\.json: TensorRT-LLM 1\.1\.0; expected 1\.2\.1"):
        inspect(engine)


BROKEN_HERE = {
    "config.json of a checkpoint": (
        "checkpoint",
        "config.json",
        "fetch or copy the folder again, or build it",
    ),
    "config.json of an engine": (
        "engine",
        "config.json",
        "fetch or copy the folder again, or build it again",
    ),
    "conversion.json": ("checkpoint", "conversion.json", "copy the checkpoint again, or build it again"),
    "rank file": ("checkpoint", "rank1.safetensors", "copy the checkpoint again, or build it again"),
    "engine.json": ("engine", RECORD_NAME, "copy the whole engine directory, or build it again"),
}


@pytest.mark.parametrize("name", BROKEN_HERE)
def test_a_file_that_was_made_here_is_not_to_be_fetched(
    name: str, copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    artefact, file, todo = BROKEN_HERE[name]
    path = copy(artefact)
    (path / file).write_bytes((path / file).read_bytes()[:-20])
    code, _, err = inspect_cli(path, capsys)
    assert (code, err.count("\n")) == (1, 1)
    assert todo in err
    assert "fetch the file" not in err


def test_engine_without_and_with_a_foreign_record(copy: Callable[[str], Path], edit_json: EditJson) -> None:
    engine = copy("engine")
    edit_json(engine / RECORD_NAME, {"sm": ...})
    with pytest.raises(CheckpointError, match=r"engine\.json: a record that cannot be read \('sm'\)"):
        inspect(engine)
    edit_json(engine / RECORD_NAME, {"schema": 99})
    with pytest.raises(CheckpointError, match=r"engine\.json: schema 99; expected 1"):
        inspect(engine)
    (engine / RECORD_NAME).unlink()
    assert "no engine.json: not built by this toolkit" in inspect(engine).warnings[0]


def sizes(world_size: int, tp_size: int, pp_size: int) -> dict[str, Any]:
    return {"mapping": {"world_size": world_size, "tp_size": tp_size, "pp_size": pp_size}}


def quantized(algo: str) -> dict[str, Any]:
    return {"quantization": {"quant_algo": algo}}


CONFIG_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "head_size": ({"head_size": ...}, "head_size is missing"),
    "derived head_size": ({"head_size": 12}, r"qkv\.weight is BF16 \[96, 96\]; expected BF16 \[72, 96\]"),
    "vocab": ({"vocab_size": 500}, r"embedding\.weight is BF16 \[512, 96\]; expected BF16 \[500, 96\]"),
    "dtype": ({"dtype": "float16"}, r"is BF16 .*expected F16"),
    "dtype unknown": ({"dtype": "float8"}, "dtype is 'float8'"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
    "architecture": ({"architecture": "MistralForCausalLM"}, "architecture is 'MistralForCausalLM'"),
    "mapping": ({"mapping": ...}, "mapping is missing"),
    "world": (sizes(3, 2, 2), "world_size 3 and cp_size 1; expected world_size 4"),
    "tp": (sizes(5, 5, 1), "5 does not divide num_attention_heads"),
    "ranks": (sizes(2, 2, 1), r"rank2\.safetensors is of no rank"),
    "quantization": ({"quantization": ...}, "quantization is missing"),
    "algo": (quantized("W4A16"), r"quantization\.quant_algo is 'W4A16'; expected null or 'FP8'"),
    "fp8": (quantized("FP8"), r"activation_scaling_factor is missing; expected F32 \[1\]"),
    "layers": ({"num_hidden_layers": 6}, r"layers\.2\.\S+ is missing"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_config_and_tensors_must_agree(fault: str, copy: Callable[[str], Path], edit_json: EditJson) -> None:
    changes, said = CONFIG_FAULTS[fault]
    checkpoint = copy("checkpoint")
    edit_json(checkpoint / "config.json", changes)
    with pytest.raises(CheckpointError, match=said):
        check_tensors(checkpoint)


def test_missing_scale_and_tensor_are_named(tmp_path: Path) -> None:
    write_fp8_checkpoint(FP8_CONFIG, tmp_path / "fp8")
    path, tensors = tmp_path / "fp8" / "rank0.safetensors", fp8_tensors(FP8_CONFIG)
    prefix = "transformer.layers.2."
    for name, said in {
        prefix + "mlp.gate.activation_scaling_factor": r"is missing; expected F32 \[1\]",
        prefix + "attention.dense.weight": r"is missing; expected F8_E4M3 \[96, 128\]",
        "transformer.ln_f.weight": r"is missing; expected BF16 \[96\]",
    }.items():
        write_zeros(path, {key: tensors[key] for key in tensors if key != name})
        with pytest.raises(CheckpointError, match=f"rank0.safetensors: {name} {said}"):
            check_tensors(path.parent)


def test_what_the_loader_does_without(tmp_path: Path) -> None:
    """It merges separate KV scales, views int8 as FP8, and takes rope buffers or leaves them."""
    write_fp8_checkpoint(FP8_CONFIG, tmp_path / "fp8")
    path, tensors = tmp_path / "fp8" / "rank0.safetensors", fp8_tensors(FP8_CONFIG)
    merged = "attention.kv_cache_scaling_factor"
    kept = {name: need for name, need in tensors.items() if not name.endswith(merged)}
    kept["transformer.layers.0.mlp.fc.weight"] = ("I8", (288, 96))
    kept["rotary_inv_freq"] = ("F32", (8,))
    kept["something.else"] = ("F32", (1,))
    write_zeros(path, kept)
    assert check_tensors(path.parent).unread == ("rank0.safetensors: something.else",)
    write_zeros(path, {**kept, "rotary_inv_freq": ("F32", (9,))})
    with pytest.raises(CheckpointError, match=r"rotary_inv_freq is F32 \[9\]; expected F32 \[8\]"):
        check_tensors(path.parent)


@pytest.mark.parametrize("variant", ["1x1", "2x1", "1x2", "2x2", "4x1"])
def test_contract_fits_every_recorded_mapping(variant: str, tmp_path: Path) -> None:
    """What NVIDIA's converter wrote: no tensor unread, none missing."""
    golden = json.loads((DATA / "golden_bf16.json").read_text())[variant]
    (tmp_path / "config.json").write_bytes((DATA / f"config_{variant}.json").read_bytes())
    for rank, tensors in golden.items():
        shapes = {name: ("BF16", tuple(entry[0])) for name, entry in tensors.items()}
        write_zeros(tmp_path / f"{rank}.safetensors", shapes)
    facts = check_tensors(tmp_path)
    assert facts.unread == ()
    assert facts.num_tensors == sum(len(tensors) for tensors in golden.values())
    assert read_header(tmp_path / "rank0.safetensors").tensors
