"""Which modules of a checkpoint are FP8, as TensorRT-LLM reads `quantization` in config.json.

It knows names and patterns, no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

FP8 = "FP8"
# What TensorRT-LLM 1.2.1 leaves unquantised when the config has no list; any list, an empty one too, replaces
# it.
DEFAULT_EXCLUDED = (
    "*lm_head",
    "*router",
    "*vocab_embedding",
    "*position_embedding",
    "*block_embedding",
    "*shared_expert_gate",
)


@dataclass(frozen=True, slots=True)
class Quantization:
    """The part of `quantization` that decides what is computed."""

    quant_algo: str | None = None
    """FP8 means the linear layers that no pattern excludes."""
    kv_cache_quant_algo: str | None = None
    """FP8 means keys and values of every layer; patterns do not touch it."""
    exclude_modules: tuple[str, ...] | None = None

    def is_fp8(self, module: str) -> bool:
        """Whether a linear layer is FP8.

        Args:
            module: its name in a rank's engine, such as `transformer.layers.0.attention.qkv`: layers are
                counted within the pipeline rank, and so they are in patterns. No pattern reaches below the
                name it matches: `transformer.layers.0` excludes nothing, `transformer.layers.0.*` a layer.
        """
        patterns = DEFAULT_EXCLUDED if self.exclude_modules is None else self.exclude_modules
        return self.quant_algo == FP8 and not any(fnmatchcase(module, pattern) for pattern in patterns)

    @property
    def has_fp8_kv_cache(self) -> bool:
        """Whether keys and values are kept as FP8."""
        return self.kv_cache_quant_algo == FP8
