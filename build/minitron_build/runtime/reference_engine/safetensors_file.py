"""Reads one safetensors file through a memory map, tensor by tensor.

It knows the file format (8 bytes of header length, a JSON header, raw little-endian data) and nothing of what
the tensors mean. Written here because a bundle carries torch, not the safetensors package.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any

import torch

HEADER_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
}


class SafetensorsError(ValueError):
    """The file is not the safetensors file it should be; one line."""


class SafetensorsFile:
    """One memory-mapped safetensors file; tensors are copied out one at a time.

    Raises:
        SafetensorsError: the file is cut short, or its header is not the format's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = path.stat().st_size
            if size <= HEADER_LENGTH_BYTES:
                raise SafetensorsError(
                    f"{path}: found {size} bytes, expected a safetensors file; copy it again"
                )
            # A private writable map: torch refuses to wrap read-only memory without a warning.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        header_bytes = int.from_bytes(self._map[:HEADER_LENGTH_BYTES], "little")
        self._data_start = HEADER_LENGTH_BYTES + header_bytes
        if header_bytes > MAX_HEADER_BYTES or self._data_start > size:
            raise SafetensorsError(
                f"{path}: header length {header_bytes} does not fit {size} bytes; copy it again"
            )
        self._entries = self._read_header()
        self._check_size(size)

    def _read_header(self) -> dict[str, dict[str, Any]]:
        try:
            header = json.loads(self._map[HEADER_LENGTH_BYTES : self._data_start])
        except ValueError as error:
            raise SafetensorsError(
                f"{self.path}: the header is not JSON ({error}); copy the file again"
            ) from error
        if not isinstance(header, dict):
            raise SafetensorsError(f"{self.path}: the header is not a JSON object; copy the file again")
        header.pop("__metadata__", None)
        return header

    def _check_size(self, size: int) -> None:
        try:
            end = max((entry["data_offsets"][1] for entry in self._entries.values()), default=0)
        except (KeyError, TypeError, IndexError) as error:
            raise SafetensorsError(
                f"{self.path}: a tensor's header entry is damaged; copy the file again"
            ) from error
        if self._data_start + end != size:
            expected = self._data_start + end
            raise SafetensorsError(
                f"{self.path}: found {size} bytes, its header promises {expected}; copy it again"
            )

    def names(self) -> set[str]:
        """Names of all tensors in the file."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> str:
        """Dtype of one tensor in the format's own word, such as BF16."""
        return str(self._entries[name]["dtype"])

    def load(self, name: str) -> torch.Tensor:
        """A view of one tensor in the map, in the dtype it has on disk; copy it before the file goes.

        Raises:
            SafetensorsError: a dtype that no checkpoint of ours has, or a shape that contradicts the size.
        """
        entry = self._entries[name]
        dtype = TORCH_DTYPES.get(entry["dtype"])
        if dtype is None:
            known = ", ".join(TORCH_DTYPES)
            raise SafetensorsError(
                f"{self.path}: tensor {name} has dtype {entry['dtype']}, expected one of {known}"
            )
        begin, end = entry["data_offsets"]
        count = math.prod(entry["shape"])
        if end - begin != count * dtype.itemsize:
            raise SafetensorsError(
                f"{self.path}: tensor {name} has {end - begin} bytes for shape {entry['shape']}"
            )
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._data_start + begin)
        return flat.reshape(entry["shape"])

    def release(self) -> None:
        """Give the pages read so far back to the kernel; views made before read them again when used."""
        self._map.madvise(mmap.MADV_DONTNEED)
