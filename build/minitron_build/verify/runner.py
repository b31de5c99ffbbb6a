"""Both models of a verification run layer by layer: one decoder layer in memory, many sequences through it.

The arithmetic is the reference engine's. Added here is what an engine with KV cache reuse does: a sequence
whose second part is computed on keys and values that an earlier request left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from minitron_build.runtime.reference_engine.checkpoint import StoredLayer
from minitron_build.runtime.reference_engine.decoder import DecoderLayer, Rows
from minitron_build.runtime.reference_engine.kv_cache import SequenceKvCache
from minitron_build.runtime.reference_engine.layerwise import LayerRunner
from minitron_build.runtime.reference_engine.llama import PREFILL_CHUNK_TOKENS

NO_REUSE: Mapping[int, int] = {}


Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""
Ids = tuple[int, ...]


class Runner(LayerRunner):
    """One model, of which one layer at a time is in memory; see `LayerRunner` for its arguments."""

    def through(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        reuse_at: Mapping[int, int] = NO_REUSE,
        on_layer: Callable[[int], None] | None = None,
    ) -> list[torch.Tensor]:
        """Hidden states behind the last layer, [tokens, hidden] of each sequence.

        Args:
            reuse_at: see `run`.
            on_layer: called with the number of each layer that is done.
        """
        hidden = self.embed(sequences)
        for index in range(self.num_layers):
            hidden = self.run(self.source.layer(index), hidden, reuse_at)
            self.source.release()
            if on_layer is not None:
                on_layer(index + 1)
        return hidden

    @torch.inference_mode()
    def run(
        self, stored: StoredLayer, hidden: Sequence[torch.Tensor], reuse_at: Mapping[int, int] = NO_REUSE
    ) -> list[torch.Tensor]:
        """Hidden states behind a layer, [tokens, hidden] of each sequence.

        Args:
            reuse_at: by index of the sequence, the position from which it is computed on a KV cache that
                holds all before; the cache is what a first pass over those tokens left.
        """
        layer = DecoderLayer(self._config, stored, self._compute, cache_index=0)
        is_fp8 = stored.kv_cache_scale is not None
        return [
            self._run_sequence(layer, x, is_fp8) if at is None else self._run_reusing(layer, x, is_fp8, at)
            for x, at in ((x, reuse_at.get(index)) for index, x in enumerate(hidden))
        ]

    def _run_reusing(
        self, layer: DecoderLayer, x: torch.Tensor, is_fp8_cache: bool, reuse_at: int
    ) -> torch.Tensor:
        """The whole sequence, its chunks cut anew from `reuse_at` on."""
        cache = SequenceKvCache(self._config, self._compute, 1, is_fp8=is_fp8_cache)
        cache.reserve(len(x))
        parts = []
        for part in (x[:reuse_at], x[reuse_at:]):
            for chunk in torch.split(part, PREFILL_CHUNK_TOKENS):
                rows = Rows.chunk(self._config, cache, len(chunk), self._rope, self._compute.dtype)
                parts.append(layer.forward(chunk, rows))
                cache.advance(len(chunk))
        return torch.cat(parts)
