"""What `minitron bench` refuses with: one line, without a gRPC status, because no call was made."""

from __future__ import annotations

from typing import ClassVar

from minitron_client.errors import MinitronClientError


class BenchError(MinitronClientError):
    """A flag, a file or a result that the benchmark cannot use; `str()` is one line for the user."""

    default_code = "INVALID_ARGUMENT"

    def __str__(self) -> str:
        return self.message


class BenchUsageError(BenchError):
    """Flags that say what cannot be, or contradict one another: bad usage, exit 2."""

    is_bad_usage: ClassVar[bool] = True
