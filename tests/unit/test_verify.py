"""The gate: what passes, what fails and why, on the demo model and on broken copies of it.

Run: pytest tests/unit/test_verify.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_build.checkpoint.convert import convert_checkpoint
from minitron_build.errors import CheckpointError
from minitron_build.source.hub import resolve_checkpoint
from minitron_build.verify.gate import VerifyRequest, short_verify, verify
from minitron_build.verify.result import PARTS

DEMO = resolve_checkpoint("demo").hf_dir
FEW = {"num_samples": 4, "seq_len": 128}
NO_PARTS = dict.fromkeys(PARTS, "not wanted here")
EditJson = Callable[[Path, dict[str, Any]], None]


@pytest.fixture(scope="module")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "demo"
    convert_checkpoint(DEMO, folder)
    return folder


@pytest.fixture
def broken(demo_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(demo_checkpoint, tmp_path / "broken")
    return tmp_path / "broken"


def test_a_bf16_checkpoint_is_its_source(demo_checkpoint: Path) -> None:
    result = verify(VerifyRequest("demo", demo_checkpoint, DEMO, **FEW))
    assert result.passed
    assert not result.failure
    assert result.facts["kind"] == "exact"
    assert {check.name for check in result.checks} == {
        *("perplexity_rise", "top1_agreement", "mean_kl", "p99_kl", "layer_snr"),
        *("long_prompt_kl", "golden_gap", "repeat_difference"),
    }
    assert result.facts["eval"]["predicted_tokens"] == 4 * 127
    assert 1 < result.facts["eval"]["source_perplexity"] < 4096
    assert result.facts["long_prompt"]["tokens"] == 8192
    assert [len(one["source_ids"]) for one in result.facts["golden_prompts"]] == [16] * 8


def test_short_form_says_what_it_leaves_out(demo_checkpoint: Path) -> None:
    result = short_verify(demo_checkpoint, DEMO)
    assert result.passed
    assert set(result.skipped) == set(PARTS)
    assert json.loads(json.dumps(result.as_dict()))["skipped"] == dict(result.skipped)
    assert sum("not measured" in line for line in result.lines()) == len(PARTS)


def test_every_mapping_passes(demo_checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(DEMO, tmp_path / "2x2", tp_size=2, pp_size=2)
    assert verify(VerifyRequest("2x2", tmp_path / "2x2", DEMO, **FEW, skipped=NO_PARTS)).passed


def test_dropped_rope_scaling_shows_at_the_long_prompt_only(broken: Path, edit_json: EditJson) -> None:
    edit_json(broken / "config.json", {"rotary_scaling": None})
    fp8_limits = {"perplexity_rise": 0.01, "top1_agreement": 0.95, "mean_kl": 0.05, "p99_kl": 0.5}
    limits = fp8_limits | {"layer_snr": 10, "long_prompt_kl": 0.05, "golden_gap": 1.0}
    result = verify(VerifyRequest("broken", broken, DEMO, **FEW, thresholds=limits))
    assert [check.name for check in result.checks if not check.passed] == ["long_prompt_kl"]
    assert "RoPE" in result.failure


def test_source_of_another_shape_is_refused(demo_checkpoint: Path, tiny_minitron: Path) -> None:
    with pytest.raises(CheckpointError, match="vocab_size is 4096; expected 512"):
        short_verify(demo_checkpoint, tiny_minitron)
