"""The Llama forward pass over a whole TensorRT-LLM checkpoint in memory.

It knows the stack of layers, the embedding and the output head, and one KV cache per sequence; nothing of
requests, sampling or scheduling. What a row computes never depends on the other rows of the batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from .checkpoint import CheckpointReader
from .config import CheckpointConfig, UnsupportedCheckpointError, read_checkpoint_config
from .decoder import DecoderLayer, Rows, rms_norm
from .kv_cache import Scratch, SequenceKvCache
from .linear import LOADING_THREADS, Compute, make_projections, probe_row_ladder, use_whole_float32
from .rope import RopeTable, inverse_frequencies

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Prompt tokens per pass: long enough for the matrix products, short enough that running streams barely wait.
PREFILL_CHUNK_TOKENS = 256
# A layer this small is computed faster by one thread than two can agree on it, far more so on a busy machine.
SINGLE_THREAD_LAYER_NUMBERS = 4 << 20


def default_num_threads(config: CheckpointConfig) -> int:
    """How many threads serve a model of this size best on this machine."""
    qkv_and_dense = config.head_size * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layer_numbers = config.hidden_size * (qkv_and_dense + 3 * config.intermediate_size)
    return 1 if layer_numbers < SINGLE_THREAD_LAYER_NUMBERS else os.cpu_count() or 1


def check_compute(compute_dtype: str, max_seq_len: int, config: CheckpointConfig) -> None:
    """Refuse a dtype this engine does not compute in, and positions the model does not have.

    Raises:
        ValueError: an unknown compute dtype.
        UnsupportedCheckpointError: more positions than the checkpoint's config declares.
    """
    if compute_dtype not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype is {compute_dtype!r}; expected one of {', '.join(COMPUTE_DTYPES)}")
    if max_seq_len > config.max_position_embeddings:
        raise UnsupportedCheckpointError(
            f"max_seq_len is {max_seq_len}; the model has {config.max_position_embeddings} positions"
        )


class LlamaModel:
    """A whole model in memory.

    Args:
        checkpoint_dir: a TensorRT-LLM checkpoint, any tp x pp mapping, unquantised or FP8.
        max_seq_len: positions the RoPE table covers.
        compute_dtype: "float32"; or "bfloat16": weights, KV cache and activations in it, sums in float32.
        num_threads: torch threads of the whole process; None: one for a small model, else every core.
        keeps_fp8_bytes: see `Compute`.
        device: where it computes; a CUDA device with FP8 tensor cores uses them.

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
        keeps_fp8_bytes: bool = False,
        device: str = "cpu",
    ) -> None:
        self.config = read_checkpoint_config(checkpoint_dir)
        check_compute(compute_dtype, max_seq_len, self.config)
        self.dtype = COMPUTE_DTYPES[compute_dtype]
        self._compute = Compute(self.dtype, torch.device(device), keeps_fp8_bytes)
        self._scratch = Scratch(self._compute)
        torch.set_num_threads(num_threads or default_num_threads(self.config))
        use_whole_float32(self._compute.device)
        reader = CheckpointReader(checkpoint_dir, self.config)
        check_frequencies(reader)
        # Kept as stored: a looked-up row is widened without loss, and a bf16 table stays small.
        self._embedding = reader.embedding().to(self._compute.device, copy=True)
        with ThreadPoolExecutor(LOADING_THREADS) as pool:
            indices = range(self.config.num_hidden_layers)
            self._layers = list(pool.map(partial(self._load_layer, reader), indices))
            self._lm_head = make_projections(reader.lm_head(), self._compute, each=pool.map)
        self._final_norm = self._compute.owned(reader.final_norm())
        reader.release()
        self._rope = RopeTable(self.config, max_seq_len, self._compute)
        projections = [one for layer in self._layers for one in layer.projections]
        self.row_ladder = probe_row_ladder([*projections, *self._lm_head], self._compute.device)

    def _load_layer(self, reader: CheckpointReader, index: int) -> DecoderLayer:
        layer = DecoderLayer(self.config, reader.layer(index), self._compute, index)
        reader.release()  # so that the file's pages do not pile up beside the weights
        return layer

    def new_cache(self) -> SequenceKvCache:
        """An empty KV cache for one sequence."""
        config = self.config
        is_fp8 = config.quantization.has_fp8_kv_cache
        return SequenceKvCache(
            config, self._compute, config.num_hidden_layers, is_fp8=is_fp8, scratch=self._scratch
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that one token takes."""
        return self.new_cache().bytes_per_token

    @torch.inference_mode()
    def prefill(self, input_ids: Sequence[int], cache: SequenceKvCache) -> torch.Tensor:
        """Compute one chunk of one prompt, behind what `cache` holds.

        Returns:
            Hidden states after the final norm, [tokens, hidden].
        """
        cache.reserve(len(input_ids))
        return self._forward(
            input_ids, Rows.chunk(self.config, cache, len(input_ids), self._rope, self.dtype)
        )

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
        num_rows = self.row_ladder.padded(len(caches))
        rows = Rows.step(caches, num_rows, self._rope, self.row_ladder)
        return self._forward([*input_ids, *[0] * (num_rows - len(caches))], rows)[: len(caches)]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states [rows, hidden], as float32 [rows, vocab_size] on the CPU."""
        num_rows = hidden.shape[0]
        padded = F.pad(hidden, (0, 0, 0, self.row_ladder.padded(num_rows) - num_rows))
        out = torch.empty(padded.shape[0], self.config.vocab_size, device=hidden.device)
        for start, end in self.row_ladder.tiles(padded.shape[0]):
            torch.cat([part.float32(padded[start:end]) for part in self._lm_head], dim=1, out=out[start:end])
        return out[:num_rows].cpu()

    def _forward(self, input_ids: Sequence[int], rows: Rows) -> torch.Tensor:
        x = self._embedding[torch.tensor(input_ids, device=self._embedding.device)].to(self.dtype)
        for layer in self._layers:  # x is [rows, hidden]
            x = layer.forward(x, rows)
        for cache in rows.caches:
            cache.advance(rows.tokens_each)
        return rms_norm(x, self._final_norm, self.config.norm_epsilon)


def check_frequencies(source: CheckpointReader) -> None:
    """Refuse a checkpoint whose own RoPE table, which TensorRT-LLM would use, contradicts its config.

    Raises:
        UnsupportedCheckpointError: the two differ.
    """
    stored = source.stored_inverse_frequencies()
    if stored is None:
        return
    expected = inverse_frequencies(source.config)
    if stored.shape != expected.shape or not torch.allclose(stored.float(), expected, rtol=1e-4):
        raise UnsupportedCheckpointError(
            "the checkpoint's rotary_inv_freq contradicts rotary_base and rotary_scaling in its config.json; "
            "convert it again"
        )
