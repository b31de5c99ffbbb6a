"""What a check yields: one thing that is wrong with a file of a model repository. It knows no check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from minitron_build.lint.triton_repository import TritonModel, TritonRepository

Severity = Literal["error", "warning"]
ERROR: Severity = "error"
WARNING: Severity = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        file: in the repository, with its line when the key stands in it.
        key: parameter, tensor or field.
        todo: what to do about it, where `expected` does not say it.
    """

    severity: Severity
    file: str
    key: str
    found: str
    expected: str = ""
    todo: str = ""

    def __str__(self) -> str:
        expected = f"expected {self.expected}" if self.expected else ""
        words = "; ".join(part for part in (self.found, expected, self.todo) if part)
        return " ".join(f"{self.severity}: {self.file}: {self.key}: {words}".split())

    def as_dict(self) -> dict[str, str]:
        """JSON form."""
        return {name: str(value) for name, value in asdict(self).items()}


def finding(
    severity: Severity, model: TritonModel, key: str, found: str, *, expected: str = "", todo: str = ""
) -> Finding:
    """A finding about a model's file, with the line of the key in it."""
    line = model.template.lines.get(key)
    return Finding(severity, f"{model.file}:{line}" if line else model.file, key, found, expected, todo)


Check = Callable[[TritonRepository, TritonModel], Iterator[Finding]]
