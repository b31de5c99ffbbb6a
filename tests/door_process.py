"""`minitron openai` as a process in front of a real server, until a test is over."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

RUN = "import sys; from minitron_build.cli import main; sys.exit(main(sys.argv[1:]))"


class RunningDoor(NamedTuple):
    """The address of its API, `http://HOST:PORT/v1`, and its process."""

    url: str
    pid: int


@contextmanager
def door_process(grpc_url: str, *flags: str) -> Iterator[RunningDoor]:
    """A door that takes requests; it is drained at the end, and must not have failed."""
    command = [sys.executable, "-c", RUN, "openai", "--url", grpc_url, "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield RunningDoor(json.loads(line)["url"], process.pid)
        finally:
            process.terminate()
            code, said = process.wait(15), process.stderr.read() if process.stderr else ""
    assert code == 0, said
    assert "Traceback" not in said, said
