"""Rotary position embedding: the table of cosines and sines, and its application to q and k.

It knows the llama3 change of frequencies and the rotate-half (gpt-neox) pairing; nothing of attention.
"""

from __future__ import annotations

import math

import torch

from .config import CheckpointConfig, Llama3RopeScaling
from .linear import Compute


def inverse_frequencies(config: CheckpointConfig) -> torch.Tensor:
    """Frequency of each pair of dimensions, [head_size / 2] float32."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.int64).float() / config.head_size
    inv_freq = 1.0 / (config.rotary_base**exponents)
    return inv_freq if config.rotary_scaling is None else _llama3_scaled(inv_freq, config.rotary_scaling)


def _llama3_scaled(inv_freq: torch.Tensor, scaling: Llama3RopeScaling) -> torch.Tensor:
    """Slow waves are stretched by `factor`, fast ones kept, those between interpolated."""
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / scaling.low_freq_factor, inv_freq / scaling.factor, inv_freq)
    is_between = (wavelength <= original / scaling.low_freq_factor) & (
        wavelength >= original / scaling.high_freq_factor
    )
    return torch.where(is_between, between, scaled)


class RopeTable:
    """Cosines and sines of every position below `max_positions`, in the compute dtype."""

    def __init__(self, config: CheckpointConfig, max_positions: int, compute: Compute) -> None:
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse_frequencies(config))
        # [max_positions, 1, head_size]; the middle dimension is the heads'.
        self.cos = compute.owned(torch.cat((angles.cos(), angles.cos()), dim=-1))[:, None, :]
        self.sin = compute.owned(torch.cat((-angles.sin(), angles.sin()), dim=-1))[:, None, :]

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [tokens, 1, head_size] of `positions` [tokens], for `rotate`."""
        return self.cos[positions], self.sin[positions]


def rotate(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate `x` [tokens, heads, head_size] by what `RopeTable.at` gave for its tokens."""
    cos, sin = angles
    # The sines of the first half are stored negated, so rotate-half is a swap of halves.
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin
