"""Source and candidate through their layers side by side, one layer of each in memory.

All sequences of a verification go through in one pass, so that nine gigabytes are read once. It knows hidden
states, layer errors and logits of chosen rows; which sequences these are and what is good enough it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minitron_build.verify.spans import Sequences, Span
from minitron_build.verify.statistics import TokenComparison, compare_rows, snr_db

if TYPE_CHECKING:
    import torch

    from minitron_build.verify.streamed_model import Head, StreamedModel

LOGIT_ROWS = 64
"""Rows whose logits of both models are in memory at once: 33 MB each at 128,256 tokens."""
LOCAL_ROWS = 1024
"""Rows that also go through the candidate's layer from the source's hidden states."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""


@dataclass(frozen=True, slots=True)
class LayerError:
    """How far a layer of the candidate is from the source's.

    Attributes:
        own_snr_db: of what the layer adds, given the source's hidden states: the layer's own error.
        stream_snr_db: of the hidden states behind it, errors of all layers before it included.
    """

    own_snr_db: float
    stream_snr_db: float


@dataclass(frozen=True, slots=True, eq=False)
class SideBySide:
    """What is left of a pass: hidden states behind the last layer, each layer's error, and both heads.

    Attributes:
        source, candidate: float32 [rows, hidden]; the candidate may have more sequences behind the source's.
    """

    source: torch.Tensor
    candidate: torch.Tensor
    layers: tuple[LayerError, ...]
    heads: tuple[Head, Head]

    def logits(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of rows of the source and of the candidate, float32 [rows, vocab_size] each."""
        return self.heads[0].logits(self.source[start:end]), self.candidate_logits(start, end)

    def candidate_logits(self, start: int, end: int) -> torch.Tensor:
        """Logits of rows of the candidate, float32 [rows, vocab_size]."""
        return self.heads[1].logits(self.candidate[start:end])


def run_side_by_side(
    source: StreamedModel,
    candidate: StreamedModel,
    shared: Sequences,
    candidate_only: Sequences,
    progress: Progress,
) -> SideBySide:
    """One pass of all layers.

    Args:
        shared: through both models.
        candidate_only: behind them, through the candidate alone.
    """
    import torch

    num_layers = source.config.num_hidden_layers
    spans = shared.spans
    both = shared.followed_by(candidate_only)
    both_spans, local_spans = both.spans, list(_first_rows(spans))
    num_local = local_spans[-1].end
    source_hidden, candidate_hidden = source.embed(shared.ids), candidate.embed(both.ids)
    errors = []
    for index in range(num_layers):
        progress("layers", index, num_layers)
        before = source_hidden[:num_local]
        source_hidden = source.layer(index)(source_hidden, spans)
        layer = candidate.layer(index)
        added = source_hidden[:num_local] - before
        candidate_hidden = layer(candidate_hidden, both_spans)
        errors.append(
            LayerError(
                _snr(added, layer(before, local_spans) - before),
                _snr(source_hidden[:num_local], candidate_hidden[:num_local]),
            )
        )
        del layer
    progress("layers", num_layers, num_layers)
    if not torch.isfinite(source_hidden).all():
        raise FloatingPointError("the source's hidden states are not finite")
    heads = source.head(), candidate.head()
    return SideBySide(source_hidden, candidate_hidden, tuple(errors), heads)


def compare_tokens(passed: SideBySide, span: Span, ids: Sequence[int]) -> Iterator[TokenComparison]:
    """Next-token distributions of both models at every row of a sequence that has a next token."""
    import torch

    for start in range(span.start, span.end - 1, LOGIT_ROWS):
        end = min(start + LOGIT_ROWS, span.end - 1)
        offset = start - span.start
        next_ids = torch.tensor(ids[offset + 1 : offset + 1 + end - start])
        yield compare_rows(*passed.logits(start, end), next_ids, offset)


def _first_rows(spans: Sequence[Span]) -> Iterator[Span]:
    """The first sequences, cut where there are more than LOCAL_ROWS rows."""
    for span in spans:
        if span.start < LOCAL_ROWS:
            yield Span(span.start, min(span.end, LOCAL_ROWS))


def _snr(signal: torch.Tensor, approximation: torch.Tensor) -> float:
    return snr_db(_energy(signal), _energy(signal - approximation))


def _energy(rows: torch.Tensor) -> float:
    """Sum of squares; row by row in float32, over the rows in float64."""
    return float(rows.norm(dim=-1).double().square().sum())
