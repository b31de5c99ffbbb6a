"""Held-out text as token sequences: the set that ships with the toolkit, or a user's file.

It knows file formats and how text is cut into windows. The shipped set was written for this project, apart
from the calibration set: a model must not be judged on what its scaling factors were taken from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeGuard

from minitron_build.errors import RefusedError

HELD_OUT_DIR = Path(__file__).with_name("held_out")
DEFAULT_NAME = "held-out set of the toolkit"
DEFAULT_SAMPLES, DEFAULT_SEQ_LEN = 32, 512
MIN_TOKENS = 256
"""Fewer predicted tokens than this judge nothing."""
MIN_WINDOW_TOKENS = 16
FORMATS = ".txt (text), .jsonl (an object with text or input_ids a line) or .json (a list of id lists)"

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class EvalSet:
    """Token sequences with their origin.

    Attributes:
        sha256: of the file, or of the shipped files one after the other.
        sequences: each of at least two ids; the first begins a text or a window of one.
    """

    name: str
    sha256: str
    sequences: tuple[tuple[int, ...], ...]

    @property
    def num_predicted(self) -> int:
        """Tokens that have another one before them."""
        return sum(len(ids) - 1 for ids in self.sequences)

    def as_dict(self) -> dict[str, Any]:
        """JSON form, without the ids."""
        longest = max(map(len, self.sequences))
        return {
            "name": self.name,
            "sha256": self.sha256,
            "sequences": len(self.sequences),
            "longest_tokens": longest,
            "predicted_tokens": self.num_predicted,
        }

    def long_prompt(self, num_tokens: int) -> tuple[int, ...]:
        """One prompt of so many ids: all sequences in order, over again if they are not enough."""
        ids = [one for sequence in self.sequences for one in sequence]
        repeats = -(-num_tokens // len(ids))
        return tuple((ids * repeats)[:num_tokens])


def read_eval_set(
    path: Path | None,
    *,
    encode: Encode,
    vocab_size: int,
    bos_token_id: int | None,
    num_samples: int = DEFAULT_SAMPLES,
    seq_len: int = DEFAULT_SEQ_LEN,
) -> EvalSet:
    """Held-out sequences; windows of different documents take turns, so that a few are a mixture.

    Args:
        path: None means the shipped set.
        encode: text to ids without special tokens.
        bos_token_id: put in front of each window of a text, as the model was trained; None for none.
        num_samples: windows at most.
        seq_len: ids of a window at most.

    Raises:
        RefusedError: no such file, not of a known format, ids outside the vocabulary, or too little of it.
    """
    documents = _shipped_documents() if path is None else _read_documents(path)
    where = "the shipped held-out set" if path is None else str(path)
    windows = [list(_windows(document, encode, bos_token_id, seq_len)) for document in documents]
    turns = [window for turn in zip_longest(*windows) for window in turn if window is not None]
    chosen = tuple(turns[:num_samples])
    _check_ids(chosen, vocab_size, where)
    digest = hashlib.sha256()
    for file in sorted(HELD_OUT_DIR.glob("*.txt")) if path is None else [path]:
        digest.update(file.read_bytes())
    eval_set = EvalSet(DEFAULT_NAME if path is None else path.name, digest.hexdigest(), chosen)
    if eval_set.num_predicted < MIN_TOKENS:
        raise RefusedError(
            f"{eval_set.num_predicted} tokens to predict",
            expected=f"at least {MIN_TOKENS}",
            where=where,
            todo="give more text",
        )
    return eval_set


Document = str | Sequence[int]


def _shipped_documents() -> list[Document]:
    return [path.read_text(encoding="utf-8") for path in sorted(HELD_OUT_DIR.glob("*.txt"))]


def _read_documents(path: Path) -> list[Document]:
    """The texts or id lists of a user's file."""
    readers: dict[str, Callable[[Path, str], list[Document]]] = {
        ".txt": lambda _, text: [text],
        ".jsonl": _jsonl_documents,
        ".json": _json_documents,
    }
    reader = readers.get(path.suffix)
    if reader is None:
        raise RefusedError(f"--eval-data {path}", expected=FORMATS)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RefusedError(f"cannot be read ({error.strerror})", where=f"--eval-data {path}") from None
    except UnicodeDecodeError as error:
        raise RefusedError(f"not UTF-8 (byte {error.start})", where=f"--eval-data {path}") from None
    if not text.strip():
        raise RefusedError("an empty file", expected=FORMATS, where=f"--eval-data {path}")
    return reader(path, text)


def _jsonl_documents(path: Path, text: str) -> list[Document]:
    documents: list[Document] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        raw = _parsed(line, where)
        value = raw.get("input_ids", raw.get("text")) if isinstance(raw, dict) else None
        if isinstance(value, str) or _is_id_list(value):
            documents.append(value)
        else:
            raise RefusedError("neither text nor input_ids", expected='{"text": "…"}', where=where)
    return documents


def _json_documents(path: Path, text: str) -> list[Document]:
    raw = _parsed(text, str(path))
    if not isinstance(raw, list) or not raw or not all(map(_is_id_list, raw)):
        raise RefusedError("something else", expected="a list of lists of token ids", where=str(path))
    return raw


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RefusedError(f"not JSON ({error})", where=where) from None


def _is_id_list(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(one) is int for one in value)


def _windows(
    document: Document, encode: Encode, bos_token_id: int | None, seq_len: int
) -> Iterator[tuple[int, ...]]:
    """Windows of at most `seq_len` ids; a short rest is left out unless it is all there is."""
    is_text = isinstance(document, str)
    ids = encode(document) if isinstance(document, str) else list(document)
    start_ids = [bos_token_id] if is_text and bos_token_id is not None else []
    step = seq_len - len(start_ids)
    for start in range(0, len(ids), step):
        window = [*start_ids, *ids[start : start + step]]
        if len(window) >= MIN_WINDOW_TOKENS or (start == 0 and len(window) > 1):
            yield tuple(window)


def _check_ids(sequences: Sequence[Sequence[int]], vocab_size: int, where: str) -> None:
    for number, ids in enumerate(sequences):
        outside = next((one for one in ids if not 0 <= one < vocab_size), None)
        if outside is not None:
            raise RefusedError(
                f"token id {outside} in sequence {number}",
                expected=f"ids from 0 to {vocab_size - 1}",
                where=where,
                todo="is this the tokenizer of this model?",
            )
