"""The reference engine on FP8 checkpoints, held to an independent float64 model that checks every rounding.

Run: pytest tests/golden/test_fp8_logits.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8_model import CALIBRATION_IDS, Recorder, check_engine, write_fp8_checkpoint
from minitron_build.calibration.samples import CalibrationSet
from minitron_build.checkpoint.convert_fp8 import Fp8Choice, convert_fp8_checkpoint
from minitron_build.cli import main
from minitron_build.runtime.reference_engine import LlamaModel
from minitron_build.runtime.reference_engine import kv_cache as kv_cache_module
from minitron_build.runtime.reference_engine import linear as linear_module
from minitron_build.runtime.reference_engine.llama import PREFILL_CHUNK_TOKENS
from pretended_cuda import DEVICE, pretended_cuda

GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_logits.json").read_text())
SHORT_IDS = [508, *((11 * n * n + 5 * n) % 500 for n in range(39))]
FLOAT32_ROUNDING = 2e-5  # of the largest logit; sums of up to 288 terms through 4 layers


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    for module in (linear_module, kv_cache_module):
        monkeypatch.setattr(module, "quantize", recorder.wrap(module.quantize))
    return recorder


def engine_logits(checkpoint: Path, ids: list[int], recorder: Recorder, **options: Any) -> torch.Tensor:
    model = LlamaModel(checkpoint, max_seq_len=len(ids), **options)
    recorder.codes.clear()  # probing the row ladder rounds too
    return model.last_logits(ids).double()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= FLOAT32_ROUNDING * expected.abs().max()


@pytest.mark.parametrize("kv_scale", [None, 1.0, 0.03])
@pytest.mark.parametrize("excluded", [(), ("0.attention.qkv", "2.mlp.proj", "3.mlp.fc", "3.mlp.gate")])
def test_logits_equal_float64(
    tiny_minitron: Path, tmp_path: Path, recorder: Recorder, kv_scale: float | None, excluded: tuple[str, ...]
) -> None:
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8", kv_scale=kv_scale, excluded=excluded)
    found = engine_logits(checkpoint, SHORT_IDS, recorder)
    expected = check_engine(tiny_minitron, checkpoint, SHORT_IDS, recorder, PREFILL_CHUNK_TOKENS)
    assert_close(found, expected)


def test_logits_equal_float64_with_one_byte_weights(
    tiny_minitron: Path, tmp_path: Path, recorder: Recorder
) -> None:
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8")
    found = engine_logits(checkpoint, SHORT_IDS, recorder, keeps_fp8_bytes=True)
    assert_close(found, check_engine(tiny_minitron, checkpoint, SHORT_IDS, recorder, PREFILL_CHUNK_TOKENS))


@pytest.mark.parametrize("kv_scale", [None, 1.0])
def test_logits_by_scaled_mm_equal_float64(
    tiny_minitron: Path, tmp_path: Path, recorder: Recorder, kv_scale: float | None
) -> None:
    """The path of a GPU's tensor cores, with the CPU's own `torch._scaled_mm` in their place."""
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8", kv_scale=kv_scale)
    with pretended_cuda() as mode:
        found = engine_logits(checkpoint, SHORT_IDS, recorder, device=str(DEVICE))
    assert mode.operations["aten._scaled_mm.default"] >= 4 * 5
    assert_close(found, check_engine(tiny_minitron, checkpoint, SHORT_IDS, recorder, PREFILL_CHUNK_TOKENS))


def test_bfloat16_rounds_as_an_engine_of_that_dtype(
    tiny_minitron: Path, tmp_path: Path, recorder: Recorder
) -> None:
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8")
    found = engine_logits(checkpoint, SHORT_IDS, recorder, compute_dtype="bfloat16")
    arguments = (tiny_minitron, checkpoint, SHORT_IDS, recorder, PREFILL_CHUNK_TOKENS)
    expected = check_engine(*arguments, dtype=torch.bfloat16)
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("exclude", [(), ("*.mlp.proj", "transformer.layers.0.*")])
def test_the_converters_own_checkpoint(
    tiny_minitron: Path, tmp_path: Path, recorder: Recorder, exclude: tuple[str, ...]
) -> None:
    data = CalibrationSet("own", "0" * 64, tuple(CALIBRATION_IDS[n : n + 30] for n in range(0, 300, 30)), 30)
    choice = Fp8Choice(exclude=exclude)
    checkpoint = convert_fp8_checkpoint(tiny_minitron, tmp_path / "fp8", data, choice=choice).path
    found = engine_logits(checkpoint, SHORT_IDS, recorder)
    assert_close(found, check_engine(tiny_minitron, checkpoint, SHORT_IDS, recorder, PREFILL_CHUNK_TOKENS))


def test_minitron_logits_prints_them(
    tiny_minitron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8")
    (tmp_path / "ids.json").write_text(json.dumps([SHORT_IDS]))
    assert main(["logits", str(checkpoint), "--input-ids", str(tmp_path / "ids.json"), "--top-k", "3"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    values, ids = LlamaModel(checkpoint, max_seq_len=64).last_logits(SHORT_IDS).topk(3)
    assert result["top"] == [list(pair) for pair in zip(ids.tolist(), values.tolist(), strict=True)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(
    tiny_minitron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.json").write_text("[[1]]")
    flags = ["--input-ids", str(tmp_path / "ids.json"), "--device", "cuda"]
    assert main(["logits", str(tmp_path), *flags]) == 1
    assert "--device: torch" in capsys.readouterr().err


def test_logits_equal_float64_at_8200_tokens(tiny_minitron: Path, tmp_path: Path, recorder: Recorder) -> None:
    case = next(one for one in GOLDEN if one.get("length") == 8200)
    square, step, modulus, offset = case["formula_coeff"]
    ids = [(square * n * n + step * n) % modulus + offset for n in range(8200)]
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8", num_layers=2)
    found = engine_logits(checkpoint, ids, recorder)
    assert_close(found, check_engine(tiny_minitron, checkpoint, ids, recorder, PREFILL_CHUNK_TOKENS))
