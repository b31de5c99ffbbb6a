"""The Python examples of README.md, run as they stand against a real server; a broken one fails here.

Each block is a program of its own: it runs in its own process and folder, with MINITRON_URL set and the
loopback's default address replaced by the test server's, and must end by itself without an error.

Run with: pytest tests/server/test_readme_examples.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_build.serving.triton_server import TritonServer

pytestmark = pytest.mark.server

README = Path(__file__).parents[2] / "README.md"
DEFAULT_ADDRESSES = ("127.0.0.1:8001", "localhost:8001")
TIMEOUT_S = 120
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[str]:
    """The Python blocks of a Markdown text, in order."""
    return _BLOCK.findall(text)


def run_block(code: str, grpc_url: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A block as a program of its own, before a server at another address than the README's."""
    for address in DEFAULT_ADDRESSES:
        code = code.replace(address, grpc_url)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder, env={**os.environ, "MINITRON_URL": grpc_url}, capture_output=True, text=True,
        timeout=TIMEOUT_S, check=False,
    )  # fmt: skip


EXAMPLES = blocks(README.read_text(encoding="utf-8"))


def test_there_are_examples_and_none_is_missed() -> None:
    assert EXAMPLES
    assert len(EXAMPLES) == README.read_text(encoding="utf-8").count("```python")


@pytest.mark.parametrize("code", EXAMPLES, ids=[f"block {number}" for number in range(1, len(EXAMPLES) + 1)])
def test_an_example_runs(code: str, running_server: TritonServer, tmp_path: Path) -> None:
    done = run_block(code, running_server.grpc_url, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "minitron" in code
    assert done.stdout or "print(" not in code


@pytest.mark.parametrize(
    "broken",
    [
        "from minitron_client import MinitronClients\n",
        "from minitron_client import MinitronClient\nMinitronClient().generate('x', max_token=3)\n",
        "import minitron_client, warnings\nwarnings.warn('old')\n",
    ],
    ids=["name", "option", "warning"],
)
def test_a_broken_example_would_fail(broken: str, running_server: TritonServer, tmp_path: Path) -> None:
    assert run_block(broken, running_server.grpc_url, tmp_path).returncode == 1
