"""The reference engine: executes a TensorRT-LLM checkpoint on a CPU with in-flight batching.

Token ids in, token ids out. It knows nothing of text, tokenizers, Triton or how a checkpoint is made.
"""

from .checkpoint import CheckpointConfig, UnsupportedCheckpointError, read_checkpoint_config
from .engine import EngineStats, ReferenceEngine
from .llama import LlamaModel
from .request import (
    EngineLimits,
    EngineOutput,
    GenerationRequest,
    QueueFullError,
    RequestError,
    RequestTimes,
    SamplingConfig,
)

__all__ = [
    "CheckpointConfig",
    "EngineLimits",
    "EngineOutput",
    "EngineStats",
    "GenerationRequest",
    "LlamaModel",
    "QueueFullError",
    "ReferenceEngine",
    "RequestError",
    "RequestTimes",
    "SamplingConfig",
    "UnsupportedCheckpointError",
    "read_checkpoint_config",
]
