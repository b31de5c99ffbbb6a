"""The flags by which the commands that generate say how.

It knows flags; what they mean is `SamplingParams`' business.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence

from minitron_client.errors import InvalidValueError
from minitron_client.flag_types import UsageError, checked
from minitron_client.sampling import DEFAULT_MAX_TOKENS, SamplingParams, checked_number

# field of SamplingParams, type, help
_NUMBERS: tuple[tuple[str, type, str], ...] = (
    ("temperature", float, "above 1 flattens, below 1 sharpens; needs --top-p or --top-k"),
    ("top_k", int, "sample from the K likeliest tokens"),
    ("top_p", float, "sample from the likeliest tokens that reach probability P"),
    ("seed", int, "makes sampling repeatable"),
    ("repetition_penalty", float, "above 1 discourages tokens that occurred"),
    ("presence_penalty", float, "subtracted once for a token that occurred"),
    ("frequency_penalty", float, "subtracted for each time a token occurred"),
    ("min_tokens", int, "no end of text before this many tokens"),
    ("priority_level", int, "of the requests that wait, the lowest level runs first; 1 before all"),
)
EMBEDDING_BIAS = "embedding_bias"
"""Words and weights in one: `--embedding-bias`, and `/set embedding_bias` of the REPL."""


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags; `sampling_of` reads them."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=sampling_number("max_tokens", int), default=DEFAULT_MAX_TOKENS, metavar="N",
        help="default %(default)s",
    )  # fmt: skip
    for name, kind, text in _NUMBERS:
        group.add_argument(
            f"--{name.replace('_', '-')}", type=sampling_number(name, kind), metavar=kind.__name__.upper(),
            help=text,
        )  # fmt: skip
    for name, text in (("stop", "end after this text"), ("bad", "never generate this text")):
        group.add_argument(
            f"--{name}-word", dest=f"{name}_words", type=_word, action="append", default=[], metavar="TEXT",
            help=f"{text}; may be repeated",
        )  # fmt: skip
    group.add_argument(
        "--embedding-bias", type=checked(_bias), action="append", default=[], metavar="TEXT=WEIGHT",
        help="add WEIGHT to the logits of TEXT's tokens, above 0 for likelier; may be repeated",
    )  # fmt: skip


def sampling_number(name: str, kind: type) -> Callable[[str], int | float | None]:
    """The `type=` of a flag for a number of `SamplingParams`: its field's own range."""

    def check(text: str) -> int | float | None:
        try:
            value: object = kind(text)
        except ValueError:
            value = text
        return checked_number(name, value)

    return checked(check)


def sampling_of(args: argparse.Namespace) -> SamplingParams:
    """The options that the flags ask for.

    Raises:
        UsageError: one contradicts another.
    """
    names = ("max_tokens", "stop_words", "bad_words", *(name for name, _, _ in _NUMBERS))
    options: dict[str, object] = {name: getattr(args, name) for name in names}
    options |= _bias_options(args.embedding_bias)
    try:
        return SamplingParams.of(options)
    except InvalidValueError as error:
        raise UsageError(error.message) from None


def bias_options(texts: Iterable[str]) -> dict[str, object]:
    """Each `TEXT=WEIGHT`, as the two options that they are together.

    Raises:
        InvalidValueError: one of them is not TEXT=NUMBER.
    """
    return _bias_options([_bias(text) for text in texts])


def _bias_options(pairs: Sequence[tuple[str, float]]) -> dict[str, object]:
    return {
        "embedding_bias_words": [word for word, _ in pairs],
        "embedding_bias_weights": [weight for _, weight in pairs],
    }


def _bias(text: str) -> tuple[str, float]:
    word, _, weight = text.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not word or not math.isfinite(number):
        raise InvalidValueError(f"{EMBEDDING_BIAS} {text!r} is not TEXT=WEIGHT, such as yes=2.5")
    return word, number


def _word(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected a text, got an empty one")
    return text
