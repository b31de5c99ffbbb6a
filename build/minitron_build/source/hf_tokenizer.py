"""The tokenizer of a Hugging Face folder or of a bundle, held against the model it is to serve.

It knows that every id a tokenizer can make needs a row of the embedding. What a readable tokenizer is, the
runtime says (runtime/tokenizer.py), so that what is accepted here is what loads there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from minitron_build.errors import CheckpointError

if TYPE_CHECKING:
    from minitron_build.runtime.tokenizer import TextTokenizer


def open_tokenizer(tokenizer_dir: Path) -> TextTokenizer:
    """The tokenizer of a Hugging Face folder or of a bundle.

    Raises:
        CheckpointError: none, or not one of this family.
    """
    from minitron_build.runtime.tokenizer import TextTokenizer, TokenizerFileError

    try:
        return TextTokenizer(tokenizer_dir)
    except TokenizerFileError as error:
        raise CheckpointError(str(error), todo="fetch tokenizer.json with the checkpoint") from None


def check_tokenizer(tokenizer_dir: Path, vocab_size: int) -> None:
    """Refuse a tokenizer that cannot be served with a model; more rows than tokens are padding, and fine.

    Args:
        vocab_size: rows of the model's embedding.

    Raises:
        CheckpointError: it cannot be read, or can make an id that has no row.
    """
    last_id, token = open_tokenizer(tokenizer_dir).last_token
    if last_id >= vocab_size:
        raise CheckpointError(
            f"token {token!r} has id {last_id}",
            expected=f"ids below the model's vocab_size of {vocab_size} (config.json)",
            where=str(tokenizer_dir / "tokenizer.json"),
            todo="fetch tokenizer.json and config.json of the same checkpoint",
        )
