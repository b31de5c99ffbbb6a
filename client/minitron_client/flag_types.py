"""What a flag's value may be: `type=` functions for argparse, and flags that do not go together.

argparse prints their sentence behind the flag's name and exits with 2. A flag that is right in itself, and
refused by a file, a model or a server, is not bad usage: that is told elsewhere, with exit 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import ClassVar, TypeVar

from minitron_client.errors import InvalidValueError

T = TypeVar("T")


class UsageError(InvalidValueError):
    """Flags that contradict one another, or lack one another: exit 2; `str()` is one line for the user."""

    is_bad_usage: ClassVar[bool] = True

    def __str__(self) -> str:
        return self.message


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""
    bounds = f"a whole number from {low}" + ("" if high is None else f" to {high}")

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected {bounds}, got {text!r}")
        return value

    return read


def number(
    low: float, high: float = math.inf, *, is_open_below: bool = False, unit: str = "a number"
) -> Callable[[str], float]:
    """A finite number from `low` (above it with `is_open_below`) to `high`."""
    bounds = f"{unit} {'above' if is_open_below else 'from'} {low:g}"
    bounds += f" to {high:g}" if math.isfinite(high) else ""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        is_low = value <= low if is_open_below else value < low
        if not math.isfinite(value) or is_low or value > high:
            raise argparse.ArgumentTypeError(f"expected {bounds}, got {text!r}")
        return value

    return read


port = integer(1, 65535)
"""A TCP port."""
seconds = number(0, is_open_below=True, unit="seconds")
"""A time above 0."""
seconds_or_0 = number(0, unit="seconds")
"""A time, 0 included."""


def checked(check: Callable[[str], T]) -> Callable[[str], T]:
    """What `check` makes of the text; its refusal is bad usage."""

    def read(text: str) -> T:
        try:
            return check(text)
        except InvalidValueError as error:
            raise argparse.ArgumentTypeError(error.message) from None

    return read
