"""The calibration set: token ids from a user's file, or from the texts in the package.

Reads `.txt` (cut into windows), `.jsonl` (one sample a line, text or ids) and `.json` (a list of id lists),
and refuses or warns about what would give wrong ranges. It knows the tokenizer, nothing of tensors.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_build.errors import CheckpointError, PlanError

if TYPE_CHECKING:
    from minitron_build.runtime.tokenizer import TextTokenizer

DEFAULT_SET = Path(__file__).with_name("default_set")
"""Counted with byte-pair vocabularies of 151,643 and 130,072 tokens and Llama 3's pattern, up to three digits
being one token: 121,588 and 122,096 tokens, which make 238 and 239 windows of 512. Llama 3's vocabulary, of
128,256, lies below the first: its windows are no fewer."""
DEFAULT_NAME = "default"
DEFAULT_SAMPLES, DEFAULT_SEQ_LEN = 128, 512
MIN_SAMPLE_TOKENS = 16
"""Shorter samples say little: what follows a BOS is unlike the middle of a text."""
FEW_TOKENS = 8192
"""Fewer tokens in all are warned about: the widest activations are rare."""
MAX_FILE_BYTES = 1 << 30
FORMATS = (".txt", ".jsonl", ".json")


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Samples that a calibration runs through the model, in order.

    Attributes:
        name: the file's name, or `default`.
        file_sha256: of the file, or of the package's texts in name order.
        samples: token ids, each at least MIN_SAMPLE_TOKENS.
        seq_len: the most tokens of a sample.
        warnings: what the user should know about it, one sentence each.
    """

    name: str
    file_sha256: str
    samples: tuple[tuple[int, ...], ...]
    seq_len: int
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def num_tokens(self) -> int:
        """Of all samples together."""
        return sum(map(len, self.samples))

    @property
    def digest(self) -> str:
        """sha256 of the ids themselves: equal digests calibrate equally."""
        text = json.dumps(self.samples, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """The record of it that a checkpoint and a manifest keep."""
        lengths = [len(sample) for sample in self.samples]
        return {
            "name": self.name,
            "file_sha256": self.file_sha256,
            "input_ids_sha256": self.digest,
            "num_samples": len(lengths),
            "num_tokens": sum(lengths),
            "seq_len": self.seq_len,
            "min_tokens": min(lengths),
            "max_tokens": max(lengths),
        }


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """What the user asked for.

    Attributes:
        path: the user's file; None for the texts in the package.
        num_samples: how many samples at most; None for DEFAULT_SAMPLES.
        seq_len: tokens of a sample at most; longer ones are cut.
    """

    path: Path | None = None
    num_samples: int | None = None
    seq_len: int = DEFAULT_SEQ_LEN

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise PlanError(f"--calib-samples is {self.num_samples}", expected="1 or more")
        if self.seq_len < MIN_SAMPLE_TOKENS:
            raise PlanError(f"--calib-seq-len is {self.seq_len}", expected=f"{MIN_SAMPLE_TOKENS} or more")

    @property
    def max_samples(self) -> int:
        """How many are taken at most."""
        return DEFAULT_SAMPLES if self.num_samples is None else self.num_samples


def check_samples_file(path: Path, flag: str) -> None:
    """Refuse what cannot be a file of samples, without reading it.

    Raises:
        CheckpointError: no such file, a folder, or a name of another format.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "No such file or directory"
        raise CheckpointError(what, where=f"{flag} {path}", todo="give a file of samples")
    if path.suffix not in FORMATS:
        raise CheckpointError(
            f"a file named {path.name}", expected=", ".join(FORMATS), where=flag, todo="rename it"
        )


def read_calibration_set(request: SampleRequest, hf_dir: Path, vocab_size: int) -> CalibrationSet:
    """The samples that a request means for a model.

    Args:
        hf_dir: holds the tokenizer; not read for a file of ids.
        vocab_size: ids at and above it are refused.

    Raises:
        CheckpointError: the file is missing, empty, of another format, or names ids outside the vocabulary;
            or the tokenizer is missing.
    """
    tokenizer = _lazy_tokenizer(hf_dir)
    if request.path is None:
        paths, samples = (
            sorted(DEFAULT_SET.glob("*.txt")),
            folder_samples(DEFAULT_SET, tokenizer(), request.seq_len),
        )
    else:
        paths, samples = [request.path], file_samples(request.path, tokenizer, request.seq_len)
    where = DEFAULT_NAME if request.path is None else str(request.path)
    taken, num_short = _take(samples, request, where)
    check_ids(taken, vocab_size, where)
    return CalibrationSet(
        name=DEFAULT_NAME if request.path is None else request.path.name,
        file_sha256=sha256_of_files(paths),
        samples=tuple(taken),
        seq_len=request.seq_len,
        warnings=tuple(_warnings(taken, num_short, request)),
    )


def _lazy_tokenizer(hf_dir: Path) -> Callable[[], TextTokenizer]:
    """The tokenizer when it is first needed: a file of ids needs none."""

    def load() -> TextTokenizer:
        from minitron_build.runtime.tokenizer import TextTokenizer, TokenizerFileError

        try:
            return TextTokenizer(hf_dir)
        except TokenizerFileError as error:
            raise CheckpointError(
                str(error), where=str(hf_dir), todo="give the ids themselves: --calib-data FILE.json"
            ) from None

    return load


def folder_samples(folder: Path, tokenizer: TextTokenizer, seq_len: int) -> Iterator[tuple[int, ...]]:
    """Windows of a folder's texts, the kinds in turn, so that any number of them is a mixture."""
    kinds = [_windows(path.read_text("utf-8"), tokenizer, seq_len) for path in sorted(folder.glob("*.txt"))]
    while kinds:
        for kind in list(kinds):
            window = next(kind, None)
            if window is None:
                kinds.remove(kind)
            else:
                yield window


def _windows(text: str, tokenizer: TextTokenizer, seq_len: int) -> Iterator[tuple[int, ...]]:
    """Windows of seq_len tokens in a row, each begun as a prompt is (BOS); a short rest is dropped."""
    start = tokenizer.encode("", add_special_tokens=True)
    body_len, ids = seq_len - len(start), []
    for paragraph in text.split("\n\n"):
        ids += tokenizer.encode(paragraph + "\n\n", add_special_tokens=False)
        while len(ids) >= body_len:
            yield (*start, *ids[:body_len])
            ids = ids[body_len:]
    if len(ids) * 2 >= body_len:
        yield (*start, *ids)


def file_samples(
    path: Path, tokenizer: Callable[[], TextTokenizer], seq_len: int, flag: str = "--calib-data"
) -> Iterator[tuple[int, ...]]:
    """Samples of a user's file, of at most seq_len tokens.

    Args:
        flag: that the user named the file with.

    Raises:
        CheckpointError: the file is missing, empty or of another format.
    """
    check_samples_file(path, flag)
    readers: dict[str, Callable[[], Iterator[Sequence[int]]]] = {
        ".txt": lambda: _windows(_read_text(path), tokenizer(), seq_len),
        ".jsonl": lambda: _jsonl_samples(path, tokenizer),
        ".json": lambda: _json_samples(path),
    }
    for sample in readers[path.suffix]():
        yield tuple(sample[:seq_len])


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(
                f"{path.stat().st_size} bytes",
                expected=f"at most {MAX_FILE_BYTES}",
                where=str(path),
                todo="a few hundred samples are enough",
            )
        text = path.read_text(encoding="utf-8-sig")  # some editors put a BOM in front
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CheckpointError(f"{what}", where=str(path), todo="give a file of samples") from None
    if not text.strip():
        raise CheckpointError("an empty file", expected="text or token ids", where=str(path))
    return text


def _jsonl_samples(path: Path, tokenizer: Callable[[], TextTokenizer]) -> Iterator[Sequence[int]]:
    """One JSON object a line: `{"text": ...}` or `{"input_ids": [...]}`."""
    loaded: TextTokenizer | None = None
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        value = _parse(line, where)
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            loaded = loaded or tokenizer()
            yield loaded.encode(value["text"], add_special_tokens=True)
        elif isinstance(value, dict) and "input_ids" in value:
            yield _id_list(value["input_ids"], where)
        else:
            raise CheckpointError(
                f"{line.strip()[:40]!r}", expected='{"text": "..."} or {"input_ids": [...]}', where=where
            )


def _json_samples(path: Path) -> Iterator[Sequence[int]]:
    """A list of id lists."""
    value = _parse(_read_text(path), str(path))
    if not isinstance(value, list):
        raise CheckpointError(
            f"a JSON {type(value).__name__}", expected="a list of id lists", where=str(path)
        )
    for index, sample in enumerate(value):
        yield _id_list(sample, f"{path} sample {index}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise CheckpointError("not JSON: nested too deeply", where=where) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"not JSON: {error}", where=where) from None
    except ValueError:  # Python's own bound on the digits of an integer
        raise CheckpointError("not JSON: a number of too many digits", where=where) from None


def _id_list(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or any(type(token) is not int for token in value):
        raise CheckpointError(f"{reprlib.repr(value)[:40]!r}", expected="a list of token ids", where=where)
    return value


def _take(
    samples: Iterator[tuple[int, ...]], request: SampleRequest, where: str
) -> tuple[list[tuple[int, ...]], int]:
    """The first samples that are long enough, and how many before them were too short."""
    taken: list[tuple[int, ...]] = []
    num_short = 0
    for sample in samples:
        if len(sample) < MIN_SAMPLE_TOKENS:
            num_short += 1
            continue
        taken.append(sample)
        if len(taken) == request.max_samples:
            break
    if not taken:
        found = (
            f"{num_short} samples, all shorter than {MIN_SAMPLE_TOKENS} tokens" if num_short else "no samples"
        )
        raise CheckpointError(
            found, expected=f"samples of {MIN_SAMPLE_TOKENS} to {request.seq_len} tokens", where=where
        )
    return taken, num_short


def check_ids(samples: Sequence[Sequence[int]], vocab_size: int, where: str) -> None:
    """Refuse ids that no model of this vocabulary has.

    Raises:
        CheckpointError: names the first sample and id.
    """
    for index, sample in enumerate(samples):
        outside = next((token for token in sample if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise CheckpointError(
                f"sample {index} holds id {outside}",
                expected=f"ids of the vocabulary, 0 to {vocab_size - 1}",
                where=where,
                todo="was it tokenised for another model?",
            )


def _warnings(samples: Sequence[Sequence[int]], num_short: int, request: SampleRequest) -> Iterator[str]:
    if num_short:
        yield f"{num_short} calibration samples shorter than {MIN_SAMPLE_TOKENS} tokens were left out"
    if request.num_samples is not None and len(samples) < request.num_samples:
        yield f"{len(samples)} calibration samples, fewer than --calib-samples {request.num_samples}"
    num_tokens = sum(map(len, samples))
    if num_tokens < FEW_TOKENS:
        yield (
            f"{num_tokens} calibration tokens are few: wider activations than theirs would be clipped; "
            f"give {FEW_TOKENS} or more"
        )


def sha256_of_files(paths: Sequence[Path]) -> str:
    """Of all files' bytes, one behind the other."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
