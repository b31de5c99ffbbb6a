"""A client in a process that forks: the child asks on channels of its own, or is told why it cannot.

Forks happen in processes of their own, because a process that holds pytest and its servers is no fair parent.
Run with: pytest tests/unit/test_client_fork.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from fake_triton import FakeTriton, serving_fake

pytestmark = pytest.mark.unit

PRELUDE = """
import asyncio, json, os, sys
from minitron_client import AsyncMinitronClient, ClientClosedError, MinitronClient

URL = sys.argv[1]

def in_child(ask):
    'What a forked child gets, within 10 seconds.'
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = ask()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return os.read(read, 4096).decode() if code == 0 else f"the child ended by {code}"

def ask_anew():
    with MinitronClient(URL, timeout_s=5) as client:
        return client.generate("hi").text

async def ask_awaited():
    async with AsyncMinitronClient(URL, timeout_s=5) as client:
        return (await client.generate("hi")).text
"""


@pytest.fixture
def fake() -> Iterator[FakeTriton]:
    with serving_fake() as triton:
        yield triton


def run(code: str, fake: FakeTriton, *, is_text: bool = False) -> Any:
    """The JSON that a program prints last, or all that it prints."""
    program = PRELUDE + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, fake.url],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout if is_text else json.loads(done.stdout.splitlines()[-1])


SPOILT = "ClientClosedError: this process was forked while a request of its parent ran"


def test_the_same_client_serves_the_child_and_the_parent(fake: FakeTriton) -> None:
    said = run(
        """
        client = MinitronClient(URL, timeout_s=5)
        said = [client.generate("hi").text]
        said += [in_child(lambda: client.generate("hi").text), in_child(ask_anew)]
        said.append(in_child(lambda: in_child(lambda: client.generate("hi").text)))
        said.append(in_child(lambda: client.close() or "closed"))
        said.append(client.generate("hi").text)
        print(json.dumps(said))
        """,
        fake,
    )
    assert said == ["ok", "ok", "ok", "ok", "closed", "ok"]


def test_a_fork_right_after_an_answer_spoils_nothing(fake: FakeTriton) -> None:
    said = run(
        """
        client = MinitronClient(URL, timeout_s=5)
        said = []
        for _ in range(30):
            with client.stream("hi") as stream:
                said.append(stream.final().text)
            said.append(in_child(lambda: client.generate("hi").text))
        print(json.dumps(said))
        """,
        fake,
    )
    assert said == ["ok"] * 60


def test_a_child_forked_while_a_request_runs_is_told_at_once(fake: FakeTriton) -> None:
    said = run(
        """
        client = MinitronClient(URL, timeout_s=5)
        with client.stream("hi") as stream:
            said = [
                in_child(lambda: client.generate("hi").text),
                in_child(ask_anew),
                in_child(lambda: in_child(lambda: client.generate("hi").text)),
                in_child(lambda: asyncio.run(ask_awaited())),
                in_child(lambda: str(client.health())),
                in_child(lambda: next(stream).text),
                in_child(lambda: stream.close() or "left alone"),
            ]
            said.append(stream.final().text)
        said.append(in_child(lambda: client.generate("hi").text))
        print(json.dumps(said))
        """,
        fake,
    )
    *refused, parents_stream, closed, answer, later = said
    assert len(refused) == 5
    for one in refused:
        assert one.startswith(SPOILT), one
        assert "start the process with spawn" in one
    assert parents_stream.startswith("ClientClosedError: the request is that of the process which forked")
    assert (closed, answer, later) == ("left alone", "ok", "ok")


def test_a_parent_is_warned_that_its_requests_are_at_risk(fake: FakeTriton) -> None:
    said = run(
        """
        import logging
        logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
        client = MinitronClient(URL, timeout_s=5)
        client.generate("hi")
        in_child(lambda: "nothing ran")
        print("--", flush=True)
        with client.stream("hi") as stream:
            in_child(lambda: "something ran")
            stream.final()
        """,
        fake,
        is_text=True,
    )
    quiet, warned = said.split("--")
    assert "fork" not in quiet
    assert warned.count("WARNING forked while 1 request runs") == 1


def test_a_lock_that_another_thread_held_is_free_in_the_child(fake: FakeTriton) -> None:
    said = run(
        """
        client = MinitronClient(URL, timeout_s=5)
        client.generate("hi")
        with client._lock, client._pool._lock:
            said = in_child(lambda: client.generate("hi").text)
        print(json.dumps(said))
        """,
        fake,
    )
    assert said == "ok"


def test_a_child_of_an_awaiting_process_is_told_at_once(fake: FakeTriton) -> None:
    said = run(
        """
        async def main():
            async with AsyncMinitronClient(URL, timeout_s=5) as client:
                said = [(await client.generate("hi")).text]
                said += [in_child(lambda: asyncio.run(ask_awaited())), in_child(ask_anew)]
                said.append((await client.generate("hi")).text)
                return said
        said = asyncio.run(main())
        said.append(in_child(lambda: asyncio.run(ask_awaited())))
        print(json.dumps(said))
        """,
        fake,
    )
    assert said[0] == said[3] == "ok"
    assert said[1].startswith("ClientClosedError: this process was forked while grpc.aio was in use")
    assert said[2] == "ok"
    assert said[4] == "ok"  # nothing was open any more
