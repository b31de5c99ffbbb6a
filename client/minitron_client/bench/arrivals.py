"""When the requests of an open loop are due.

It knows arrival processes and nothing of what arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def _poisson(rate: float, rng: np.random.Generator) -> Iterator[float]:
    """Independent arrivals: gaps are exponential with mean 1 / rate."""
    now_s = 0.0
    while True:
        now_s += float(rng.exponential(1 / rate))
        yield now_s


def _constant(rate: float, rng: np.random.Generator) -> Iterator[float]:
    """One every 1 / rate seconds; a product and no sum, so that no rounding adds up."""
    number = 0
    while True:
        yield number / rate
        number += 1


ARRIVALS: dict[str, Callable[[float, np.random.Generator], Iterator[float]]] = {
    "poisson": _poisson,
    "constant": _constant,
}


def arrival_times(process: str, rate: float, rng: np.random.Generator) -> Iterator[float]:
    """Seconds after the start at which requests are due, without end and never going back.

    Args:
        process: a name of ARRIVALS.
        rate: mean requests per second, above 0.
        rng: where chance comes from.
    """
    return ARRIVALS[process](rate, rng)
