"""Where the door gets the served model's tokenizer from: a folder.

It knows when to read what; what is in the files is `served_tokenizer.py`'s.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_client.errors import UnsupportedError
from minitron_client.openai.served_tokenizer import ServedTokenizer, read_tokenizer_dir

if TYPE_CHECKING:
    from minitron_client import AsyncMinitronClient
    from minitron_client.openai.door import LoadTokenizer


async def tokenizer_source(folder: Path | None, client: AsyncMinitronClient) -> LoadTokenizer:
    """How the door loads the tokenizer; a folder is read now, so that a wrong one is refused at the start.

    Raises:
        InvalidValueError: the folder holds no usable tokenizer.
    """
    if folder is not None:
        tokenizer = await asyncio.to_thread(read_tokenizer_dir, folder)

        async def given() -> ServedTokenizer:
            return tokenizer

        return given

    async def refuse() -> ServedTokenizer:
        raise UnsupportedError(
            "chat and log probabilities need the tokenizer; start the door with --tokenizer-dir"
        )

    return refuse
