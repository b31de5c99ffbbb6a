"""The two models of a verification, opened: a TensorRT-LLM checkpoint and the HF checkpoint behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_build.errors import CheckpointError
from minitron_build.verify.thresholds import EXACT, ROUNDED

if TYPE_CHECKING:
    from minitron_build.runtime.reference_engine.config import CheckpointConfig
    from minitron_build.verify.streamed_model import StreamedModel

SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_size"),
)
"""What two models must agree in before their numbers mean anything."""


@dataclass(frozen=True, slots=True, eq=False)
class ModelPair:
    """Source and candidate, of one shape.

    Attributes:
        kind: how the candidate's weights differ from the source's; one of thresholds.KINDS.
        bos_token_id: of the source.
    """

    source: StreamedModel
    candidate: StreamedModel
    kind: str
    bos_token_id: int | None

    @property
    def max_positions(self) -> int:
        """Longest sequence both models take."""
        return min(one.config.max_position_embeddings for one in (self.source, self.candidate))


def open_models(checkpoint_dir: Path, source_dir: Path, *, max_tokens: int) -> ModelPair:
    """Open both; reads no weights yet.

    Raises:
        CheckpointError: one of the two cannot be executed, or they are not of one shape.
    """
    from minitron_build.runtime.reference_engine import UnsupportedCheckpointError, open_checkpoint
    from minitron_build.source.model_config import ModelConfig
    from minitron_build.verify.hf_reader import HfReader
    from minitron_build.verify.streamed_model import StreamedModel

    source_reader = HfReader(source_dir)
    try:
        reader = open_checkpoint(checkpoint_dir)
        config = reader.config
        _check_shape(source_reader.config, config, checkpoint_dir, source_dir)
        candidate = StreamedModel(reader, max_tokens=max_tokens)
    except UnsupportedCheckpointError as error:
        raise CheckpointError(str(error)) from None
    source = StreamedModel(source_reader, max_tokens=max_tokens)
    kind = EXACT if source_reader.config.dtype == config.dtype else ROUNDED
    return ModelPair(source, candidate, kind, ModelConfig.read(source_dir).bos_token_id)


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
