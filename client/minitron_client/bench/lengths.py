"""Lengths in tokens: fixed, or drawn from a distribution.

It knows how a distribution is written on the command line. It knows nothing of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from minitron_client.bench.refusal import BenchUsageError

if TYPE_CHECKING:
    import numpy as np

MAX_TOKENS = 2**20


class Shape(NamedTuple):
    """A family of distributions: its parameters' names, their check, and one draw."""

    parameters: tuple[str, ...]
    is_valid: Callable[[tuple[float, ...]], bool]
    wants: str
    draw: Callable[[np.random.Generator, tuple[float, ...]], float]


def _is_length(value: float) -> bool:
    return 1 <= value <= MAX_TOKENS


SHAPES: dict[str, Shape] = {
    "fixed": Shape(
        ("N",),
        lambda p: _is_length(p[0]) and p[0] == int(p[0]),
        f"a whole number from 1 to {MAX_TOKENS}",
        lambda rng, p: p[0],
    ),
    "uniform": Shape(
        ("LOW", "HIGH"),
        lambda p: _is_length(p[0]) and p[0] <= p[1] <= MAX_TOKENS,
        f"1 <= LOW <= HIGH <= {MAX_TOKENS}",
        lambda rng, p: float(rng.integers(int(p[0]), int(p[1]), endpoint=True)),
    ),
    "normal": Shape(
        ("MEAN", "STD"),
        lambda p: _is_length(p[0]) and p[1] >= 0,
        f"MEAN from 1 to {MAX_TOKENS} and STD at least 0",
        lambda rng, p: float(rng.normal(p[0], p[1])),
    ),
    "lognormal": Shape(
        ("MEDIAN", "SIGMA"),
        lambda p: _is_length(p[0]) and 0 <= p[1] <= 5,
        f"MEDIAN from 1 to {MAX_TOKENS} and SIGMA (of the logarithm) from 0 to 5",
        lambda rng, p: float(rng.lognormal(math.log(p[0]), p[1])),
    ),
}
FORMS = "N, " + ", ".join(
    f"{name}:{','.join(shape.parameters)}" for name, shape in SHAPES.items() if name != "fixed"
)


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long prompts or answers are.

    Attributes:
        shape: a name of SHAPES.
        parameters: its numbers, in tokens (SIGMA has no unit).

    Raises:
        BenchUsageError: the parameters do not suit the shape.
    """

    shape: str
    parameters: tuple[float, ...]

    def __post_init__(self) -> None:
        shape = SHAPES[self.shape]
        if (
            len(self.parameters) != len(shape.parameters)
            or not all(math.isfinite(value) for value in self.parameters)
            or not shape.is_valid(self.parameters)
        ):
            raise BenchUsageError(f"lengths {self}: expected {','.join(shape.parameters)} with {shape.wants}")

    def __str__(self) -> str:
        numbers = ",".join(f"{value:g}" for value in self.parameters)
        return numbers if self.shape == "fixed" else f"{self.shape}:{numbers}"

    def draw(self, rng: np.random.Generator) -> int:
        """One length in tokens; a draw outside 1 to MAX_TOKENS is moved to the nearer end."""
        return min(max(round(SHAPES[self.shape].draw(rng, self.parameters)), 1), MAX_TOKENS)


def parse_lengths(text: str) -> Lengths:
    """`128`, `uniform:64,256`, `normal:128,32` or `lognormal:128,0.5`.

    Raises:
        BenchUsageError: it is none of these.
    """
    name, colon, numbers = text.partition(":")
    if not colon:
        name, numbers = "fixed", text
    try:
        parameters = tuple(float(part) for part in numbers.split(","))
    except ValueError:
        parameters = ()
    if name not in SHAPES or not parameters:
        raise BenchUsageError(f"lengths {text!r}: expected {FORMS}")
    return Lengths(name, parameters)
