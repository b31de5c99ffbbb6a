"""One decoder layer in bf16, computed as transformers computes it, its ranges recorded on the way.

The order of operations and the dtype of each are transformers' LlamaDecoderLayer with sdpa attention: the
scaling factors must be those that NVIDIA ModelOpt, which watches that model, arrives at. It knows tensors of
one layer, nothing of files or of the other layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from minitron_build.calibration.amax import KEY_SITE, SITES, VALUE_SITE, LayerAmax
from minitron_build.source.model_config import ModelConfig


class AmaxRecorder:
    """Running amax of each site, on the device that computes; one maximum over all sequences."""

    def __init__(self, device: torch.device) -> None:
        self._amax = {site: torch.zeros((), dtype=torch.bfloat16, device=device) for site in SITES}

    def see(self, site: str, values: Tensor) -> None:
        """Take a bf16 tensor of any shape into account; NaN stays NaN."""
        low, high = torch.aminmax(values)
        self._amax[site] = torch.maximum(self._amax[site], torch.maximum(low.abs(), high.abs()))

    def layer_amax(self) -> LayerAmax:
        """What was seen; waits for the device."""
        return LayerAmax({site: float(amax) for site, amax in self._amax.items()})


class RopeAngles:
    """Cosines and sines of positions 0 to max_tokens - 1, bf16 [tokens, head_dim], for rotate-half."""

    def __init__(self, config: ModelConfig, max_tokens: int, device: torch.device) -> None:
        positions = torch.arange(max_tokens, device=device).float()
        # Computed on the CPU as transformers does at construction, then carried over.
        angles = positions[:, None] * inverse_frequencies(config).to(device)[None, :]
        both = torch.cat((angles, angles), dim=-1)
        self.cos, self.sin = both.cos().to(torch.bfloat16), both.sin().to(torch.bfloat16)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate [heads, tokens, head_dim] by the angles of its tokens."""
        num_tokens, half = x.shape[1], x.shape[2] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return (x * self.cos[:num_tokens]).add_(turned.mul_(self.sin[:num_tokens]))


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Frequency of each pair of dimensions, float32 [head_dim / 2]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    return frequencies if config.rope_scaling is None else _llama3_scaled(frequencies, config.rope_scaling)


def _llama3_scaled(frequencies: Tensor, scaling: Mapping[str, float]) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated."""
    factor, old_len = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > old_len / low, frequencies / factor, frequencies)
    smooth = (old_len / wavelengths - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    is_between = ~(wavelengths < old_len / high) * ~(wavelengths > old_len / low)
    return torch.where(is_between, between, scaled)


def decoder_layer(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    hidden: Tensor,
    angles: RopeAngles,
    recorder: AmaxRecorder,
) -> Tensor:
    """Run one sequence through one decoder layer.

    Args:
        weights: bf16, by HF name within the layer (`self_attn.q_proj.weight`).
        hidden: bf16 [tokens, hidden_size].

    Returns:
        bf16 [tokens, hidden_size].
    """
    # Sums and products are taken in place where transformers makes a new tensor: the same bits, and half the
    # memory to fetch from the kernel, which costs more than the arithmetic.
    normed = rms_norm(hidden, weights["input_layernorm.weight"], config.rms_norm_eps)
    hidden = _attention(config, weights, normed, angles, recorder).add_(hidden)
    normed = rms_norm(hidden, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
    return _mlp(weights, normed, recorder).add_(hidden)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise rows in float32, round to bf16, then weigh."""
    wide = hidden.float()
    variance = wide.pow(2).mean(-1, keepdim=True)
    return wide.mul_(torch.rsqrt(variance + eps)).to(hidden.dtype).mul_(weight)


def _attention(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    normed: Tensor,
    angles: RopeAngles,
    recorder: AmaxRecorder,
) -> Tensor:
    """Causal grouped-query attention of one sequence, [tokens, hidden_size] -> the same."""
    recorder.see("qkv_input", normed)
    query, key, value = (
        functional.linear(normed, weights[f"self_attn.{name}_proj.weight"])
        .view(len(normed), -1, config.head_dim)
        .transpose(0, 1)  # [heads, tokens, head_dim]
        for name in "qkv"
    )
    query, key = angles.rotate(query), angles.rotate(key)
    recorder.see(KEY_SITE, key)
    recorder.see(VALUE_SITE, value)
    context = functional.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        is_causal=len(normed) > 1,
        scale=config.head_dim**-0.5,
        enable_gqa=True,
    )
    context = context[0].transpose(0, 1).reshape(len(normed), -1)
    recorder.see("o_input", context)
    return functional.linear(context, weights["self_attn.o_proj.weight"])


def _mlp(weights: Mapping[str, Tensor], normed: Tensor, recorder: AmaxRecorder) -> Tensor:
    """SwiGLU, [tokens, hidden_size] -> the same."""
    recorder.see("gate_up_input", normed)
    gate = functional.linear(normed, weights["mlp.gate_proj.weight"])
    up = functional.linear(normed, weights["mlp.up_proj.weight"])
    product = functional.silu(gate, inplace=True).mul_(up)
    recorder.see("down_input", product)
    return functional.linear(product, weights["mlp.down_proj.weight"])
