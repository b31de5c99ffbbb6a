"""A model of a verification, run layer by layer: one decoder layer in memory, many sequences through it.

The arithmetic is the reference engine's. It knows the order of a whole pass, not what it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from minitron_build.runtime.reference_engine.layerwise import NO_REUSE, LayerRunner, Reuse

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""
Ids = tuple[int, ...]


class Runner(LayerRunner):
    """One model, of which one layer at a time is in memory; see `LayerRunner` for its arguments."""

    def through(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        reuse: Mapping[int, Reuse] = NO_REUSE,
        on_layer: Callable[[int], None] | None = None,
    ) -> list[torch.Tensor]:
        """Hidden states behind the last layer, [tokens, hidden] of each sequence.

        Args:
            sequences: token ids, each from position 0.
            reuse: see `run_layer`.
            on_layer: called with the number of layers that are done.
        """
        hidden = self.embed(sequences)
        for index in range(self.num_layers):
            hidden = self.run_layer(index, hidden, reuse)
            if on_layer is not None:
                on_layer(index + 1)
        return hidden
