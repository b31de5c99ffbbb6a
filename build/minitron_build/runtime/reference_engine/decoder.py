"""One decoder layer: RMSNorm, GQA attention with fused qkv, RoPE, SwiGLU.

It knows tensors, weights and KV caches; nothing of how many layers there are or where rows come from. What a
row computes never depends on the other rows, bit for bit: a prompt's chunk is computed alone, generated
tokens together in row counts that `linear` has proven, attention per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from .checkpoint import StoredLayer
from .config import CheckpointConfig
from .kv_cache import SequenceKvCache
from .linear import Compute, Each, Projection, RowLadder, make_projection
from .rope import RopeTable, rotate

# Elementwise kernels treat the last few numbers of a call apart: whole multiples of this have no last few.
VECTOR_NUMBERS = 32
# Below this, torch runs an elementwise call on one thread, so threads cannot cut it unevenly.
SINGLE_THREAD_NUMBERS = 32768


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What one pass computes: `tokens_each` tokens of each sequence in turn, then padding rows."""

    caches: Sequence[SequenceKvCache]
    tokens_each: int
    angles: tuple[torch.Tensor, torch.Tensor]
    """Cosines and sines of every row's position."""
    mask: torch.Tensor | None
    """Added to the scores of a chunk of one sequence, [group * new, before + new]."""
    ladder: RowLadder

    @classmethod
    def chunk(
        cls,
        config: CheckpointConfig,
        cache: SequenceKvCache,
        num_new: int,
        rope: RopeTable,
        dtype: torch.dtype,
    ) -> Rows:
        """The next `num_new` tokens of one prompt, behind what `cache` holds."""
        start = cache.length
        angles = rope.at(torch.arange(start, start + num_new, device=rope.cos.device))
        group = config.num_attention_heads // config.num_key_value_heads
        hidden = torch.full(
            (num_new, start + num_new), float("-inf"), dtype=dtype, device=rope.cos.device
        ).triu(diagonal=start + 1)  # a token sees those before it and itself
        mask = None if num_new == 1 else hidden.repeat(group, 1)
        return cls([cache], num_new, angles, mask, RowLadder((num_new,)))

    @classmethod
    def step(
        cls, caches: Sequence[SequenceKvCache], num_rows: int, rope: RopeTable, ladder: RowLadder
    ) -> Rows:
        """One token of each sequence, padded to `num_rows` rows."""
        positions = torch.zeros(num_rows, dtype=torch.int64, device=rope.cos.device)
        positions[: len(caches)] = torch.tensor([cache.length for cache in caches])
        return cls(caches, 1, rope.at(positions), None, ladder)


class DecoderLayer:
    """The weights of one layer, ready for products, and what it does to hidden states.

    Args:
        config: the checkpoint's.
        stored: the layer as stored; copied.
        compute: how to compute.
        cache_index: the layer's place in the KV caches it is given.
        each: `map`, or a thread pool's: laying a weight out for products keeps one core busy.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        stored: StoredLayer,
        compute: Compute,
        cache_index: int,
        *,
        each: Each = map,
    ) -> None:
        self._config, self._dtype, self._cache_index = config, compute.dtype, cache_index
        self._kv_cache_scale = stored.kv_cache_scale
        self._input_layernorm = compute.owned(stored.input_layernorm)
        self._post_layernorm = compute.owned(stored.post_layernorm)
        linears = (stored.qkv, stored.dense, stored.fc, stored.gate, stored.proj)
        self.projections = tuple(each(partial(make_projection, compute=compute), linears))
        self._qkv, self._dense, self._fc, self._gate, self._proj = self.projections

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Hidden states behind the layer, [rows, hidden]; writes the rows' keys and values to the caches."""
        epsilon = self._config.norm_epsilon
        qkv = self._linear(rms_norm(x, self._input_layernorm, epsilon), self._qkv, rows)
        x = x + self._linear(self._attention(qkv, rows), self._dense, rows)
        normed = rms_norm(x, self._post_layernorm, epsilon)
        fc, gate = self._linear(normed, self._fc, rows), self._linear(normed, self._gate, rows)
        return x + self._linear(_swiglu(fc, gate), self._proj, rows)

    def _linear(self, x: torch.Tensor, weight: Projection, rows: Rows) -> torch.Tensor:
        """A prompt's chunk as it is; rows of several sequences in the proven row counts."""
        if x.shape[0] <= rows.ladder.sizes[-1]:
            return weight.float32(x).to(self._dtype)
        tiles = rows.ladder.tiles(x.shape[0])
        return torch.cat([weight.float32(x[start:end]) for start, end in tiles]).to(self._dtype)

    def _attention(self, qkv: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Attention of every sequence over its own cache; [rows, heads * head_size]."""
        num_heads, num_kv_heads = self._config.num_attention_heads, self._config.num_key_value_heads
        # [rows, heads + 2 * kv_heads, head_size]
        heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, self._config.head_size)
        rotated = rotate(heads[:, : num_heads + num_kv_heads], rows.angles)
        # [rows, 2, kv_heads, head_size] -> [2, kv_heads, rows, head_size]
        new = torch.cat((rotated[:, num_heads:], heads[:, num_heads + num_kv_heads :]), dim=1)
        new = new.view(len(new), 2, num_kv_heads, -1).permute(1, 2, 0, 3)
        queries = rotated[:, :num_heads].view(len(new[0, 0]), num_kv_heads, -1, self._config.head_size)
        if rows.mask is not None:
            return _attend_chunk(queries, *self._write(rows.caches[0], new), rows.mask)
        out = torch.zeros_like(queries)  # [rows, kv_heads, group, head_size]
        for row, cache in enumerate(rows.caches):
            keys, values = self._write(cache, new[:, :, row : row + 1])
            out[row : row + 1] = F.scaled_dot_product_attention(queries[row : row + 1], keys, values)
        return out.view(len(out), -1)

    def _write(self, cache: SequenceKvCache, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cache.write(self._cache_index, new, self._kv_cache_scale)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm of rows [rows, hidden], its mean taken in float32."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return (wide * scale).to(x.dtype) * weight


def _attend_chunk(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """One chunk: queries [new, kv_heads, group, head_size] over keys [1, kv_heads, length, head_size].

    The query heads of a KV head are laid out as rows of one product, so keys and values are never repeated.
    """
    num_new, num_kv_heads, group, head_size = queries.shape
    rows = queries.permute(1, 2, 0, 3).reshape(1, num_kv_heads, group * num_new, head_size)
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
    out = out.view(num_kv_heads, group, num_new, head_size).permute(2, 0, 1, 3)
    return out.reshape(num_new, -1)


def _swiglu(fc: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """silu(fc) * gate, [rows, intermediate], cut so that a row's bits do not depend on its neighbours."""
    num_rows, width = fc.shape
    rows_per_call = max(1, SINGLE_THREAD_NUMBERS // width) if width % VECTOR_NUMBERS == 0 else 1
    if num_rows <= rows_per_call:
        return F.silu(fc) * gate
    return torch.cat([F.silu(part) for part in torch.split(fc, rows_per_call)]) * gate
