"""What the `tensorrt_llm` model answers: engine outputs to named arrays.

It knows TensorRT-LLM's output names, shapes and which flag asks for which. It knows nothing of Triton's
objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .inputs import Array
from .reference_engine import EngineOutput
from .token_request import Returns, SequenceRequest


@dataclass(frozen=True, slots=True)
class Piece:
    """What one response of one sequence is made of."""

    sequence: SequenceRequest
    token_ids: tuple[int, ...]
    """The ids the response carries: new ones, or prompt and completion when the caller wants both at once."""
    outputs: tuple[EngineOutput, ...]
    """The engine's outputs behind it, at least one."""
    output_tokens: int
    """Tokens generated so far, these included."""

    @property
    def last(self) -> EngineOutput:
        """The newest of the outputs."""
        return self.outputs[-1]


def _int32(*values: int) -> Array:
    return np.array([values], dtype=np.int32)  # [batch 1, len(values)]


def _time(value_ns: int) -> Array:
    return np.array([[value_ns]], dtype=np.int64)


def _new_blocks(piece: Piece) -> Array:
    new = piece.last.kv_new_blocks
    return _int32(piece.last.kv_blocks if new is None else new)


def _log_probs(piece: Piece) -> Array:
    values = [value for output in piece.outputs for value in output.log_probs]
    return np.array([[values]], dtype=np.float32)  # [batch 1, beam 1, new tokens]


def _context_logits(piece: Piece) -> Array | None:
    found = next((out.context_logits for out in piece.outputs if out.context_logits is not None), None)
    return None if found is None else found[None].astype(np.float32, copy=False)  # [batch 1, prompt, vocab]


def _generation_logits(piece: Piece) -> Array | None:
    parts = [out.generation_logits for out in piece.outputs if out.generation_logits is not None]
    if not parts:
        return None
    return np.concatenate(parts).astype(np.float32, copy=False)[
        None, None
    ]  # [batch 1, beam 1, new tokens, vocab]


_OUTPUTS: dict[str, tuple[str | None, Callable[[Piece], Array | None]]] = {
    "output_ids": (None, lambda piece: np.array([[piece.token_ids]], dtype=np.int32)),  # [batch 1, beam 1, n]
    "sequence_length": (None, lambda piece: _int32(len(piece.token_ids))),  # [batch 1, beam 1]
    "batch_index": (None, lambda piece: _int32(piece.sequence.batch_index)),
    "sequence_index": (None, lambda piece: _int32(piece.sequence.sequence_index)),
    "cum_log_probs": ("log_probs", lambda piece: np.array([[piece.last.cum_log_prob]], dtype=np.float32)),
    "output_log_probs": ("log_probs", _log_probs),
    "context_logits": ("context_logits", _context_logits),
    "generation_logits": ("generation_logits", _generation_logits),
    "num_input_tokens": ("num_input_tokens", lambda piece: _int32(len(piece.sequence.generation.input_ids))),
    "num_output_tokens": ("num_output_tokens", lambda piece: _int32(piece.output_tokens)),
    "arrival_time_ns": ("perf_metrics", lambda piece: _time(piece.last.times.arrival_ns)),
    "first_scheduled_time_ns": ("perf_metrics", lambda piece: _time(piece.last.times.first_scheduled_ns)),
    "first_token_time_ns": ("perf_metrics", lambda piece: _time(piece.last.times.first_token_ns)),
    "last_token_time_ns": ("perf_metrics", lambda piece: _time(piece.last.times.last_token_ns)),
    "kv_cache_alloc_total_blocks": ("perf_metrics", lambda piece: _int32(piece.last.kv_blocks)),
    "kv_cache_alloc_new_blocks": ("perf_metrics", _new_blocks),
    "kv_cache_reused_blocks": ("perf_metrics", lambda piece: _int32(piece.last.kv_reused_blocks)),
}
"""Output -> the flag of `Returns` that asks for it (None: always sent when requested), and how it is made."""
OPTIONAL_OUTPUTS = frozenset(name for name, (flag, _) in _OUTPUTS.items() if flag is not None)
"""Those that only a flag brings."""


def to_arrays(piece: Piece, wanted: frozenset[str], returns: Returns) -> dict[str, Array]:
    """The tensors of one response: those requested by name and asked for by flag.

    Args:
        piece: what the response is made of.
        wanted: output names the caller requested.
        returns: the caller's flags.
    """
    arrays: dict[str, Array] = {}
    for name, (flag, make) in _OUTPUTS.items():
        if name in wanted and (flag is None or getattr(returns, flag)):
            array = make(piece)
            if array is not None:
                arrays[name] = array
    return arrays


def empty_arrays(wanted: frozenset[str]) -> dict[str, Array]:
    """The empty final response of a stopped request, as TensorRT-LLM's backend sends it."""
    arrays = {
        "output_ids": np.zeros((1, 1, 0), dtype=np.int32),
        "sequence_length": np.zeros((1, 1), dtype=np.int32),
    }
    return {name: array for name, array in arrays.items() if name in wanted}


def joined_ids(outputs: Sequence[EngineOutput]) -> tuple[int, ...]:
    """The new ids of several outputs in order."""
    return tuple(token_id for output in outputs for token_id in output.token_ids)
