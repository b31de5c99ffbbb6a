"""Bytes of a plan and ceilings over them, against the figures known for this model and these boards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron_build.checkpoint.weight_map import Mapping
from minitron_build.errors import PlanError
from minitron_build.planning.fp8_plan import plan_fp8
from minitron_build.planning.gpu_models import GPU_MODELS, find_model, find_models, model_of, smallest_model
from minitron_build.planning.limits import Limits
from minitron_build.planning.memory_model import (
    DoesNotFitError,
    activation_bytes,
    auto_batch,
    check_fit,
    fit_gpu,
    model_bytes,
    stage_needs,
)
from minitron_build.planning.request import PlanRequest
from minitron_build.planning.roofline import decode_tokens_per_s, prefill_tokens_per_s, rates_of
from minitron_build.planning.targets import GENERATIONS, TARGETS, Gpu
from minitron_build.source.model_config import ModelConfig

CONFIG = ModelConfig.from_dict(
    json.loads((Path(__file__).parents[1] / "golden" / "data" / "width_base_config.json").read_text())
)
ONE = Mapping(1, 1)
LIMITS = Limits(64, 8192, 9216, 8192)
GIB = 1 << 30

# decode tokens/s of one request in bf16 and fp8, and KV cache tokens in thousands, computed independently
# for round memory sizes and 2.5 GiB of activations
PUBLISHED = {
    "L4": (36, 66, 94, 240),
    "L40S": (105, 191, 269, 591),
    "A100-80GB": (248, None, 503, None),
    "H100": (407, 742, 503, 1060),
    "H200": (583, 1064, 887, 1830),
    "B200": (971, 1773, 1160, 2360),
}


def model(precision: str, mapping: Mapping = ONE) -> Any:
    return model_bytes(CONFIG, mapping, precision, precision)


def test_weights_are_those_of_the_checkpoint() -> None:
    assert model("bf16").weights_bytes == 2 * 4_512_746_496
    assert model("fp8").weights_bytes == pytest.approx(5.30e9, rel=1e-3)
    assert model("bf16").ranks[0].step_bytes == pytest.approx(8.24e9, rel=1e-3)
    assert model("fp8").ranks[0].step_bytes == pytest.approx(4.51e9, rel=1e-3)


def test_kv_cache_per_token() -> None:
    assert model("bf16").kv_cache_bytes_per_token == 128 * 1024
    assert model("fp8").kv_cache_bytes_per_token == 64 * 1024
    assert model("bf16", Mapping(2, 1)).kv_cache_bytes_per_token == 64 * 1024
    # 16 ranks share 8 KV heads: each keeps one
    assert model("bf16", Mapping(16, 1)).kv_cache_bytes_per_token == 16 * 1024
    # 32 layers over 3 stages: 11, 11, 10
    ranks = model("bf16", Mapping(1, 3)).ranks
    assert [rank.kv_cache_bytes_per_token // 4096 for rank in ranks] == [11, 11, 10]


def test_ranks_hold_the_model_once_but_for_what_is_repeated() -> None:
    whole, halves = model("bf16"), model("bf16", Mapping(2, 1))
    embedding, norms = 2 * 128256 * 3072, 2 * 65 * 3072
    assert halves.total_weights_bytes == whole.weights_bytes + embedding + norms
    assert model("fp8", Mapping(2, 1)).total_weights_bytes == model("fp8").weights_bytes + norms
    stages = model("bf16", Mapping(1, 2))
    assert stages.total_weights_bytes == whole.weights_bytes


def test_activations_follow_their_formula() -> None:
    layer = 8192 * 2 * (2 * 3072 + 3 * 9216)
    logits = 256 * 128256 * 4 * 2
    assert activation_bytes(CONFIG, ONE, 256, 8192) == layer + logits + 1792 * 1024 * 1024
    assert activation_bytes(CONFIG, ONE, 256, 8192) == pytest.approx(2.69e9, rel=0.01)
    assert activation_bytes(CONFIG, Mapping(2, 1), 64, 8192) < activation_bytes(CONFIG, ONE, 64, 8192)


@pytest.mark.parametrize("name", PUBLISHED)
def test_decode_ceiling_is_the_published_one(name: str) -> None:
    bf16, fp8, _, _ = PUBLISHED[name]
    gpu = find_model(name)
    for precision, wanted in (("bf16", bf16), ("fp8", fp8)):
        rates = rates_of(gpu, model(precision))
        assert rates is not None
        if wanted is not None:
            assert decode_tokens_per_s(model(precision), rates, 1, 0) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_kv_cache_is_near_the_published_one(name: str) -> None:
    """Within what round memory sizes differ from those that drivers report."""
    _, _, bf16, fp8 = PUBLISHED[name]
    for precision, wanted in (("bf16", bf16), ("fp8", fp8)):
        if wanted is not None:
            fit = fit_gpu(model(precision), find_model(name).memory_bytes, LIMITS, 0.9)
            assert fit.kv_cache_tokens / 1000 == pytest.approx(wanted, rel=0.09)


def test_kv_cache_is_the_fraction_of_what_is_left() -> None:
    fit = fit_gpu(model("bf16"), 80 * 10**9, LIMITS, 0.5)
    left = 80 * 10**9 - fit.weights_bytes - fit.activation_bytes
    assert fit.kv_cache_bytes == left // 2
    assert fit.kv_cache_tokens == fit.kv_cache_bytes // fit.kv_cache_bytes_per_token // 32 * 32
    assert fit.full_length_requests(9216) == fit.kv_cache_tokens // 9216


def test_the_rank_with_the_least_room_decides() -> None:
    uneven = model("bf16", Mapping(1, 3))
    fit = fit_gpu(uneven, 24 * 10**9, LIMITS, 0.9)
    rooms = [
        (24 * 10**9 - rank.weights_bytes - fit.activation_bytes) * 0.9 / rank.kv_cache_bytes_per_token
        for rank in uneven.ranks
    ]
    assert fit.kv_cache_tokens == pytest.approx(min(rooms), abs=32)
    assert max(rooms) > min(rooms) + 1000


@pytest.mark.parametrize(("memory_gb", "batch"), [(12.0, 1), (13.0, 4), (24.15, 32), (42.9, 64), (1000, 256)])
def test_batch_is_what_typical_requests_allow(memory_gb: float, batch: int) -> None:
    assert auto_batch(model("bf16"), int(memory_gb * 1e9), 9216, 8192, 0.9) == batch


def test_too_small_a_gpu_is_refused_with_the_limit_to_lower() -> None:
    fit = fit_gpu(model("bf16"), 12 * 10**9, replace(LIMITS, max_batch_size=1), 0.9)
    with pytest.raises(DoesNotFitError) as caught:
        check_fit(fit, LIMITS, "12 GB GPU", kv_cache_fraction=0.9, is_fp8_possible=True)
    message = str(caught.value)
    assert f"lower --max-seq-len to {fit.kv_cache_tokens} or less with --max-input-len below it" in message
    assert "9216 tokens, one request of --max-seq-len; " in message
    assert "--precision fp8" in message
    assert caught.value.fit is fit
    lower = Limits(1, fit.kv_cache_tokens - 1, fit.kv_cache_tokens, 8192)
    check_fit(fit, lower, "12 GB GPU", kv_cache_fraction=0.9, is_fp8_possible=True)


def test_too_small_for_the_weights_names_what_would_help() -> None:
    fit = fit_gpu(model("bf16"), 8 * 10**9, LIMITS, 0.9)
    with pytest.raises(
        DoesNotFitError, match=r"KV cache of 0 tokens.*; use more ranks .--tp-size. or a larger"
    ):
        check_fit(fit, LIMITS, "8 GB GPU", kv_cache_fraction=0.9, is_fp8_possible=False)


def test_a_small_fraction_is_named_with_the_one_that_is_enough() -> None:
    whole = int(24e9)
    fit = fit_gpu(model("bf16"), whole, LIMITS, 0.001)
    with pytest.raises(DoesNotFitError, match=r"raise --kv-cache-fraction 0.001 to ") as caught:
        check_fit(fit, LIMITS, "24 GB GPU", kv_cache_fraction=0.001, is_fp8_possible=False)
    enough = float(str(caught.value).split("--kv-cache-fraction 0.001 to ")[1].split()[0])
    assert fit_gpu(model("bf16"), whole, LIMITS, enough).kv_cache_tokens >= LIMITS.max_seq_len
    assert fit_gpu(model("bf16"), whole, LIMITS, enough - 0.01).kv_cache_tokens < LIMITS.max_seq_len
    hopeless = fit_gpu(model("bf16"), 12 * 10**9, LIMITS, 0.5)
    with pytest.raises(DoesNotFitError) as caught:
        check_fit(hopeless, LIMITS, "12 GB GPU", kv_cache_fraction=0.5, is_fp8_possible=False)
    assert "--kv-cache-fraction" not in str(caught.value)


def test_stages_need_what_they_hold() -> None:
    needs = stage_needs(model("bf16", Mapping(2, 1)), 2 * GIB)
    assert needs["checkpoint"].ram_bytes < GIB
    assert needs["checkpoint"].disk_bytes == model("bf16", Mapping(2, 1)).total_weights_bytes
    assert needs["engine"].ram_bytes == 2 * model("bf16", Mapping(2, 1)).weights_bytes + 4 * GIB
    assert needs["engine"].gpu_bytes == model("bf16", Mapping(2, 1)).weights_bytes + 2 * GIB


def test_calibration_takes_what_was_measured_and_no_more_than_a_laptop_has() -> None:
    """1199 MiB were measured with 32 samples of 512 tokens; the plan must not promise less."""
    request = PlanRequest(arch="hopper", precision="fp8", calib_samples=32)
    fp8, _ = plan_fp8(CONFIG, ONE, request, "fp8")
    assert fp8 is not None
    model = model_bytes(CONFIG, ONE, "fp8", "fp8", fp8)
    ram_bytes = stage_needs(model, 0)["checkpoint"].ram_bytes
    assert 1199 << 20 < ram_bytes < 1.5 * GIB
    default, _ = plan_fp8(CONFIG, ONE, PlanRequest(arch="hopper", precision="fp8"), "fp8")
    assert default is not None
    assert default.ram_bytes(CONFIG) < 2.5 * GIB


def test_excluded_layers_take_two_bytes_a_number() -> None:
    request = PlanRequest(arch="hopper", precision="fp8", fp8_exclude=("*.mlp.proj",))
    fp8, decisions = plan_fp8(CONFIG, ONE, request, "fp8")
    whole, kept = (model_bytes(CONFIG, ONE, "fp8", "fp8", plan).weights_bytes for plan in (None, fp8))
    assert kept - whole == 32 * 3072 * 9216
    assert "32 linear layers stay bf16" in [decision.value for decision in decisions]


def test_more_requests_bring_more_until_memory_or_arithmetic_is_full() -> None:
    rates = rates_of(find_model("H100"), model("fp8"))
    assert rates is not None
    ceilings = [decode_tokens_per_s(model("fp8"), rates, batch, 2304) for batch in (1, 8, 64, 512, 4096)]
    assert ceilings == sorted(ceilings)
    cache_only = rates.bytes_per_s / (2304 * 64 * 1024)
    assert 0.9 * cache_only < ceilings[-1] < cache_only
    no_cache = decode_tokens_per_s(model("fp8"), rates, 100_000, 0)
    assert no_cache < rates.linear_flops_per_s / (2 * 3.7e9)


def test_ranks_share_the_work() -> None:
    rates = rates_of(find_model("A100-80GB"), model("bf16"))
    assert rates is not None
    one = decode_tokens_per_s(model("bf16"), rates, 1, 0)
    assert decode_tokens_per_s(model("bf16", Mapping(2, 1)), rates, 1, 0) == pytest.approx(2 * one, rel=0.001)
    # one request passes the stages one after another; many fill them
    assert decode_tokens_per_s(model("bf16", Mapping(1, 2)), rates, 1, 0) == pytest.approx(one, rel=0.001)
    many = decode_tokens_per_s(model("bf16"), rates, 64, 2304)
    assert decode_tokens_per_s(model("bf16", Mapping(1, 2)), rates, 64, 2304) > 1.2 * many


def test_prefill_is_arithmetic_for_long_and_memory_for_short_prompts() -> None:
    rates = rates_of(find_model("A100-80GB"), model("bf16"))
    assert rates is not None
    flops_per_token = 2 * 3_724_541_952 + 32 * 4 * 4096 * 4096 + 2 * 128256 * 3072 / 8192
    assert prefill_tokens_per_s(model("bf16"), rates, 8192) == pytest.approx(
        312e12 / flops_per_token, rel=1e-3
    )
    assert prefill_tokens_per_s(model("bf16"), rates, 1) == pytest.approx(248, rel=0.02)


def test_boards_agree_with_targets() -> None:
    assert len({gpu.name for gpu in GPU_MODELS}) == len(GPU_MODELS)
    assert {gpu.sm for gpu in GPU_MODELS} == set(GENERATIONS)
    for gpu in GPU_MODELS:
        assert (gpu.fp8_flops_per_s is not None) == ("fp8" in TARGETS[gpu.arch].precisions)
        assert smallest_model(gpu.sm).memory_bytes <= gpu.memory_bytes


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("l4", ["L4"]),
        ("A100", ["A100-40GB", "A100-80GB"]),
        ("NVIDIA A100-SXM4-80GB", ["A100-80GB"]),
        ("NVIDIA H100 80GB HBM3", ["H100"]),
        ("RTX PRO 6000", ["RTX-PRO-6000"]),
    ],
)
def test_boards_are_found_by_name(name: str, found: list[str]) -> None:
    assert [gpu.name for gpu in find_models(name)] == found


@pytest.mark.parametrize("name", ["V100", "", "H100 PCIe"])
def test_unknown_board_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match=r"expected one of A10, L4.*--gpu-memory-gb N"):
        find_model(name)


def test_two_boards_of_a_name_are_refused() -> None:
    with pytest.raises(PlanError, match="--gpu a100; expected A100-40GB or A100-80GB"):
        find_model("a100")


def test_gpu_here_keeps_its_own_memory() -> None:
    here = model_of(Gpu("NVIDIA H200", 90, 140 * GIB))
    assert (here.name, here.memory_bytes, here.bandwidth_bytes_per_s) == ("NVIDIA H200", 140 * GIB, 4.8e12)
    other = model_of(Gpu("NVIDIA H100 PCIe", 90, 80 * GIB))
    assert other.bandwidth_bytes_per_s is None
    assert rates_of(other, model("bf16")) is None
