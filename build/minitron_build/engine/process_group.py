"""A long-running child in a process group of its own, its output given on line by line.

Whatever ends the wait (the child's exit, Ctrl-C, SIGTERM, an error in the reader) leaves no process of the
group behind. It knows nothing of what the child does.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

TAIL_LINES = 400
POLL_INTERVAL_S = 0.2
STOP_GRACE_S = 10.0
"""From SIGTERM to SIGKILL."""
OUTPUT_GRACE_S = 2.0
"""For the last lines, after the child has gone and its group was killed."""
MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")

OnLine = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a child ended.

    Attributes:
        returncode: as `subprocess` gives it: negative for a signal.
        tail: its last lines, at most TAIL_LINES.
        num_oom_kills: processes that the kernel killed for this cgroup's memory limit meanwhile.
    """

    returncode: int
    tail: tuple[str, ...]
    num_oom_kills: int


def run_in_group(
    command: Sequence[str],
    *,
    cwd: Path,
    environ: Mapping[str, str],
    on_line: OnLine,
    pass_fds: Sequence[int] = (),
) -> Outcome:
    """Run a command to its end.

    Args:
        on_line: called in this thread with each line of stdout and stderr together.
        pass_fds: descriptors that the child keeps open: a lock among them outlives us with the child.

    Raises:
        OSError: the command cannot be started.
        KeyboardInterrupt: SIGINT or SIGTERM came; the group has ended.
    """
    kills_before = _count_oom_kills()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with _sigterm_interrupts():
        process = subprocess.Popen(
            list(command),
            cwd=cwd,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,  # a progress bar's carriage returns end lines too
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
        try:
            for line in _lines(process):
                tail.append(line)
                on_line(line)
        except BaseException:
            _stop(process)
            raise
        finally:
            _kill_group(process.pid)
    return Outcome(process.wait(), tuple(tail), _count_oom_kills() - kills_before)


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """Lines until the child's output ends, or the child does and nothing more comes.

    A thread reads, so that a grandchild that keeps the pipe open cannot hold us.
    """
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    while True:
        has_ended = process.poll() is not None
        if has_ended:
            _kill_group(process.pid)
        try:
            line = lines.get(timeout=OUTPUT_GRACE_S if has_ended else POLL_INTERVAL_S)
        except queue.Empty:
            if has_ended:
                return
            continue
        if line is None:
            process.wait()
            return
        yield line


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    if process.stdout is not None:
        with process.stdout as output:
            for line in output:
                if line.strip():
                    lines.put(line.rstrip())
    lines.put(None)


def _stop(process: subprocess.Popen[str]) -> None:
    """Ask the group to end, then make it."""
    _signal_group(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_GRACE_S)
    _kill_group(process.pid)
    process.wait()


def _kill_group(leader_pid: int) -> None:
    _signal_group(leader_pid, signal.SIGKILL)


def _signal_group(leader_pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the whole group has gone
        os.killpg(leader_pid, number)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM end the wait as Ctrl-C does; only the main thread may and needs to."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _count_oom_kills() -> int:
    """The cgroup's count so far; 0 where the kernel keeps none."""
    try:
        words = MEMORY_EVENTS.read_text().split()
    except OSError:
        return 0
    return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0
