"""Keys and values of one sequence, growing with it; freed with the object.

It knows nothing of attention. Growth depends on the sequence's own length only, so that what a sequence
computes cannot depend on its neighbours.
"""

from __future__ import annotations

import math

import torch

from .config import CheckpointConfig
from .fp8 import E4M3, dequantize, quantize
from .linear import Compute

TOKENS_PER_BLOCK = 64


class Scratch:
    """Memory for one layer's FP8 keys and values in the compute dtype, used again and again."""

    def __init__(self, compute: Compute) -> None:
        self._flat = torch.empty(0, dtype=compute.dtype, device=compute.device)

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of that shape; whatever was taken before is overwritten with it."""
        count = math.prod(shape)
        if count > len(self._flat):
            self._flat = self._flat.new_empty(count + count // 4)
        return self._flat[:count].view(shape)


class SequenceKvCache:
    """KV cache of one sequence, one tensor per layer; FP8, one byte a number, or the compute dtype.

    Args:
        config: of the model.
        compute: how to compute.
        num_layers: how many layers write to it.
        is_fp8: whether keys and values are rounded to E4M3 and kept so.
        scratch: shared by the caches of a model that computes one sequence's attention at a time.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        compute: Compute,
        num_layers: int,
        *,
        is_fp8: bool,
        scratch: Scratch | None = None,
    ) -> None:
        self._num_kv_heads, self._head_size = config.num_key_value_heads, config.head_size
        self._compute, self._scratch = compute, scratch or Scratch(compute)
        self._stored_dtype = E4M3 if is_fp8 else compute.dtype
        self._layers = [self._empty(0) for _ in range(num_layers)]
        self._capacity = 0
        self.length = 0

    def _empty(self, capacity: int) -> torch.Tensor:
        # [keys and values, kv_heads, capacity, head_size]
        shape = (2, self._num_kv_heads, capacity, self._head_size)
        return torch.empty(shape, dtype=self._stored_dtype, device=self._compute.device)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers together."""
        numbers = 2 * len(self._layers) * self._num_kv_heads * self._head_size
        return numbers * self._stored_dtype.itemsize

    @property
    def num_blocks(self) -> int:
        """Blocks of `TOKENS_PER_BLOCK` tokens allocated so far, in every layer alike."""
        return self._capacity // TOKENS_PER_BLOCK

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` more; a quarter ahead, so that copies stay rare.

        Raises:
            RuntimeError: memory is exhausted; what was there stays valid.
        """
        needed = self.length + num_tokens
        if needed <= self._capacity:
            return
        capacity = -(-(needed + needed // 4) // TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK
        for layer, old in enumerate(self._layers):
            if old.shape[2] < capacity:  # a reserve that ran out of memory half-way goes on where it stopped
                new = self._empty(capacity)
                new[:, :, : self.length] = old[:, :, : self.length]
                self._layers[layer] = new
        self._capacity = capacity

    def write(
        self, layer: int, new: torch.Tensor, scaling_factor: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put a layer's new keys and values [2, kv_heads, new, head_size] behind the old ones.

        Args:
            layer: which.
            new: in the compute dtype, keys behind RoPE.
            scaling_factor: of an FP8 cache, which rounds what it is given; None for any other.

        Returns:
            All keys and all values of the layer, each [1, kv_heads, length + new, head_size], as the cache
            holds them; of an FP8 cache good until the next write to any cache of the same scratch. `length`
            itself moves in `advance`, after the last layer.
        """
        end = self.length + new.shape[2]
        held = self._layers[layer]
        if scaling_factor is None:
            held[:, :, self.length : end] = new
            return held[:1, :, :end], held[1:, :, :end]
        held[:, :, self.length : end] = quantize(new, scaling_factor)
        wide = self._scratch.take((2, self._num_kv_heads, end, self._head_size))
        dequantize(held[:, :, :end], scaling_factor, wide)
        return wide[:1], wide[1:]

    def advance(self, num_tokens: int) -> None:
        """Count the tokens that every layer has written."""
        self.length += num_tokens

    def rewind(self, num_tokens: int) -> None:
        """Forget the tokens behind the first `num_tokens`; the memory is kept.

        Raises:
            ValueError: it does not hold so many.
        """
        if not 0 <= num_tokens <= self.length:
            raise ValueError(f"rewind to {num_tokens} tokens; expected 0 to {self.length}")
        self.length = num_tokens
