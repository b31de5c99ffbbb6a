"""A model whose layers come and go: one decoder layer in memory, applied to rows of many sequences at once.

The arithmetic is the reference engine's, in float32. It knows how rows of sequences lie behind each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from minitron_build.runtime.reference_engine import LayerRunner, LoadedLayer, ModelSource
from minitron_build.runtime.reference_engine import OutputHead as Head
from minitron_build.verify.spans import Span

__all__ = ["Head", "StreamedLayer", "StreamedModel"]


class StreamedModel:
    """Embedding, layers one at a time, and logits.

    Args:
        source: a converted checkpoint's weights or an HF folder's.
        max_tokens: longest sequence.
    """

    def __init__(self, source: ModelSource, *, max_tokens: int) -> None:
        self.config = source.config
        self._runner = LayerRunner(source, max_seq_len=min(max_tokens, self.config.max_position_embeddings))

    def embed(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Embeddings of all ids, one sequence after the other, float32 [rows, hidden]."""
        return torch.cat(self._runner.embed(sequences))

    def layers(self) -> Iterator[StreamedLayer]:
        """The layers in order; each is loaded when asked for and kept by nobody."""
        for index in range(self.config.num_hidden_layers):
            yield self.layer(index)

    def layer(self, index: int) -> StreamedLayer:
        """One layer, loaded."""
        layer = StreamedLayer(self._runner.load(self._runner.source.layer(index)))
        self._runner.source.release()
        return layer

    def head(self) -> Head:
        """The final norm and the output projection, loaded."""
        return self._runner.output_head()


class StreamedLayer:
    """One decoder layer in float32."""

    def __init__(self, layer: LoadedLayer) -> None:
        self._layer = layer

    def __call__(self, hidden: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """Hidden states [rows, hidden] behind the layer, a new tensor."""
        return torch.cat([self._layer.run(hidden[one.start : one.end], one.reuse_at) for one in spans])
