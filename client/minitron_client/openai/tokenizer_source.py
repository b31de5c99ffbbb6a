"""Where the door gets the served model's tokenizer from: a folder, or the server.

It knows when to read what; what is in the files is `served_tokenizer.py`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeAlias

from minitron_client.openai.served_tokenizer import ServedTokenizer, read_tokenizer_dir, served_tokenizer
from minitron_client.tokenizer import Tokenizer

LoadTokenizer: TypeAlias = Callable[[], Awaitable[ServedTokenizer]]


class TokenizerClient(Protocol):
    """What this needs of `minitron_client.AsyncMinitronClient`."""

    async def tokenizer(self) -> Tokenizer:
        """The served model's tokenizer with its files."""


class TokenizerSource:
    """Loads the tokenizer at first need and keeps it; after a failure it is asked for again.

    Args:
        load: gives it.
    """

    def __init__(self, load: LoadTokenizer) -> None:
        self._load = load
        self._known: ServedTokenizer | None = None
        self._lock = asyncio.Lock()

    async def __call__(self) -> ServedTokenizer:
        """The tokenizer.

        Raises:
            MinitronClientError: it cannot be had now.
        """
        async with self._lock:
            if self._known is None:
                self._known = await self._load()
            return self._known


async def tokenizer_source(folder: Path | None, client: TokenizerClient) -> TokenizerSource:
    """How the door loads the tokenizer; a folder is read now, so that a wrong one is refused at the start.

    Raises:
        InvalidValueError: the folder holds no usable tokenizer.
    """

    async def from_server() -> ServedTokenizer:
        tokenizer = await client.tokenizer()
        return await asyncio.to_thread(served_tokenizer, tokenizer)

    if folder is None:
        return TokenizerSource(from_server)
    given = await asyncio.to_thread(read_tokenizer_dir, folder)

    async def from_folder() -> ServedTokenizer:
        return given

    return TokenizerSource(from_folder)
