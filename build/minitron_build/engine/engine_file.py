"""The first bytes of a `rank{N}.engine`: which TensorRT wrote the plan.

A TensorRT plan file starts with a tag, a serialisation version and, at a fixed place, the four numbers of the
TensorRT that wrote it: what trtexec's --getPlanVersionOnly reads. It knows nothing of what follows.
"""

from __future__ import annotations

import struct
from pathlib import Path

from minitron_build.errors import CheckpointError

PLAN_TAG = b"ftrt"
HEADER_BYTES = 28
VERSION_START = 24


def read_tensorrt_version(engine_file: Path) -> str:
    """`major.minor.patch.build` of the TensorRT that wrote a plan file.

    Raises:
        CheckpointError: no such file, or not a plan file.
    """
    try:
        with engine_file.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except FileNotFoundError:
        raise CheckpointError(
            "missing", expected="a TensorRT engine", where=str(engine_file), todo="build the engine again"
        ) from None
    if len(header) < HEADER_BYTES or header[:4] != PLAN_TAG or struct.unpack_from("<I", header, 4)[0]:
        raise CheckpointError(
            "not a TensorRT plan file" if header else "empty",
            expected=f"one that starts with {PLAN_TAG.decode()!r}",
            where=str(engine_file),
            todo="copy the whole engine directory, or build it again",
        )
    return ".".join(str(number) for number in header[VERSION_START:HEADER_BYTES])
