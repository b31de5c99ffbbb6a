"""Prompts of a wanted length in tokens, made of random words.

How many tokens a word adds behind another is asked of a tokenizer once; the pre-tokenizers of this family
split before each space, so the counts of a prompt's words add up. Without a tokenizer a word is taken for one
token, and the result says that lengths are not exact. It knows no client: a tokenizer is a function.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_client.bench.refusal import BenchError

if TYPE_CHECKING:
    import numpy as np

Tokenize = Callable[[str], Awaitable[list[int]]]
"""Text to token ids, with the tokens that the server puts in front of every prompt."""

FIRST_WORD = "The"
_COMMON_WORDS = (
    "a about after again air all also an and any are as at back be because been before both but by call "
    "can come could day did different do does down each end even every find first for form from get "
    "give go good great had has have he help her here him his home house how if import in into is it "
    "its just kind know large last left letter life light like line list little long look made make man "
    "many may me mean men more most mother much must my name need never new no not now number of off "
    "old on one only or other our out over own page part people place play point port press put read "
    "return right said same say see self set she should show small so some sound still such take tell "
    "than that the their them then there these they thing think this three through time to too true try "
    "turn two under up us use very want was water way we well went were what when where which who why "
    "will with word work world would write year you your "
)
WORDS = tuple(_COMMON_WORDS.split())


@dataclass(frozen=True, slots=True)
class WordCosts:
    """What words cost in tokens.

    Attributes:
        first: tokens of a prompt that is FIRST_WORD alone, with those that the server puts in front.
        costs: tokens that each word adds behind another word and a space.
        is_exact: the numbers come from a tokenizer.
    """

    first: int
    costs: Mapping[str, int]
    is_exact: bool

    def prompt(self, num_tokens: int, rng: np.random.Generator) -> str:
        """Random words that come to `num_tokens`, or to a few less where no word is short enough.

        Raises:
            BenchError: fewer tokens than the shortest prompt has.
        """
        if num_tokens < self.first:
            raise BenchError(
                f"a prompt of {num_tokens} tokens is not possible: the shortest has {self.first}, with the "
                "tokens that the server puts in front; give longer --prompt-tokens"
            )
        words, costs = list(self.costs), self.costs
        chosen, left, cheapest = [FIRST_WORD], num_tokens - self.first, min(costs.values())
        while left >= cheapest:
            for index in rng.integers(len(words), size=left // cheapest):
                word = words[index]
                if costs[word] <= left:
                    chosen.append(word)
                    left -= costs[word]
        return " ".join(chosen)


def guessed_costs() -> WordCosts:
    """A token a word, and one that the server puts in front."""
    return WordCosts(2, dict.fromkeys(WORDS, 1), is_exact=False)


async def measured_costs(tokenize: Tokenize) -> WordCosts:
    """Costs by a tokenizer; checked on a whole prompt, because they must add up.

    Raises:
        BenchError: the tokenizer does not split before spaces, so lengths cannot be planned with it.
    """
    first = len(await tokenize(FIRST_WORD))
    costs = {word: len(await tokenize(f"{FIRST_WORD} {word}")) - first for word in WORDS}
    if min(costs.values()) < 1:
        raise BenchError("the tokenizer joins words, so prompts of a wanted length cannot be made with it")
    whole = " ".join([FIRST_WORD, *WORDS])
    found, expected = len(await tokenize(whole)), first + sum(costs.values())
    if found != expected:
        raise BenchError(
            f"the tokenizer makes {found} tokens of words that have {expected} one by one, so prompts of a "
            "wanted length cannot be made with it"
        )
    return WordCosts(first, costs, is_exact=True)


def tokenizer_file(path: Path) -> Tokenize:
    """The tokenizer of a local `tokenizer.json`.

    Raises:
        BenchError: it is missing or cannot be read.
        ModuleNotFoundError: the package tokenizers is not installed.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise BenchError(f"--tokenizer {path}: no such file; expected a tokenizer.json or its folder")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exceptions
        raise BenchError(f"--tokenizer {file}: not a tokenizer.json ({error})") from error

    async def tokenize(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    return tokenize
