"""What the reference engine reads from a TensorRT-LLM checkpoint, and what it refuses.

Run: pytest tests/unit/test_reference_engine_checkpoint.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_build.checkpoint.convert import convert_checkpoint
from minitron_build.runtime.reference_engine import (
    LlamaModel,
    UnsupportedCheckpointError,
    read_checkpoint_config,
)
from minitron_build.runtime.reference_engine.checkpoint import CheckpointReader, layer_ranges
from minitron_build.runtime.reference_engine.safetensors_file import SafetensorsError, SafetensorsFile

EditJson = Callable[[Path, dict[str, Any]], None]


@pytest.fixture
def checkpoint(tiny_minitron: Path, tmp_path: Path) -> Path:
    convert_checkpoint(tiny_minitron, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_head_size_is_read_not_derived(checkpoint: Path) -> None:
    config = read_checkpoint_config(checkpoint)
    assert config.head_size == 16 != config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "GPTForCausalLM"}, "architecture is 'GPTForCausalLM'"),
        ({"architecture": ...}, "architecture is missing"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attn_bias": True}, "attn_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"qk_layernorm": True}, "qk_layernorm is True"),
        ({"residual_mlp": True}, "residual_mlp is True"),
        ({"moe": {"num_experts": 8}}, "moe.num_experts is 8"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        ({"head_size": ...}, "head_size is missing"),
        ({"head_size": "16"}, "head_size is '16'; expected int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"rotary_embedding_dim": 8}, "rotary_embedding_dim is 8; expected head_size 16"),
        ({"rotary_scaling": ...}, "rotary_scaling is missing"),
        ({"rotary_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_type 'yarn'"),
        ({"rotary_scaling": "llama3"}, "rotary_scaling is 'llama3'"),
        ({"rotary_base": ...}, "rotary_base is missing"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"num_key_value_heads": 3}, "8 heads do not divide into 3 KV heads"),
        ({"mapping": {"tp_size": 1, "pp_size": 5}}, "pp_size 5 exceeds 4 layers"),
        ({"mapping": {"tp_size": 1, "pp_size": 1, "world_size": 2}}, "world_size 2"),
        ({"mapping": {"tp_size": 1, "pp_size": 1, "cp_size": 2}}, "mapping.cp_size is 2"),
        ({"embedding_sharding_dim": 2}, "embedding_sharding_dim is 2"),
        (
            {"quantization": {"quant_algo": "W4A16_AWQ"}},
            "quant_algo is 'W4A16_AWQ'; this engine",
        ),
        ({"quantization": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}}, "None and 'FP8' only"),
        ({"quantization": {"kv_cache_quant_algo": "INT8"}}, "kv_cache_quant_algo is 'INT8'"),
        (
            {"quantization": {"quant_algo": "FP8", "exclude_modules": "lm_head"}},
            "expected a list of",
        ),
        ({"quantization": {"quant_algo": "FP8", "exclude_modules": [1]}}, "exclude_modules is [1]"),
        ({"quantization": ["FP8"]}, "quantization is ['FP8']; expected an object"),
    ],
)
def test_what_is_not_implemented_is_refused(
    checkpoint: Path, edit_json: EditJson, changes: dict[str, Any], message: str
) -> None:
    edit_json(checkpoint / "config.json", changes)
    with pytest.raises(UnsupportedCheckpointError) as caught:
        read_checkpoint_config(checkpoint)
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def edit_rank0(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = checkpoint / "rank0.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    path.unlink()
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("transformer.ln_f.weight"), "lacks transformer.ln_f.weight"),
        (lambda tensors: tensors.update({"lm_head.bias": torch.zeros(1)}), "has unknown lm_head.bias"),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(512, 95, dtype=torch.bfloat16)}),
            "lm_head.weight is BF16 [512, 95]; expected BF16 [512, 96]",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(512, 96)}),
            "lm_head.weight is F32 [512, 96]; expected BF16",
        ),
    ],
)
def test_wrong_tensors_are_refused(
    checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    edit_rank0(checkpoint, change)
    with pytest.raises(UnsupportedCheckpointError) as caught:
        LlamaModel(checkpoint, max_seq_len=64)
    assert message in str(caught.value)


def test_missing_and_damaged_rank_files_are_refused(checkpoint: Path) -> None:
    path = checkpoint / "rank0.safetensors"
    content = path.read_bytes()
    for damaged, message in (
        (content[:-1], "its header promises"),
        (content[:5], "found 5 bytes"),
        (b"\xff" * 64, "does not fit"),
        ((4).to_bytes(8, "little") + b"{{{{", "is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "header entry is damaged"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UnsupportedCheckpointError) as caught:
            LlamaModel(checkpoint, max_seq_len=64)
        assert message in str(caught.value)
    path.unlink()
    with pytest.raises(UnsupportedCheckpointError, match=r"rank0.safetensors: no such file"):
        LlamaModel(checkpoint, max_seq_len=64)


def test_safetensors_dtype_and_size_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"whole": torch.zeros(2, dtype=torch.int64)}, path)
    with pytest.raises(SafetensorsError, match="has dtype I64"):
        SafetensorsFile(path).load("whole")
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(SafetensorsError, match=r"has 8 bytes for shape \[3\]"):
        SafetensorsFile(path).load("x")


def test_too_many_positions_and_unknown_dtype_are_refused(checkpoint: Path) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="the model has 131072 positions"):
        LlamaModel(checkpoint, max_seq_len=131073)
    with pytest.raises(ValueError, match="compute_dtype is 'float16'"):
        LlamaModel(checkpoint, max_seq_len=64, compute_dtype="float16")


def test_rope_table_in_the_checkpoint_must_agree(checkpoint: Path) -> None:
    plain = 500000.0 ** (-torch.arange(0, 16, 2) / 16)
    edit_rank0(checkpoint, lambda tensors: tensors.update({"rotary_inv_freq": plain}))
    with pytest.raises(UnsupportedCheckpointError, match="rotary_inv_freq contradicts"):
        LlamaModel(checkpoint, max_seq_len=64)


def shard_embedding(checkpoint: Path, dim: int, edit_json: EditJson) -> None:
    """What `use_parallel_embedding` makes of a tp 2 checkpoint whose embedding is whole on every rank."""
    for rank in (0, 1):
        path = checkpoint / f"rank{rank}.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        name = "transformer.vocab_embedding.weight"
        tensors[name] = tensors[name].chunk(2, dim=dim)[rank].contiguous()
        path.unlink()
        save_file(tensors, path)
    edit_json(checkpoint / "config.json", {"use_parallel_embedding": True, "embedding_sharding_dim": dim})


@pytest.mark.parametrize("dim", [0, 1])
def test_sharded_embedding_is_joined(
    tiny_minitron: Path, tmp_path: Path, edit_json: EditJson, dim: int
) -> None:
    convert_checkpoint(tiny_minitron, tmp_path / "checkpoint", tp_size=2)
    whole = CheckpointReader(tmp_path / "checkpoint", read_checkpoint_config(tmp_path / "checkpoint"))
    expected = whole.embedding().clone()
    shard_embedding(tmp_path / "checkpoint", dim, edit_json)
    sharded = CheckpointReader(tmp_path / "checkpoint", read_checkpoint_config(tmp_path / "checkpoint"))
    assert torch.equal(sharded.embedding(), expected)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2), (2, 2), (4, 1), (1, 3)])
def test_rank_files_are_joined_to_the_same_tensors(
    tiny_minitron: Path, checkpoint: Path, tmp_path: Path, tp_size: int, pp_size: int
) -> None:
    cut = tmp_path / "cut"
    convert_checkpoint(tiny_minitron, cut, tp_size=tp_size, pp_size=pp_size)
    whole, joined = (CheckpointReader(path, read_checkpoint_config(path)) for path in (checkpoint, cut))
    assert torch.equal(whole.embedding(), joined.embedding())
    assert torch.equal(whole.lm_head().weight, joined.lm_head().weight)
    assert torch.equal(whole.final_norm(), joined.final_norm())
    for index in range(4):
        one, other = whole.layer(index), joined.layer(index)
        assert torch.equal(one.input_layernorm, other.input_layernorm)
        assert torch.equal(one.post_layernorm, other.post_layernorm)
        for name in ("qkv", "dense", "fc", "gate", "proj"):
            assert torch.equal(getattr(one, name).weight, getattr(other, name).weight)


def test_tied_head_may_be_left_out(checkpoint: Path, edit_json: EditJson) -> None:
    edit_rank0(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
    edit_json(checkpoint / "config.json", {"tie_word_embeddings": True})
    reader = CheckpointReader(checkpoint, read_checkpoint_config(checkpoint))
    assert torch.equal(reader.lm_head().weight, reader.embedding())


def test_earlier_pipeline_ranks_get_the_extra_layers() -> None:
    assert [len(held) for held in layer_ranges(32, 5)] == [
        len(part) for part in torch.arange(32).tensor_split(5)
    ]
    assert layer_ranges(4, 3) == [range(0, 2), range(2, 3), range(3, 4)]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_stored_dtypes_run(checkpoint: Path, edit_json: EditJson, dtype: str) -> None:
    expected = LlamaModel(checkpoint, max_seq_len=64).last_logits([508, 1, 2, 3])

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()})

    edit_rank0(checkpoint, widen)
    edit_json(checkpoint / "config.json", {"dtype": dtype})
    logits = LlamaModel(checkpoint, max_seq_len=64).last_logits([508, 1, 2, 3])
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
