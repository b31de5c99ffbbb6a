"""A model whose layers come and go: one decoder layer in memory, applied to rows of many sequences at once.

Every sequence starts at position 0. Matrix products see the rows of all sequences together, so that a weight
is read once; attention sees one sequence. It knows the order of a forward pass, not what it is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from minitron_build.runtime.reference_engine.checkpoint import CheckpointConfig
from minitron_build.runtime.reference_engine.linear import Projection, make_projection, make_projections
from minitron_build.runtime.reference_engine.rope import RopeTable, rotate
from minitron_build.verify.spans import Span

MLP_ROWS = 2048


class LayerReader(Protocol):
    """Whole tensors of a model under TensorRT-LLM's names."""

    config: CheckpointConfig

    def embedding(self) -> torch.Tensor:
        """[vocab_size, hidden_size]."""

    def lm_head(self) -> torch.Tensor:
        """[vocab_size, hidden_size]."""

    def final_norm(self) -> torch.Tensor:
        """[hidden_size]."""

    def layer(self, index: int) -> Mapping[str, torch.Tensor]:
        """The tensors of one layer."""


class StreamedModel:
    """Embedding, layers one at a time, and logits.

    Args:
        reader: a converted checkpoint's or an HF folder's.
        max_tokens: longest sequence.
    """

    def __init__(self, reader: LayerReader, *, max_tokens: int) -> None:
        self.config = reader.config
        self._reader = reader
        self._rope = RopeTable(self.config, max_tokens, torch.float32)

    def embed(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Embeddings of all ids, one sequence after the other, float32 [rows, hidden]."""
        ids = torch.tensor([one for sequence in sequences for one in sequence])
        return self._reader.embedding()[ids].float()

    def layers(self) -> Iterator[StreamedLayer]:
        """The layers in order; each is loaded when asked for and kept by nobody."""
        for index in range(self.config.num_hidden_layers):
            yield self.layer(index)

    def layer(self, index: int) -> StreamedLayer:
        """One layer, loaded."""
        return StreamedLayer(self.config, self._reader.layer(index), self._rope)

    def head(self) -> Head:
        """The final norm and the output projection, loaded."""
        return Head(self.config, self._reader.final_norm(), self._reader.lm_head())


class StreamedLayer:
    """One decoder layer in float32."""

    def __init__(
        self, config: CheckpointConfig, tensors: Mapping[str, torch.Tensor], rope: RopeTable
    ) -> None:
        self._config, self._rope = config, rope
        self._input_norm = tensors["input_layernorm.weight"].float()
        self._post_norm = tensors["post_layernorm.weight"].float()
        names = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
        self._qkv, self._dense, self._fc, self._gate, self._proj = (
            make_projection(weight, _exact_dtype(weight))
            for weight in (tensors[f"{name}.weight"] for name in names)
        )

    @torch.inference_mode()
    def __call__(self, hidden: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """Hidden states [rows, hidden] behind the layer, a new tensor."""
        normed = rms_norm(hidden, self._input_norm, self._config.norm_epsilon)
        qkv = _linear(self._qkv, normed)
        attended = torch.cat([self._attention(qkv[span.start : span.end], span.reuse_at) for span in spans])
        out = hidden + _linear(self._dense, attended)
        normed = rms_norm(out, self._post_norm, self._config.norm_epsilon)
        for rows in torch.split(torch.arange(len(out)), MLP_ROWS):
            part = normed[rows[0] : rows[-1] + 1]
            product = F.silu(self._fc.float32(part)) * self._gate.float32(part)
            out[rows[0] : rows[-1] + 1] += self._proj.float32(product)
        return out

    def _attention(self, qkv: torch.Tensor, reuse_at: int | None) -> torch.Tensor:
        """Causal attention of one sequence, [tokens, heads * head_size]."""
        config, num_tokens = self._config, len(qkv)
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        heads = qkv.view(num_tokens, -1, config.head_size)
        rotated = rotate(heads[:, : num_heads + num_kv_heads], self._rope.at(torch.arange(num_tokens)))
        queries, keys = rotated[:, :num_heads].transpose(0, 1), rotated[:, num_heads:].transpose(0, 1)
        values = heads[:, num_heads + num_kv_heads :].transpose(0, 1)
        if reuse_at is None:
            attended = _attend(queries, keys, values)
        else:
            first = _attend(queries[:, :reuse_at], keys[:, :reuse_at], values[:, :reuse_at])
            attended = torch.cat((first, _attend(queries[:, reuse_at:], keys, values)), dim=1)
        return attended.transpose(0, 1).reshape(num_tokens, -1)


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The last queries of a sequence over all its keys: [heads, new, size] over [kv_heads, tokens, size]."""
    num_new, num_tokens = queries.shape[1], keys.shape[1]
    mask = None
    if num_new != num_tokens:
        mask = torch.ones(num_new, num_tokens, dtype=torch.bool).tril(num_tokens - num_new)
    return F.scaled_dot_product_attention(
        queries[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )[0]


class Head:
    """The final norm and the output projection."""

    def __init__(self, config: CheckpointConfig, norm: torch.Tensor, weight: torch.Tensor) -> None:
        self._epsilon, self._norm = config.norm_epsilon, norm.float()
        self._parts = make_projections(weight, _exact_dtype(weight))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of rows of hidden states, float32 [rows, vocab_size]."""
        normed = rms_norm(hidden, self._norm, self._epsilon)
        return torch.cat([part.float32(normed) for part in self._parts], dim=1)


def _exact_dtype(weight: torch.Tensor) -> torch.dtype:
    """In which a projection loses nothing of the weight and takes the least memory."""
    return torch.bfloat16 if weight.dtype is torch.bfloat16 else torch.float32


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Rows divided by their root mean square, then weighed."""
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon) * weight


def _linear(projection: Projection, rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([projection.float32(part) for part in torch.split(rows, MLP_ROWS)])
