"""Token ids to text, one token at a time: incremental detokenising, and stop words found in the text.

This module knows UTF-8 and strings. It knows nothing of Triton, of engines, or of where a token's bytes come
from. Whatever the cuts between its calls, the pieces joined equal the text decoded as a whole.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable


class Detokenizer:
    """Turns token ids into text as they come, and never emits half a character.

    Args:
        bytes_of: the bytes a token id stands for; `b""` for one that has no text.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is not whole yet."""
        return self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        """What the end of the sequence leaves: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


class StopWordMatcher:
    """Finds the earliest end of any stop word in a text that arrives in pieces.

    Words may straddle pieces. Of two words that end in different places the one that ends first counts, so
    the answer does not depend on how the text was cut.

    Args:
        words: what to look for; an empty word is refused.

    Raises:
        ValueError: a word is empty.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._words = tuple(dict.fromkeys(words))
        if "" in self._words:
            raise ValueError("a stop word is empty; expected at least one character")
        self._reach = max((len(word) for word in self._words), default=1) - 1
        self._tail = ""  # the last characters seen that a word could still begin in

    def __bool__(self) -> bool:
        return bool(self._words)

    def feed(self, piece: str) -> int | None:
        """Look at the next piece of text.

        Returns:
            How many characters of `piece` belong to the text that ends with the stop word, or None.
        """
        text = self._tail + piece
        ends = [end for word in self._words if (end := self._end_of(word, text)) is not None]
        if ends:
            return min(ends) - len(self._tail)
        self.skip(piece)
        return None

    def skip(self, piece: str) -> None:
        """Take a piece in which no word may end; one may begin in it."""
        self._tail = (self._tail + piece)[-self._reach :] if self._reach else ""

    def _end_of(self, word: str, text: str) -> int | None:
        # A match must end inside the new piece: what lies wholly in the tail was looked at before.
        start = text.find(word, max(0, len(self._tail) - len(word) + 1))
        return None if start < 0 else start + len(word)
