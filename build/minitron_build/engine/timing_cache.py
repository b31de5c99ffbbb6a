"""TensorRT's timing cache: how fast each kernel was, kept so that the next build need not measure again.

One file per TensorRT version and SM, since TensorRT refuses any other, under the user's cache folder. A build
works on a copy and the finished one replaces the kept one whole, so that neither a killed build nor two at a
time can spoil it. It knows nothing of the build.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

WORK_NAME = "model.cache"
"""Name in the build's working folder; relative, because an engine's config.json records it."""


@dataclass(frozen=True, slots=True)
class TimingCache:
    """The kept cache of one TensorRT version and SM."""

    path: Path

    @classmethod
    def of(cls, tensorrt: str, sm: int, environ: Mapping[str, str] | None = None) -> TimingCache:
        """Where it is kept: under XDG_CACHE_HOME, or ~/.cache."""
        environ = os.environ if environ is None else environ
        base = environ.get("XDG_CACHE_HOME", "")
        # The specification has a relative path ignored.
        root = Path(base) if os.path.isabs(base) else Path(environ.get("HOME") or os.curdir) / ".cache"
        return cls(root / "minitron-trtllm" / f"timing-tensorrt-{tensorrt}-sm{sm}.cache")

    def copy_to(self, work_dir: Path) -> tuple[str, ...]:
        """Put a copy into the build's working folder.

        Returns:
            The flags of trtllm-build that read and write the copy.
        """
        write = ("--output_timing_cache", WORK_NAME)
        if not self.path.is_file():
            return write
        shutil.copyfile(self.path, work_dir / WORK_NAME)
        return ("--input_timing_cache", WORK_NAME, *write)

    def keep(self, work_dir: Path) -> str:
        """Keep what a finished build left in its working folder.

        Returns:
            Why nothing was kept, empty when it was: a cache is no reason to fail a build.
        """
        made = work_dir / WORK_NAME
        if not made.is_file() or not made.stat().st_size:
            return "trtllm-build wrote none"
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made, temporary)
            temporary.replace(self.path)
        except OSError as error:
            return f"{self.path}: {error.strerror or error}"
        return ""
