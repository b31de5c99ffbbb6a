"""A safetensors file whose layout is known before its first tensor, and whose tensors arrive in any order.

It knows offsets and durability; what a tensor means is the writer's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

from minitron_build.checkpoint.trtllm_checkpoint import FileDigest
from minitron_build.source.safetensors_file import ITEM_BYTES, layout_header

DTYPE_ORDER = ("F32", "BF16", "F8_E4M3")
"""The safetensors library stores wide types first, then by name; ModelOpt's files come from it."""
HASH_CHUNK_BYTES = 4 << 20

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""name -> (dtype as safetensors writes it, shape), in file order."""


def library_order(layout: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The layout in the order in which the safetensors library would store it."""
    names = sorted(layout, key=lambda name: (DTYPE_ORDER.index(layout[name][0]), name))
    return {name: layout[name] for name in names}


def layout_bytes(layout: Layout) -> int:
    """Size of the whole file."""
    return len(layout_header(layout)) + sum(_num_bytes(entry) for entry in layout.values())


def _num_bytes(entry: tuple[str, tuple[int, ...]]) -> int:
    return prod(entry[1]) * ITEM_BYTES[entry[0]]


class PlannedFile:
    """The file, open for writing; what is not written stays zero.

    Args:
        is_resumed: keep what an interrupted run wrote; otherwise the file starts empty.
        metadata: of the file's header.
    """

    def __init__(
        self, path: Path, layout: Layout, *, is_resumed: bool, metadata: Mapping[str, str] | None = None
    ) -> None:
        header = layout_header(layout, metadata)
        self.path = path
        self._starts: dict[str, int] = {}
        self.file_bytes = len(header)
        for name, entry in layout.items():
            self._starts[name] = self.file_bytes
            self.file_bytes += _num_bytes(entry)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if is_resumed else os.O_TRUNC)
        self._descriptor = os.open(path, flags, 0o644)
        os.ftruncate(self._descriptor, self.file_bytes)
        self._write(memoryview(header), 0)

    def write(self, name: str, data: memoryview, offset_bytes: int = 0) -> None:
        """Write a part of a tensor, `offset_bytes` behind its first byte."""
        self._write(data.cast("B"), self._starts[name] + offset_bytes)

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], offset + done)

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        os.fdatasync(self._descriptor)

    def digest(self) -> FileDigest:
        """Of the whole file, read back; its pages are given back on the way."""
        digest, done = hashlib.sha256(), 0
        while done < self.file_bytes:
            chunk = os.pread(self._descriptor, HASH_CHUNK_BYTES, done)
            digest.update(chunk)
            os.posix_fadvise(self._descriptor, done, len(chunk), os.POSIX_FADV_DONTNEED)
            done += len(chunk)
        return FileDigest(digest.hexdigest(), self.file_bytes)

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
