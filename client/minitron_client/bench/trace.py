"""A trace: requests written down beforehand, one JSON object a line.

    {"input_tokens": 812, "output_tokens": 96, "timestamp": 0.35}
    {"prompt": "def add(a, b):", "output_tokens": 32}

`timestamp` is in seconds, from any zero. It knows the file's format and nothing of how it is played.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_client.bench.lengths import MAX_TOKENS
from minitron_client.bench.refusal import BenchError

KEYS = ("prompt", "input_tokens", "output_tokens", "timestamp")


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace; exactly one of `prompt` and `input_tokens` is set.

    Raises:
        BenchError: the row contradicts itself or has a value out of range.
    """

    output_tokens: int
    prompt: str | None = None
    input_tokens: int | None = None
    timestamp_s: float | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.input_tokens is None):
            raise BenchError("expected prompt or input_tokens, one of the two")
        if self.prompt is not None and (not isinstance(self.prompt, str) or not self.prompt):
            raise BenchError(f"prompt is {self.prompt!r}, expected a text that is not empty")
        for name, value in (("input_tokens", self.input_tokens), ("output_tokens", self.output_tokens)):
            if value is not None and not _is_count(value):
                raise BenchError(f"{name} is {value!r}, expected a whole number from 1 to {MAX_TOKENS}")
        if self.timestamp_s is not None and not _is_time(self.timestamp_s):
            raise BenchError(f"timestamp is {self.timestamp_s!r}, expected seconds, 0 or above")


def read_trace(path: Path) -> tuple[TraceRow, ...]:
    """The rows of a trace; timestamps are moved so that the first is 0.

    Raises:
        BenchError: the file is missing, empty, or a line is wrong; it names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold what else splitlines() splits at
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"trace {path}: {_reason(error)}; expected JSON lines in UTF-8") from error
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise BenchError(f"trace {path} has no line; expected one JSON object a request")
    return _from_zero(path, rows)


def mean_rate(rows: Sequence[TraceRow]) -> float:
    """Arrivals per second: gaps between timestamps over the time from the first to the last.

    0 where there is none: one request, all at the same time, or no timestamps.
    """
    last_s = rows[-1].timestamp_s
    return (len(rows) - 1) / last_s if last_s else 0.0


def _row(path: Path, number: int, line: str) -> TraceRow:
    where = f"trace {path} line {number}"
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise BenchError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(found, dict):
        raise BenchError(f"{where}: found {type(found).__name__}, expected an object with {', '.join(KEYS)}")
    unknown = sorted(set(found) - set(KEYS))
    if unknown:
        raise BenchError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(KEYS)}")
    if "output_tokens" not in found:
        raise BenchError(f"{where}: output_tokens is missing")
    try:
        return TraceRow(
            found["output_tokens"], found.get("prompt"), found.get("input_tokens"), found.get("timestamp")
        )
    except BenchError as error:
        raise BenchError(f"{where}: {error.message}") from error


def _from_zero(path: Path, rows: list[TraceRow]) -> tuple[TraceRow, ...]:
    """Timestamps are on every row or on none, and do not go back."""
    times = [row.timestamp_s for row in rows if row.timestamp_s is not None]
    if times and len(times) != len(rows):
        raise BenchError(
            f"trace {path}: {len(times)} of {len(rows)} requests have a timestamp; give all or none"
        )
    for number, (earlier, later) in enumerate(itertools.pairwise(times), 2):
        if later < earlier:
            raise BenchError(
                f"trace {path} request {number}: timestamp {later:g} after {earlier:g}; sort it by time"
            )
    if not times:
        return tuple(rows)
    return tuple(
        TraceRow(row.output_tokens, row.prompt, row.input_tokens, time - times[0])
        for row, time in zip(rows, times, strict=True)
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_TOKENS


def _is_time(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else f"not UTF-8 ({error.reason})"
