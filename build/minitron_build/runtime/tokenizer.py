"""The tokenizer of the served model, read from `tokenizer.json` with the `tokenizers` library alone.

It knows byte-level BPE: which bytes a token stands for, which tokens are special. It knows nothing of Triton.
Text is never "cleaned up" (`clean_up_tokenization_spaces` is ignored on purpose: it changes what was
generated).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LONG_TEXT_CHARS = 2048


class TokenizerFileError(ValueError):
    """The tokenizer on disk is missing, or is not a byte-level one."""


class TextTokenizer:
    """Text to token ids and back.

    Args:
        tokenizer_dir: folder that holds `tokenizer.json`.

    Raises:
        TokenizerFileError: the file is missing, unreadable, or its decoder is not ByteLevel.
    """

    def __init__(self, tokenizer_dir: Path) -> None:
        path = tokenizer_dir / "tokenizer.json"
        self._tokenizer = _read_tokenizer(path)
        self._special_ids = frozenset(
            token_id
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        self._bytes_by_id: dict[int, bytes] = {}

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def last_token(self) -> tuple[int, str]:
        """The largest id it can make and its text, whoever makes it: vocabulary, added tokens or BOS."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        around = self._tokenizer.encode("", add_special_tokens=True)
        return max(
            (
                *((token_id, token) for token, token_id in vocabulary.items()),
                *zip(around.ids, around.tokens, strict=True),
            ),
            default=(-1, ""),
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; with special tokens, the post-processor's own (BOS first) are added."""
        if len(text) < LONG_TEXT_CHARS:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        # A batch is tokenised without the interpreter's lock: the streams of this process go on meanwhile.
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of a whole sequence; bytes that are not UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a special token (BOS, EOS, reserved)."""
        return token_id in self._special_ids

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes an id stands for, special tokens spelled out; `b""` for an id outside the vocabulary."""
        known = self._bytes_by_id.get(token_id)
        if known is None:
            known = self._bytes_by_id[token_id] = _token_bytes(self._tokenizer.id_to_token(token_id))
        return known

    def visible_bytes_of(self, token_id: int) -> bytes:
        """As `bytes_of`, special tokens standing for nothing."""
        return b"" if token_id in self._special_ids else self.bytes_of(token_id)


def _read_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        text = path.read_text(encoding="utf-8")
        decoder = (json.loads(text).get("decoder") or {}).get("type")
    except (OSError, ValueError, AttributeError) as error:
        raise TokenizerFileError(f"{path} cannot be read as a tokenizer: {error}") from error
    if decoder != "ByteLevel":
        raise TokenizerFileError(f"{path} has decoder {decoder}; expected ByteLevel, as Llama 3 has")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises the bare class
        raise TokenizerFileError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()  # a prompt is refused when too long, never cut
    tokenizer.no_padding()
    return tokenizer


def _byte_of_char() -> dict[str, int]:
    """The byte each character of a byte-level vocabulary stands for (GPT-2's table, turned round)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = [byte for byte in range(256) if byte not in set(plain)]
    table = {chr(byte): byte for byte in plain}
    table.update({chr(256 + place): byte for place, byte in enumerate(shifted)})
    return table


_BYTE_OF_CHAR = _byte_of_char()


def _token_bytes(token: str | None) -> bytes:
    if token is None:
        return b""
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:  # an added token with characters outside the table stands for itself
        return token.encode("utf-8")
