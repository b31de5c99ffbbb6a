"""Triton's Python processes ("stubs") as /proc shows them: which live, and how one died.

Triton starts one per instance of a Python model, reaps it only when it unloads the model, and does not
notice its death. This module reads /proc; it knows nothing of logs, ports or models' meaning.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from minitron_build.serving.triton_log import status_words
from minitron_build.serving.triton_preflight import STUB_NAME

SERVER_NAME = "tritonserver"
DEAD_STATES = ("", "Z", "X")  # gone, zombie, dead
_INSTANCE_ARGUMENT = (
    8  # stub, model.py, region, two sizes, parent, backend folder, ipc handle, INSTANCE, runtime
)


class ProcessState(NamedTuple):
    """One process: its state letter ("" when gone), parent, process group, session and wait status."""

    letter: str
    parent_pid: int
    group: int
    session: int
    wait_status: int

    @property
    def is_dead(self) -> bool:
        """Whether it runs no more."""
        return self.letter in DEAD_STATES


GONE = ProcessState("", 0, 0, 0, 0)


def read_state(pid: int) -> ProcessState:
    """The state of a process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return GONE
    return ProcessState(fields[0], int(fields[1]), int(fields[2]), int(fields[3]), int(fields[-1]))


def live_group(group: int) -> Iterator[int]:
    """Pids of the processes of a group that live."""
    for pid in _pids():
        state = read_state(pid)
        if state.group == group and not state.is_dead:
            yield pid


def live_session(session: int) -> Iterator[int]:
    """Pids of the processes of a session that live; mpirun gives each rank a group of its own in it."""
    for pid in _pids():
        state = read_state(pid)
        if state.session == session and not state.is_dead:
            yield pid


def live_servers() -> Iterator[int]:
    """Pids of all tritonservers that live on this machine, whoever started them."""
    for pid in _pids():
        if (
            SERVER_NAME in (Path(_program(pid)).name, Path(_command(pid)[0]).name)
            and not read_state(pid).is_dead
        ):
            yield pid


def live_stubs(server_pid: int) -> dict[int, str]:
    """The live stubs of a server: pid -> name of the model instance.

    A child that a model forks looks like a stub until it becomes something else: only the server's own
    children count.
    """
    stubs: dict[int, str] = {}
    for pid in _pids():
        state = read_state(pid)
        if state.parent_pid == server_pid and not state.is_dead:
            command = _command(pid)
            if command[0].endswith(STUB_NAME) and len(command) > _INSTANCE_ARGUMENT:
                stubs[pid] = command[_INSTANCE_ARGUMENT]
    return stubs


def has_dead_children(server_pid: int) -> bool:
    """Whether children of a server have ended and were not reaped; Triton reaps none of its stubs."""
    states = (read_state(pid) for pid in _pids())
    return any(state.parent_pid == server_pid and state.letter == "Z" for state in states)


def describe_death(stubs: Mapping[int, str], server_pid: int, *, may_unload: bool = False) -> str | None:
    """The first of these stubs that has died, in words; None while all live.

    Args:
        server_pid: whose stubs they are. A process with another parent has only got a reaped stub's number.
        may_unload: one that ended with exit code 0, or was reaped, is taken for a model that was unloaded.
    """
    for pid, instance in stubs.items():
        state = read_state(pid)
        if state.parent_pid != server_pid:
            state = GONE
        if may_unload and (not state.letter or state.wait_status == 0):
            continue
        if state.is_dead:
            return f"the Python process of model instance {instance} died ({status_words(state.wait_status)})"
    return None


def _pids() -> Iterator[int]:
    return (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))


def _program(pid: int) -> str:
    """The file that a process runs; known from the start, whereas its command line is empty for a moment.

    Empty when the process has ended, or is another user's.
    """
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has ended meanwhile
        return [""]
