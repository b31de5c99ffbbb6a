"""A client in a process that forks: the child asks on channels of its own, and the parent goes on.

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
    os.waitpid(pid, 0)
    return os.read(read, 4096).decode()

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


def run(code: str, fake: FakeTriton) -> Any:
    """The JSON that a program prints last."""
    program = PRELUDE + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, fake.url],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def test_the_same_client_serves_the_child_and_the_parent(fake: FakeTriton) -> None:
    said = run(
        """
        client = MinitronClient(URL, timeout_s=5)
        said = [client.generate("hi").text]
        with client.stream("hi") as stream:
            said += [in_child(lambda: client.generate("hi").text), in_child(ask_anew), stream.final().text]
        said.append(in_child(lambda: client.close() or "closed"))
        said.append(client.generate("hi").text)
        print(json.dumps(said))
        """,
        fake,
    )
    assert said == ["ok", "ok", "ok", "ok", "closed", "ok"]


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
