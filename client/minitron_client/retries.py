"""Whether to try again, and after which pause.

It knows attempts and seconds, nothing of requests or connections.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

INITIAL_PAUSE_S, MAX_PAUSE_S, JITTER = 0.5, 8.0, 0.25


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Pauses that double from half a second, each shortened by up to a quarter.

    Attributes:
        max_retries: attempts after the first.
        draw: gives a number in [0, 1): how much of the jitter to take off.
    """

    max_retries: int
    draw: Callable[[], float] = random.random

    def pause_s(self, num_failed: int, left_s: float, *, has_other: bool = False) -> float | None:
        """Seconds to wait before the next attempt; None to give up.

        Args:
            num_failed: attempts that have failed.
            left_s: seconds until the caller's deadline.
            has_other: another server is there to ask, which needs no time to recover.
        """
        if num_failed > self.max_retries:
            return None
        longest_s = min(INITIAL_PAUSE_S * 2.0 ** min(num_failed - 1, 10), MAX_PAUSE_S)
        pause_s = 0.0 if has_other else longest_s * (1 - JITTER * self.draw())
        return pause_s if pause_s < left_s else None
