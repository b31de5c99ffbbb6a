"""Lists of token sequences in TensorRT-LLM's flat layout: stop words and bad words.

A list is int32 [2, length]: row 0 holds the ids of all sequences one after the other, row 1 where each
sequence ends, filled up with -1. It knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from .status import invalid

IdSequences = tuple[tuple[int, ...], ...]
_NO_END, _FILL = -1, 0


def pack(rows: Sequence[Sequence[Sequence[int]]]) -> npt.NDArray[np.int32]:
    """Lay out one list of sequences per row of a batch.

    Returns:
        [batch, 2, length] int32; length 0 when no row has a sequence.
    """
    length = max((sum(map(len, row)) for row in rows), default=0)
    packed = np.full((len(rows), 2, length), _NO_END, dtype=np.int32)
    packed[:, 0] = _FILL
    for place, row in enumerate(rows):
        ids = [token_id for sequence in row for token_id in sequence]
        packed[place, 0, : len(ids)] = ids
        packed[place, 1, : len(row)] = list(accumulate(map(len, row)))
    return packed


def unpack(packed: npt.NDArray[np.int32] | None, name: str) -> IdSequences:
    """Read one row of the layout.

    Args:
        packed: [2, length], or None for no sequence.
        name: what an error calls the tensor.

    Raises:
        StatusError: another shape, or ends that do not rise within the ids.
    """
    if packed is None:
        return ()
    if packed.ndim != 2 or packed.shape[0] != 2:
        raise invalid(f"{name} has shape {list(packed.shape)} per row; expected [2, length]")
    ids = packed[0].tolist()
    ends = [end for end in packed[1].tolist() if end != _NO_END]
    starts = [0, *ends][: len(ends)]
    if any(end <= start or end > len(ids) for start, end in zip(starts, ends, strict=True)):
        raise invalid(
            f"{name} has sequence ends {ends} over {len(ids)} ids; expected rising ends within the ids"
        )
    return tuple(tuple(ids[start:end]) for start, end in zip(starts, ends, strict=True))
