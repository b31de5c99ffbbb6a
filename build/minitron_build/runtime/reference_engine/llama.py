"""The Llama forward pass over a TensorRT-LLM checkpoint: RMSNorm, GQA with fused qkv, RoPE, SwiGLU.

It knows tensors and one KV cache per sequence; nothing of requests, sampling or scheduling. What a row
computes never depends on the other rows of the batch, bit for bit: prompts are computed alone in chunks,
generated tokens together in row counts that `linear` has proven, attention per sequence.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .checkpoint import CheckpointConfig, CheckpointReader, UnsupportedCheckpointError, read_checkpoint_config
from .kv_cache import SequenceKvCache
from .linear import Projection, make_projection, make_projections, probe_row_ladder
from .rope import RopeTable, inverse_frequencies, rotate

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Prompt tokens per pass: long enough for the matrix products, short enough that running streams barely wait.
PREFILL_CHUNK_TOKENS = 256
# A layer this small is computed faster by one thread than two can agree on it, far more so on a busy machine.
SINGLE_THREAD_LAYER_NUMBERS = 4 << 20
# Elementwise kernels treat the last few numbers of a call apart: whole multiples of this have no last few.
VECTOR_NUMBERS = 32
# Below this, torch runs an elementwise call on one thread, so threads cannot cut it unevenly.
SINGLE_THREAD_NUMBERS = 32768


def default_num_threads(config: CheckpointConfig) -> int:
    """How many threads serve a model of this size best on this machine."""
    qkv_and_dense = config.head_size * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layer_numbers = config.hidden_size * (qkv_and_dense + 3 * config.intermediate_size)
    return 1 if layer_numbers < SINGLE_THREAD_LAYER_NUMBERS else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of one layer in the compute dtype, named as TensorRT-LLM names them."""

    input_layernorm: torch.Tensor  # [hidden]
    qkv: Projection  # [(heads + 2 * kv_heads) * head_size, hidden]
    dense: Projection  # [hidden, heads * head_size]
    post_layernorm: torch.Tensor  # [hidden]
    fc: Projection  # [intermediate, hidden]: HF's gate_proj, the one SiLU is applied to
    gate: Projection  # [intermediate, hidden]: HF's up_proj
    proj: Projection  # [hidden, intermediate]


class LlamaModel:
    """A whole model in memory.

    Args:
        checkpoint_dir: a TensorRT-LLM checkpoint, any tp x pp mapping.
        max_seq_len: positions the RoPE table covers.
        compute_dtype: "float32"; or "bfloat16": weights, KV cache and activations in it, sums in float32.
        num_threads: torch threads of the whole process; None: one for a small model, else every core.

    Raises:
        UnsupportedCheckpointError: the checkpoint asks for something this engine does not implement.
        ValueError: an unknown compute dtype.
    """

    def __init__(
        self,
        checkpoint_dir: Path,
        *,
        max_seq_len: int,
        compute_dtype: str = "float32",
        num_threads: int | None = None,
    ) -> None:
        if compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"compute_dtype is {compute_dtype!r}; expected one of {', '.join(COMPUTE_DTYPES)}"
            )
        self.config = read_checkpoint_config(checkpoint_dir)
        if max_seq_len > self.config.max_position_embeddings:
            raise UnsupportedCheckpointError(
                f"max_seq_len is {max_seq_len}; the model has {self.config.max_position_embeddings} positions"
            )
        self.dtype = COMPUTE_DTYPES[compute_dtype]
        torch.set_num_threads(num_threads or default_num_threads(self.config))
        reader = CheckpointReader(checkpoint_dir, self.config)
        _check_frequencies(reader, self.config)
        # Kept as stored: a looked-up row is widened without loss, and a bf16 table stays small.
        self._embedding = reader.embedding().clone()
        self._layers = [self._layer(reader, index) for index in range(self.config.num_hidden_layers)]
        self._final_norm = self._owned(reader.final_norm())
        self._lm_head = make_projections(reader.lm_head(), self.dtype)
        self._rope = RopeTable(self.config, max_seq_len, self.dtype)
        first = self._layers[0]
        self.row_ladder = probe_row_ladder([first.qkv, first.dense, first.fc, first.proj, *self._lm_head])

    def _owned(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in the compute dtype that does not depend on the file any more."""
        return torch.empty(tensor.shape, dtype=self.dtype).copy_(tensor)

    def _layer(self, reader: CheckpointReader, index: int) -> LayerWeights:
        tensors = reader.layer(index)
        return LayerWeights(
            input_layernorm=self._owned(tensors["input_layernorm.weight"]),
            qkv=make_projection(tensors["attention.qkv.weight"], self.dtype),
            dense=make_projection(tensors["attention.dense.weight"], self.dtype),
            post_layernorm=self._owned(tensors["post_layernorm.weight"]),
            fc=make_projection(tensors["mlp.fc.weight"], self.dtype),
            gate=make_projection(tensors["mlp.gate.weight"], self.dtype),
            proj=make_projection(tensors["mlp.proj.weight"], self.dtype),
        )

    def new_cache(self) -> SequenceKvCache:
        """An empty KV cache for one sequence."""
        config = self.config
        return SequenceKvCache(
            config.num_hidden_layers, config.num_key_value_heads, config.head_size, self.dtype
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that one token takes."""
        config = self.config
        return (
            2 * config.num_hidden_layers * config.num_key_value_heads * config.head_size * self.dtype.itemsize
        )

    @torch.inference_mode()
    def prefill(self, input_ids: Sequence[int], cache: SequenceKvCache) -> torch.Tensor:
        """Compute one chunk of one prompt, behind what `cache` holds.

        Returns:
            Hidden states after the final norm, [tokens, hidden].
        """
        cache.reserve(len(input_ids))
        return self._forward(torch.tensor(input_ids), [cache], len(input_ids))

    def last_logits(self, input_ids: Sequence[int]) -> torch.Tensor:
        """Logits behind a whole prompt, [vocab_size] float32, computed in chunks."""
        cache = self.new_cache()
        for start in range(0, len(input_ids), PREFILL_CHUNK_TOKENS):
            hidden = self.prefill(input_ids[start : start + PREFILL_CHUNK_TOKENS], cache)
        return self.logits(hidden[-1:])[0]

    @torch.inference_mode()
    def decode(self, input_ids: Sequence[int], caches: Sequence[SequenceKvCache]) -> torch.Tensor:
        """Compute the next token of several sequences at once, one id and one cache each.

        Returns:
            Hidden states after the final norm, [sequences, hidden].
        """
        for cache in caches:
            cache.reserve(1)
        padding = self.row_ladder.padded(len(caches)) - len(caches)
        return self._forward(torch.tensor([*input_ids, *[0] * padding]), caches, 1)[: len(caches)]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states [rows, hidden], as float32 [rows, vocab_size]."""
        num_rows = hidden.shape[0]
        padded = F.pad(hidden, (0, 0, 0, self.row_ladder.padded(num_rows) - num_rows))
        out = torch.empty(padded.shape[0], self.config.vocab_size)
        for start, end in self.row_ladder.tiles(padded.shape[0]):
            torch.cat([part.float32(padded[start:end]) for part in self._lm_head], dim=1, out=out[start:end])
        return out[:num_rows]

    def _forward(
        self, ids: torch.Tensor, caches: Sequence[SequenceKvCache], tokens_each: int
    ) -> torch.Tensor:
        """All layers over `ids`: `tokens_each` tokens of each cache in turn, then padding rows."""
        positions = torch.zeros(len(ids), dtype=torch.int64)
        for index, cache in enumerate(caches):
            start = index * tokens_each
            positions[start : start + tokens_each] = torch.arange(cache.length, cache.length + tokens_each)
        angles = self._rope.at(positions)
        mask = None if tokens_each == 1 else self._grouped_mask(caches[0].length, tokens_each)
        x = self._embedding[ids].to(self.dtype)  # [rows, hidden]
        for index, layer in enumerate(self._layers):
            normed = self._norm(x, layer.input_layernorm)
            qkv = self._linear(normed, layer.qkv, tokens_each)
            attended = self._attention(index, qkv, angles, caches, mask)
            x = x + self._linear(attended, layer.dense, tokens_each)
            normed = self._norm(x, layer.post_layernorm)
            fc, gate = (self._linear(normed, weight, tokens_each) for weight in (layer.fc, layer.gate))
            x = x + self._linear(_swiglu(fc, gate), layer.proj, tokens_each)
        for cache in caches:
            cache.advance(tokens_each)
        return self._norm(x, self._final_norm)

    def _linear(self, x: torch.Tensor, weight: Projection, tokens_each: int) -> torch.Tensor:
        """A prompt's chunk as it is; rows of several sequences in the proven row counts."""
        if tokens_each > 1 or x.shape[0] <= self.row_ladder.sizes[-1]:
            return weight.float32(x).to(self.dtype)
        tiles = self.row_ladder.tiles(x.shape[0])
        return torch.cat([weight.float32(x[start:end]) for start, end in tiles]).to(self.dtype)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.config.norm_epsilon)
        return (wide * scale).to(x.dtype) * weight

    def _grouped_mask(self, num_before: int, num_new: int) -> torch.Tensor:
        """Added to a chunk's scores, [group * new, before + new]: a token sees those before it and itself."""
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        hidden = torch.full((num_new, num_before + num_new), float("-inf"), dtype=self.dtype)
        return hidden.triu(diagonal=num_before + 1).repeat(group, 1)

    def _attention(
        self,
        index: int,
        qkv: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        caches: Sequence[SequenceKvCache],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of every sequence over its own cache; [rows, heads * head_size]."""
        num_heads, num_kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        # [rows, heads + 2 * kv_heads, head_size]
        heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, self.config.head_size)
        rotated = rotate(heads[:, : num_heads + num_kv_heads], angles)
        # [rows, 2, kv_heads, head_size] -> [2, kv_heads, rows, head_size]
        new = torch.cat((rotated[:, num_heads:], heads[:, num_heads + num_kv_heads :]), dim=1)
        new = new.view(len(new), 2, num_kv_heads, -1).permute(1, 2, 0, 3)
        queries = rotated[:, :num_heads].view(len(new[0, 0]), num_kv_heads, -1, self.config.head_size)
        if mask is not None:
            return _attend_chunk(queries, *caches[0].write(index, new), mask)
        out = torch.zeros_like(queries)  # [rows, kv_heads, group, head_size]
        for row, cache in enumerate(caches):
            keys, values = cache.write(index, new[:, :, row : row + 1])
            out[row : row + 1] = F.scaled_dot_product_attention(queries[row : row + 1], keys, values)
        return out.view(len(out), -1)


def _check_frequencies(reader: CheckpointReader, config: CheckpointConfig) -> None:
    """Refuse a checkpoint whose own RoPE table, which TensorRT-LLM would use, contradicts its config."""
    stored = reader.stored_inverse_frequencies()
    if stored is None:
        return
    expected = inverse_frequencies(config)
    if stored.shape != expected.shape or not torch.allclose(stored.float(), expected, rtol=1e-4):
        raise UnsupportedCheckpointError(
            "the checkpoint's rotary_inv_freq contradicts rotary_base and rotary_scaling in its config.json; "
            "convert it again"
        )


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
