"""Ctrl-C while grpc holds a lock: the request is stopped, the client goes on, and nothing waits for ever.

A signal handler's exception can come out of Condition.__enter__ with the lock taken, and then nobody gives
it back. The programs raise it there, in processes of their own: a lock that is lost stays lost.
Run with: pytest tests/unit/test_client_interrupt.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from fake_triton import FakeTriton, serving_fake, until_cancelled

pytestmark = pytest.mark.unit

PRELUDE = """
import json, sys, threading
from minitron_client import MinitronClient

URL = sys.argv[1]
enter = threading.Condition.__enter__
main, countdown = threading.get_ident(), 0

def enter_and_be_interrupted(self):
    'Takes the lock; the one that the countdown is for is never given back.'
    global countdown
    taken = enter(self)
    if threading.get_ident() == main and countdown:
        countdown -= 1
        if not countdown:
            raise KeyboardInterrupt
    return taken

threading.Condition.__enter__ = enter_and_be_interrupted
"""


@pytest.fixture
def fake() -> Iterator[FakeTriton]:
    with serving_fake() as triton:
        triton.script = until_cancelled
        yield triton


def run(code: str, fake: FakeTriton) -> Any:
    """The JSON that a program prints last, within 20 seconds."""
    program = PRELUDE + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, fake.url],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("lock", [1, 2, 3], ids="lock-{}".format)
def test_interrupt_of_a_read(fake: FakeTriton, lock: int) -> None:
    """The first lock of a read is its call's, the second the channel's."""
    said = run(
        f"""
        said = []
        with MinitronClient(URL, timeout_s=15) as client:
            try:
                with client.stream("hi") as stream:
                    said.append(next(stream).text)
                    countdown = {lock}
                    for chunk in stream:
                        pass
            except KeyboardInterrupt:
                said.append("interrupted")
            with client.stream("hi") as stream:
                said.append(next(stream).text)
        print(json.dumps(said))
        """,
        fake,
    )
    assert said == ["0 ", "interrupted", "0 "]
    assert len(fake.stopped_ids) == 2, "the interrupted one, and the last"


@pytest.mark.parametrize("lock", [1, 2, 3], ids="lock-{}".format)
def test_interrupt_of_a_request_that_is_being_sent(fake: FakeTriton, lock: int) -> None:
    said = run(
        f"""
        with MinitronClient(URL, timeout_s=15) as client:
            client.stream("hi").close()
            countdown = {lock}
            try:
                with client.stream("hi") as stream:
                    next(stream)
                    next(stream)
            except KeyboardInterrupt:
                with client.stream("hi") as stream:
                    print(json.dumps(next(stream).text))
        """,
        fake,
    )
    assert said == "0 "


def test_interrupt_that_left_a_lock_released_too_early(fake: FakeTriton) -> None:
    """One that falls between a wait's release of the lock and the wait makes grpc's own leaving fail."""
    said = run(
        """
        wait = threading.Condition.wait
        is_armed = False

        def release_and_be_interrupted(self, timeout=None):
            global is_armed
            if threading.get_ident() == main and is_armed:
                is_armed = False
                self._release_save()
                raise KeyboardInterrupt
            return wait(self, timeout)

        threading.Condition.wait = release_and_be_interrupted
        said = []
        with MinitronClient(URL, timeout_s=15) as client:
            try:
                with client.stream("hi") as stream:
                    said.append(next(stream).text)
                    is_armed = True
                    for chunk in stream:
                        pass
            except KeyboardInterrupt:
                said.append("interrupted")
        print(json.dumps(said))
        """,
        fake,
    )
    assert said == ["0 ", "interrupted"]
    assert len(fake.stopped_ids) == 1
