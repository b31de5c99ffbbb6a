"""The plan decides everything with its reason, and refuses what contradicts itself, model or target."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron_build.errors import PlanError
from minitron_build.model_config import ModelConfig
from minitron_build.plan import BuildPlan, PlanRequest, available_memory_bytes, make_plan
from minitron_build.targets import TARGETS, Gpu, resolve_target

GIB = 1 << 30
REAL = Path(__file__).parents[1] / "golden" / "data" / "width_base_config.json"


def plan_for(config: ModelConfig, *, available_gib: int = 20, **request: Any) -> BuildPlan:
    asked = PlanRequest(**{"arch": "cpu", **request})
    return make_plan("model", config, asked, gpus=(), available_bytes=available_gib * GIB)


@pytest.fixture
def real() -> ModelConfig:
    return ModelConfig.from_dict(json.loads(REAL.read_text()))


def test_every_decision_has_a_reason(real: ModelConfig) -> None:
    plan = plan_for(real)
    record = json.loads(json.dumps(plan.as_dict()))
    assert {
        "arch",
        "sm",
        "precision",
        "kv_cache_dtype",
        "tp_size",
        "pp_size",
        "limits",
        "memory",
    } <= record.keys()
    assert all(decision["reason"] for decision in record["decisions"])
    assert record["limits"]["max_input_len"] == 8192
    assert record["limits"]["max_seq_len"] == 9216
    assert "cpu bundle, bf16" in next(plan.lines())


def test_memory_decides_arithmetic_and_batch(real: ModelConfig) -> None:
    small, large = plan_for(real, available_gib=20), plan_for(real, available_gib=200)
    assert (small.compute_dtype, large.compute_dtype) == ("bfloat16", "float32")
    assert small.memory.kv_cache_bytes_per_token == 128 * 1024
    assert 1 <= small.limits.max_batch_size < large.limits.max_batch_size


def test_auto_without_a_gpu_is_the_cpu_and_says_so() -> None:
    assert resolve_target("auto", ()) == (TARGETS["cpu"], "no NVIDIA GPU was found on this machine")


def test_auto_reads_the_gpu() -> None:
    target, reason = resolve_target("auto", (Gpu("NVIDIA H100", 90, 80 * GIB),))
    assert (target.arch, reason) == ("hopper", "NVIDIA H100 is SM 90")
    with pytest.raises(PlanError, match=r"NVIDIA A10 is SM 86; expected one of ampere 80, ada 89"):
        resolve_target("auto", (Gpu("NVIDIA A10", 86, 24 * GIB),))


def test_model_with_few_positions_gets_what_it_has(real: ModelConfig) -> None:
    limits = plan_for(replace(real, max_position_embeddings=2048)).limits
    assert (limits.max_input_len, limits.max_seq_len) == (2047, 2048)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"precision": "fp8"}, "--precision fp8 with --arch cpu; expected bf16"),
        ({"arch": "ampere", "precision": "fp8"}, "--precision fp8 with --arch ampere.*no FP8 tensor cores"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 with --arch cpu"),
        ({"arch": "hopper"}, "does not build TensorRT engines yet"),
        ({"tp_size": 3}, "--tp-size 3 does not divide"),
        ({"pp_size": 33}, "--pp-size 33 for 32 layers"),
        ({"max_input_len": 4096, "max_seq_len": 4096}, "--max-input-len 4096 with --max-seq-len 4096"),
        ({"max_seq_len": 200000}, "--max-seq-len 200000; expected at most .* 131072"),
        ({"max_batch_size": 0}, "--max-batch-size is 0"),
        ({"max_num_tokens": -1}, "--max-num-tokens is -1"),
    ],
)
def test_refused(real: ModelConfig, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        plan_for(real, **request_)
    assert "\n" not in str(caught.value)


def test_available_memory_is_what_this_process_may_take() -> None:
    assert 0 < available_memory_bytes() < 1 << 50
