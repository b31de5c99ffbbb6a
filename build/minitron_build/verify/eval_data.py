"""Held-out text as token sequences: the set that ships with the toolkit, or a user's file.

Read as calibration samples are. The shipped set was written for this project, apart from the calibration set:
a model must not be judged on what its scaling factors were taken from.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_build.calibration.samples import check_ids, file_samples, folder_samples, sha256_of_files
from minitron_build.errors import RefusedError

if TYPE_CHECKING:
    from minitron_build.runtime.tokenizer import TextTokenizer

HELD_OUT_DIR = Path(__file__).with_name("held_out")
"""39 or 40 windows of 512 tokens, counted as the calibration set is (see its DEFAULT_SET)."""
DEFAULT_NAME = "held-out set of the toolkit"
DEFAULT_SAMPLES, DEFAULT_SEQ_LEN = 32, 512
FLAG = "--eval-data"
MIN_TOKENS = 256
"""Fewer predicted tokens than this judge nothing."""


@dataclass(frozen=True, slots=True)
class EvalSet:
    """Token sequences with their origin.

    Attributes:
        sha256: of the file, or of the shipped files one after the other.
        sequences: each of at least two ids.
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
    tokenizer: TextTokenizer,
    vocab_size: int,
    *,
    num_samples: int = DEFAULT_SAMPLES,
    seq_len: int = DEFAULT_SEQ_LEN,
) -> EvalSet:
    """Held-out sequences; windows of the shipped texts take turns, so that a few are a mixture.

    Args:
        path: None means the shipped set.
        tokenizer: puts BOS in front of each text or window, if the model's does.
        vocab_size: ids at and above it are refused.
        num_samples: sequences at most.
        seq_len: ids of a sequence at most.

    Raises:
        CheckpointError: no such file, not of a known format, or ids outside the vocabulary.
        RefusedError: too little to judge by.
    """
    where = "the shipped held-out set" if path is None else str(path)
    if path is None:
        files, samples = sorted(HELD_OUT_DIR.glob("*.txt")), folder_samples(HELD_OUT_DIR, tokenizer, seq_len)
    else:
        files, samples = [path], file_samples(path, lambda: tokenizer, seq_len, FLAG)
    sequences = tuple(islice((ids for ids in samples if len(ids) > 1), num_samples))
    check_ids(sequences, vocab_size, where)
    eval_set = EvalSet(DEFAULT_NAME if path is None else path.name, sha256_of_files(files), sequences)
    if eval_set.num_predicted < MIN_TOKENS:
        is_cut = len(sequences) == num_samples
        raise RefusedError(
            f"{len(sequences)} sequences of up to {seq_len} tokens hold {eval_set.num_predicted} to predict",
            expected=f"{MIN_TOKENS} or more",
            where=where,
            todo=f"raise --eval-samples {num_samples} or --eval-seq-len {seq_len}"
            if is_cut
            else "give more text",
        )
    return eval_set
