"""The flags by which the commands that generate say how.

It knows flags; what they mean is `SamplingParams`' business.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from minitron_client.errors import InvalidValueError
from minitron_client.sampling import DEFAULT_MAX_TOKENS, SamplingParams

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
        "--max-tokens", type=int, default=DEFAULT_MAX_TOKENS, metavar="N", help="default %(default)s"
    )
    for name, kind, text in _NUMBERS:
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=text)
    for name, text in (("stop", "end after this text"), ("bad", "never generate this text")):
        group.add_argument(
            f"--{name}-word", dest=f"{name}_words", action="append", default=[], metavar="TEXT",
            help=f"{text}; may be repeated",
        )  # fmt: skip
    group.add_argument(
        "--embedding-bias", action="append", default=[], metavar="TEXT=WEIGHT",
        help="add WEIGHT to the logits of TEXT's tokens, above 0 for likelier; may be repeated",
    )  # fmt: skip


def sampling_of(args: argparse.Namespace) -> SamplingParams:
    """The options that the flags ask for.

    Raises:
        InvalidValueError: a value is refused, or contradicts another.
    """
    names = ("max_tokens", "stop_words", "bad_words", *(name for name, _, _ in _NUMBERS))
    options: dict[str, object] = {name: getattr(args, name) for name in names}
    return SamplingParams.of(options | bias_options(args.embedding_bias))


def bias_options(texts: Iterable[str]) -> dict[str, object]:
    """`TEXT=WEIGHT`, each, as the two options that it is.

    Raises:
        InvalidValueError: one of them is not TEXT=NUMBER.
    """
    words: list[str] = []
    weights: list[float] = []
    for text in texts:
        word, _, weight = text.rpartition("=")
        try:
            weights.append(float(weight))
        except ValueError:
            raise InvalidValueError(
                f"{EMBEDDING_BIAS} {text!r} is not TEXT=WEIGHT, such as yes=2.5"
            ) from None
        words.append(word)
    return {"embedding_bias_words": words, "embedding_bias_weights": weights}
