"""What an engine gave one sequence since the last time, as the text models take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from .inputs import Array
from .status import StatusError

NO_ARRAYS: Mapping[str, Array] = MappingProxyType({})


class EngineStep(NamedTuple):
    """New tokens, or the end, of one sequence."""

    token_ids: Sequence[int] = ()
    log_probs: Sequence[float] = ()
    """Of `token_ids`, when asked for."""
    arrays: Mapping[str, Array] = NO_ARRAYS
    """Logits and measurements by the engine model's output name, when asked for."""
    finish_reason: str | None = None
    """"stop", "length" or "cancelled" on the last step of a sequence that did not fail."""
    error: StatusError | None = None
    """Why the sequence failed; nothing follows."""

    @property
    def is_last(self) -> bool:
        """Whether nothing follows."""
        return self.finish_reason is not None or self.error is not None
