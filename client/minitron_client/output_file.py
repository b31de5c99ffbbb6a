"""A file that a command leaves to its user: whether it can be written, and how it comes to be there whole.

A regular file is written under a temporary name beside it and renamed. A link stays a link: what it leads to
is replaced. What is no regular file (a pipe, a device, this process's own stdout) would be destroyed by a
rename, and is written to as it stands. It knows nothing of what is written.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from minitron_client.errors import InvalidValueError


def check_output(path: Path, flag: str) -> None:
    """Before any work: `path` can be written by `writing_whole`.

    Args:
        path: where to write.
        flag: its name on the command line, for the refusal.

    Raises:
        InvalidValueError: a folder, a socket, in a folder that is missing or may not be written to.
    """
    try:
        mode = _mode(path)
    except OSError as error:
        raise InvalidValueError(f"{flag} {path}: {error.strerror}; give another file") from error
    if mode is None or stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        _check_place(path, flag)
    elif _own_stream(path) is None and (stat.S_ISSOCK(mode) or not os.access(path, os.W_OK)):
        raise InvalidValueError(f"{flag} {path} cannot be opened for writing; give another file")


def is_regular(path: Path) -> bool:
    """Whether `path`, its links followed, is a regular file, or none yet."""
    mode = _mode(path)
    return mode is None or stat.S_ISREG(mode)


def target_of(path: Path) -> Path:
    """The file that a name leads to, every link followed; it need not exist."""
    return Path(os.path.realpath(path))


@contextmanager
def writing_whole(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file that is at `path` when the block has ended well, and not there by half.

    Lines end as they are written. A stream has what was written until the block broke off.

    Raises:
        InvalidValueError: the reader of a pipe has gone.
        OSError: it cannot be written; a regular file is as it was.
    """
    if _own_stream(path) is None and is_regular(path):
        with _replacing(target_of(path)) as file:
            yield file
        return
    try:
        with _open_stream(path) as file:
            yield file
    except BrokenPipeError as error:
        raise InvalidValueError(
            f"{path}: its reader has gone before the end; keep it, or give a file"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a text as `writing_whole` does."""
    with writing_whole(path) as file:
        file.write(text)


def _check_place(path: Path, flag: str) -> None:
    target = target_of(path)
    if not target.parent.is_dir() or target.is_dir():
        raise InvalidValueError(f"{flag} {path}: expected a file's name in a folder that exists")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InvalidValueError(
            f"{flag} {path}: the folder {target.parent} cannot be written to; give another, or its permission"
        )


def _mode(path: Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _own_stream(path: Path) -> int | None:
    """This process's stdout or stderr, where the name leads to it: /dev/stdout, or the file it goes to."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
    return None


def _open_stream(path: Path) -> TextIO:
    descriptor = _own_stream(path)
    if descriptor is None:
        return open(path, "w", encoding="utf-8", newline="")
    for stream in (sys.stdout, sys.stderr):  # what was printed before comes before
        stream.flush()
    return open(os.dup(descriptor), "w", encoding="utf-8", newline="")


@contextmanager
def _replacing(target: Path) -> Iterator[TextIO]:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if (mode := _mode(target)) is not None:
            os.chmod(temporary, stat.S_IMODE(mode))
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
