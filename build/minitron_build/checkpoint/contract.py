"""What TensorRT-LLM 1.2.1's loader demands of a checkpoint: every tensor of every rank, its dtype and shape.

Held against the headers of the rank files before a GPU is touched, because the loader itself finds a missing
scale only after minutes, and never says which file. It knows `config.json` and layouts, no tensor's values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Mapping as MappingType
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from minitron_build.checkpoint.trtllm_checkpoint import COPY_OR_BUILD, rank_name
from minitron_build.checkpoint.weight_map import Mapping as RankMapping
from minitron_build.checkpoint.weight_map import rank_tensors
from minitron_build.errors import CheckpointError, PlanError
from minitron_build.source.model_config import ARCHITECTURE, ModelConfig, read_json_object
from minitron_build.source.safetensors_file import read_header

STORED_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
FP8_DTYPES = ("F8_E4M3", "I8")
"""Bytes of FP8 that a writer without the dtype called int8 are accepted by the loader."""
QUANT_ALGOS = (None, "FP8")
LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
DEFAULT_EXCLUDED = ("*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding")
KV_SCALE = "attention.kv_cache_scaling_factor"
KV_SCALE_PARTS = ("attention.k_cache_scaling_factor", "attention.v_cache_scaling_factor")
OPTIONAL_KV_SCALES = (*KV_SCALE_PARTS, "attention.kv_cache_rcp_scaling_factor")
_LAYER = "transformer.layers.{}."


@dataclass(frozen=True, slots=True)
class TensorNeed:
    """What a tensor must be: one of `dtypes` (safetensors' names), of exactly `shape`."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtypes[0]} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """What a checkpoint that passed is.

    Attributes:
        num_tensors: of all ranks together.
        weights_bytes: bytes of the rank files.
        unread: tensors that the loader does not read, by `rank file: name`; it warns of them.
        exclude_modules: patterns of modules that stay bf16 in an FP8 checkpoint, as its config says.
    """

    architecture: str
    dtype: str
    logits_dtype: str
    quant_algo: str | None
    kv_cache_quant_algo: str | None
    model: ModelConfig
    mapping: RankMapping
    num_tensors: int
    weights_bytes: int
    unread: tuple[str, ...]
    exclude_modules: tuple[str, ...] = ()


def check_tensors(checkpoint_dir: Path) -> CheckpointFacts:
    """Hold every rank file's header against what the loader will demand.

    Raises:
        CheckpointError: config.json lacks something, a rank file is missing or one too many, or a tensor is
            missing or has another dtype or shape; names file and tensor.
    """
    path = checkpoint_dir / "config.json"
    config = read_json_object(path, todo=COPY_OR_BUILD)
    try:
        model, mapping = read_model(config), _read_mapping(config)
        _check_quantization(config)
        wanted = tuple(_rank_needs(config, model, mapping))
    except (CheckpointError, PlanError) as error:
        raise CheckpointError(
            error.found, expected=error.expected, where=error.where or str(path), todo=error.todo
        ) from None
    _check_rank_names(checkpoint_dir, mapping)
    unread: list[str] = []
    num_tensors = weights_bytes = 0
    for rank, (needs, optional) in enumerate(wanted):
        header = read_header(checkpoint_dir / rank_name(rank), todo=COPY_OR_BUILD)
        found = {tensor.name: TensorNeed((tensor.dtype,), tensor.shape) for tensor in header.tensors}
        _check_rank(checkpoint_dir / rank_name(rank), found, needs, optional)
        unread += [f"{rank_name(rank)}: {name}" for name in found.keys() - needs.keys() - optional.keys()]
        num_tensors, weights_bytes = num_tensors + len(found), weights_bytes + header.file_bytes
    quantization = config["quantization"]
    return CheckpointFacts(
        architecture=ARCHITECTURE,
        dtype=config["dtype"],
        logits_dtype=config.get("logits_dtype", "float32"),
        quant_algo=quantization.get("quant_algo"),
        kv_cache_quant_algo=quantization.get("kv_cache_quant_algo"),
        model=model,
        mapping=mapping,
        num_tensors=num_tensors,
        weights_bytes=weights_bytes,
        unread=tuple(sorted(unread)),
        exclude_modules=tuple(quantization.get("exclude_modules") or ()),
    )


def read_model(config: MappingType[str, Any]) -> ModelConfig:
    """The model that a TensorRT-LLM checkpoint's `config.json` describes.

    `head_size` must be written: without it TensorRT-LLM takes hidden_size / heads, wrong for this family.

    Raises:
        CheckpointError: a field is missing, has the wrong type, or asks for what this toolkit has not.
    """
    if config.get("architecture") != ARCHITECTURE:
        raise CheckpointError(
            f"architecture is {config.get('architecture')!r}",
            expected=repr(ARCHITECTURE),
            todo="is this a TensorRT-LLM checkpoint of the Llama-3.1-Minitron family?",
        )
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise CheckpointError(
                f"{name} is {config[name]!r}", expected=repr(value), todo="not supported by this toolkit"
            )
    dtype = _field(config, "dtype", str)
    if dtype not in STORED_DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}", expected=" or ".join(STORED_DTYPES))
    return ModelConfig(
        **{name: _field(config, name, int) for name in _COUNTS},
        head_dim=_field(config, "head_size", int),
        rms_norm_eps=float(_field(config, "norm_epsilon", (int, float))),
        rope_theta=float(_field(config, "rotary_base", (int, float))),
        rope_scaling=config.get("rotary_scaling"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        dtype=dtype,
        bos_token_id=None,
        eos_token_ids=(),
    )


_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "position_embedding_type": "rope_gpt_neox",
    "attn_bias": False,
    "mlp_bias": False,
    "bias": False,
    "lm_head_bias": False,
    "qk_layernorm": False,
    "residual_mlp": False,
    "embedding_sharding_dim": 0,
}
"""Settings with one value that this family has; absent means not used."""

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def _field(config: MappingType[str, Any], name: str, kinds: type | tuple[type, ...]) -> Any:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, kinds):
        found = f"{name} is {value!r}" if name in config else f"{name} is missing"
        kind = kinds.__name__ if isinstance(kinds, type) else "float"
        raise CheckpointError(found, expected=f"a value of type {kind}")
    return value


def _read_mapping(config: MappingType[str, Any]) -> RankMapping:
    block = config.get("mapping")
    if not isinstance(block, Mapping):
        raise CheckpointError("mapping is missing", expected="an object with world_size, tp_size and pp_size")
    mapping = RankMapping(_field(block, "tp_size", int), _field(block, "pp_size", int))
    world_size = _field(block, "world_size", int)
    if block.get("cp_size", 1) != 1 or world_size != mapping.world_size:
        raise CheckpointError(
            f"mapping has world_size {world_size} and cp_size {block.get('cp_size', 1)}",
            expected=f"world_size {mapping.world_size}, which is tp_size x pp_size, and cp_size 1",
        )
    return mapping


def _check_quantization(config: MappingType[str, Any]) -> None:
    block = config.get("quantization")
    if not isinstance(block, Mapping):
        raise CheckpointError("quantization is missing", expected="an object with quant_algo")
    for name in ("quant_algo", "kv_cache_quant_algo"):
        if block.get(name) not in QUANT_ALGOS:
            raise CheckpointError(f"quantization.{name} is {block[name]!r}", expected="null or 'FP8'")


def _rank_needs(
    config: MappingType[str, Any], model: ModelConfig, mapping: RankMapping
) -> Iterator[tuple[dict[str, TensorNeed], dict[str, TensorNeed]]]:
    """For each rank what it must hold and what it may hold."""
    needs: list[dict[str, TensorNeed]] = [{} for _ in range(mapping.world_size)]
    dtype = STORED_DTYPES[config["dtype"]]
    sharded = bool(config.get("use_parallel_embedding", False))
    for tensor in rank_tensors(model, mapping, shard_embedding=sharded):
        module = tensor.name.removesuffix(".weight")
        is_fp8 = _is_quantized(module, config["quantization"])
        needs[tensor.rank][tensor.name] = TensorNeed(FP8_DTYPES if is_fp8 else (dtype,), tensor.shape)
        if is_fp8:
            for scale in ("activation_scaling_factor", "weights_scaling_factor"):
                needs[tensor.rank][f"{module}.{scale}"] = _SCALAR
    for rank, need in enumerate(needs):
        layers = range(len(mapping.layers_of(rank // mapping.tp_size, model.num_hidden_layers)))
        if config["quantization"].get("kv_cache_quant_algo") == "FP8":
            need.update({_LAYER.format(layer) + KV_SCALE: _SCALAR for layer in layers})
        scales = {_LAYER.format(layer) + name: _SCALAR for layer in layers for name in OPTIONAL_KV_SCALES}
        yield need, scales | _rope_buffers(model)


_SCALAR = TensorNeed(("F32",), (1,))


def _is_quantized(module: str, quantization: MappingType[str, Any]) -> bool:
    """Whether a linear layer's weight is FP8; a given list of exclusions replaces the default one."""
    if quantization.get("quant_algo") != "FP8" or not module.endswith((*LINEARS, "lm_head")):
        return False
    patterns = quantization.get("exclude_modules")
    patterns = DEFAULT_EXCLUDED if patterns is None else patterns
    return not any(fnmatchcase(module, pattern) for pattern in patterns)


def _rope_buffers(model: ModelConfig) -> dict[str, TensorNeed]:
    """Tables that upstream's converter writes and the loader does not need: the engine computes its own."""
    positions, rotary = model.max_position_embeddings, model.head_dim
    return {
        "embed_positions": TensorNeed(("F32",), (1, positions, rotary)),
        "rotary_inv_freq": TensorNeed(("F32",), (rotary // 2,)),
        "embed_positions_for_gpt_attention": TensorNeed(("F32",), (1, positions * rotary)),
    }


def _check_rank_names(checkpoint_dir: Path, mapping: RankMapping) -> None:
    wanted = {rank_name(rank) for rank in range(mapping.world_size)}
    found = {path.name for path in checkpoint_dir.glob("rank*.safetensors")}
    wrong = sorted(wanted ^ found)
    if wrong:
        raise CheckpointError(
            f"{wrong[0]} is {'missing' if wrong[0] in wanted else 'of no rank'}",
            expected=f"{mapping.world_size} rank files (tp {mapping.tp_size} x pp {mapping.pp_size})",
            where=str(checkpoint_dir),
            todo="copy the whole checkpoint, or convert it again",
        )


def _check_rank(
    path: Path,
    found: Mapping[str, TensorNeed],
    needs: Mapping[str, TensorNeed],
    optional: Mapping[str, TensorNeed],
) -> None:
    for name in sorted(needs.keys() - found.keys()):
        if not _is_merged(name, found) and not _is_shared(name, found):
            raise _wrong(path, name, "missing", needs[name])
    for name, need in (*needs.items(), *optional.items()):
        tensor = found.get(name)
        if tensor is not None and (tensor.dtypes[0] not in need.dtypes or tensor.shape != need.shape):
            raise _wrong(path, name, str(tensor), need)


def _is_merged(name: str, found: Mapping[str, TensorNeed]) -> bool:
    """Separate key and value scales, which the loader merges."""
    prefix = name.removesuffix(KV_SCALE)
    return prefix != name and all(prefix + part in found for part in KV_SCALE_PARTS)


def _is_shared(name: str, found: Mapping[str, TensorNeed]) -> bool:
    """An lm_head that the loader takes from the embedding of the same rank."""
    return name == "lm_head.weight" and "transformer.vocab_embedding.weight" in found


def _wrong(path: Path, name: str, what: str, need: TensorNeed) -> CheckpointError:
    todo = "convert the checkpoint again with --force"
    return CheckpointError(f"{name} is {what}", expected=str(need), where=str(path), todo=todo)
