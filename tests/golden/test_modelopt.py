"""The FP8 conversion against NVIDIA ModelOpt itself, on a random model of other shapes, file by file.

    pip install -e '.[test,modelopt]' && pytest tests/golden/test_modelopt.py

ModelOpt runs in one child process for all of it: importing it takes seconds and registers things globally.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from minitron_build.calibration.samples import CalibrationSet, SampleRequest, read_calibration_set
from minitron_build.checkpoint.convert_fp8 import Fp8Choice, convert_fp8_checkpoint
from minitron_build.checkpoint.export_hf import export_hf_checkpoint
from minitron_build.checkpoint.weight_map import Mapping, hf_tensors
from minitron_build.source.model_config import ModelConfig

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None, reason="nvidia-modelopt is not installed: extra [modelopt]"
)

DATA = Path(__file__).parent / "data"
MODELOPT = """
import copy, json, sys, warnings
warnings.simplefilter("ignore")
import torch
from transformers import AutoModelForCausalLM
import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint

def loop(model):
    with torch.no_grad():
        for ids in json.load(open(job["ids"])):
            model.model(torch.tensor([ids]))

for job in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(job["hf_dir"], dtype=torch.bfloat16)
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    if job["kv"] == "fp8":
        config["quant_cfg"] = config["quant_cfg"] + copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
    model = mtq.quantize(model, config, loop)
    with torch.inference_mode():
        if job["kind"] == "hf":
            export_hf_checkpoint(model, export_dir=job["out"])
            continue
        export_tensorrt_llm_checkpoint(
            model, "llama", torch.bfloat16, export_dir=job["out"],
            inference_tensor_parallel=job["tp"], inference_pipeline_parallel=job["pp"],
        )
"""


@dataclass(frozen=True)
class Shape:
    """A random model, and how it is divided."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    tp: int
    pp: int
    kv: str = "fp8"


SHAPES = {
    "3 layers on 3 pipeline ranks, odd vocabulary": Shape(3, 80, 6, 3, 8, 112, 301, False, 1, 3),
    "tied, heads of 12, KV heads split": Shape(3, 80, 6, 2, 12, 112, 302, True, 2, 1),
    "padded vocabulary, tp and pp, bf16 KV cache": Shape(2, 64, 4, 4, 24, 96, 303, False, 2, 2, "bf16"),
    "KV heads repeated": Shape(2, 64, 8, 2, 16, 128, 256, False, 4, 1),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each shape: the model `source`, `ids.json`, ModelOpt's exports `trtllm` and `hf`."""
    root = tmp_path_factory.mktemp("modelopt")
    jobs = []
    for name, shape in SHAPES.items():
        folder = root / name
        folder.mkdir()
        source, ids = write_model(shape, folder)
        job = {"hf_dir": str(source), "ids": str(ids), "kv": shape.kv, "tp": shape.tp, "pp": shape.pp}
        jobs += [{**job, "kind": kind, "out": str(folder / kind)} for kind in ("trtllm", "hf")]
    command = [sys.executable, "-c", MODELOPT, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return root


@pytest.mark.parametrize("name", SHAPES)
def test_rank_files_are_modelopts_byte_for_byte(theirs: Path, tmp_path: Path, name: str) -> None:
    shape, folder = SHAPES[name], theirs / name
    mapping, choice = Mapping(shape.tp, shape.pp), Fp8Choice(shape.kv)
    data = calibration_set(folder, shape)
    convert_fp8_checkpoint(folder / "source", tmp_path / "ours", data, mapping=mapping, choice=choice)
    exported = sorted((folder / "trtllm").iterdir())
    assert len(exported) == 1 + mapping.world_size
    for path in exported:
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", SHAPES)
def test_hf_export_is_modelopts_byte_for_byte(theirs: Path, tmp_path: Path, name: str) -> None:
    shape, folder = SHAPES[name], theirs / name
    data, choice = calibration_set(folder, shape), Fp8Choice(shape.kv)
    export_hf_checkpoint(folder / "source", tmp_path / "ours", data, choice=choice)
    for file in ("model.safetensors", "hf_quant_config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (folder / "hf" / file).read_bytes(), file
    ours, exported = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "ours", folder / "hf")
    )
    assert ours["quantization_config"] == exported["quantization_config"]


def calibration_set(folder: Path, shape: Shape) -> CalibrationSet:
    return read_calibration_set(SampleRequest(folder / "ids.json"), folder / "source", shape.vocab)


def write_model(shape: Shape, folder: Path) -> tuple[Path, Path]:
    """(checkpoint folder, file of calibration ids) of a random model."""
    raw: dict[str, Any] = json.loads((DATA / "tiny_minitron" / "config.json").read_text())
    raw |= {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    hf_dir = folder / "source"
    hf_dir.mkdir()
    (hf_dir / "config.json").write_text(json.dumps(raw))
    generator = torch.Generator().manual_seed(20)
    tensors = {
        name: (torch.randn(size, generator=generator) * 0.05 + ("norm" in name)).to(torch.bfloat16)
        for name, size in hf_tensors(ModelConfig.from_dict(raw)).items()
    }
    save_file(tensors, hf_dir / "model.safetensors", metadata={"format": "pt"})
    lengths = (20, 33, 64, 17)
    ids = [torch.randint(0, shape.vocab, (length,), generator=generator).tolist() for length in lengths]
    (folder / "ids.json").write_text(json.dumps(ids))
    return hf_dir, folder / "ids.json"
