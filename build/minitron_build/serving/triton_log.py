"""What Triton's log says: which lines a person needs, and the one reason behind a failed start.

It knows the two forms of Triton's log lines, what a healthy start complains of, and how a cause is worded.
It does not read the log; triton_server.py does.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator

# Said by every healthy start on a machine without a GPU.
_NOISE = re.compile(
    "Unable to allocate pinned system memory|CudaDriverHelper has not been initialized"
    "|unable to create stream for ensemble|CUDA driver version is insufficient"
)
_LEVEL = re.compile(r"^\d{4}-\d\d-\d\dT[\d:.]+Z ([IWEF]) |^([IWEF])\d{4} [\d:.]+ ")


class LogFilter:
    """Which lines of Triton's log a person needs; a line without a level belongs to the one before."""

    def __init__(self) -> None:
        self._level = "I"

    def is_worth_showing(self, line: str) -> bool:
        """Whether the line is a warning or an error, or part of one, and not known to be harmless."""
        match = _LEVEL.match(line)
        if match:
            self._level = match.group(1) or match.group(2)
        elif line.startswith(("error:", "[libprotobuf ERROR")):
            return True
        return self._level in "WEF" and bool(line.strip()) and not _NOISE.search(line)


_SERVER_HAS_GONE = "Non-graceful termination detected"
"""Said by a model's process that finds the server dead."""
_LAUNCHER = re.compile("mpirun|orterun|prterun")

# From the most telling to the least: what went wrong, then what Triton concluded.
_REASONS = (
    re.compile(r"^\[libprotobuf ERROR [^\]]*\] (?P<cause>.+)"),
    re.compile(r'"failed to load (?P<model>\S+) version \d+: (?P<cause>.+)"'),
    re.compile(r'"Poll failed for model directory (?P<model>\S+): (?P<cause>.+)"'),
    re.compile(r"Failed to initialize Python stub[^:]*: (?P<cause>.+)"),
    re.compile(r"^(?P<cause>\w*(?:Error|Exception): .+)"),
    re.compile(r'^\S+ E \d+ \S+\] "?(?P<cause>.+?)"?$'),
    re.compile(r"^\s*what\(\):\s+(?P<cause>.+)"),
    re.compile(r"^(?P<cause>terminate called .+)"),
    re.compile(r"^(?P<cause>(?:mpirun|orterun|prterun) (?:noticed|detected) that .+)"),
    re.compile(r"^error: (?P<cause>.+)"),
    re.compile(r"tritonserver: (?P<cause>unrecognized option.+)"),
    re.compile(r"(?P<cause>(?:error while loading shared libraries|failed to start|Failed to start).+)"),
)


def failure_reason(log: Iterable[str]) -> str:
    """Triton's own reason, in one line, from its log; empty when there is none."""
    lines = [line for line in without_aftermath(log) if not _NOISE.search(line)]
    for pattern in _REASONS:
        for line in lines:
            match = pattern.search(line)
            if match:
                model = match.groupdict().get("model")
                cause = _shorten_cause(match["cause"])
                return _with_file(f"model {model}: {cause}" if model else cause, lines)
    return ""


def without_aftermath(log: Iterable[str]) -> Iterator[str]:
    """The log but what models' processes say once the server has gone, when they end under their threads."""
    has_gone = False
    for line in log:
        has_gone |= _SERVER_HAS_GONE in line
        if not has_gone or _LAUNCHER.match(line):
            yield line


def _shorten_cause(cause: str) -> str:
    """Triton quotes a traceback in one line; keep its error and its first file and line."""
    error, _, trace = cause.partition("\\n\\nAt:\\n")
    frame = trace.split("\\n", 1)[0].strip()
    error = " ".join(error.replace("\\n", " ").split()).removeprefix("Internal: ")
    return f"{error} (at {frame})" if frame else error


def _with_file(reason: str, lines: list[str]) -> str:
    """A protobuf error has only line:column; Triton names the file in its next line."""
    if "Error parsing text-format" not in reason:
        return reason
    named = next((match for line in lines if (match := re.search(r"text proto from (\S+?)\"?$", line))), None)
    return f"{named.group(1)}: {reason}" if named else reason


def exit_words(code: int | None) -> str:
    """A Python exit code (negative: the signal) in words."""
    if code is not None and code < 0:
        return f"signal {_signal_name(-code)}"
    return f"exit code {code}"


def status_words(status: int) -> str:
    """A wait status in words."""
    if status & 0x7F:
        hint = "; the machine may be out of memory" if status & 0x7F == signal.SIGKILL else ""
        return f"signal {_signal_name(status & 0x7F)}{hint}"
    return f"exit code {status >> 8}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
