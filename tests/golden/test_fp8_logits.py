"""The reference engine on FP8 checkpoints, held to an independent float64 model that checks every rounding.

Run: pytest tests/golden/test_fp8_logits.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8_model import Recorder, check_engine, write_fp8_checkpoint
from minitron_build.runtime.reference_engine import LlamaModel
from minitron_build.runtime.reference_engine import kv_cache as kv_cache_module
from minitron_build.runtime.reference_engine import linear as linear_module
from minitron_build.runtime.reference_engine.llama import PREFILL_CHUNK_TOKENS

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


def test_logits_equal_float64_at_8200_tokens(tiny_minitron: Path, tmp_path: Path, recorder: Recorder) -> None:
    case = next(one for one in GOLDEN if one.get("length") == 8200)
    square, step, modulus, offset = case["formula_coeff"]
    ids = [(square * n * n + step * n) % modulus + offset for n in range(8200)]
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8", num_layers=2)
    found = engine_logits(checkpoint, ids, recorder)
    assert_close(found, check_engine(tiny_minitron, checkpoint, ids, recorder, PREFILL_CHUNK_TOKENS))
