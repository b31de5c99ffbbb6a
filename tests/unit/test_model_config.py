"""`config.json` is read strictly, in both transformers styles, and refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron_build.errors import CheckpointError
from minitron_build.source.model_config import ModelConfig

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture
def raw(tiny_minitron: Path) -> dict[str, Any]:
    value = json.loads((tiny_minitron / "config.json").read_text())
    assert isinstance(value, dict)
    return value


def read(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    merged = {**raw, **changes}
    return ModelConfig.from_dict({key: value for key, value in merged.items() if value is not ...})


def test_head_dim_is_read_not_derived(raw: dict[str, Any]) -> None:
    config = read(raw)
    assert (config.head_dim, config.hidden_size // config.num_attention_heads) == (16, 12)
    assert config.q_size == 128


def test_head_dim_of_configs_older_than_the_field(raw: dict[str, Any]) -> None:
    assert read(raw, head_dim=...).head_dim == 12
    with pytest.raises(CheckpointError, match="head_dim is missing"):
        read(raw, head_dim=None, hidden_size=97)


def test_transformers_5_style_equals_4_style(raw: dict[str, Any]) -> None:
    parameters = {**LLAMA3, "rope_type": "llama3", "rope_theta": 500000.0}
    new = read(
        raw, rope_theta=..., rope_scaling=..., torch_dtype=..., dtype="bfloat16", rope_parameters=parameters
    )
    assert new == read(raw)


def test_older_type_key_equals_rope_type(raw: dict[str, Any]) -> None:
    assert read(raw, rope_scaling={**LLAMA3, "type": "llama3"}) == read(raw)


def test_plain_rope_is_read_and_pointed_out(raw: dict[str, Any]) -> None:
    for block in (None, {"rope_type": "default"}, ...):
        config = read(raw, rope_scaling=block)
        assert config.rope_scaling is None
        assert "no RoPE scaling" in config.warnings[0]


def test_eos_may_be_a_list_and_generation_config_wins(raw: dict[str, Any]) -> None:
    assert read(raw, eos_token_id=[509, 510, 509]).eos_token_ids == (509, 510)
    assert ModelConfig.from_dict(raw, {"eos_token_id": 511}).eos_token_ids == (511,)
    with pytest.raises(CheckpointError, match="eos_token_id 99999 is outside the vocabulary of 512"):
        ModelConfig.from_dict({**raw, "eos_token_id": 99999}, {"eos_token_id": 511})


def test_parameters_of_the_real_shape() -> None:
    path = Path(__file__).parents[1] / "golden" / "data" / "width_base_config.json"
    assert ModelConfig.from_dict(json.loads(path.read_text())).num_parameters == 4_512_746_496


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["NemotronForCausalLM"]}, "architectures is .*Nemotron.*expected"),
    ({"architectures": ...}, "architectures is None"),
    ({"model_type": "mistral"}, "model_type is 'mistral'"),
    ({"hidden_act": "relu2"}, "hidden_act is 'relu2'; expected 'silu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"sliding_window": 4096}, "sliding_window is 4096"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantised already .*'fp8'"),
    ({"rope_theta": ...}, "no RoPE base"),
    ({"rope_scaling": {**LLAMA3, "rope_type": "yarn"}}, "RoPE type 'yarn'; expected 'default' or 'llama3'"),
    ({"rope_scaling": {**LLAMA3}}, "RoPE type None"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor is missing"),
    ({"rope_scaling": {**LLAMA3, "factor": 0, "rope_type": "llama3"}}, "rope_scaling.factor is 0"),
    (
        {"rope_scaling": {**LLAMA3, "rope_type": "llama3", "type": "linear"}},
        "type 'linear' and rope_type 'llama3'",
    ),
    ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; expected an object"),
    ({"rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 10000.0}}, "disagree"),
    ({"num_key_value_heads": ...}, "num_key_value_heads is missing"),
    ({"num_key_value_heads": 3}, "not a multiple"),
    ({"vocab_size": ...}, "vocab_size is missing"),
    ({"vocab_size": "512"}, "vocab_size is '512'; expected a value of type int"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"rms_norm_eps": ...}, "rms_norm_eps is missing"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
    ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is float8_e4m3fn"),
    ({"torch_dtype": ...}, "torch_dtype is missing"),
    ({"eos_token_id": ...}, "eos_token_id is None"),
    ({"eos_token_id": 512}, "outside the vocabulary"),
    ({"eos_token_id": [True]}, r"eos_token_id is \[True\]"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused_in_one_line(raw: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(raw, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "a JSON list; expected an object")])
def test_broken_file_names_itself(tiny_copy: Path, text: str, message: str) -> None:
    (tiny_copy / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelConfig.read(tiny_copy)
    assert "config.json" in str(caught.value)
