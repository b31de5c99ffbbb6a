"""Runs a model layer by layer over whole sets of sequences, with one layer's weights in memory at a time.

For measuring models that do not fit: a 9 GB checkpoint needs one layer, the hidden states and a little more.
The arithmetic is the engine's own, chunk for chunk, so hidden states have the bits of `LlamaModel.prefill`.
It knows nothing of what is measured.

    runner = LayerRunner(open_checkpoint(checkpoint_dir), max_seq_len=8192, compute_dtype="bfloat16")
    hidden = runner.embed(sequences)
    for index in range(runner.num_layers):
        hidden = runner.run_layer(index, hidden)  # one [tokens, hidden] per sequence
    logits = runner.output_head().logits(hidden[0][-1:])  # [1, vocab_size]

A source is anything that hands out weights part by part (`ModelSource`): a TensorRT-LLM checkpoint through
`CheckpointReader`, or another format through a class of the caller's. To see what one module costs, run a
layer put together from two: `runner.run_stored(dataclasses.replace(fp8_layer, qkv=bf16_layer.qkv), hidden)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint import CheckpointReader, ModelSource, StoredLayer, StoredLinear
from .config import CheckpointConfig, read_checkpoint_config
from .decoder import DecoderLayer, Rows, rms_norm
from .kv_cache import SequenceKvCache
from .linear import (
    LOADING_THREADS,
    Compute,
    MakeProjection,
    Projection,
    make_projections,
    use_whole_float32,
)
from .llama import COMPUTE_DTYPES, PREFILL_CHUNK_TOKENS, check_compute, check_frequencies, default_num_threads
from .rope import RopeTable


@dataclass(frozen=True, slots=True)
class Reuse:
    """Where a sequence begins as an earlier one, and takes over its keys and values, as an engine may.

    The earlier one is cut into chunks there too: so the rest of both has the same bits on any device, unless
    the cache gives back other numbers.

    Attributes:
        of: place of the earlier sequence.
        at: how many tokens are taken over.
    """

    of: int
    at: int


NO_REUSE: Mapping[int, Reuse] = {}


def open_checkpoint(checkpoint_dir: Path) -> CheckpointReader:
    """A TensorRT-LLM checkpoint as a source, its config and every tensor's name, dtype and shape checked.

    Raises:
        UnsupportedCheckpointError: the checkpoint asks for something this engine does not implement.
    """
    reader = CheckpointReader(checkpoint_dir, read_checkpoint_config(checkpoint_dir))
    check_frequencies(reader)
    return reader


class LayerRunner:
    """One model, of which one layer at a time is in memory.

    Args:
        source: where the weights come from.
        max_seq_len: the longest sequence's tokens.
        compute_dtype: "float32" or "bfloat16", as for `LlamaModel`.
        num_threads: torch threads of the whole process; None: one for a small model, else every core.
        device: where it computes; hidden states stay there.

    Raises:
        UnsupportedCheckpointError: more positions than the model has.
        ValueError: an unknown compute dtype.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        max_seq_len: int,
        compute_dtype: str = "float32",
        num_threads: int | None = None,
        device: str = "cpu",
    ) -> None:
        check_compute(compute_dtype, max_seq_len, source.config)
        self.source, self._config = source, source.config
        self._compute = Compute(COMPUTE_DTYPES[compute_dtype], torch.device(device))
        torch.set_num_threads(num_threads or default_num_threads(source.config))
        use_whole_float32(self._compute.device)
        self._max_seq_len, self.num_layers = max_seq_len, source.config.num_hidden_layers
        self._rope = RopeTable(source.config, max_seq_len, self._compute)

    @torch.inference_mode()
    def embed(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The hidden states that the first layer gets, [tokens, hidden] of each sequence.

        Raises:
            ValueError: an empty sequence, one longer than `max_seq_len`, or an id outside the vocabulary.
        """
        vocab_size = self._config.vocab_size
        for number, ids in enumerate(sequences):
            if not 1 <= len(ids) <= self._max_seq_len:
                raise ValueError(
                    f"sequence {number} has {len(ids)} tokens; expected 1 to {self._max_seq_len}"
                )
            outside = next((one for one in ids if not 0 <= one < vocab_size), None)
            if outside is not None:
                raise ValueError(
                    f"sequence {number} holds token id {outside}; expected 0 to {vocab_size - 1}"
                )
        table = self.source.embedding()
        hidden = [self._compute.owned(table[torch.tensor(ids)]) for ids in sequences]
        self.source.release()
        return hidden

    def run_layer(
        self, index: int, hidden: Sequence[torch.Tensor], reuse: Mapping[int, Reuse] = NO_REUSE
    ) -> list[torch.Tensor]:
        """The hidden states behind layer `index`, given those before it; each [tokens, hidden].

        The layer's weights are read, used for every sequence, and dropped.

        Args:
            index: which layer.
            hidden: of every sequence.
            reuse: by place of a sequence, what it takes over of an earlier one; its hidden states are that
                one's so far.

        Raises:
            UnsupportedCheckpointError: a weight or a scaling factor that no engine could use.
        """
        try:
            return self.run_stored(self.source.layer(index), hidden, reuse)
        finally:
            self.source.release()

    def run_stored(
        self, stored: StoredLayer, hidden: Sequence[torch.Tensor], reuse: Mapping[int, Reuse] = NO_REUSE
    ) -> list[torch.Tensor]:
        """As `run_layer`, with weights from anywhere."""
        layer = self.load(stored)
        cuts = {taken.of: taken.at for taken in reuse.values()}
        caches: dict[int, SequenceKvCache] = {}  # of those that others begin with
        out: list[torch.Tensor] = []
        for place, x in enumerate(hidden):
            if place in reuse:
                taken = reuse[place]
                out.append(layer.run_on(out[taken.of][: taken.at], caches[taken.of], x[taken.at :]))
                continue
            cache = layer.new_cache(len(x))
            out.append(layer.run(x, cache, cuts.get(place)))
            if place in cuts:
                caches[place] = cache
        return out

    def load(self, stored: StoredLayer) -> LoadedLayer:
        """A layer in memory, for those who run it more than once."""
        return LoadedLayer(self._config, stored, self._compute, self._rope)

    def output_head(self) -> OutputHead:
        """The last norm and the output projection, which stay in memory as long as the result does."""
        try:
            return OutputHead(self.source, self._compute)
        finally:
            self.source.release()


class LoadedLayer:
    """One layer in memory; made by `LayerRunner.load`."""

    def __init__(
        self, config: CheckpointConfig, stored: StoredLayer, compute: Compute, rope: RopeTable
    ) -> None:
        self._config, self._compute, self._rope = config, compute, rope
        self._is_fp8_cache = stored.kv_cache_scale is not None
        with ThreadPoolExecutor(LOADING_THREADS) as pool:
            self._layer = DecoderLayer(config, stored, compute, cache_index=0, each=pool.map)

    def new_cache(self, num_tokens: int) -> SequenceKvCache:
        """An empty KV cache of this layer with room for a sequence."""
        cache = SequenceKvCache(self._config, self._compute, 1, is_fp8=self._is_fp8_cache)
        cache.reserve(num_tokens)
        return cache

    @torch.inference_mode()
    def run(
        self, x: torch.Tensor, cache: SequenceKvCache | None = None, cut_at: int | None = None
    ) -> torch.Tensor:
        """Hidden states behind the layer, a new [tokens, hidden], of the tokens behind what `cache` holds.

        Args:
            x: the hidden states before it.
            cache: None for a sequence that begins here.
            cut_at: a token of `x` with which a chunk begins, whatever its place.
        """
        cache = self.new_cache(len(x)) if cache is None else cache
        out = torch.empty_like(x)
        for start, end in _chunks(len(x), cut_at or len(x)):
            rows = Rows.chunk(self._config, cache, end - start, self._rope, self._compute.dtype)
            out[start:end] = self._layer.forward(x[start:end], rows)
            cache.advance(end - start)
        return out

    @torch.inference_mode()
    def run_on(self, known: torch.Tensor, cache: SequenceKvCache, rest: torch.Tensor) -> torch.Tensor:
        """As `run`, of a sequence whose first hidden states are `known`, and whose keys and values cached."""
        cache.rewind(len(known))
        return torch.cat((known, self.run(rest, cache)))


def _chunks(num_tokens: int, border: int) -> Iterator[tuple[int, int]]:
    """The engine's chunks of a prompt, begun anew at `border`."""
    for first, last in ((0, border), (border, num_tokens)):
        for start in range(first, last, PREFILL_CHUNK_TOKENS):
            yield start, min(start + PREFILL_CHUNK_TOKENS, last)


class OutputHead:
    """From the hidden states behind the last layer to logits; made by `LayerRunner.output_head`."""

    def __init__(self, source: ModelSource, compute: Compute) -> None:
        self._norm, self._epsilon = compute.owned(source.final_norm()), source.config.norm_epsilon

        def each_then_release(make: MakeProjection, parts: Iterable[StoredLinear]) -> Iterator[Projection]:
            for part in parts:
                yield make(part)
                source.release()  # or the whole head would stand in memory twice

        self._projections = make_projections(source.lm_head(), compute, each=each_then_release)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states [rows, hidden], float32 [rows, vocab_size].

        Half a megabyte a row at 128,256 ids: give it some hundred rows at a time.
        """
        normed = rms_norm(hidden, self._norm, self._epsilon)
        return torch.cat([part.float32(normed) for part in self._projections], dim=1)
