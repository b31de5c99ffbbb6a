"""The files of the tokenizer as a client fetches them, and one digest that stands for all of them.

It knows file names, bytes and digests. It knows nothing of what is in a tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .inputs import Array

FILE_NAMES = ("chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
"""In order of name; a tokenizer need not have all of them."""


class TokenizerFiles:
    """What is read once, at load time, and answered as it is.

    Args:
        tokenizer_dir: folder that holds them.
    """

    def __init__(self, tokenizer_dir: Path) -> None:
        paths = [tokenizer_dir / name for name in FILE_NAMES]
        self._contents = {path.name: path.read_bytes() for path in paths if path.is_file()}
        digests = ((hashlib.sha256(raw).hexdigest(), name) for name, raw in self._contents.items())
        lines = "".join(f"{digest}  {name}\n" for digest, name in digests)
        self.sha256 = hashlib.sha256(lines.encode()).hexdigest()
        """Of the lines that `sha256sum` prints of the files in order of name."""

    def arrays(self) -> dict[str, Array]:
        """The outputs that answer a request with RETURN_TOKENIZER, each [batch 1, files or 1]."""
        return {
            "TOKENIZER_SHA256": _strings([self.sha256.encode()]),
            "TOKENIZER_FILE_NAMES": _strings([name.encode() for name in self._contents]),
            "TOKENIZER_FILES": _strings(list(self._contents.values())),
        }


def _strings(values: Sequence[bytes]) -> Array:
    array = np.empty((1, len(values)), dtype=np.object_)
    array[0] = values
    return array
