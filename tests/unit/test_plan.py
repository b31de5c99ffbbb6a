"""The plan decides everything with its reason, and refuses what contradicts itself, model or target."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron_build.cli import main
from minitron_build.errors import CheckpointError, PlanError
from minitron_build.planning.memory_model import DoesNotFitError
from minitron_build.planning.plan import BuildPlan, PlanRequest, available_memory_bytes, make_plan
from minitron_build.planning.targets import TARGETS, Gpu, resolve_target
from minitron_build.source.model_config import ModelConfig

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
    assert small.memory.weights_bytes == large.memory.weights_bytes == 9_025_492_992
    fp8 = plan_for(real, available_gib=20, precision="fp8")
    assert (fp8.compute_dtype, fp8.memory.kv_cache_bytes_per_token) == ("float32", 64 * 1024)
    assert fp8.memory.weights_bytes == small.memory.weights_bytes
    assert 1 <= small.limits.max_batch_size < large.limits.max_batch_size


def test_auto_without_a_gpu_is_the_cpu_and_says_so() -> None:
    assert resolve_target("auto", ()) == (TARGETS["cpu"], "no NVIDIA GPU was found on this machine")


def test_auto_reads_the_gpu() -> None:
    target, reason = resolve_target("auto", (Gpu("NVIDIA H100", 90, 80 * GIB),))
    assert (target.arch, reason) == ("hopper", "NVIDIA H100 is SM 90")
    with pytest.raises(PlanError, match=r"NVIDIA A10 is SM 86; expected one of ampere 80, ada 89.*--sm 86"):
        resolve_target("auto", (Gpu("NVIDIA A10", 86, 24 * GIB),))


def test_another_sm_of_a_generation() -> None:
    target, reason = resolve_target("ampere", (), 86)
    assert (target.arch, target.sm, target.precisions, reason) == (
        "ampere",
        86,
        ("bf16",),
        "asked for with --sm",
    )
    assert resolve_target("auto", (), 120)[0].arch == "blackwell"


@pytest.mark.parametrize("arch", [arch for arch in TARGETS if arch != "cpu"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_gpu_plans_are_complete(real: ModelConfig, arch: str, tp_size: int) -> None:
    for precision in ("auto", *TARGETS[arch].precisions):
        plan = plan_for(real, arch=arch, precision=precision, tp_size=tp_size)
        record = json.loads(json.dumps(plan.as_dict()))
        assert record["precision"] == (TARGETS[arch].precisions[0] if precision == "auto" else precision)
        assert record["kv_cache_dtype"] == record["precision"]
        assert record["sm"] == TARGETS[arch].sm
        assert record["limits"]["max_num_tokens"] == 8192
        assert record["trtllm_build_argv"][:5] == [
            "trtllm-build",
            "--checkpoint_dir",
            "checkpoint",
            "--output_dir",
            "engine",
        ]
        assert record["versions"]["tensorrt_llm"] == "1.2.1"
        assert record["versions"]["tensorrt"] == "10.14.1.48"
        assert "26.07-trtllm-python-py3" in record["container"]
        assert record["memory"]["kv_cache_tokens"] >= record["limits"]["max_seq_len"]
        assert record["memory"]["stages"].keys() == {"checkpoint", "engine", "bundle"}
        decided = {decision["what"]: decision for decision in record["decisions"]}
        assert record["plugins"].keys() < decided.keys()
        assert {"arch", "precision", "kv_cache_dtype", "gpu", "max_batch_size", "container"} < decided.keys()
        assert all(decision["reason"] for decision in decided.values())


def test_printed_command_names_the_output_folder(real: ModelConfig, tmp_path: Path) -> None:
    request = PlanRequest(arch="hopper")
    plan = make_plan("model", real, request, gpus=(), available_bytes=20 * GIB, output_dir=tmp_path)
    assert str(tmp_path / "checkpoint") in plan.trtllm_build_argv
    assert plan.trtllm_build_argv[-1] == plan.engine_argv("a", "b")[-1]
    assert plan.engine_argv("a", "b")[2:5] == ("a", "--output_dir", "b")
    assert any(line.startswith("  engine: trtllm-build") for line in plan.lines())


def test_batch_is_for_the_gpu_it_will_run_on(real: ModelConfig) -> None:
    def batch(request: PlanRequest, *gpus: Gpu) -> tuple[int, str]:
        plan = make_plan("model", real, request, gpus=gpus, available_bytes=20 * GIB)
        reason = next(decision.reason for decision in plan.decisions if decision.what == "gpu")
        return plan.limits.max_batch_size, reason

    ada = PlanRequest(arch="ada")
    assert batch(ada) == (64, "no GPU of SM 89 here: the smallest common one, or say --gpu; 24.2 GB")
    assert batch(ada, Gpu("NVIDIA H200", 90, 140 * GIB))[0] == 64
    assert batch(ada, Gpu("NVIDIA L40S", 89, 45 * GIB)) == (128, "this machine's GPU is SM 89; 48.3 GB")
    assert batch(replace(ada, gpu="L40S"))[0] == 128
    assert batch(replace(ada, gpu_memory_gb=16)) == (32, "its memory was given with --gpu-memory-gb")
    assert batch(PlanRequest(gpu="H100")) == (256, "asked for with --gpu; 85.5 GB")
    assert batch(replace(ada, kv_cache_fraction=0.4))[0] == 32


def test_weights_and_kv_cache_may_differ_one_way(real: ModelConfig) -> None:
    plan = plan_for(real, arch="hopper", kv_cache_dtype="bf16")
    assert (plan.precision, plan.kv_cache_dtype, plan.plugins["use_fp8_context_fmha"]) == (
        "fp8",
        "bf16",
        "disable",
    )
    assert plan.memory.kv_cache_bytes_per_token == 128 * 1024


def test_long_prompts_are_chunked_or_fit_in_a_step(real: ModelConfig) -> None:
    long = {"arch": "hopper", "max_input_len": 20000, "max_seq_len": 24000}
    assert plan_for(real, **long).limits.max_num_tokens == 8192
    unpaged = (("use_paged_context_fmha", "disable"),)
    plan = plan_for(real, **long, plugins=unpaged)
    assert plan.limits.max_num_tokens == 20000
    assert any("--max-num-tokens 20000 is more than 16384" in warning for warning in plan.warnings)
    with pytest.raises(PlanError, match="--max-input-len 20000 with --max-num-tokens 8192 and no chunked"):
        plan_for(real, **long, plugins=unpaged, max_num_tokens=8192)


def test_small_plans_take_small_steps(real: ModelConfig) -> None:
    limits = plan_for(real, arch="hopper", max_batch_size=1, max_seq_len=1024, max_input_len=512).limits
    assert limits.max_num_tokens == 1024


def test_more_requests_than_the_cache_holds_is_a_warning(real: ModelConfig) -> None:
    plan = plan_for(real, arch="ada", max_batch_size=512)
    assert any("fewer than --max-batch-size 512" in warning for warning in plan.warnings)


def test_one_request_of_full_length_must_fit(real: ModelConfig) -> None:
    with pytest.raises(
        DoesNotFitError, match=r"L4: .*lower --max-seq-len to \d+ or less, or use --precision fp8"
    ):
        plan_for(real, arch="ada", precision="bf16", max_seq_len=131072)


def test_model_with_few_positions_gets_what_it_has(real: ModelConfig) -> None:
    limits = plan_for(replace(real, max_position_embeddings=2048)).limits
    assert (limits.max_input_len, limits.max_seq_len) == (2047, 2048)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"arch": "ampere", "precision": "fp8"}, "--precision fp8 with --arch ampere.*no FP8 tensor cores"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 with --arch cpu"),
        ({"kv_cache_dtype": "fp8"}, "and bf16 weights; expected fp8 weights or a bf16 KV cache"),
        ({"precision": "bf16", "calib_samples": 8}, "--calib-samples with --precision bf16; only FP8"),
        ({"precision": "fp8", "calib_samples": 0}, "--calib-samples is 0; expected 1 or more"),
        ({"precision": "fp8", "calib_seq_len": 4}, "--calib-seq-len is 4; expected 16 or more"),
        ({"precision": "fp8", "fp8_exclude": ("*.mlp.down",)}, "matches no linear layer; expected a pattern"),
        ({"precision": "fp8", "fp8_exclude": ("*",)}, "leaves no linear layer in FP8; use --precision bf16"),
        ({"sm": 90}, "--sm 90 with --arch cpu"),
        ({"gpu": "H100"}, "--gpu H100 is SM 90; expected cpu"),
        ({"gpu_memory_gb": 24}, "--gpu-memory-gb with --arch cpu"),
        ({"plugins": (("gemm_plugin", "auto"),)}, "--plugin gemm_plugin with --arch cpu"),
        ({"arch": "ampere", "sm": 90}, "--sm 90 with --arch ampere; expected --arch hopper"),
        ({"arch": "auto", "sm": 75}, "--sm 75; expected one of 80 ampere, 86 ampere, 89 ada"),
        ({"arch": "ampere", "kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 with --arch ampere.*no FP8"),
        (
            {"arch": "hopper", "precision": "bf16", "kv_cache_dtype": "fp8"},
            "and bf16 weights; expected fp8 weights or a bf16 KV cache; TensorRT-LLM turns paged context",
        ),
        ({"arch": "hopper", "tp_size": 3}, "--tp-size 3 does not divide"),
        ({"arch": "hopper", "tp_size": 16}, "--tp-size 16 .*make 16 ranks; expected at most 8"),
        ({"arch": "hopper", "tp_size": 8, "pp_size": 6}, "make 48 ranks; expected at most 8"),
        ({"arch": "hopper", "max_batch_size": 64, "max_num_tokens": 16}, "--max-num-tokens 16.*at least 64"),
        (
            {"arch": "hopper", "max_batch_size": 1, "max_num_tokens": 20000},
            "--max-num-tokens 20000.*at most 9216",
        ),
        ({"arch": "hopper", "max_input_len": 9300}, "--max-input-len 9300 with --max-seq-len 9216"),
        (
            {"arch": "blackwell", "plugins": (("gemm_swiglu_plugin", "fp8"),)},
            "gemm_swiglu_plugin=fp8 on SM 100",
        ),
        ({"arch": "hopper", "kv_cache_fraction": 0}, "--kv-cache-fraction is 0"),
        ({"arch": "hopper", "gpu_memory_gb": 0}, "--gpu-memory-gb is 0"),
        ({"arch": "hopper", "gpu": "L4"}, "--gpu L4 is SM 89; expected hopper"),
        ({"arch": "hopper", "gpu": "H300"}, "--gpu H300; expected one of"),
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


def test_too_little_memory_to_serve_is_pointed_out(real: ModelConfig) -> None:
    assert "the others wait" in plan_for(real, max_batch_size=1000).warnings[-1]
    assert "9.0 GB when served, and 8.6 GB are available here" in plan_for(real, available_gib=8).warnings[-1]


def test_what_serves_an_engine_is_a_decision(real: ModelConfig) -> None:
    for name, word in (("cpp", "C++ tensorrtllm backend"), ("executor", "owns TensorRT-LLM's executor")):
        plan = plan_for(real, arch="hopper", engine_backend=name)
        (decision,) = (one for one in plan.decisions if one.what == "engine_backend")
        assert (plan.engine_backend, plan.as_dict()["engine_backend"], decision.value) == (name, name, name)
        assert word in decision.reason
    assert plan_for(real, arch="hopper").engine_backend == "cpp"
    assert plan_for(real).engine_backend is None


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"arch": "cpu"}, "--engine-backend executor with --arch cpu; a CPU has no engine: leave it out"),
        (
            {"arch": "hopper", "tp_size": 2},
            "--engine-backend executor with 2 ranks; expected one rank; use --engine-backend cpp",
        ),
    ],
)
def test_an_executor_needs_a_gpu_and_one_rank(
    real: ModelConfig, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        plan_for(real, engine_backend="executor", **request_)


def test_reasons_of_lengths_name_the_model_s_own_end(real: ModelConfig) -> None:
    short = {row.what: row.reason for row in plan_for(replace(real, max_position_embeddings=2048)).decisions}
    assert short["max_seq_len"] == "the model's positions end at 2048"
    assert "one is left for an answer" in short["max_input_len"]
    usual = {row.what: row.reason for row in plan_for(real).decisions}
    assert usual["max_seq_len"] == "room for an answer behind a prompt of 8192"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "--calib-data .*nowhere: No such file or directory; give a file of samples"),
        ("folder.json", "--calib-data .*folder.json: a folder; give a file of samples"),
        ("samples.csv", "--calib-data: a file named samples.csv; expected .txt, .jsonl, .json; rename it"),
    ],
)
def test_calibration_data_that_is_no_file_is_refused_with_the_plan(
    real: ModelConfig, tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "samples.csv").write_text("x")
    with pytest.raises(CheckpointError, match=message):
        plan_for(real, precision="fp8", calib_data=tmp_path / name)
    flags = [
        "--arch",
        "cpu",
        "--checkpoint",
        "demo",
        "--precision",
        "fp8",
        "--output-dir",
        str(tmp_path / "o"),
    ]
    assert main(["build", *flags, "--calib-data", str(tmp_path / name), "--dry-run"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert re.search(message, err.splitlines()[-1])
