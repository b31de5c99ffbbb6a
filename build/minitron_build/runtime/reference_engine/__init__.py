"""The reference engine: executes a TensorRT-LLM checkpoint on a CPU with in-flight batching.

Token ids in, token ids out. It knows nothing of text, tokenizers, Triton or how a checkpoint is made.
"""

from .checkpoint import CheckpointReader, ModelSource, StoredLayer, StoredLinear
from .config import CheckpointConfig, UnsupportedCheckpointError, read_checkpoint_config
from .engine import EngineStats, ReferenceEngine
from .layerwise import LayerRunner, LoadedLayer, OutputHead, Reuse, open_checkpoint
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
    "CheckpointReader",
    "EngineLimits",
    "EngineOutput",
    "EngineStats",
    "GenerationRequest",
    "LayerRunner",
    "LlamaModel",
    "LoadedLayer",
    "ModelSource",
    "OutputHead",
    "QueueFullError",
    "ReferenceEngine",
    "RequestError",
    "RequestTimes",
    "Reuse",
    "SamplingConfig",
    "StoredLayer",
    "StoredLinear",
    "UnsupportedCheckpointError",
    "open_checkpoint",
    "read_checkpoint_config",
]
