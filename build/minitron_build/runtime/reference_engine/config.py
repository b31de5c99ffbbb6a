"""Reads config.json of a TensorRT-LLM checkpoint strictly: what this engine does not implement is refused.

It knows the file's fields and nothing of rank files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .quantization import FP8, Quantization

STORED_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Settings that this engine does not implement, each with the only values it may have; absent = not used.
REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "architecture": ("LlamaForCausalLM",),
    "hidden_act": ("silu",),
    "position_embedding_type": ("rope_gpt_neox",),
    "attn_bias": (False,),
    "mlp_bias": (False,),
    "bias": (False,),
    "lm_head_bias": (False,),
    "qk_layernorm": (False,),
    "residual_mlp": (False,),
    "fc_after_embed": (False,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "layer_idx_offset": (0,),
    "embedding_multiplier": (1.0,),
    "attention_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "output_multiplier_scale": (1.0,),
    "rotary_pct": (1.0,),
    "has_partial_lora_mask": (False,),
    "remove_duplicated_kv_heads": (False,),
    "moe.num_experts": (0,),
    "mapping.cp_size": (1,),
    "quantization.quant_algo": (None, FP8),
    "quantization.kv_cache_quant_algo": (None, FP8),
    "quantization.pre_quant_scale": (False,),
    "quantization.has_zero_point": (False,),
    "quantization.use_meta_recipe": (False,),
}
MUST_BE_WRITTEN = ("architecture", "hidden_act", "position_embedding_type")


class UnsupportedCheckpointError(ValueError):
    """The checkpoint cannot be executed by this engine; `str()` is one line."""


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """The llama3 change of RoPE frequencies for long contexts."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if self.factor < 1 or self.high_freq_factor <= self.low_freq_factor:
            raise UnsupportedCheckpointError(
                f"rotary_scaling has factor {self.factor}, low_freq_factor {self.low_freq_factor}, "
                f"high_freq_factor {self.high_freq_factor}; expected factor >= 1 and high above low"
            )


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """The part of config.json that decides what is computed; `head_size` is read, never derived."""

    dtype: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    norm_epsilon: float
    max_position_embeddings: int
    rotary_base: float
    rotary_scaling: Llama3RopeScaling | None
    tp_size: int
    pp_size: int
    use_parallel_embedding: bool
    embedding_sharding_dim: int
    tie_word_embeddings: bool
    quantization: Quantization = field(default_factory=Quantization)

    def __post_init__(self) -> None:
        for name in _WHOLE_NUMBERS:
            if getattr(self, name) < 1:
                raise UnsupportedCheckpointError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.num_attention_heads % self.num_key_value_heads or self.num_attention_heads % self.tp_size:
            raise UnsupportedCheckpointError(
                f"{self.num_attention_heads} heads do not divide into {self.num_key_value_heads} KV heads "
                f"and tp_size {self.tp_size}"
            )
        larger = max(self.num_key_value_heads, self.tp_size)
        if larger % min(self.num_key_value_heads, self.tp_size):
            raise UnsupportedCheckpointError(
                f"{self.num_key_value_heads} KV heads do not fit tp_size {self.tp_size}; expected a multiple"
            )
        if self.intermediate_size % self.tp_size or self.hidden_size % self.tp_size:
            raise UnsupportedCheckpointError(
                f"hidden_size {self.hidden_size} and intermediate_size {self.intermediate_size} do not "
                f"divide by tp_size {self.tp_size}"
            )
        if self.pp_size > self.num_hidden_layers:
            raise UnsupportedCheckpointError(
                f"pp_size {self.pp_size} exceeds {self.num_hidden_layers} layers"
            )
        if self.head_size % 2:
            raise UnsupportedCheckpointError(f"head_size is {self.head_size}; RoPE needs an even number")

    @property
    def kv_heads_per_rank(self) -> int:
        """KV heads each tensor-parallel rank holds; at least one, then duplicated."""
        return max(self.num_key_value_heads // self.tp_size, 1)


_WHOLE_NUMBERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_size",
    "max_position_embeddings",
    "tp_size",
    "pp_size",
)


def read_checkpoint_config(checkpoint_dir: Path) -> CheckpointConfig:
    """Read config.json and refuse whatever this engine does not implement.

    Raises:
        UnsupportedCheckpointError: the file is missing, not JSON, incomplete, or asks for something else.
    """
    path = checkpoint_dir / "config.json"
    raw = _read_json(path)
    try:
        _check_required_values(raw)
        return _config_from(raw)
    except UnsupportedCheckpointError as error:
        raise UnsupportedCheckpointError(f"{path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UnsupportedCheckpointError(
            f"{path}: no such file; expected a TensorRT-LLM checkpoint (config.json, rank0.safetensors)"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedCheckpointError(
            f"{path}: not JSON ({error}); convert the checkpoint again"
        ) from error
    if not isinstance(raw, dict):
        raise UnsupportedCheckpointError(f"{path}: found a JSON {type(raw).__name__}; expected an object")
    if "architecture" not in raw and "architectures" in raw:
        raise UnsupportedCheckpointError(f"{path}: this is a Hugging Face checkpoint; convert it first")
    return raw


_ABSENT = object()


def _lookup(raw: dict[str, Any], dotted: str) -> Any:
    value: Any = raw
    for key in dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            return _ABSENT
        value = value[key]
    return value


def _check_required_values(raw: dict[str, Any]) -> None:
    for dotted, allowed in REQUIRED_VALUES.items():
        value = _lookup(raw, dotted)
        if value is _ABSENT:
            if dotted in MUST_BE_WRITTEN:
                raise UnsupportedCheckpointError(f"{dotted} is missing; expected {allowed[0]!r}")
        elif value not in allowed:
            raise UnsupportedCheckpointError(
                f"{dotted} is {value!r}; this engine implements {' and '.join(map(repr, allowed))} only"
            )


def _config_from(raw: dict[str, Any]) -> CheckpointConfig:
    dtype = _typed(raw, "dtype", str)
    if dtype not in STORED_DTYPES:
        raise UnsupportedCheckpointError(f"dtype is {dtype!r}; expected one of {', '.join(STORED_DTYPES)}")
    head_size = _typed(raw, "head_size", int)
    rotary_dim = raw.get("rotary_embedding_dim", head_size)
    if rotary_dim != head_size:
        raise UnsupportedCheckpointError(
            f"rotary_embedding_dim is {rotary_dim}; expected head_size {head_size}"
        )
    mapping = _typed(raw, "mapping", dict)
    tp_size, pp_size = _typed(mapping, "tp_size", int), _typed(mapping, "pp_size", int)
    if mapping.get("world_size", tp_size * pp_size) != tp_size * pp_size:
        raise UnsupportedCheckpointError(
            f"mapping has world_size {mapping['world_size']}; expected tp_size {tp_size} x pp_size {pp_size}"
        )
    return CheckpointConfig(
        dtype=dtype,
        vocab_size=_typed(raw, "vocab_size", int),
        hidden_size=_typed(raw, "hidden_size", int),
        intermediate_size=_typed(raw, "intermediate_size", int),
        num_hidden_layers=_typed(raw, "num_hidden_layers", int),
        num_attention_heads=_typed(raw, "num_attention_heads", int),
        num_key_value_heads=_typed(raw, "num_key_value_heads", int),
        head_size=head_size,
        norm_epsilon=float(_typed(raw, "norm_epsilon", (int, float))),
        max_position_embeddings=_typed(raw, "max_position_embeddings", int),
        rotary_base=float(_typed(raw, "rotary_base", (int, float))),
        rotary_scaling=_rotary_scaling(raw),
        tp_size=tp_size,
        pp_size=pp_size,
        use_parallel_embedding=bool(raw.get("use_parallel_embedding", False)),
        embedding_sharding_dim=_sharding_dim(raw),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", raw.get("share_embedding_table", False))),
        quantization=_quantization(raw),
    )


def _quantization(raw: dict[str, Any]) -> Quantization:
    block = raw.get("quantization", {})
    if not isinstance(block, dict):
        raise UnsupportedCheckpointError(f"quantization is {block!r}; expected an object")
    patterns = block.get("exclude_modules")
    if patterns is not None and not (
        isinstance(patterns, list) and all(isinstance(one, str) for one in patterns)
    ):
        raise UnsupportedCheckpointError(
            f"quantization.exclude_modules is {patterns!r}; expected a list of module names, or null"
        )
    return Quantization(
        quant_algo=block.get("quant_algo"),
        kv_cache_quant_algo=block.get("kv_cache_quant_algo"),
        exclude_modules=None if patterns is None else tuple(patterns),
    )


def _typed(raw: dict[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    """A required value of the right type; a bool is not a number."""
    if key not in raw:
        raise UnsupportedCheckpointError(f"{key} is missing; convert the checkpoint again")
    value = raw[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = kind.__name__ if isinstance(kind, type) else " or ".join(one.__name__ for one in kind)
        raise UnsupportedCheckpointError(f"{key} is {value!r}; expected {names}")
    return value


def _sharding_dim(raw: dict[str, Any]) -> int:
    dim = raw.get("embedding_sharding_dim", 0)
    if dim not in (0, 1):
        raise UnsupportedCheckpointError(f"embedding_sharding_dim is {dim!r}; expected 0 or 1")
    return int(dim)


def _rotary_scaling(raw: dict[str, Any]) -> Llama3RopeScaling | None:
    if "rotary_scaling" not in raw:
        raise UnsupportedCheckpointError("rotary_scaling is missing; expected an object, or null for none")
    scaling = raw["rotary_scaling"]
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        raise UnsupportedCheckpointError(f"rotary_scaling is {scaling!r}; expected an object or null")
    rope_type = scaling.get("rope_type", scaling.get("type"))
    if rope_type != "llama3":
        raise UnsupportedCheckpointError(
            f"rotary_scaling has rope_type {rope_type!r}; this engine implements llama3"
        )
    return Llama3RopeScaling(
        factor=float(_typed(scaling, "factor", (int, float))),
        low_freq_factor=float(_typed(scaling, "low_freq_factor", (int, float))),
        high_freq_factor=float(_typed(scaling, "high_freq_factor", (int, float))),
        original_max_position_embeddings=_typed(scaling, "original_max_position_embeddings", int),
    )
