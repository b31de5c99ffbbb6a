"""The safetensors file format: strict reading of headers, and writing of headers known in advance.

The format is an 8-byte little-endian header length, a JSON header with dtype, shape and byte offsets of each
tensor, then the tensors' bytes without holes. Written here rather than with the safetensors package because
conversion streams: it never maps a file and never holds a tensor. It knows nothing of models.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_build.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

ITEM_BYTES = {
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "F8_E4M3": 1,
    "I8": 1,
    "U8": 1,
    "I32": 4,
    "I64": 8,
    "BOOL": 1,
    "F64": 8,
}
MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's own bound."""

LFS_POINTER_START = b"version https://git-lfs"
FOREIGN_STARTS = {
    LFS_POINTER_START: (
        "a Git-LFS pointer, not the weights",
        "fetch the file itself: git lfs pull, or download again",
    ),
    b"GGUF": ("a GGUF file", "give the Hugging Face safetensors checkpoint"),
    b"PK\x03\x04": (
        "a zip archive (a PyTorch or .nemo file)",
        "give the Hugging Face safetensors checkpoint",
    ),
    b"<!DO": ("an HTML page", "the download was answered with a web page: log in or fetch it again"),
}


FETCH_AGAIN = "fetch the file again"
"""What helps with a file that was fetched from elsewhere."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's entry: where its bytes lie in the file (`start` from the file's first byte)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A checked header; tensors are in file order and fill the file without holes."""

    path: Path
    header_bytes: int
    file_bytes: int
    tensors: tuple[TensorInfo, ...]


def read_header(path: Path, *, todo: str = FETCH_AGAIN) -> SafetensorsHeader:
    """Read and check the header of a safetensors file.

    Args:
        todo: what helps when the file is broken.

    Raises:
        CheckpointError: not a safetensors file, truncated, or with entries that do not fit the file.
    """
    try:
        return _read_header(path)
    except CheckpointError as error:
        raise CheckpointError(
            error.found, expected=error.expected, where=error.where, todo=error.todo or todo
        ) from None


def _read_header(path: Path) -> SafetensorsHeader:
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        _refuse_foreign(path, start)
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES or start[8:9] != b"{":
            raise CheckpointError("not a safetensors file", where=str(path))
        file.seek(8)
        text = file.read(length)
    if len(text) < length:
        raise _truncated(path, file_bytes, 8 + length)
    return SafetensorsHeader(path, 8 + length, file_bytes, _read_entries(path, text, file_bytes))


def layout_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The bytes before the data of a file that holds these tensors in this order.

    Args:
        tensors: name -> (dtype as safetensors writes it, shape); data follows in the same order.
        metadata: free text of the file, by key; None for a file without.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts 8-byte aligned, as the reference implementation writes it
    return struct.pack("<Q", len(text)) + text


def read_bytes(descriptor: int, offset: int, num_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes of a file as uint8 [num_bytes]."""
    import numpy as np

    buffer = np.empty(num_bytes, dtype=np.uint8)
    done = 0
    while done < num_bytes:
        count = os.preadv(descriptor, [buffer.data[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the source became shorter while it was read")
        done += count
    return buffer


def _refuse_foreign(path: Path, start: bytes) -> None:
    for magic, (what, todo) in FOREIGN_STARTS.items():
        if start.startswith(magic):
            raise CheckpointError(what, expected="a safetensors file", where=str(path), todo=todo)


def _truncated(path: Path, found_bytes: int, expected_bytes: int) -> CheckpointError:
    return CheckpointError(
        f"{found_bytes} bytes",
        expected=f"{expected_bytes} bytes by its own header; the file is truncated or has grown",
        where=str(path),
    )


def _read_entries(path: Path, text: bytes, file_bytes: int) -> tuple[TensorInfo, ...]:
    """Entries in file order, checked against each other and against the file's size."""
    try:
        raw = json.loads(text)
        raw.pop("__metadata__", None)
        tensors = sorted(
            (_read_entry(name, entry, 8 + len(text)) for name, entry in raw.items()),
            key=lambda tensor: (tensor.start, tensor.num_bytes),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"a safetensors header that cannot be read ({error})", where=str(path)
        ) from None
    end = 8 + len(text)
    for tensor in tensors:
        if tensor.start != end:
            raise CheckpointError(
                f"{tensor.name} starts at byte {tensor.start}", expected=f"byte {end}", where=str(path)
            )
        end += tensor.num_bytes
    if end != file_bytes:
        raise _truncated(path, file_bytes, end)
    return tuple(tensors)


def _read_entry(name: str, entry: dict[str, object], data_start: int) -> TensorInfo:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise ValueError(f"{name}: {entry}")
    begin, end = (int(offset) for offset in offsets)
    if dtype in ITEM_BYTES and prod(shape) * ITEM_BYTES[dtype] != end - begin:
        raise ValueError(f"{name}: {dtype} {shape} does not take {end - begin} bytes")
    return TensorInfo(name, dtype, tuple(int(size) for size in shape), data_start + begin, end - begin)
