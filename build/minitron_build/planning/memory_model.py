"""How many bytes a plan takes: on each GPU, on the host and on disk.

Weights and KV cache are exact; activations are an estimate whose formula is written at
`activation_bytes`. It knows shapes and formats, no machine and no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod

from minitron_build.checkpoint.fp8_exclude import Excluded, fp8_kind
from minitron_build.checkpoint.weight_map import Mapping, rank_tensors
from minitron_build.errors import PlanError
from minitron_build.planning.fp8_plan import Fp8Plan
from minitron_build.planning.limits import Limits, typical_len
from minitron_build.source.model_config import ModelConfig

KV_ITEM_BYTES = {"bf16": 2, "fp8": 1}
EMBEDDING = "transformer.vocab_embedding.weight"
RUNTIME_BYTES = 1792 << 20
"""CUDA context, cuBLAS and attention workspaces, decoder and I/O buffers of one rank: an estimate."""
MAX_AUTO_BATCH = 256
CONVERSION_RAM_BYTES = 500 << 20
"""A bf16 conversion streams chunk by chunk; see `Fp8Plan.ram_bytes` for FP8."""
ENGINE_SLACK_BYTES = 4 << 30
"""Of host memory: TensorRT's libraries and tactics beside twice the weights."""
BUNDLE_DISK_BYTES = 64 << 20
"""Tokenizer, configs and the Python of the models."""
KV_BLOCK_TOKENS = 32
MAX_ADVISED_FRACTION = 0.9
"""TensorRT-LLM's own default: more leaves nothing for what the estimate misses."""
NOTHING_EXCLUDED = Excluded()


@dataclass(frozen=True, slots=True)
class RankBytes:
    """What one rank keeps and moves.

    Attributes:
        weights_bytes: all tensors of the rank's engine.
        step_bytes: of them, what a decode step reads: all but the embedding, of which it reads a few rows.
    """

    weights_bytes: int
    step_bytes: int
    kv_cache_bytes_per_token: int


@dataclass(frozen=True, slots=True)
class StageNeed:
    """What a stage of the build needs free on this machine; GPU memory is per GPU."""

    ram_bytes: int
    disk_bytes: int
    gpu_bytes: int = 0


@dataclass(frozen=True, slots=True)
class GpuFit:
    """One GPU (each GPU, with several ranks) under a plan.

    Attributes:
        kv_cache_bytes: the KV cache's pool; the rank with the least room decides.
        kv_cache_bytes_per_token: of the rank that keeps the most layers.
        kv_cache_tokens: what the pool holds, of all requests together.
    """

    gpu_memory_bytes: int
    weights_bytes: int
    activation_bytes: int
    kv_cache_bytes: int
    kv_cache_bytes_per_token: int
    kv_cache_tokens: int

    def full_length_requests(self, max_seq_len: int) -> int:
        """How many requests of full length the pool holds at once."""
        return self.kv_cache_tokens // max_seq_len


class DoesNotFitError(PlanError):
    """A GPU cannot hold the weights and one request of full length; `fit` is what it can hold."""

    def __init__(self, fit: GpuFit, limits: Limits, *, where: str, todo: str) -> None:
        self.fit = fit
        super().__init__(
            f"{fit.gpu_memory_bytes / 1e9:.1f} GB hold {fit.weights_bytes / 1e9:.2f} GB weights, "
            f"{fit.activation_bytes / 1e9:.2f} GB activations and a KV cache of {fit.kv_cache_tokens} tokens",
            expected=f"{limits.max_seq_len} tokens, one request of --max-seq-len",
            where=where,
            todo=todo,
        )


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """A model in one format, divided over ranks.

    Attributes:
        conversion_ram_bytes: host memory that making the checkpoint takes.
    """

    config: ModelConfig
    mapping: Mapping
    precision: str
    kv_cache_dtype: str
    ranks: tuple[RankBytes, ...]
    conversion_ram_bytes: int

    @property
    def weights_bytes(self) -> int:
        """Of the rank that keeps the most."""
        return max(rank.weights_bytes for rank in self.ranks)

    @property
    def total_weights_bytes(self) -> int:
        """Of all ranks together, as on disk."""
        return sum(rank.weights_bytes for rank in self.ranks)

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """Of the rank that keeps the most layers."""
        return max(rank.kv_cache_bytes_per_token for rank in self.ranks)


def model_bytes(
    config: ModelConfig,
    mapping: Mapping,
    precision: str,
    kv_cache_dtype: str,
    fp8: Fp8Plan | None = None,
) -> ModelBytes:
    """Sizes of every rank, from the shapes that the checkpoint will have.

    FP8 scales (a few KB) are not counted. KV cache of a token = 2 (key and value) x layers of the rank x
    KV heads of the rank x head_dim x item bytes.

    Args:
        fp8: how the weights are quantised at precision fp8; None for the defaults.
    """
    excluded = fp8.excluded if fp8 else NOTHING_EXCLUDED
    weights, step = [0] * mapping.world_size, [0] * mapping.world_size
    for tensor in rank_tensors(config, mapping, shard_embedding=precision == "fp8"):
        is_fp8 = precision == "fp8" and fp8_kind(tensor, excluded) is not None
        num_bytes = prod(tensor.shape) * (1 if is_fp8 else 2)
        weights[tensor.rank] += num_bytes
        step[tensor.rank] += 0 if tensor.name == EMBEDDING else num_bytes
    heads = max(config.num_key_value_heads // mapping.tp_size, 1)
    item = 2 * heads * config.head_dim * KV_ITEM_BYTES[kv_cache_dtype]
    ranks = tuple(
        RankBytes(
            weights[rank],
            step[rank],
            item * len(mapping.layers_of(rank // mapping.tp_size, config.num_hidden_layers)),
        )
        for rank in range(mapping.world_size)
    )
    conversion = CONVERSION_RAM_BYTES if fp8 is None else fp8.ram_bytes(config)
    return ModelBytes(config, mapping, precision, kv_cache_dtype, ranks, conversion)


def activation_bytes(config: ModelConfig, mapping: Mapping, max_batch_size: int, max_num_tokens: int) -> int:
    """What an engine takes beside weights and KV cache: an estimate, on purpose a little high.

    TensorRT sizes activations at build time for the largest step and reuses memory between layers, so the
    largest layer counts once:

        tokens x 2 bytes x (2 hidden + max(2 q + 2 kv, 3 intermediate) / tp)
            residual and normed stream, and either qkv with the context or gate, up and their product
        + batch x vocab x 4 bytes x 2
            float32 logits of each request, in the engine and in the decoder
        + RUNTIME_BYTES

    For Width-Base at batch 256 and 8192 tokens: 0.55 + 0.26 + 1.88 = 2.69 GB.
    """
    attention = 2 * config.q_size + 2 * config.kv_size
    widest = max(attention, 3 * config.intermediate_size) // mapping.tp_size
    per_token = 2 * (2 * config.hidden_size + widest)
    logits = max_batch_size * config.vocab_size * 4 * 2
    return max_num_tokens * per_token + logits + RUNTIME_BYTES


def fit_gpu(model: ModelBytes, gpu_memory_bytes: int, limits: Limits, kv_cache_fraction: float) -> GpuFit:
    """What is left for the KV cache: fraction x (memory - weights - activations), as TensorRT-LLM counts.

    Tokens are whole blocks of 32. Never raises: a GPU too small has 0 tokens.
    """
    activations = activation_bytes(model.config, model.mapping, limits.max_batch_size, limits.max_num_tokens)
    pools = [
        max(0, int(kv_cache_fraction * (gpu_memory_bytes - rank.weights_bytes - activations)))
        for rank in model.ranks
    ]
    tokens = min(pool // rank.kv_cache_bytes_per_token for pool, rank in zip(pools, model.ranks, strict=True))
    return GpuFit(
        gpu_memory_bytes=gpu_memory_bytes,
        weights_bytes=model.weights_bytes,
        activation_bytes=activations,
        kv_cache_bytes=min(pools),
        kv_cache_bytes_per_token=model.kv_cache_bytes_per_token,
        kv_cache_tokens=tokens // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS,
    )


def auto_batch(
    model: ModelBytes, gpu_memory_bytes: int, max_seq_len: int, max_num_tokens: int, kv_cache_fraction: float
) -> int:
    """The largest power of two of typical requests that the KV cache holds, 1 to MAX_AUTO_BATCH."""
    typical, batch = typical_len(max_seq_len), MAX_AUTO_BATCH
    while batch > 1:
        limits = Limits(batch, max_seq_len - 1, max_seq_len, max_num_tokens)
        if fit_gpu(model, gpu_memory_bytes, limits, kv_cache_fraction).kv_cache_tokens >= batch * typical:
            break
        batch //= 2
    return batch


def check_fit(
    fit: GpuFit, limits: Limits, where: str, *, kv_cache_fraction: float, is_fp8_possible: bool
) -> None:
    """Refuse a GPU that cannot hold one request of full length.

    Args:
        where: the GPU in the user's words.
        kv_cache_fraction: what the fit was reckoned with.
        is_fp8_possible: the GPU has FP8 and the plan does not use it yet.

    Raises:
        DoesNotFitError: names the limit to lower and to what, or what else would help.
    """
    if fit.kv_cache_tokens >= limits.max_seq_len:
        return
    todo = f"use {'--precision fp8, ' if is_fp8_possible else ''}more ranks (--tp-size) or a larger GPU"
    if fit.kv_cache_tokens >= 2 * KV_BLOCK_TOKENS:
        lower = f"lower --max-seq-len to {fit.kv_cache_tokens} or less"
        if limits.max_input_len >= fit.kv_cache_tokens:
            lower += " with --max-input-len below it"
        todo = f"{lower}, or {todo}"
    enough = _enough_fraction(fit, limits, kv_cache_fraction)
    if enough is not None:
        todo = f"raise --kv-cache-fraction {kv_cache_fraction:g} to {enough:g} or more, or {todo}"
    raise DoesNotFitError(fit, limits, where=where, todo=todo)


def _enough_fraction(fit: GpuFit, limits: Limits, fraction: float) -> float | None:
    """The fraction, to two places, with which one request of full length fits; None where none does."""
    free_bytes = fit.kv_cache_bytes / fraction
    blocks = math.ceil(limits.max_seq_len / KV_BLOCK_TOKENS)
    wanted_bytes = blocks * KV_BLOCK_TOKENS * fit.kv_cache_bytes_per_token
    if wanted_bytes > MAX_ADVISED_FRACTION * free_bytes:
        return None
    return math.ceil(100 * wanted_bytes / free_bytes) / 100


def stage_needs(model: ModelBytes, activations: int) -> dict[str, StageNeed]:
    """What each stage of a GPU build needs, by its name on the command line.

    The engine stage builds rank after rank: twice the weights of one in host memory (as read and as built)
    and its weights and activations on the GPU.
    """
    return {
        "checkpoint": StageNeed(model.conversion_ram_bytes, model.total_weights_bytes),
        "engine": StageNeed(
            2 * model.weights_bytes + ENGINE_SLACK_BYTES,
            model.total_weights_bytes,
            model.weights_bytes + activations,
        ),
        "bundle": StageNeed(CONVERSION_RAM_BYTES, BUNDLE_DISK_BYTES),
    }
