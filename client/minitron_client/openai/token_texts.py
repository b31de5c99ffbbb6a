"""What each output token stands for in the text: the tokens beside log probabilities.

It knows byte-level BPE vocabularies through the `tokenizers` library. It knows nothing of requests.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from minitron_client.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token of the output.

    Attributes:
        data: the bytes it stands for; they may be a part of a character.
        log_prob: its log probability.
        offset: characters of the text that were whole before it.
    """

    data: bytes
    log_prob: float
    offset: int

    @property
    def text(self) -> str:
        """The token as text; as OpenAI does, "bytes:" and escapes where it is no whole character."""
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.data)


class TokenBytes:
    """The bytes of each id of a vocabulary.

    Args:
        tokenizer: a `tokenizers.Tokenizer` with a ByteLevel decoder.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._known: dict[int, bytes] = {}

    def visible(self, token_id: int) -> bytes:
        """The bytes an id puts into the text; none for a special token.

        Raises:
            UnsupportedError: the id is not in this vocabulary.
        """
        if token_id in self._special_ids:
            return b""
        if token_id not in self._known:
            token = self._tokenizer.id_to_token(token_id)
            if token is None:
                raise UnsupportedError(
                    f"token id {token_id} is not in the door's tokenizer; is it the server's?"
                )
            self._known[token_id] = _token_bytes(token)
        return self._known[token_id]


class TokenPlaces:
    """Follows the tokens of one choice and where in its text each begins."""

    def __init__(self, vocabulary: TokenBytes) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0
        self._waiting: list[TokenText] = []

    def add(self, token_ids: Iterable[int], log_probs: Iterable[float]) -> None:
        """Take new tokens; special ones have no place in the text and are left out."""
        for token_id, log_prob in zip(token_ids, log_probs, strict=True):
            data = self._vocabulary.visible(token_id)
            if data:
                self._waiting.append(TokenText(data, log_prob, self._offset))
                self._offset += len(self._decoder.decode(data))

    def take(self, shown: int) -> tuple[TokenText, ...]:
        """The tokens that begin in the first `shown` characters of the text and were not taken yet."""
        count = sum(token.offset < shown for token in self._waiting)
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return tuple(taken)


def _byte_of_char() -> dict[str, int]:
    """The byte each character of a byte-level vocabulary stands for (GPT-2's table, turned round)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + place): byte for place, byte in enumerate(shifted)
    }


_BYTE_OF_CHAR = _byte_of_char()


def _token_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:  # an added token with characters outside the table stands for itself
        return token.encode("utf-8")
