"""A model process ends with its server, also when the server was gone before the model was loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

from minitron_build.runtime.orphan import server_pid

WATCH = """
import sys, time
from minitron_build.runtime import orphan
orphan.CHECK_INTERVAL_S = 0.05
named = int(sys.argv[1])
orphan.server_pid = lambda command_line: named
orphan.end_with_parent()
time.sleep(float(sys.argv[2]))
"""


def _process(named_pid: int, lives_s: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WATCH, str(named_pid), str(lives_s)])


def test_ends_with_a_server_that_was_killed_while_models_loaded() -> None:
    server = subprocess.Popen(["sleep", "0"])
    server.wait()
    assert _process(server.pid, 60).wait(timeout=30) == 1


def test_ends_when_the_server_is_killed_later_and_not_before() -> None:
    with subprocess.Popen(["sleep", "60"]) as server:
        model = _process(server.pid, 60)
        with pytest.raises(subprocess.TimeoutExpired):
            model.wait(timeout=1)
        server.kill()
        server.wait()
        assert model.wait(timeout=30) == 1


def test_lives_on_beside_a_living_server() -> None:
    with subprocess.Popen(["sleep", "60"]) as server:
        assert _process(server.pid, 0.5).wait(timeout=30) == 0
        server.kill()


@pytest.mark.parametrize(
    ("words", "pid"),
    [
        (["stub", "model.py", "region", "1048576", "1048576", "4711", "/backends", "336", "a_0_0"], 4711),
        (["python3", "-c", "pass"], None),
        (["stub", "model.py", "region", "1048576", "1048576", "no number"], None),
        (["stub", "model.py", "region", "1048576", "1048576", "0"], None),
    ],
)
def test_the_server_by_the_command_line(words: list[str], pid: int | None) -> None:
    assert server_pid(b"\0".join(word.encode() for word in words) + b"\0") == pid
