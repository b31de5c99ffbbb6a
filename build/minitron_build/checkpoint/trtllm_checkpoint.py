"""The TensorRT-LLM checkpoint: `config.json`, `rank{N}.safetensors` and `conversion.json`.

Writes the config that TensorRT-LLM 1.2.1's converter writes, key for key, and reads a checkpoint folder
back strictly. `conversion.json` is ours: which source bytes the ranks were made from and the digest of every
file. It knows nothing of how ranks are filled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping as MappingType
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_build.checkpoint.weight_map import GPUS_PER_NODE, Mapping
from minitron_build.errors import CheckpointError
from minitron_build.source.model_config import ARCHITECTURE, ModelConfig, read_json_object

CONVERSION_NAME = "conversion.json"
COPY_OR_BUILD = "copy the checkpoint again, or build it again with --force"
"""What helps with a broken file of a checkpoint."""
CONVERSION_SCHEMA = 1
MODELOPT_VERSION = "0.47.0"
"""The release whose FP8 export this toolkit reproduces, byte for byte."""


def rank_name(rank: int) -> str:
    """File name of a rank's weights."""
    return f"rank{rank}.safetensors"


def checkpoint_config(config: ModelConfig, mapping: Mapping, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """`config.json` of a checkpoint without quantisation.

    Keys, order and values are those of TensorRT-LLM 1.2.1's converter (LLaMAConfig, then PretrainedConfig).
    `head_size` is written because its absence would mean hidden_size / heads, which is wrong for this family.
    """
    return {
        "mlp_bias": False,
        "attn_bias": False,
        "rotary_base": config.rope_theta,
        "rotary_scaling": None if config.rope_scaling is None else dict(config.rope_scaling),
        "residual_mlp": False,
        "disable_weight_only_quant_plugin": False,
        "moe": _MOE_OFF,
        "remove_duplicated_kv_heads": False,
        "fc_after_embed": False,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "layer_idx_offset": 0,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "output_multiplier_scale": 1.0,
        "has_partial_lora_mask": False,
        "architecture": ARCHITECTURE,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": "silu",
        "logits_dtype": "float32",
        "norm_epsilon": config.rms_norm_eps,
        "runtime_defaults": None,
        "position_embedding_type": "rope_gpt_neox",
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mapping": _mapping_block(mapping),
        "quantization": _NO_QUANTIZATION,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "head_size": config.head_dim,
        "qk_layernorm": False,
        "rotary_embedding_dim": config.head_dim,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def fp8_checkpoint_config(
    config: ModelConfig, mapping: Mapping, *, has_fp8_kv: bool, exclude_modules: Sequence[str]
) -> dict[str, Any]:
    """`config.json` of an FP8 checkpoint, key for key what NVIDIA ModelOpt writes.

    `producer` says whose format it is; logits are float16; `rank` is the last one's, which writes the file.
    """
    rope: dict[str, Any] = {"rotary_base": config.rope_theta}
    if config.rope_scaling is not None:
        rope["rotary_scaling"] = dict(config.rope_scaling)
    return {
        "producer": {"name": "modelopt", "version": MODELOPT_VERSION},
        "architecture": ARCHITECTURE,
        "dtype": "bfloat16",
        "logits_dtype": "float16",
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_size": config.hidden_size,
        "norm_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "head_size": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "position_embedding_type": "rope_gpt_neox",
        "share_embedding_table": False,
        "residual_mlp": False,
        "bias": False,
        "rotary_pct": 1.0,
        "rank": mapping.world_size - 1,
        "decoder": "llama",
        "rmsnorm": True,
        "lm_head_bias": False,
        **rope,
        "mapping": {
            "world_size": mapping.world_size,
            "tp_size": mapping.tp_size,
            "pp_size": mapping.pp_size,
        },
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8" if has_fp8_kv else None,
            "exclude_modules": list(exclude_modules),
        },
    }


def dump_config(config: MappingType[str, Any]) -> str:
    """The text of a checkpoint's `config.json`, formatted as upstream formats it."""
    return json.dumps(config, indent=4)


_MOE_OFF = {
    "num_experts": 0,
    "shared_expert_intermediate_size": 0,
    "top_k": 0,
    "normalization_mode": None,
    "sparse_mixer_epsilon": 0.01,
    "tp_mode": 0,
    "device_limited_n_group": 0,
    "device_limited_topk_group": 0,
    "device_limited_routed_scaling_factor": 1.0,
}

_NO_QUANTIZATION = {
    "quant_algo": None,
    "kv_cache_quant_algo": None,
    "group_size": 128,
    "smoothquant_val": 0.5,
    "clamp_val": None,
    "use_meta_recipe": False,
    "has_zero_point": False,
    "pre_quant_scale": False,
    "exclude_modules": None,
    "mamba_ssm_cache_dtype": None,
}


def _mapping_block(mapping: Mapping) -> dict[str, Any]:
    return {
        "world_size": mapping.world_size,
        "gpus_per_node": GPUS_PER_NODE,
        "cp_size": 1,
        "tp_size": mapping.tp_size,
        "pp_size": mapping.pp_size,
        "moe_tp_size": mapping.tp_size,
        "moe_cluster_size": 1,
        "moe_ep_size": 1,
        "attn_tp_size": -1,
        "attn_cp_size": -1,
        "cp_config": {},
        "enable_attention_dp": False,
        "enable_lm_head_tp_in_adp": False,
    }


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a file must be."""

    sha256: str
    size_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"sha256": self.sha256, "size_bytes": self.size_bytes}

    @classmethod
    def of_bytes(cls, data: bytes) -> FileDigest:
        """Of a small file's content."""
        return cls(hashlib.sha256(data).hexdigest(), len(data))

    @classmethod
    def from_dict(cls, raw: MappingType[str, Any]) -> FileDigest:
        """Inverse of `as_dict`."""
        return cls(str(raw["sha256"]), int(raw["size_bytes"]))


@dataclass(frozen=True, slots=True)
class TrtllmCheckpoint:
    """A whole checkpoint folder.

    Attributes:
        plan_digest: identifies source bytes, mapping and toolkit; equal digests mean equal checkpoints.
        sources: digest of each source file read, by name; of weights it equals the hub's LFS id.
        files: digest of each file of the checkpoint, `conversion.json` itself excepted.
    """

    path: Path
    config: MappingType[str, Any]
    plan_digest: str
    sources: MappingType[str, FileDigest]
    files: MappingType[str, FileDigest]

    @property
    def mapping(self) -> Mapping:
        """Tp x pp of the rank files."""
        block = self.config["mapping"]
        return Mapping(int(block["tp_size"]), int(block["pp_size"]))

    @classmethod
    def load(cls, checkpoint_dir: Path) -> TrtllmCheckpoint:
        """Read a folder that `convert_checkpoint` finished.

        Raises:
            CheckpointError: not such a folder, or a file is missing or has another size.
        """
        record = read_json_object(checkpoint_dir / CONVERSION_NAME, todo=COPY_OR_BUILD)
        if record.get("schema") != CONVERSION_SCHEMA:
            raise CheckpointError(
                f"schema {record.get('schema')!r}",
                expected=str(CONVERSION_SCHEMA),
                where=str(checkpoint_dir / CONVERSION_NAME),
                todo="convert again with this version of the toolkit",
            )
        try:
            sources = {name: FileDigest.from_dict(raw) for name, raw in record["sources"].items()}
            files = {name: FileDigest.from_dict(raw) for name, raw in record["files"].items()}
            digest = str(record["plan_digest"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"a record that cannot be read ({error})",
                where=str(checkpoint_dir / CONVERSION_NAME),
                todo=COPY_OR_BUILD,
            ) from None
        checkpoint = cls(
            checkpoint_dir,
            read_json_object(checkpoint_dir / "config.json", todo=COPY_OR_BUILD),
            digest,
            sources,
            files,
        )
        checkpoint._check_sizes()
        return checkpoint

    def _check_sizes(self) -> None:
        for name, digest in self.files.items():
            path = self.path / name
            found = path.stat().st_size if path.is_file() else None
            if found != digest.size_bytes:
                raise CheckpointError(
                    "missing" if found is None else f"{found} bytes",
                    expected=f"{digest.size_bytes} bytes",
                    where=str(path),
                    todo="convert again with --force",
                )


def dump_conversion(
    plan_digest: str, sources: MappingType[str, FileDigest], files: MappingType[str, FileDigest]
) -> str:
    """The text of `conversion.json`; it holds no times, so equal inputs give equal bytes."""
    record = {
        "schema": CONVERSION_SCHEMA,
        "plan_digest": plan_digest,
        "sources": {name: digest.as_dict() for name, digest in sorted(sources.items())},
        "files": {name: digest.as_dict() for name, digest in sorted(files.items())},
    }
    return json.dumps(record, indent=2) + "\n"
