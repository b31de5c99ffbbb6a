"""The keys that open the door, from a file or the environment, compared in constant time.

It knows digests only: a key is not kept.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from minitron_client.errors import InvalidValueError
from minitron_client.openai.api_errors import ApiError
from minitron_client.settings import VariableError

KEYS_VARIABLE = "MINITRON_OPENAI_API_KEY"
MIN_KEY_CHARACTERS = 16
_SCHEME = "bearer"


class ApiKeys:
    """The keys that are accepted; none: everybody may come in."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = tuple({_digest(key) for key in keys})

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> None:
        """Check an `Authorization` header.

        Raises:
            ApiError: 401, no key or a wrong one.
        """
        if not self._digests:
            return
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != _SCHEME or not key.strip():
            raise _refusal("no API key: send the header 'Authorization: Bearer KEY'", None)
        digest = _digest(key.strip())
        # Every key is compared, so that the time tells neither which one nor how much of it is right.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise _refusal("the API key is wrong", "invalid_api_key")


def read_api_keys(path: Path | None) -> ApiKeys:
    """Keys of a file (one a line, `#` begins a comment), else of MINITRON_OPENAI_API_KEY (commas between).

    Raises:
        InvalidValueError: the file holds no key, or a key is short or has spaces in it (a `VariableError`
            where it is the variable's).
        OSError: the file cannot be read.
    """
    if path is None:
        keys, source = os.environ.get(KEYS_VARIABLE, "").split(","), KEYS_VARIABLE
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        keys, source = [line.partition("#")[0] for line in lines], str(path)
    kept = [key.strip() for key in keys if key.strip()]
    if path is not None and not kept:
        raise InvalidValueError(f"{source} holds no API key; expected one a line")
    for place, key in enumerate(kept, start=1):
        if len(key) < MIN_KEY_CHARACTERS or not key.isascii() or len(key.split()) != 1:
            raise (VariableError if path is None else InvalidValueError)(
                f"API key {place} of {source} is not {MIN_KEY_CHARACTERS} or more ASCII characters without "
                "spaces; make one with: openssl rand -hex 32"
            )
    return ApiKeys(kept)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _refusal(message: str, code: str | None) -> ApiError:
    headers = (("www-authenticate", "Bearer"),)
    return ApiError(message, 401, "authentication_error", None, code, headers)
