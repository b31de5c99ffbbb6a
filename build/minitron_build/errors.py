"""What the build side raises, and the one line a user reads.

    MinitronError
    ├── RefusedError        found, expected, where, what to do: nothing was written (exit 1, but for one)
    │   ├── CheckpointError   the HF or TensorRT-LLM checkpoint is not what it must be
    │   ├── PlanError         the request contradicts itself, the model or the target
    │   │   └── UsageError      flags of which one makes another meaningless (exit 2)
    │   └── MachineError      this machine lacks something: a package, memory, disk, a port, a GPU
    ├── GateError           measured, and not good enough (exit 1)
    └── StageError          work had begun and failed; nothing that looks whole was left (exit 1)

This module knows nothing of what the stages do.
"""


class MinitronError(Exception):
    """Base of everything this package raises on purpose; `str()` is one line for the user."""


class RefusedError(MinitronError):
    """Refused before any work.

    Args:
        found: what was met, in the user's words.
        expected: what would have been right.
        where: file, flag or machine it was met in.
        todo: what the user can do about it.
    """

    def __init__(self, found: str, *, expected: str = "", where: str = "", todo: str = "") -> None:
        self.found, self.expected, self.where, self.todo = found, expected, where, todo
        parts = [f"{where}: {found}" if where else found]
        if expected:
            parts.append(f"expected {expected}")
        if todo:
            parts.append(todo)
        super().__init__("; ".join(" ".join(part.split()) for part in parts))


class CheckpointError(RefusedError):
    """A checkpoint on disk is not what it must be."""


class PlanError(RefusedError):
    """The request contradicts itself, the model or the target."""


class UsageError(PlanError):
    """Flags that do not go together, whatever they are about."""

    is_bad_usage = True


class MachineError(RefusedError):
    """This machine lacks something the stage needs."""


class GateError(MinitronError):
    """Everything was measured, and something misses its threshold."""


class StageError(MinitronError):
    """A stage failed half-way; what it had written under a temporary name is gone or resumable."""
