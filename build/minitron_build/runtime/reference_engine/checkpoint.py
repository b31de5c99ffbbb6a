"""Reads a TensorRT-LLM checkpoint: config.json strictly, and rank files joined back into whole tensors.

It knows the layout (rank = pp_rank * tp_size + tp_rank, fused qkv per rank, duplicated KV heads, padded
vocabulary, layer numbers local to a pipeline rank) and nothing of how the model is computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .safetensors_file import SafetensorsError, SafetensorsFile

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
    "quantization.quant_algo": (None,),
    "quantization.kv_cache_quant_algo": (None,),
    "quantization.pre_quant_scale": (False,),
}
MUST_BE_WRITTEN = ("architecture", "hidden_act", "position_embedding_type")
# Tables TensorRT-LLM may carry in a checkpoint; this engine computes its own from rotary_base.
ROPE_BUFFERS = frozenset({"embed_positions", "rotary_inv_freq", "embed_positions_for_gpt_attention"})


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
        _check_quantization(raw)
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


def _check_quantization(raw: dict[str, Any]) -> None:
    algorithm = _lookup(raw, "quantization.quant_algo")
    kv_algorithm = _lookup(raw, "quantization.kv_cache_quant_algo")
    if algorithm not in (_ABSENT, None) or kv_algorithm not in (_ABSENT, None):
        found = [str(name) for name in (algorithm, kv_algorithm) if name not in (_ABSENT, None)]
        raise UnsupportedCheckpointError(
            f"quantized checkpoint ({', '.join(found)}): FP8 checkpoints are not executed by this version "
            "of the reference engine; give it the bf16 checkpoint"
        )


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
                f"{dotted} is {value!r}; this engine implements {allowed[0]!r} only"
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


def layer_ranges(num_layers: int, pp_size: int) -> list[range]:
    """Which layers each pipeline rank holds: as `torch.tensor_split`, earlier ranks get the extra ones."""
    base, extra = divmod(num_layers, pp_size)
    starts = [rank * base + min(rank, extra) for rank in range(pp_size + 1)]
    return [range(starts[rank], starts[rank + 1]) for rank in range(pp_size)]


class CheckpointReader:
    """Whole tensors out of rank files, one at a time, so that memory holds little beside the result.

    Args:
        checkpoint_dir: a TensorRT-LLM checkpoint.
        config: its config, from `read_checkpoint_config`.

    Raises:
        UnsupportedCheckpointError: a rank file is missing or damaged, or a tensor is missing or extra.
    """

    def __init__(self, checkpoint_dir: Path, config: CheckpointConfig) -> None:
        self.config = config
        self._dir = checkpoint_dir
        self._ranks = [self._open(rank) for rank in range(config.tp_size * config.pp_size)]
        for rank, file in enumerate(self._ranks):
            self._check_tensors(rank, file)

    def _open(self, rank: int) -> SafetensorsFile:
        path = self._dir / f"rank{rank}.safetensors"
        if not path.is_file():
            world_size = self.config.tp_size * self.config.pp_size
            raise UnsupportedCheckpointError(
                f"{path}: no such file; the checkpoint's mapping has {world_size} ranks"
            )
        try:
            return SafetensorsFile(path)
        except SafetensorsError as error:
            raise UnsupportedCheckpointError(str(error)) from error

    def _check_tensors(self, rank: int, file: SafetensorsFile) -> None:
        expected = dict(self._expected_shapes(rank))
        missing = sorted(expected.keys() - file.names())
        extra = sorted(file.names() - expected.keys() - ROPE_BUFFERS)
        if missing or extra:
            parts = [
                f"{what} {', '.join(names[:3])}{'…' if len(names) > 3 else ''}"
                for what, names in (("lacks", missing), ("has unknown", extra))
                if names
            ]
            raise UnsupportedCheckpointError(f"{file.path}: {'; '.join(parts)}; convert the checkpoint again")
        dtype = STORED_DTYPES[self.config.dtype]
        for name, shape in expected.items():
            if file.shape(name) != shape or file.dtype(name) != dtype:
                raise UnsupportedCheckpointError(
                    f"{file.path}: {name} is {file.dtype(name)} {list(file.shape(name))}; "
                    f"expected {dtype} {list(shape)}"
                )

    def _expected_shapes(self, rank: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor one rank file must hold, and its shape."""
        config, pp_rank = self.config, rank // self.config.tp_size
        heads, tp_size, hidden = (
            config.num_attention_heads // config.tp_size,
            config.tp_size,
            config.hidden_size,
        )
        padded_vocab_rows = -(-config.vocab_size // tp_size)
        if pp_rank == 0:
            yield "transformer.vocab_embedding.weight", self._embedding_shape(padded_vocab_rows)
        for layer in range(len(layer_ranges(config.num_hidden_layers, config.pp_size)[pp_rank])):
            prefix = f"transformer.layers.{layer}."
            qkv_rows = (heads + 2 * config.kv_heads_per_rank) * config.head_size
            yield prefix + "input_layernorm.weight", (hidden,)
            yield prefix + "attention.qkv.weight", (qkv_rows, hidden)
            yield prefix + "attention.dense.weight", (hidden, heads * config.head_size)
            yield prefix + "post_layernorm.weight", (hidden,)
            yield prefix + "mlp.fc.weight", (config.intermediate_size // tp_size, hidden)
            yield prefix + "mlp.gate.weight", (config.intermediate_size // tp_size, hidden)
            yield prefix + "mlp.proj.weight", (hidden, config.intermediate_size // tp_size)
        if pp_rank == config.pp_size - 1:
            yield "transformer.ln_f.weight", (hidden,)
            if not self._is_tied_head_left_out(rank):
                yield "lm_head.weight", (padded_vocab_rows, hidden)

    def _is_tied_head_left_out(self, rank: int) -> bool:
        return self.config.tie_word_embeddings and "lm_head.weight" not in self._ranks[rank].names()

    def _embedding_shape(self, padded_vocab_rows: int) -> tuple[int, int]:
        config = self.config
        if not config.use_parallel_embedding or config.tp_size == 1:
            return config.vocab_size, config.hidden_size
        if config.embedding_sharding_dim == 1:
            return config.vocab_size, config.hidden_size // config.tp_size
        return padded_vocab_rows, config.hidden_size

    def embedding(self) -> torch.Tensor:
        """The token embedding, [vocab_size, hidden_size]."""
        name, config = "transformer.vocab_embedding.weight", self.config
        if not config.use_parallel_embedding or config.tp_size == 1:
            return self._ranks[0].load(name)
        parts = [self._ranks[rank].load(name) for rank in range(config.tp_size)]
        return torch.cat(parts, dim=config.embedding_sharding_dim)[: config.vocab_size]

    def lm_head(self) -> torch.Tensor:
        """The output projection, [vocab_size, hidden_size]; the embedding where the two are tied."""
        first = self.config.tp_size * (self.config.pp_size - 1)
        if self._is_tied_head_left_out(first):
            return self.embedding()
        return self._joined(self.config.pp_size - 1, "lm_head.weight", torch.cat)[: self.config.vocab_size]

    def final_norm(self) -> torch.Tensor:
        """The last RMSNorm's weight, [hidden_size]."""
        return self._ranks[-1].load("transformer.ln_f.weight")

    def stored_inverse_frequencies(self) -> torch.Tensor | None:
        """The RoPE frequencies [head_size / 2] the checkpoint carries, if it carries any."""
        name = "rotary_inv_freq"
        return self._ranks[0].load(name).reshape(-1) if name in self._ranks[0].names() else None

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of one layer under their TensorRT-LLM names, whole; qkv is [q; k; v] of all heads."""
        ranges = layer_ranges(self.config.num_hidden_layers, self.config.pp_size)
        pp_rank = next(rank for rank, held in enumerate(ranges) if index in held)
        prefix = f"transformer.layers.{index - ranges[pp_rank].start}."
        first = self._ranks[pp_rank * self.config.tp_size]
        tensors = {
            name: first.load(prefix + name) for name in ("input_layernorm.weight", "post_layernorm.weight")
        }
        for name, join in _LAYER_JOINS.items():
            tensors[name] = self._joined(pp_rank, prefix + name, join)
        tensors["attention.qkv.weight"] = self._joined(
            pp_rank, prefix + "attention.qkv.weight", self._join_qkv
        )
        return tensors

    def _joined(
        self, pp_rank: int, name: str, join: Callable[[list[torch.Tensor]], torch.Tensor]
    ) -> torch.Tensor:
        tp_size = self.config.tp_size
        parts = [self._ranks[pp_rank * tp_size + tp_rank].load(name) for tp_rank in range(tp_size)]
        return parts[0] if tp_size == 1 else join(parts)

    def _join_qkv(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Undo the fusion per rank, and take each duplicated KV head once."""
        config = self.config
        q_rows = config.num_attention_heads // config.tp_size * config.head_size
        kv_rows = config.kv_heads_per_rank * config.head_size
        split = [torch.split(part, [q_rows, kv_rows, kv_rows]) for part in parts]
        copies = max(config.tp_size // config.num_key_value_heads, 1)
        keys, values = ([part[which] for part in split[::copies]] for which in (1, 2))
        return torch.cat([*(part[0] for part in split), *keys, *values])


_LAYER_JOINS: dict[str, Callable[[list[torch.Tensor]], torch.Tensor]] = {
    "attention.dense.weight": lambda parts: torch.cat(parts, dim=1),
    "mlp.fc.weight": torch.cat,
    "mlp.gate.weight": torch.cat,
    "mlp.proj.weight": lambda parts: torch.cat(parts, dim=1),
}
