"""The answers that earlier runs of a batch left: whose they are now, and that one run at a time writes them.

An answer belongs to a line by the line's own words, wherever the line stands. One that was asked for with
other options of the command is no answer to this run's question, and is not thrown away for it either: the
run is refused. It knows the files' format and nothing of a server.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from minitron_client.errors import InvalidValueError
from minitron_client.sampling import SamplingParams

Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One line of the prompts' file.

    Attributes:
        index: its place, from 0.
        prompt: text or token ids.
        sampling: its options over the command's.
        item_id: the id it brings, or None.
        key: digest of its own words, and of how many lines before it have the same.
        asked: model and options that its answer is asked for with, as JSON values.
        former_key: what files of earlier versions have in place of both: place and question in one digest.
    """

    index: int
    prompt: str | tuple[int, ...]
    sampling: SamplingParams
    item_id: str | int | None
    key: str
    asked: dict[str, Any]
    former_key: str


@dataclass(frozen=True, slots=True)
class Found:
    """What the files hold.

    Attributes:
        answers: completions of present lines, by key.
        removed: completions of lines that the batch no longer has, by key.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    removed: dict[str, Answer] = field(default_factory=dict)


def find_answers(paths: Sequence[Path], lines: Sequence[BatchLine], partial: Path) -> Found:
    """The completions in files of ours; errors are left out, because they are asked again.

    Args:
        paths: files to read; those that are not there hold nothing.
        lines: the batch.
        partial: the one of `paths` that a killed run may have cut off.

    Raises:
        InvalidValueError: a file is not one of ours, or holds completions that this run would lose.
    """
    found = Found()
    for path in paths:
        stored = [item for item in _read_answers(path, may_be_cut=path == partial) if "completion" in item]
        _sort_out(path, stored, lines, found)
    if found.removed and not found.answers:
        where = " and ".join(str(path) for path in paths if path.exists() and path.stat().st_size)
        raise InvalidValueError(
            f"{where}: {len(found.removed)} completions, none of a line of this batch; "
            "give another --output, or remove it"
        )
    return found


@contextmanager
def locked(path: Path, output: Path) -> Iterator[TextIO]:
    """The partial file, open to append, and no other run beside this one; removed where it ends empty.

    Raises:
        InvalidValueError: another run has it.
    """
    file = _lock(path, output)
    try:
        yield file
    finally:
        file.flush()
        if not os.fstat(file.fileno()).st_size:
            path.unlink(missing_ok=True)
        file.close()


def drop_cut_line(path: Path) -> None:
    """Take away the last line where a killed run has left it unfinished."""
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _sort_out(path: Path, stored: list[Answer], lines: Sequence[BatchLine], found: Found) -> None:
    """Each answer to its line, or to those whose line has gone."""
    by_key = {line.key: line for line in lines}
    by_former = {line.former_key: line for line in lines}
    others: list[tuple[BatchLine, Answer]] = []
    for answer in stored:
        line = by_key.get(answer["key"]) if "asked" in answer else by_former.get(answer["key"])
        if line is not None and answer.get("asked", line.asked) == line.asked:
            found.answers[line.key] = answer
        elif line is not None:
            others.append((line, answer))
        elif "asked" in answer:
            found.removed[answer["key"]] = answer
        else:
            raise InvalidValueError(
                f"{path} was written by an earlier version, for other lines or options than these; "
                "ask as before, or give another --output, or remove it"
            )
    if others:
        raise InvalidValueError(
            f"{path}: {len(others)} completions were asked for otherwise ({_difference(*others[0])}); "
            "ask as before, or give another --output, or remove it"
        )


def _difference(line: BatchLine, answer: Answer) -> str:
    before, now = answer["asked"], line.asked
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    told = [f"{name} {_told(before.get(name))}, now {_told(now.get(name))}" for name in names]
    return "; ".join(told)


def _told(value: Any) -> str:
    return "left out" if value is None else json.dumps(value)


def _read_answers(path: Path, *, may_be_cut: bool) -> Iterator[Answer]:
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, text in enumerate(file, 1):
            try:
                answer = json.loads(text) if text.strip() else None
            except json.JSONDecodeError:
                if may_be_cut and not text.endswith("\n"):
                    return
                answer = "no JSON"
            if answer is None:
                continue
            if not _is_answer(answer):
                raise InvalidValueError(
                    f"{path} line {number} is not an answer of this command; give another --output, "
                    "or remove it"
                )
            yield answer


def _is_answer(found: Any) -> bool:
    is_ours = isinstance(found, dict) and isinstance(found.get("key"), str)
    return is_ours and isinstance(found.get("asked", {}), dict)


def _lock(path: Path, output: Path) -> TextIO:
    while True:
        file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.close()
                raise InvalidValueError(
                    f"another run is writing {output}; wait for its end, or give another --output"
                ) from error
            print(
                f"minitron: {path}: no locks here ({error.strerror}); keep other runs away", file=sys.stderr
            )
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # the other run has just ended, and has removed it
