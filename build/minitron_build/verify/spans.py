"""Token sequences laid one behind the other, and the rows that each has. It knows numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one sequence in a batch.

    Attributes:
        reuse_at: compute the sequence in two goes, the second on the first one's KV cache, from this
            position; None: in one.
    """

    start: int
    end: int
    reuse_at: int | None = None


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token sequences laid one behind the other; each at its own rows.

    Attributes:
        reuse_at: by index of the sequence, where its KV cache is taken up again.
    """

    ids: tuple[tuple[int, ...], ...]
    reuse_at: Mapping[int, int] = field(default_factory=dict)

    @property
    def spans(self) -> list[Span]:
        """Rows of each sequence."""
        spans, start = [], 0
        for index, ids in enumerate(self.ids):
            spans.append(Span(start, start + len(ids), self.reuse_at.get(index)))
            start += len(ids)
        return spans

    def followed_by(self, others: Sequences) -> Sequences:
        """These sequences, then the others."""
        moved = {index + len(self.ids): at for index, at in others.reuse_at.items()}
        return Sequences(self.ids + others.ids, {**self.reuse_at, **moved})
