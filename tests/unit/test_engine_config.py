"""An engine directory is read as the C++ runtime reads it, and refused in one line where that would throw."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_build.engine.engine_config import EngineConfig
from minitron_build.errors import CheckpointError

DATA = Path(__file__).parents[1] / "golden" / "data"
GOLDEN = {
    path.stem.removeprefix("resolved_build_"): json.loads(path.read_text())
    for path in DATA.glob("resolved_build_*.json")
}


@pytest.fixture
def raw() -> dict[str, Any]:
    return copy.deepcopy(GOLDEN["90_fp8"]["engine_config"])


@pytest.fixture
def engine_dir(tmp_path: Path, raw: dict[str, Any]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "rank0.engine").write_bytes(b"engine")
    return tmp_path


@pytest.mark.parametrize("name", GOLDEN)
def test_every_resolved_build_reads_back_without_a_difference(name: str) -> None:
    golden = GOLDEN[name]
    engine = EngineConfig.from_dict(golden["engine_config"])
    assert list(engine.differences_of_argv(tuple(golden["command"]))) == []
    is_fp8 = name.endswith("fp8")
    assert engine.logits_dtype == ("float16" if is_fp8 else "float32")
    assert engine.quant_algo == engine.kv_cache_quant_algo == ("FP8" if is_fp8 else None)
    assert engine.kv_cache_bytes_per_token == 2 * 4 * 2 * 16 * (1 if is_fp8 else 2)
    assert (engine.head_size, engine.max_batch_size, engine.max_seq_len) == (16, 64, 9216)
    assert engine.use_paged_context_fmha
    assert engine.kv_cache_type == "paged"


def test_what_was_resolved_otherwise_is_named(raw: dict[str, Any]) -> None:
    raw["build_config"]["max_seq_len"] = 8192
    raw["build_config"]["plugin_config"]["use_paged_context_fmha"] = False
    raw["build_config"]["plugin_config"]["gemm_plugin"] = "auto"
    engine = EngineConfig.from_dict(raw)
    assert [str(one) for one in engine.differences_of_argv(tuple(GOLDEN["90_fp8"]["command"]))] == [
        "max_seq_len: the plan asked for 9216, TensorRT-LLM resolved 8192",
        "gemm_plugin: the plan asked for disable, TensorRT-LLM resolved auto",
        "use_paged_context_fmha: the plan asked for enable, TensorRT-LLM resolved False",
    ]


def test_flags_of_every_form_are_compared(raw: dict[str, Any]) -> None:
    engine = EngineConfig.from_dict(raw)
    argv = (
        "trtllm-build",
        "--strip_plan",
        "--kv_cache_type=PAGED",
        "--logits_dtype",
        "float32",
        "--workers",
        "2",
    )
    assert [one.name for one in engine.differences_of_argv(argv)] == ["strip_plan", "logits_dtype"]
    (unknown,) = engine.differences_of_argv(("--no_such_flag", "1"))
    assert "resolved nothing of that name" in str(unknown)


def test_what_the_runtime_gives_a_default_gets_it(raw: dict[str, Any]) -> None:
    model, build = raw["pretrained_config"], raw["build_config"]
    for block, name in ((model, "logits_dtype"), (model, "head_size"), (model, "num_key_value_heads")):
        del block[name]
    del model["mapping"]["pp_size"]
    build["plugin_config"]["paged_kv_cache"] = False
    build["kv_cache_type"] = "CONTINUOUS"
    engine = EngineConfig.from_dict(raw)
    assert (engine.logits_dtype, engine.pp_size, engine.kv_cache_type) == ("float32", 1, "continuous")
    assert (engine.head_size, engine.num_key_value_heads) == (96 // 8, 8)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("version", ..., "version is missing; expected an engine of trtllm-build"),
        ("pretrained_config", ..., "pretrained_config is missing; expected an object"),
        (
            "pretrained_config.architecture",
            ...,
            "pretrained_config.architecture is missing; expected a string",
        ),
        ("pretrained_config.hidden_size", "96", "hidden_size is '96'; expected a whole number"),
        ("pretrained_config.num_hidden_layers", True, "num_hidden_layers is True; expected a whole number"),
        ("pretrained_config.dtype", "int8", "dtype is 'int8'; expected float32 or float16 or bfloat16"),
        (
            "pretrained_config.logits_dtype",
            "bfloat16",
            "logits_dtype is 'bfloat16'; expected float32 or float16",
        ),
        ("pretrained_config.mapping.tp_size", ..., "mapping.tp_size is missing"),
        ("pretrained_config.mapping.tp_size", 0, "tp_size is 0; expected 1 or more"),
        ("pretrained_config.quantization", None, "quantization is None; expected an object"),
        ("pretrained_config.moe", {}, "moe.num_experts is missing"),
        ("build_config.max_seq_len", ..., "max_seq_len is 0; expected 1 or more"),
        ("build_config.max_num_tokens", ..., "remove_input_padding without max_num_tokens"),
        (
            "build_config.kv_cache_type",
            "rope",
            "kv_cache_type is 'rope'; expected continuous or paged or disabled",
        ),
        ("build_config.lora_config", ..., "build_config.lora_config is missing"),
        (
            "build_config.plugin_config.lora_plugin",
            ...,
            "lora_plugin is missing; expected null or a plugin's dtype",
        ),
        ("build_config.plugin_config.paged_kv_cache", None, "paged_kv_cache is None; expected true or false"),
        ("build_config.plugin_config.gpt_attention_plugin", ..., "gpt_attention_plugin is missing"),
        ("build_config.plugin_config.tokens_per_block", ..., "tokens_per_block is missing"),
    ],
)
def test_what_the_runtime_needs_is_refused_when_missing(
    path: str, value: object, sentence: str, raw: dict[str, Any]
) -> None:
    *blocks, name = path.split(".")
    block = raw
    for step in blocks:
        block = block[step]
    block.pop(name, None)
    if value is not ...:
        block[name] = value
    if name == "kv_cache_type":
        block["plugin_config"]["paged_kv_cache"] = False
    with pytest.raises(CheckpointError) as caught:
        EngineConfig.from_dict(raw)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
    assert "build the engine again" in str(caught.value)


def test_a_directory_is_read_with_its_ranks(engine_dir: Path) -> None:
    engine = EngineConfig.read(engine_dir)
    assert (engine.world_size, engine.rank_files) == (1, ("rank0.engine",))
    engine.check_rank_files(engine_dir)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda path: (path / "rank0.engine").unlink(),
            "rank0.engine is missing; expected 1 rank file (tp 1 x pp 1)",
        ),
        (lambda path: (path / "rank0.engine").write_bytes(b""), "rank0.engine is empty"),
        (lambda path: (path / "rank1.engine").write_bytes(b"x"), "rank1.engine is of no rank"),
    ],
)
def test_ranks_that_do_not_match_are_refused(
    change: Callable[[Path], None], sentence: str, engine_dir: Path
) -> None:
    change(engine_dir)
    with pytest.raises(CheckpointError) as caught:
        EngineConfig.read(engine_dir).check_rank_files(engine_dir)
    assert sentence in str(caught.value)


def test_ranks_of_a_larger_world(engine_dir: Path, raw: dict[str, Any]) -> None:
    raw["pretrained_config"]["mapping"] |= {"tp_size": 2, "pp_size": 2}
    raw["build_config"]["plugin_config"]["manage_weights"] = True
    engine = EngineConfig.from_dict(raw)
    assert engine.world_size == 4
    assert engine.rank_files[3:5] == ("rank3.engine", "rank0_managed_weights.safetensors")
    assert engine.kv_cache_bytes_per_token == 2 * 2 * 1 * 16
    with pytest.raises(
        CheckpointError, match=r"rank1.engine is missing; expected 4 rank files \(tp 2 x pp 2\)"
    ):
        engine.check_rank_files(engine_dir)


def test_no_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="config.json is missing; expected a TensorRT-LLM engine directory"
    ):
        EngineConfig.read(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        EngineConfig.read(tmp_path / "none")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        EngineConfig.read(tmp_path)
