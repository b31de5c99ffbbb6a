"""Upper bounds on tokens per second: what memory bandwidth and arithmetic allow, whoever writes the kernels.

Formulas only, from bytes (memory_model.py), shapes and a board's rates (gpu_models.py). Real engines reach a
part of them; no communication between ranks, no scheduling and no sampling is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from minitron_build.planning.gpu_models import GpuModel
from minitron_build.planning.memory_model import ModelBytes


@dataclass(frozen=True, slots=True)
class Rates:
    """What one board moves and multiplies per second; linear layers may be faster than the rest (FP8)."""

    bytes_per_s: float
    linear_flops_per_s: float
    attention_flops_per_s: float
    head_flops_per_s: float


def rates_of(gpu: GpuModel, model: ModelBytes) -> Rates | None:
    """The rates that count for a model on a board; None when only its memory is known.

    FP8 weights multiply at the FP8 rate, attention too when the KV cache is FP8; lm_head stays bf16.
    """
    if gpu.bandwidth_bytes_per_s is None or gpu.bf16_flops_per_s is None:
        return None
    fp8 = gpu.fp8_flops_per_s or gpu.bf16_flops_per_s
    linear = fp8 if model.precision == "fp8" else gpu.bf16_flops_per_s
    attention = fp8 if (model.precision, model.kv_cache_dtype) == ("fp8", "fp8") else gpu.bf16_flops_per_s
    return Rates(gpu.bandwidth_bytes_per_s, linear, attention, gpu.bf16_flops_per_s)


def decode_tokens_per_s(model: ModelBytes, rates: Rates, batch: int, context_tokens: int) -> float:
    """Ceiling of generation, all requests together.

    One step gives each request a token. It reads every weight but the embedding once per micro-batch and the
    whole KV cache of every request:

        memory:     batch / ((micro-batches x weights + batch x context x KV per token) / bandwidth)
        arithmetic: batch / (batch x FLOPs per token / FLOP rate of all ranks)

    and the slower of the two, for the slowest pipeline stage.

    With pp stages up to pp micro-batches are under way; a single one passes the stages one after another.
    Tensor parallel ranks read at the same time.

    Args:
        context_tokens: tokens of each request in the KV cache; 0 leaves the cache out.
    """
    stages = model.ranks[:: model.mapping.tp_size]
    micro_batches = min(len(stages), batch)
    cache = batch * context_tokens
    busy_s = [
        (micro_batches * rank.step_bytes + cache * rank.kv_cache_bytes_per_token) / rates.bytes_per_s
        for rank in stages
    ]
    memory_s = max([*busy_s, sum(busy_s) / micro_batches])
    arithmetic_s = batch * _token_flops_s(model, rates, context_tokens, heads=1) / model.mapping.world_size
    return batch / max(memory_s, arithmetic_s)


def prefill_tokens_per_s(model: ModelBytes, rates: Rates, prompt_tokens: int) -> float:
    """Ceiling of reading prompts of one length.

    FLOPs of a prompt = 2 x linear parameters x tokens + attention over half the prompt on average (the mask
    is causal) + one lm_head for its last token; or the weights are read once, whichever is slower. All ranks
    work all the time, as they do with prompts enough.
    """
    per_token_s = _token_flops_s(model, rates, prompt_tokens / 2, heads=1 / prompt_tokens)
    arithmetic_s = prompt_tokens * per_token_s / model.mapping.world_size
    memory_s = max(rank.step_bytes for rank in model.ranks) / rates.bytes_per_s
    return prompt_tokens / max(arithmetic_s, memory_s)


def memory_bound_batch(kv_cache_tokens: int, context_tokens: int) -> int:
    """The most requests of one length that the KV cache holds, at least one."""
    return max(1, kv_cache_tokens // max(1, context_tokens))


def _token_flops_s(model: ModelBytes, rates: Rates, context_tokens: float, *, heads: float) -> float:
    """Seconds of one board for the arithmetic of one token.

    A multiply and an add are two FLOPs: 2 per linear parameter; 4 x q_size x context per layer for scores
    and their weighted sum; 2 x vocab x hidden for lm_head, `heads` times.
    """
    config = model.config
    attention_params = config.hidden_size * 2 * (config.q_size + config.kv_size)
    linear = config.num_hidden_layers * (attention_params + 3 * config.hidden_size * config.intermediate_size)
    attention = config.num_hidden_layers * 4 * config.q_size * context_tokens
    head = 2 * config.vocab_size * config.hidden_size * heads
    return (
        2 * linear / rates.linear_flops_per_s
        + attention / rates.attention_flops_per_s
        + head / rates.head_flops_per_s
    )
