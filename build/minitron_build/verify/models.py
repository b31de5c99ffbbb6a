"""The two models of a verification, opened: a TensorRT-LLM checkpoint and the HF checkpoint behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_build.errors import CheckpointError
from minitron_build.source.model_config import read_json_object
from minitron_build.verify.thresholds import EXACT, FP8, ROUNDED

if TYPE_CHECKING:
    from minitron_build.runtime.reference_engine.config import CheckpointConfig
    from minitron_build.verify.runner import Runner

SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_size"),
)
"""What two models must agree in before their numbers mean anything."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How both models compute.

    Attributes:
        dtype: "float32" shows what quantisation alone costs; "bfloat16" adds an engine's own rounding.
        device: "cpu" or "cuda".
    """

    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True, slots=True, eq=False)
class ModelPair:
    """Source and candidate, of one shape.

    Attributes:
        kind: how the candidate's weights differ from the source's; one of thresholds.KINDS.
        max_positions: longest sequence both models take.
    """

    source: Runner
    candidate: Runner
    kind: str
    max_positions: int
    num_parameters: int


def open_models(
    checkpoint_dir: Path, source_dir: Path, *, max_tokens: int, arithmetic: Arithmetic
) -> ModelPair:
    """Open both; reads no weights yet.

    Args:
        max_tokens: of the longest sequence, if both models take it.

    Raises:
        CheckpointError: one of the two cannot be executed, or they are not of one shape.
    """
    from minitron_build.runtime.reference_engine import UnsupportedCheckpointError, open_checkpoint
    from minitron_build.source.model_config import ModelConfig
    from minitron_build.verify.hf_reader import HfReader
    from minitron_build.verify.runner import Runner

    source = HfReader(source_dir)
    try:
        candidate = open_checkpoint(checkpoint_dir)
        _check_shape(source.config, candidate.config, checkpoint_dir, source_dir)
        max_positions = min(one.config.max_position_embeddings for one in (source, candidate))
        source_runner, candidate_runner = (
            Runner(
                one,
                max_seq_len=min(max_tokens, max_positions),
                compute_dtype=arithmetic.dtype,
                device=arithmetic.device,
            )
            for one in (source, candidate)
        )
    except UnsupportedCheckpointError as error:
        raise CheckpointError(str(error)) from None
    num_parameters = ModelConfig.read(source_dir).num_parameters
    kind = _kind(source.config, candidate.config)
    return ModelPair(source_runner, candidate_runner, kind, max_positions, num_parameters)


def open_reference(model_dir: Path, *, max_tokens: int, arithmetic: Arithmetic) -> Runner:
    """One model alone: a TensorRT-LLM checkpoint or an HF folder.

    Raises:
        CheckpointError: it cannot be executed.
    """
    from minitron_build.runtime.reference_engine import (
        ModelSource,
        UnsupportedCheckpointError,
        open_checkpoint,
    )
    from minitron_build.verify.hf_reader import HfReader
    from minitron_build.verify.runner import Runner

    is_converted = "architecture" in read_json_object(model_dir / "config.json")
    try:
        source: ModelSource = open_checkpoint(model_dir) if is_converted else HfReader(model_dir)
        max_seq_len = min(max_tokens, source.config.max_position_embeddings)
        return Runner(
            source, max_seq_len=max_seq_len, compute_dtype=arithmetic.dtype, device=arithmetic.device
        )
    except UnsupportedCheckpointError as error:
        raise CheckpointError(str(error)) from None


def precision_of(config: CheckpointConfig) -> dict[str, str]:
    """What a checkpoint is, in the words of a bundle's plan."""
    quantization = config.quantization
    flags = {
        "precision": quantization.quant_algo is not None,
        "kv_cache_dtype": quantization.has_fp8_kv_cache,
    }
    return {name: "fp8" if is_fp8 else "bf16" for name, is_fp8 in flags.items()}


def rope_difference(models: ModelPair) -> float:
    """Largest difference between the two models' RoPE frequencies, as a fraction of the source's.

    Where no long prompt is run, nothing else would show a wrong base or a dropped scaling.
    """
    from minitron_build.runtime.reference_engine.rope import inverse_frequencies

    source, candidate = (inverse_frequencies(one.source.config) for one in (models.source, models.candidate))
    return float(((candidate - source).abs() / source).max())


def _kind(source: CheckpointConfig, candidate: CheckpointConfig) -> str:
    quantization = candidate.quantization
    if quantization.quant_algo is not None or quantization.has_fp8_kv_cache:
        return FP8
    return EXACT if source.dtype == candidate.dtype else ROUNDED


def _check_shape(
    source: CheckpointConfig, candidate: CheckpointConfig, checkpoint_dir: Path, source_dir: Path
) -> None:
    for name in SHAPE:
        if getattr(source, name) != getattr(candidate, name):
            raise CheckpointError(
                f"{name} is {getattr(candidate, name)}",
                expected=f"{getattr(source, name)}, as {source_dir} has",
                where=str(checkpoint_dir),
                todo="give the source that it was converted from: --against HF_DIR",
            )
