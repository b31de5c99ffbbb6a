"""Unfinished work on disk: a locked folder under a temporary name, and how it becomes the finished one.

Shared by everything that writes a checkpoint. What is being written is its writer's; this knows names, locks,
free space and durability.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron_build.checkpoint.trtllm_checkpoint import CONVERSION_NAME, TrtllmCheckpoint
from minitron_build.errors import CheckpointError, MachineError, StageError

DISK_SLACK_BYTES = 64 << 20
"""Small files and the file system's own books, beside the weights."""


def work_dir_of(output_dir: Path) -> Path:
    """Where unfinished work lies."""
    return output_dir.with_name(output_dir.name + ".partial")


def finished_checkpoint(plan_digest: str, output_dir: Path, force: bool) -> TrtllmCheckpoint | None:
    """A finished checkpoint of this very plan, if it stands there; everything else needs `force`.

    Raises:
        CheckpointError: `output_dir` holds something else, and not `force`.
    """
    if force or not output_dir.exists():
        return None
    if (output_dir / CONVERSION_NAME).is_file():
        checkpoint = TrtllmCheckpoint.load(output_dir)
        if checkpoint.plan_digest == plan_digest:
            return checkpoint
        found = "a checkpoint of another source, mapping or toolkit version"
    else:
        found = "something that is not a checkpoint of this toolkit"
    raise CheckpointError(
        f"exists and holds {found}",
        where=str(output_dir),
        todo="give another folder, or --force to replace it",
    )


@contextmanager
def work_folder(work_dir: Path) -> Iterator[bool]:
    """The locked folder of unfinished work; yields whether there was one already.

    Raises:
        MachineError: another process is writing there.
    """
    resumed = work_dir.is_dir()
    work_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(work_dir, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise MachineError(
            "another conversion is writing here", where=str(work_dir), todo="wait for it or stop it"
        ) from None
    try:
        yield resumed
    finally:
        os.close(lock)


def free_disk_bytes(path: Path) -> int:
    """Free space where a file or folder is, or will be once it is made.

    A file system that tells no size at all, as some over a network, is taken at its word when it is full.
    """
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    usage = shutil.disk_usage(existing)
    return usage.free if usage.total else sys.maxsize


def check_disk(work_dir: Path, needed_bytes: int, what: str) -> None:
    """Refuse to begin what will not fit; bytes that an interrupted run wrote already count as there.

    Args:
        work_dir: need not exist yet.
        needed_bytes: of all large files together when finished.
        what: they are, in the user's words.

    Raises:
        MachineError: too little space.
    """
    present = sum(file.stat().st_blocks * 512 for file in work_dir.glob("*") if file.is_file())
    needed = max(0, needed_bytes - present) + DISK_SLACK_BYTES
    free = free_disk_bytes(work_dir)
    if free < needed:
        raise MachineError(
            f"{free / 1e9:.1f} GB free",
            expected=f"{needed / 1e9:.1f} GB for {what}",
            where=str(work_dir.parent),
            todo="free some space, or give an output folder on another disk",
        )


def write_durably(path: Path, text: str) -> None:
    """Replace a small file so that a crash leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def publish(work_dir: Path, output_dir: Path) -> None:
    """Give finished work its name; what stood there before is replaced."""
    if output_dir.exists():
        old = output_dir.with_name(output_dir.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        output_dir.rename(old)
        work_dir.rename(output_dir)
        shutil.rmtree(old)
    else:
        work_dir.rename(output_dir)
    parent = os.open(output_dir.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def stage_error(error: OSError, work_dir: Path) -> StageError:
    """A failed write in the user's words; the same command resumes."""
    if error.errno == errno.ENOSPC:
        return StageError(
            f"{work_dir.parent}: the disk is full; free some space and run the same command again: it resumes"
        )
    return StageError(f"{work_dir}: {error.strerror or error}; run the same command again: it resumes")
