"""A Hugging Face checkpoint in the words of a TensorRT-LLM one, tensor by tensor from memory-mapped shards.

The reference engine reads the source through this as it reads a converted checkpoint: the same methods, the
same names, qkv fused, nothing rounded. It knows both vocabularies through the weight map, and no arithmetic.
"""

from __future__ import annotations

from pathlib import Path

import torch

from minitron_build.checkpoint.weight_map import WEIGHT_MAP, Stage
from minitron_build.runtime.reference_engine.checkpoint import StoredLayer, StoredLinear
from minitron_build.runtime.reference_engine.config import CheckpointConfig, Llama3RopeScaling
from minitron_build.runtime.reference_engine.safetensors_file import SafetensorsFile
from minitron_build.source.hf_checkpoint import HfCheckpoint
from minitron_build.source.model_config import ModelConfig

_LAYER_PREFIX = "transformer.layers.{}."
_LAYER_SOURCES = {
    rule.name.removeprefix(_LAYER_PREFIX): tuple(template for template, _ in rule.sources)
    for rule in WEIGHT_MAP
    if rule.stage is Stage.LAYER
}


class HfReader:
    """Whole tensors of an HF checkpoint under TensorRT-LLM's names.

    Args:
        hf_dir: the folder.

    Raises:
        CheckpointError: the folder is not a checkpoint of this family.
    """

    def __init__(self, hf_dir: Path) -> None:
        self._checkpoint = HfCheckpoint.open(hf_dir)
        self.config = engine_config(self._checkpoint.config)
        self._files = {shard.path: SafetensorsFile(shard.path) for shard in self._checkpoint.shards}

    def _load(self, hf_name: str) -> torch.Tensor:
        shard, _ = self._checkpoint.tensors[hf_name]
        return self._files[shard.path].load(hf_name)

    def embedding(self) -> torch.Tensor:
        """The token embedding, [vocab_size, hidden_size]."""
        return self._load("model.embed_tokens.weight")

    def lm_head(self) -> StoredLinear:
        """The output projection, [vocab_size, hidden_size]; the embedding where the two are tied."""
        is_tied = self.config.tie_word_embeddings
        return StoredLinear(self.embedding() if is_tied else self._load("lm_head.weight"))

    def final_norm(self) -> torch.Tensor:
        """The last RMSNorm's weight, [hidden_size]."""
        return self._load("model.norm.weight")

    def layer(self, index: int) -> StoredLayer:
        """The tensors of one layer; qkv is [q; k; v] of all heads."""
        return StoredLayer(
            input_layernorm=self._joined("input_layernorm", index),
            qkv=StoredLinear(self._joined("attention.qkv", index)),
            dense=StoredLinear(self._joined("attention.dense", index)),
            post_layernorm=self._joined("post_layernorm", index),
            fc=StoredLinear(self._joined("mlp.fc", index)),
            gate=StoredLinear(self._joined("mlp.gate", index)),
            proj=StoredLinear(self._joined("mlp.proj", index)),
        )

    def release(self) -> None:
        """Give the pages of the shards back."""
        for file in self._files.values():
            file.release()

    def _joined(self, name: str, index: int) -> torch.Tensor:
        parts = [self._load(template.format(index)) for template in _LAYER_SOURCES[f"{name}.weight"]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def engine_config(config: ModelConfig) -> CheckpointConfig:
    """The reference engine's description of an HF model."""
    scaling = config.rope_scaling
    return CheckpointConfig(
        dtype=config.dtype,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        norm_epsilon=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        rotary_base=config.rope_theta,
        rotary_scaling=None
        if scaling is None
        else Llama3RopeScaling(
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
        ),
        tp_size=1,
        pp_size=1,
        use_parallel_embedding=False,
        embedding_sharding_dim=0,
        tie_word_embeddings=config.tie_word_embeddings,
    )
