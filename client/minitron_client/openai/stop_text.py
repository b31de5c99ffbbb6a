"""Stop sequences the way OpenAI has them: the text ends before the sequence, streamed or not.

The server ends after a stop word and keeps it. Text that may be the beginning of a stop word is held back
until it is known not to be one. It knows strings only.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Text that comes in pieces, without the first stop word in it and what follows.

    The word that ends first counts; of words that end together, the longest. So the result does not depend
    on how the text was cut.

    Args:
        words: stop words, none of them empty.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.is_over = False
        """A stop word has come; whatever follows is ignored."""
        self._words = tuple(words)
        self._longest = max((len(word) for word in words), default=0)
        self._held = ""

    def feed(self, piece: str) -> str:
        """Take the next piece and give what can be shown."""
        if self.is_over:
            return ""
        if not self._words:
            return piece
        text = self._held + piece
        found = [(start + len(word), start) for word in self._words if (start := text.find(word)) >= 0]
        if found:
            self.is_over, self._held = True, ""
            return text[: min(found)[1]]
        shown = len(text) - self._held_length(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back, once the text has ended without a stop word."""
        held, self._held = self._held, ""
        return held

    def _held_length(self, text: str) -> int:
        """How much of the end of `text` may be the beginning of a stop word."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(word.startswith(tail) for word in self._words):
                return length
        return 0
